"""Law 5: after `unwrap` nothing of vtprune is left and outputs are bit-equal, also after exceptions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

import vtprune
from tests.contracts.cases import PRUNING_METHODS, Answer, Case, answer, cells, fresh_model
from tests.contracts.state import restored, snapshot
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline

pytestmark = pytest.mark.law("5 undo")


class Boom(Exception):
    """Raised on purpose."""


def _same(got: Answer, expected: Answer) -> None:
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)


@cells()
def test_unwrap_leaves_nothing_on_a_model_never_wrapped_before(case: Case) -> None:
    model = fresh_model(case.family, case.layers)
    expected = answer(model, case.batch)
    before = snapshot(model)
    assert case.wrap(model) is model
    assert snapshot(model) != before, "the snapshot sees a wrap"
    with case.using(model.vtprune, case.prompts):
        answer(model, case.batch)
    assert vtprune.unwrap(model) is model
    assert not hasattr(model, "vtprune")
    assert snapshot(model) == before
    _same(answer(model, case.batch), expected)


@cells()
def test_wrapping_again_starts_afresh(case: Case) -> None:
    with restored(case):
        with case.pruned():
            first = answer(case.model, case.batch)
        with case.pruned() as pruner:
            assert pruner.last is None
            _same(answer(case.model, case.batch), first)


@cells()
def test_an_exception_while_decoding(case: Case) -> None:
    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > case.batch["input_ids"].shape[1] + 1:
            raise Boom
        return scores

    with restored(case):
        with pytest.raises(Boom), case.pruned():
            answer(case.model, case.batch, logits_processor=LogitsProcessorList([fail]))
        with case.pruned():
            first = answer(case.model, case.batch)
            with pytest.raises(Boom):
                answer(case.model, case.batch, logits_processor=LogitsProcessorList([fail]))
            _same(answer(case.model, case.batch), first)


@cells()
def test_an_exception_inside_the_model(case: Case) -> None:
    def fail(*args: Any) -> None:
        raise Boom

    language_model = case.model.model.language_model
    with restored(case), case.pruned():
        first = answer(case.model, case.batch)
        for module in (_encoder(case), language_model, language_model.layers[1], language_model.layers[-1]):
            handle = module.register_forward_hook(fail)
            try:
                with pytest.raises(Boom):
                    answer(case.model, case.batch)
            finally:
                handle.remove()
            _same(answer(case.model, case.batch), first)


def _encoder(case: Case) -> nn.Module:
    """The vision encoder that the pictures (or clips) of the case go through."""
    names = ("visual", "vision_tower", f"{case.kind}_tower")
    return next(getattr(case.model.model, name) for name in names if hasattr(case.model.model, name))


@cells()
def test_an_exception_in_the_report_callback(case: Case) -> None:
    def fail(report: vtprune.PruneReport) -> None:
        if calls.append(report) is None and len(calls) == 2:
            raise Boom

    calls: list[vtprune.PruneReport] = []
    with restored(case), case.pruned(on_report=fail):
        first = answer(case.model, case.batch)
        with pytest.raises(Boom):
            answer(case.model, case.batch)
        _same(answer(case.model, case.batch), first)


@dataclass(frozen=True)
class Fails:
    """The scorer it wraps, but it raises while there is anything in `lit`."""

    scorer: Any
    lit: list[int]

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs

    def __call__(self, tokens: Any) -> Tensor:
        if self.lit:
            raise Boom
        return self.scorer(tokens)


def _failing(pipeline: Pipeline, lit: list[int]) -> Pipeline:
    """The pipeline, but its last scorer fails while `lit`, or those of every cut between layers or of the cache."""
    if pipeline.cache is not None:
        return replace(pipeline, cache=_failing_stage(pipeline.cache, lit))
    if pipeline.inside:
        return replace(pipeline, inside=tuple(_failing_stage(stage, lit) for stage in pipeline.inside))
    return replace(pipeline, picks=_failing_picks(pipeline.picks, lit))


def _failing_stage(stage: Any, lit: list[int]) -> Any:
    counter = stage.counter
    if hasattr(counter, "scorer"):
        counter = replace(counter, scorer=Fails(counter.scorer, lit))
    return replace(stage, picks=_failing_picks(stage.picks, lit), counter=counter)


def _failing_picks(picks: tuple[Pick, ...], lit: list[int]) -> tuple[Pick, ...]:
    *earlier, last = picks
    return (*earlier, replace(last, scorer=Fails(last.scorer, lit)))


@cells(methods=PRUNING_METHODS)
def test_an_exception_in_a_stage(case: Case) -> None:
    alone = case.prompts[:1]
    with case.pruned(alone) as pruner:
        pipeline = pruner.pipeline
        first = answer(case.model, case.rows[0])
    lit: list[int] = []
    with restored(case), case.pruned(alone, method=_failing(pipeline, lit)):
        _same(answer(case.model, case.rows[0]), first)
        lit.append(1)
        with pytest.raises(Boom):
            answer(case.model, case.rows[0])
        lit.clear()
        _same(answer(case.model, case.rows[0]), first)
