"""Law 1: keeping everything, and changing nothing else, gives bit-equal logits and tokens, whatever the method."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.cases import Case, answer, cells, unpruned
from tests.models import Prompt

pytestmark = pytest.mark.law("1 identity")


@cells()
def test_keeping_everything_is_bit_equal(case: Case) -> None:
    expected = unpruned(case)
    with case.pruned(keep=1.0, **case.neutral) as pruner:
        got = answer(case.model, case.batch)
        report = pruner.last
    assert report.method == case.name
    assert report.kept == report.tokens > 0
    assert report.length_after == report.length_before
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)


@cells()
@torch.no_grad()
def test_plain_forward_is_bit_equal(case: Case) -> None:
    expected = case.model(**case.batch).logits
    with case.pruned(keep=1.0, **case.neutral):
        got = case.model(**case.batch).logits
    assert torch.equal(got, expected)


@cells(kinds=("image",))
def test_a_prompt_without_pictures_is_bit_equal_at_any_budget(case: Case) -> None:
    batch = case.inputs((Prompt(text_before=9, seed=5), Prompt(text_before=4, seed=6)))
    expected = answer(case.model, batch)
    with case.pruned() as pruner:
        got = answer(case.model, batch)
        report = pruner.last
    assert report.segments == () and report.tokens == 0
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)
