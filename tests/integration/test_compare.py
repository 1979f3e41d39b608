"""`compare`: rows as from separate wraps, pictures encoded once, the model left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vtprune
from tests import models
from tests.integration.common import (
    CACHING,
    FRAMES,
    GIVEN,
    LOSSLESS,
    ONE,
    STEPS,
    TEXT,
    Fails,
    expect,
    failing,
    fingerprint,
    kept_of,
    llava,
    write,
)
from tests.test_calibration import SETTINGS, made
from vtprune.catalog import build
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedModel, VtpruneError

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl")
METHODS = ("random", "divprune", "fastervlm")
KEEPS = (0.5, 3)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def tower(model: nn.Module) -> nn.Module:
    return model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_separate_wraps_and_pictures_are_encoded_once(name: str) -> None:
    model = models.build(name)
    inputs = models.inputs(model)
    plain = write(model, inputs, min_new_tokens=None)
    with counted(tower(model)) as calls:
        rows = vtprune.compare(model, inputs, METHODS, KEEPS, max_new_tokens=STEPS)
    assert len(calls) == 1
    assert [(row.method, row.keep) for row in rows] == [("identity", 1.0), *((m, k) for m in METHODS for k in KEEPS)]
    assert rows[0].answer.tolist() == plain.tolist()
    assert rows[0].agreement == 1.0
    for row in rows[1:]:
        with vtprune.pruning(model, row.method, keep=row.keep) as pruner:
            answer = write(model, inputs, min_new_tokens=None)
            assert row.answer.tolist() == answer.tolist(), row
            assert kept_of(row.report) == kept_of(pruner.last)
            assert (row.tokens, row.kept) == (pruner.last.tokens, pruner.last.kept)


def test_clips_are_encoded_once_too() -> None:
    model = models.build("llava_onevision")
    inputs = models.inputs(model, kind="video")
    with counted(tower(model)) as calls:
        rows = vtprune.compare(model, inputs, ["fastervlm"], [0.5], max_new_tokens=STEPS)
    assert len(calls) == 1
    assert kept_of(rows[1].report) == expect(model, inputs, "fastervlm", keep=0.5).kept


def test_without_arguments_every_method_that_needs_only_the_model_is_compared() -> None:
    """Not those that drop nothing or prune inside the encoder, nor those that need evidence from the user.

    The others that cut between layers need some in front and behind: two are too few for the budgets.
    """
    model = llava(layers=6)
    apart = {*LOSSLESS, *GIVEN, "tome", "flowcut", "mustdrop", "mustdrop_vision", "zero_tprune"}
    rows = vtprune.compare(model, models.inputs(model, ONE), max_new_tokens=2)
    assert [row.method for row in rows[:1]] == ["identity"]
    assert {row.method for row in rows[1:]} == set(vtprune.list_methods()) - apart
    reached = {(row.method, row.keep) for row in rows[1:]}
    assert {keep for _, keep in reached} == {0.5, 0.25, 0.11}
    deep = {name for name in vtprune.list_methods() if build(name).inside}
    assert {name for name, keep in reached if keep == 0.11} >= set(vtprune.list_methods()) - apart - deep
    assert ("pyramiddrop", 0.5) in reached
    assert ("pyramiddrop", 0.25) not in reached
    assert all(row.kept < row.tokens for row in rows[1:] if row.method not in CACHING)
    assert all(row.kept == row.tokens for row in rows[1:] if row.method in CACHING), "fewer are stored"
    assert all(row.report.average < row.tokens for row in rows[1:])


def test_every_row_is_announced_as_it_comes() -> None:
    model = llava()
    seen: list[Any] = []
    rows = vtprune.compare(model, models.inputs(model, ONE), ["random"], KEEPS, on_row=seen.append, max_new_tokens=2)
    assert [id(row) for row in seen] == [id(row) for row in rows]


def test_options_of_wrap_reach_every_row() -> None:
    model = models.build("llava_next")
    inputs = models.inputs(model, ONE)
    rows = vtprune.compare(model, inputs, ["random"], [2], per="part", positions="keep", max_new_tokens=2)
    assert rows[1].kept == 6, "two of the thumbnail and of each of its two crops"
    assert rows[1].report.positions == "keep"


def test_pipelines_can_be_compared() -> None:
    model = llava()
    rows = vtprune.compare(model, models.inputs(model, ONE), [failing(Fails())], [4], max_new_tokens=2)
    assert [row.method for row in rows] == ["identity", "failing"]
    assert rows[1].kept == 4


def test_agreement_counts_prompts_answered_as_without_pruning() -> None:
    model = llava()
    inputs = models.inputs(model)
    rows = vtprune.compare(model, inputs, ["random"], [0.9, 0.1], max_new_tokens=STEPS)
    for row in rows:
        same = [bool((a == b).all()) for a, b in zip(row.answer, rows[0].answer, strict=True)]
        assert row.agreement == sum(same) / len(same)


def test_prompts_without_pictures_agree_in_every_row() -> None:
    model = llava()
    rows = vtprune.compare(model, models.inputs(model, TEXT), ["random"], [0.1], max_new_tokens=STEPS)
    assert [(row.tokens, row.kept, row.agreement) for row in rows] == [(0, 0, 1.0)] * 2


def test_the_model_is_left_unwrapped_and_the_inputs_untouched() -> None:
    model = llava()
    inputs = models.inputs(model)
    before, copies = fingerprint(model), {name: value.clone() for name, value in inputs.items()}
    vtprune.compare(model, inputs, ["fastervlm"], [0.5], max_new_tokens=2)
    assert fingerprint(model) == before
    assert list(inputs) == list(copies)
    assert all(torch.equal(inputs[name], value) for name, value in copies.items())


FAILURES: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "a stage that raises": (ZeroDivisionError, {"methods": [failing(Fails([ZeroDivisionError()]))]}),
    "an unknown method": (InvalidOption, {"methods": ["divprun"]}),
    "an impossible budget": (InvalidOption, {"methods": ["random"], "keep": [0.5, 0.0]}),
    "an unknown option": (InvalidOption, {"methods": ["random"], "positions": "dense"}),
    "identity below one": (InvalidOption, {"methods": ["identity"], "keep": [0.5]}),
    "evidence nobody gives": (MissingEvidence, {"methods": [FRAMES]}),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_model_is_left_unwrapped_when_a_row_fails(case: str) -> None:
    error, options = FAILURES[case]
    model = llava()
    inputs = models.inputs(model)
    before, plain = fingerprint(model), write(model, inputs)
    with pytest.raises(error):
        vtprune.compare(model, inputs, **options, max_new_tokens=2)
    assert fingerprint(model) == before
    assert write(model, inputs).tolist() == plain.tolist()


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("options", [{"methods": ["divprun"]}, {"keep": [0.0]}, {"backend": "triton"}], ids=str)
def test_a_bad_option_is_refused_before_anything_is_encoded(options: dict[str, Any]) -> None:
    model = llava()
    with counted(tower(model)) as calls, pytest.raises(VtpruneError):
        vtprune.compare(model, models.inputs("llava"), **options)
    assert calls == []


def test_an_error_in_the_encoder_leaves_the_model_unwrapped() -> None:
    model = llava()
    inputs = models.inputs(model)
    before = fingerprint(model)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.multi_modal_projector.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        vtprune.compare(model, inputs, ["fastervlm"])
    handle.remove()
    assert fingerprint(model) == before


def test_a_receiver_that_raises_leaves_the_model_unwrapped() -> None:
    model = llava()
    inputs = models.inputs(model)
    before = fingerprint(model)

    def fail(row: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        vtprune.compare(model, inputs, ["random"], on_row=fail, max_new_tokens=2)
    assert fingerprint(model) == before


def test_comparing_on_a_wrapped_model_is_refused_and_the_wrap_stays() -> None:
    model = llava()
    inputs = models.inputs(model)
    vtprune.wrap(model, "uniform")
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="wrapped already"):
        vtprune.compare(model, inputs)
    assert fingerprint(model) == before


def test_a_model_under_test_is_answered_in_evaluation_without_gradients() -> None:
    model = llava()
    rows = vtprune.compare(model, models.inputs(model), ["random"], [0.5], max_new_tokens=2)
    assert not any(row.answer.requires_grad for row in rows)
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def measured(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model of six layers, and a calibration of it."""
    model = models.build("llava", layers=6)
    made(model, settings=SETTINGS).write(tmp_path / "mine.json")
    return model, tmp_path / "mine.json"


def test_rows_are_debiased_and_calibrated_as_by_wrap(measured: tuple[nn.Module, Path]) -> None:
    """All but the unpruned one; what the settings read of the encoder is encoded with the others."""
    model, path = measured
    inputs, options = models.inputs(model, ONE), {"debias": True, "calibration": path}
    with counted(tower(model)) as calls:
        rows = vtprune.compare(model, inputs, ["vflowopt", "fastv"], [0.6], max_new_tokens=STEPS, **options)
    assert len(calls) == 1
    assert [row.method for row in rows] == ["identity", "vflowopt+recency", "fastv+recency"]
    for row in rows[1:]:
        with vtprune.pruning(model, row.method.partition("+")[0], keep=0.6, **options) as pruner:
            assert write(model, inputs, min_new_tokens=None).tolist() == row.answer.tolist()
            assert kept_of(pruner.last) == kept_of(row.report)


def test_by_default_methods_that_do_not_take_an_option_are_left_out(measured: tuple[nn.Module, Path]) -> None:
    model, path = measured
    inputs = models.inputs(model, ONE)
    methods = [row.method for row in vtprune.compare(model, inputs, keep=0.6, calibration=path, max_new_tokens=1)]
    assert methods == ["identity", "adaptinfer", "information_horizon", "vflowopt"]
    methods = [row.method for row in vtprune.compare(model, inputs, keep=0.6, debias="sinks", max_new_tokens=1)]
    assert {"fastervlm+sinks", "fastv+sinks"} <= set(methods)
    assert [name for name in methods if "+" not in name] == ["identity"]
    with pytest.raises(InvalidOption, match="recency, cubic"):
        vtprune.compare(model, inputs, keep=0.6, debias="sink", max_new_tokens=1)
    with pytest.raises(InvalidOption, match="looks at no attention"):
        vtprune.compare(model, inputs, ["fastv", "divprune"], keep=0.6, debias="sinks", max_new_tokens=1)
