"""Law 5: after `unwrap` nothing of vtprune is left and outputs are bit-equal, also after exceptions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

import vtprune
from tests.contracts.cases import PRUNING_METHODS, Answer, Case, answer, cells, fresh_model
from tests.contracts.state import restored, snapshot

pytestmark = pytest.mark.law("5 undo")


class Boom(Exception):
    """Raised on purpose."""


def _same(got: Answer, expected: Answer) -> None:
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)


@cells()
def test_unwrap_leaves_nothing_on_a_model_never_wrapped_before(case: Case) -> None:
    model = fresh_model(case.family)
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
        for module in (_encoder(case), language_model, language_model.layers[1]):
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
class FailsOnce:
    """The scorer it wraps, but its second call raises."""

    scorer: Any
    calls: list[int] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs

    def __call__(self, tokens: Any) -> Tensor:
        self.calls.append(1)
        if len(self.calls) == 2:
            raise Boom
        return self.scorer(tokens)


@cells(methods=PRUNING_METHODS)
def test_an_exception_in_a_stage(case: Case) -> None:
    alone = case.prompts[:1]
    with case.pruned(alone) as pruner:
        pipeline = pruner.pipeline
        first = answer(case.model, case.rows[0])
    *earlier, last = pipeline.picks
    picks = (*earlier, replace(last, scorer=FailsOnce(last.scorer)))
    with restored(case), case.pruned(alone, method=replace(pipeline, picks=picks)):
        _same(answer(case.model, case.rows[0]), first)
        with pytest.raises(Boom):
            answer(case.model, case.rows[0])
        _same(answer(case.model, case.rows[0]), first)
