"""Law 1b: a decision to keep everything that is forced through the cut agrees within `TOLERANCE` of fp32 logits."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.cases import IN_LAYERS, LEAVING, Case, answer, assert_close, cells, unpruned

pytestmark = pytest.mark.law("1b through the cut")


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_the_cut_of_nothing_changes_nothing(case: Case, positions: str) -> None:
    expected = unpruned(case)
    with case.pruned(keep=1.0, positions=positions, **case.neutral) as pruner:
        answer(case.model, case.batch, steps=1)
        assert "cut" not in pruner.last.seconds, "unforced, there is nothing to cut"
        pruner._always_cut = True
        got = answer(case.model, case.batch)
        report = pruner.last
    assert "cut" in report.seconds
    assert report.kept == report.tokens > 0
    assert_close(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)


@cells(methods=[method for method in IN_LAYERS if method not in LEAVING])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_cuts_between_layers_of_nothing_change_nothing(case: Case, positions: str) -> None:
    """More tokens than there are, as a number: it is no neutral budget, and every hook on a layer runs.

    Where a picture may leave altogether, no number keeps it.
    """
    expected = unpruned(case)
    with case.pruned(keep=10_000, positions=positions) as pruner:
        got = answer(case.model, case.batch)
        report = pruner.last
    assert "cut" in report.seconds
    assert report.average == report.kept == report.tokens > 0
    assert report.kv_bytes_saved == 0
    assert_close(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)
