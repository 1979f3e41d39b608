"""Shared by the integration tests: what is on a model, what a call must give, and stages that misbehave on demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts import oracle
from tests.contracts.cases import SETTINGS
from tests.models import IMAGE, PAD, VIDEO, VISION_END, VISION_START, Prompt
from vtprune import Pick, Pipeline, PruneReport
from vtprune.catalog import build
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import TopK
from vtprune.types import VisualTokens

STEPS = 4
FORBIDDEN = [PAD, IMAGE, VIDEO, VISION_START, VISION_END]
ONE = (Prompt(images=((30, 64),), seed=1),)
OTHER = (Prompt(images=((30, 64),), text_after=7, seed=9),)
CLIPS_OF = ("llava_next_video", "llava_onevision", "video_llava", "qwen2_5_vl", "qwen3_vl")
TEXT = (Prompt(text_before=6, text_after=0, seed=5), Prompt(text_before=9, text_after=0, seed=6))


def fingerprint(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that hangs on every module: attributes by identity, hooks one by one."""
    return {name: _of_module(module) for name, module in model.named_modules(remove_duplicate=False)}


def _of_module(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"class": type(module)}
    for name, value in vars(module).items():
        if name == "rope_deltas":  # a note transformers keeps of the last prompt
            continue
        hooks = "_hooks" in name and isinstance(value, dict)
        found[name] = [(key, id(hook)) for key, hook in value.items()] if hooks else id(value)
    return found


def hooks_of(model: nn.Module) -> list[str]:
    """Names of the modules and dictionaries that hold any hook."""
    return [
        f"{name}.{kind}"
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if "_hooks" in kind and value
    ]


def write(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    """The greedy answer, prompt left out."""
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **options}
    ids = inputs.get("input_ids")
    written = model.generate(**inputs, **options)
    return written if ids is None else written[:, ids.shape[1] :]


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    """Logits of one forward."""
    return model(**inputs, **options).logits


def kept_of(report: PruneReport) -> list[list[int]]:
    """Kept token indices of every picture."""
    return [segment.keep.tolist() for segment in report.segments]


def kept_positions(ids: Tensor, report: PruneReport) -> list[int]:
    """Positions of one unpadded prompt (L,) that are left, for families without separators."""
    visual = [position for position, token in enumerate(ids.tolist()) if token in (IMAGE, VIDEO)]
    chosen: list[int] = []
    start = 0
    for segment in report.segments:
        chosen += [visual[start + index] for index in segment.keep.tolist()]
        start += segment.n
    return sorted(set(range(len(ids))) - set(visual) | set(chosen))


def by_hand(model: nn.Module, inputs: dict[str, Tensor], report: PruneReport, *, compact: bool) -> list[int]:
    """Greedy tokens of one unpadded prompt by transformers alone, given what `report` says was kept."""
    assert not hasattr(model, "vtprune"), "the reference needs the unwrapped model"
    kept = kept_positions(inputs["input_ids"][0], report)
    eos = [model.generation_config.eos_token_id]
    merged = oracle.merge(model, inputs)
    return oracle.decode(model, merged, kept, steps=STEPS, compact=compact, forbidden=FORBIDDEN + eos)[0]


@dataclass
class Expected:
    """What a model answers to `inputs` when it is wrapped afresh."""

    tokens: Tensor
    kept: list[list[int]]


def expect(model: nn.Module, inputs: dict[str, Any], method: str | Pipeline = "random", **options: Any) -> Expected:
    """Wrap, answer, unwrap."""
    with vtprune.pruning(model, method, **options) as pruner:
        tokens = write(model, inputs)
        assert pruner.last is not None
        return Expected(tokens, kept_of(pruner.last))


def assert_answers(model: nn.Module, inputs: dict[str, Any], expected: Expected) -> None:
    """The wrapped model answers as expected, from the same tokens."""
    assert write(model, inputs).tolist() == expected.tokens.tolist()
    assert kept_of(model.vtprune.last) == expected.kept


@dataclass(frozen=True)
class Fails:
    """`TopK`, but it raises while `armed` holds anything."""

    armed: list[Exception] = field(default_factory=list)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        if self.armed:
            raise self.armed.pop()
        return TopK()(tokens, scores, k, taken)


@dataclass(frozen=True)
class Frames:
    """A scorer that reads `frames`, which only a user can give."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"frames"})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return tokens.evidence["frames"]


def failing(selector: Fails) -> Pipeline:
    """A pipeline around a selector that fails on demand."""
    return Pipeline(name="failing", picks=(Pick(name="top", scorer=Constant(), selector=selector),))


FRAMES = Pipeline(name="by-frames", picks=(Pick(name="frames", scorer=Frames(), selector=TopK()),))


IN_LAYERS = tuple(method for method in vtprune.list_methods() if build(method).inside)
"""Methods that cut between decoder layers."""


CACHING = tuple(method for method in vtprune.list_methods() if build(method).cache is not None)
"""Methods that let all tokens pass and store fewer of them."""


LOSSLESS = tuple(method for method in vtprune.list_methods() if not build(method).drops)
"""Methods that drop nothing."""
GIVEN = tuple(method for method in vtprune.list_methods() if {"relevance", "frames"} & set(build(method).needs))
"""Methods whose evidence the user has to give."""
EDITING = tuple(method for method in LOSSLESS if build(method).attention is not None)
"""Methods that change attention instead."""


def room(method: str) -> dict[str, Any]:
    """Options of a tiny model that the method can prune: cuts between layers need some in front and some behind, and
    so does what changes attention."""
    return {"layers": 6} if method in (*IN_LAYERS, *EDITING) else {}


def reachable(method: str) -> dict[str, Any]:
    """A budget for `wrap` where six layers cannot have the default one on average, or the method takes no other; with
    parameters at which tiny models show something."""
    if method in LOSSLESS:
        return {"keep": 1.0, **SETTINGS.get(method, {})}
    return {"keep": 0.6} if method in IN_LAYERS else {}


def llava(**options: Any) -> nn.Module:
    """A fresh tiny LLaVA."""
    return models.build("llava", **options)
