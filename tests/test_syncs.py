"""Host synchronisations: one read of the device in every prefill, none in a decode step.

Whatever makes the host wait for a GPU shows on a CPU too: as an operator whose result decides a shape or becomes a
number (seen by a dispatch mode, however it was spelt), or as a copy to the host (seen by replacing the methods).
A wait counts for the file of the innermost frame outside torch.
The forms that kernels have for host memory are switched off: what is watched is what a GPU runs.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

import vtprune
from tests import models
from tests.integration.common import GIVEN, ONE, TEXT, logits, reachable, room, write
from tests.models import QWEN, VIDEO_FAMILIES, Prompt
from vtprune.catalog import build
from vtprune.kernels import host
from vtprune.stages.sinks import MassiveActivations, WithoutMassive

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
METHODS = tuple(name for name in vtprune.list_methods() if name not in ("identity", *GIVEN))
"""Those that prune and need no evidence but the model's."""
CELLS = [(name, method) for name in FAMILIES for method in METHODS if name == "llava" or build(method).encoder is None]
"""Methods that prune inside the encoder only where it bears that."""
CHECKS = {"dyvte": 0, "zipvl": 2}
"""How often adaptive methods ask the device for each shape, where not once: at the budget of these tests, dyvte comes
to its last layer before two checks in a row may find anything; zipvl asks in each of two layers."""
OURS, TORCH, HERE = Path(vtprune.__file__).parent, Path(torch.__file__).parent, Path(__file__)
DECIDES_A_SHAPE_OR_A_NUMBER = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "allclose",
    "equal",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
    "is_nonzero",
}
TAKES_A_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = ("cpu", "numpy", "tolist", "__array__")


class Waits:
    """Where the host waited for the device: ours, and everybody's, by file and function."""

    def __init__(self) -> None:
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self._on_host: list[Tensor] = []

    def note(self, what: str) -> None:
        frame = innermost(sys._getframe(1))
        path = Path(frame.f_code.co_filename)
        where = f"{what} in {path.name}:{frame.f_code.co_name}:{frame.f_lineno}"
        (self.ours if path.is_relative_to(OURS) else self.others)[where] += 1

    def copied(self, what: str, tensor: Tensor, result: Any) -> None:
        """A copy of what is on the host already is no wait."""
        if any(tensor is known for known in self._on_host):
            return
        self.note(what)
        if isinstance(result, Tensor):
            self._on_host.append(result)


def innermost(frame: FrameType | None) -> FrameType:
    """The innermost frame that is neither torch's nor this file's."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != HERE and not path.is_relative_to(TORCH):
            return frame
        frame = frame.f_back
    raise AssertionError("no caller")


class Watch(TorchDispatchMode):
    """Notes the operators that make the host wait."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in DECIDES_A_SHAPE_OR_A_NUMBER and not self._told(name, args, kwargs or {}):
            self._waits.note(name)
        if name in TAKES_A_MASK and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self._waits.note(f"{name} with a mask")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _told(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """`repeat_interleave` does not wait where it is told how long the result is."""
        return name == "repeat_interleave" and kwargs.get("output_size") is not None


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits = Waits()
    with monkeypatch.context() as patch:
        for name in COPIES:
            patch.setattr(Tensor, name, _noting(waits, name, getattr(Tensor, name)))
        patch.setattr(Tensor, "to", _noting_moves(waits, Tensor.to))
        patch.setattr(host, "holds", lambda tensor: False)
        with Watch(waits):
            yield waits


def _noting(waits: Waits, name: str, original: Any) -> Any:
    def copying(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        waits.copied(name, self, result)
        return result

    return copying


def _noting_moves(waits: Waits, original: Any) -> Any:
    def moving(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = original(self, *args, **kwargs)
        if args[:1] == ("cpu",) or kwargs.get("device") == "cpu":
            waits.copied("to cpu", self, result)
        return result

    return moving


def wrapped(name: str, method: str, **options: Any) -> nn.Module:
    return vtprune.wrap(models.build(name, **room(method)), method, **{**reachable(method), **options})


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: int(x.sum()),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: "yes" if x.max() > 0 else "no",
        lambda x: list(range(x.sum().long())),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 1])),
        lambda x: torch.zeros(4)[x.long()[0].item() :],
        lambda x: x.long().bincount(),
    ],
)
def test_a_wait_is_counted_for_its_caller(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caller: dict[str, Any] = {"wait": wait}
    source = compile("def call(x):\n    return wait(x)", str(OURS / "imaginary.py"), "exec")
    exec(source, caller)
    x = torch.tensor([1.0, 2.0, 0.0])
    with watched(monkeypatch) as waits:
        caller["call"](x)
    assert sum(waits.ours.values()) == 1, waits.ours
    assert not waits.others


@pytest.mark.parametrize(
    "free",
    [
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.sort(),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x.cumsum(0).gather(0, torch.tensor([1])),
        lambda x: x.repeat_interleave(2),
        lambda x: x.to(torch.float16),
        lambda x: x.split([1, 2]),
    ],
)
def test_what_does_not_wait_is_not_counted(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as waits:
        free(torch.tensor([1.0, 2.0, 0.0]))
    assert not waits.ours
    assert not waits.others


@pytest.mark.parametrize(("name", "method"), CELLS)
@pytest.mark.parametrize("prompts", [ONE, None], ids=["one", "batch"])
def test_a_prefill_reads_the_device_once(name: str, method: str, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more for every shape of picture where what they hold decides how many tokens stay."""
    model = wrapped(name, method)
    inputs = models.inputs(model, prompts)
    logits(model, inputs)
    with watched(monkeypatch) as waits:
        logits(model, inputs)
    report = model.vtprune.last
    shapes = {tuple(part.grid for part in segment.parts) for segment in report.segments}
    asked = report.adaptive * CHECKS.get(method, 1)
    assert sum(waits.ours.values()) == 1 + asked * len(shapes), waits.ours
    assert report.kept < report.tokens or report.attention or report.average < report.tokens


@pytest.mark.parametrize("channels", [None, (3, 5)])
@pytest.mark.parametrize("method", ["attention_sink", "pyramiddrop"])
def test_telling_sinks_waits_for_nothing(method: str, channels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To change attention to them, or to leave them out at a cut; in a prefill and in the words behind it."""
    rule = MassiveActivations(threshold=1.5, channels=channels)
    options: dict[str, Any] = {"debias": WithoutMassive(rule=rule)}
    if method == "attention_sink":
        options = {"least": 0.0, "most": 1.0, "threshold": 1.5, "channels": channels}
    model = wrapped("llava", method, **options)
    inputs = models.inputs(model, None)
    word = {"input_ids": torch.tensor([[7], [9]])}
    logits(model, inputs)
    with watched(monkeypatch) as waits, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert sum(waits.ours.values()) == 1, waits.ours
        model(**word, past_key_values=cache)
    assert sum(waits.ours.values()) == 1, waits.ours


@pytest.mark.parametrize("rule", ["mass", "stable"])
@pytest.mark.parametrize(
    ("options", "checks"),
    [
        ({"below": 0.0}, 4),
        ({"below": 0.0, "patience": 3}, 2),
        ({"below": 0.0, "every": 2}, 2),
        ({"below": 0.0, "keep": 0.5}, 2),
        ({"below": 1.0}, 1),
        ({"below": 1.0, "patience": 2}, 1),
    ],
)
def test_every_check_of_an_exit_reads_once(
    rule: str, options: dict[str, Any], checks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of layers 1 to 4 for each shape, as long as pictures are there and so many checks could let them go."""
    settings = {"keep": 0.9, "first": 1 / 6, "patience": 1, "rule": rule, **options}
    model = wrapped("llava_next", "dyvte", **settings)
    inputs = models.inputs(model)
    with watched(monkeypatch) as waits:
        logits(model, inputs)
    report = model.vtprune.last
    shapes = {tuple(part.grid for part in segment.parts) for segment in report.segments}
    assert len(shapes) > 1
    assert sum(waits.ours.values()) == 1 + checks * len(shapes), waits.ours


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"per": "part"}, {"per": "prompt"}, {"positions": "keep"}, {"positions": "compact"}]
)
def test_no_option_adds_a_read(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(name, "vtprune", **options)
    inputs = models.inputs(model)
    with watched(monkeypatch) as waits:
        logits(model, inputs)
    assert sum(waits.ours.values()) == 1, waits.ours


@pytest.mark.parametrize("name", FAMILIES)
def test_forced_tokens_are_read_where_they_are_given_and_not_at_every_cut(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from the host, so that a method of three cuts reads no more of them than one of a single cut."""
    found = []
    for method in ("random", "pyramiddrop"):
        model = wrapped(name, method)
        inputs = models.inputs(model, ONE)
        with watched(monkeypatch) as waits, model.vtprune.using(protect=[[1, 2]], forbid=[[3]]):
            logits(model, inputs)
        assert {1, 2} <= set(model.vtprune.last.segments[0].keep.tolist())
        found.append(sum(waits.ours.values()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_prefill_of_clips_reads_the_device_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(name, "vtprune")
    inputs = models.inputs(model, kind="video")
    with watched(monkeypatch) as waits:
        logits(model, inputs)
    assert sum(waits.ours.values()) == 1, waits.ours


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_budget_by_scores_of_frames_reads_once_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(name)
    inputs = models.inputs(model, (Prompt(clips=((32, 32, 4),), seed=3),), kind="video")
    with vtprune.pruning(model, "random", keep=0.5) as pruner:
        logits(model, inputs)
        scores = torch.rand(len(pruner.last.segments[0].parts))
    with vtprune.pruning(model, "quota", keep=0.5) as pruner, pruner.using(frames=[scores]):
        logits(model, inputs)
        with watched(monkeypatch) as waits:
            logits(model, inputs)
        assert sum(waits.ours.values()) == 2, waits.ours


@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_makes_transformers_wait_no_more_often(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers does inside a helper that vtprune calls would count for transformers."""
    model = models.build(name)
    inputs = models.inputs(model)
    logits(model, inputs)
    with watched(monkeypatch) as plain:
        logits(model, inputs)
    vtprune.wrap(model, "fastervlm")
    with watched(monkeypatch) as pruned:
        logits(model, inputs)
    assert sum(pruned.others.values()) <= sum(plain.others.values()), pruned.others - plain.others


@pytest.mark.parametrize("method", ["vtprune", "random", "pyramiddrop", "vflowopt", "transprune", "dyvte"])
@pytest.mark.parametrize("name", FAMILIES)
def test_decode_steps_read_nothing(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(name, method)
    inputs = models.inputs(model)
    cache = DynamicCache()
    logits(model, inputs, past_key_values=cache)
    mask = inputs["attention_mask"]
    with watched(monkeypatch) as waits:
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            ids = mask.sum(dim=1, keepdim=True) - 1
            step = {"attention_mask": mask, "position_ids": ids.expand(3, -1, -1) if name in QWEN else ids}
            logits(model, {"input_ids": torch.full_like(ids, 20), **step}, past_key_values=cache)
    assert not waits.ours


DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_generate_reads_the_device_once(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(name, "vtprune")
    inputs = models.inputs(model, ONE if how == "prompt lookup" else None)
    with watched(monkeypatch) as waits:
        write(model, inputs, max_new_tokens=6, min_new_tokens=6, **DECODING[how])
    assert sum(waits.ours.values()) == 1, waits.ours


def test_a_prompt_without_pictures_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llava", "vtprune")
    inputs = models.inputs(model, TEXT)
    with watched(monkeypatch) as waits:
        write(model, inputs)
    assert not waits.ours


def test_keeping_everything_reads_at_most_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llava", "vtprune", keep=1.0)
    inputs = models.inputs(model)
    with watched(monkeypatch) as waits:
        write(model, inputs)
    assert sum(waits.ours.values()) <= 1, waits.ours


def test_the_report_reads_the_device_when_asked_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llava", "vtprune", on_report=lambda report: report.method)
    inputs = models.inputs(model)
    with watched(monkeypatch) as waits:
        logits(model, inputs)
        before = sum(waits.ours.values())
        assert len(model.vtprune.last.segments[0].keep) == 4
    assert before == 1
    assert sum(waits.ours.values()) > before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_gpu_agrees(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own report of synchronising calls, counted for the file of the innermost frame outside torch."""
    model = wrapped(name, method).cuda()
    inputs = {key: value.cuda() for key, value in models.inputs(name).items()}
    logits(model, inputs)
    waits = Waits()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *_, **__: waits.note("cuda"))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            logits(model, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    report = model.vtprune.last
    shapes = {tuple(part.grid for part in segment.parts) for segment in report.segments}
    asked = report.adaptive * CHECKS.get(method, 1)
    assert sum(waits.ours.values()) == 1 + asked * len(shapes), waits.ours
