"""Law 1b: a decision to keep everything that is forced through the cut agrees within `TOLERANCE` of fp32 logits."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.cases import Case, answer, assert_close, cells, unpruned

pytestmark = pytest.mark.law("1b through the cut")


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_the_cut_of_nothing_changes_nothing(case: Case, positions: str) -> None:
    expected = unpruned(case.family, case.kind)
    with case.pruned(keep=1.0, positions=positions) as pruner:
        answer(case.model, case.batch, steps=1)
        assert "cut" not in pruner.last.seconds, "unforced, there is nothing to cut"
        pruner._always_cut = True
        got = answer(case.model, case.batch)
        report = pruner.last
    assert "cut" in report.seconds
    assert report.kept == report.tokens > 0
    assert_close(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)
