"""Law 4: kept indices are ascending and unique, and exactly as many as the budget says, which rounds half up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.cases import ADAPTIVE, EXACT_METHODS, IN_TOWER, PRUNING_METHODS, Case, cells
from tests.models import QWEN, Prompt
from vtprune.report import PruneReport, SegmentReport
from vtprune.types import Budget

pytestmark = pytest.mark.law("4 order and count")

BUDGETS = (0.1, 1 / 3, 0.5, 0.999, 3)
SMALL = Prompt(images=((24, 24),), seed=51)
MANY = {
    "image": (Prompt(images=((24, 40), (60, 64)), seed=53), Prompt(images=((30, 92),), seed=54)),
    "video": (Prompt(clips=((24, 40, 4), (24, 40, 4)), seed=55), Prompt(clips=((24, 40, 4),), seed=56)),
}


def counted(keep: float | int, n: int) -> int:
    """How many of `n` tokens stay, in exact arithmetic."""
    wanted = keep if isinstance(keep, int) else math.floor(Fraction(keep * n) + Fraction(1, 2))
    return min(n, max(1, wanted))


@contextmanager
def _length_in_the_model(model: nn.Module) -> Iterator[list[int]]:
    """Lengths of the sequences that the first decoder layer sees."""
    seen: list[int] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handle = model.model.language_model.layers[0].register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def _prefill(case: Case, prompts: tuple[Prompt, ...], **options: object) -> PruneReport:
    """The report of one prefill, checked against what the language model was given."""
    with case.pruned(prompts, **options) as pruner, _length_in_the_model(case.model) as lengths:
        case.model(**case.inputs(prompts))
        report = pruner.last
    assert lengths == [max(report.length_after)]
    for row, (before, after) in enumerate(zip(report.length_before, report.length_after, strict=True)):
        assert before - after == sum(s.n - s.k for s in report.segments if s.row == row)
    for segment in report.segments:
        _check_order(segment)
    return report


def _check_order(segment: SegmentReport) -> None:
    kept = segment.keep.tolist()
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(segment.n))
    assert segment.k == len(kept)
    assert segment.n == sum(part.grid[0] * part.grid[1] for part in segment.parts)


@cells(methods=EXACT_METHODS, kinds=("image",))
def test_every_number_from_one_to_all(case: Case) -> None:
    n = _prefill(case, (SMALL,), keep=1.0).tokens
    assert n % 2 == (case.family in QWEN), "an odd number of tokens where the family can have one"
    for k in [*range(max(2, _least(case, n)), n + 1), n + 3]:
        report = _prefill(case, (SMALL,), keep=k)
        assert [segment.k for segment in report.segments] == [min(k, n)] == [Budget(keep=k).resolve(n)]


@cells(methods=EXACT_METHODS, kinds=("image",))
def test_halves_round_up(case: Case) -> None:
    n = _prefill(case, (SMALL,), keep=1.0).tokens
    for wanted in (3.5, 4.5):
        share = wanted / n
        assert share * n == wanted, "exact in binary"
        report = _prefill(case, (SMALL,), keep=share)
        assert [segment.k for segment in report.segments] == [wanted + 0.5]


@cells(methods=EXACT_METHODS)
@pytest.mark.parametrize("per", ["image", "part", "prompt"])
def test_shares_and_numbers_round_per_unit(case: Case, per: str) -> None:
    for keep in _budgets(case, per):
        report = _prefill(case, MANY[case.kind], keep=keep, per=per)
        for n, k in _units(report, per):
            assert k == counted(keep, n) == Budget(keep=keep, per=per).resolve(n)


@cells(methods=[method for method in PRUNING_METHODS if method != "tome"], kinds=("image",))
def test_one_token_is_the_least(case: Case) -> None:
    least = _prefill(case, MANY[case.kind], keep=0.001)
    with pytest.warns(UserWarning, match="1.0 keeps all"):
        one = _prefill(case, MANY[case.kind], keep=1)
    for report in (one, least):
        assert [segment.k for segment in report.segments] == [1, 1, 1]


@cells(methods=ADAPTIVE)
@pytest.mark.parametrize("per", ["image", "part", "prompt"])
def test_an_adaptive_method_keeps_what_it_wants_but_at_most_the_budget(case: Case, per: str) -> None:
    most = list(_units(_prefill(case, MANY[case.kind], keep=0.8, per=per), per))
    for keep in (0.1, 1 / 3, 0.5, 3):
        report = _prefill(case, MANY[case.kind], keep=keep, per=per)
        for (n, k), (same, wanted) in zip(_units(report, per), most, strict=True):
            assert n == same
            assert k == min(counted(keep, n), wanted)
    assert any(wanted < counted(0.8, n) for n, wanted in most), "the budget is not what decides"


@cells(methods=("identity",))
def test_the_neutral_method_keeps_every_token(case: Case) -> None:
    report = _prefill(case, MANY[case.kind], keep=1.0)
    assert [segment.keep.tolist() for segment in report.segments] == [list(range(s.n)) for s in report.segments]
    assert len(report.segments) == 3


def _budgets(case: Case, per: str) -> list[float | int]:
    """Those of `BUDGETS` that are not refused: a number for a prompt tells the encoder of a picture nothing."""
    refused = {0.1, 3} if case.method == "tome" else {3} if case.method in IN_TOWER and per == "prompt" else set()
    return [keep for keep in BUDGETS if keep not in refused]


def _least(case: Case, n: int) -> int:
    """ToMe halves at most, in each of the two blocks that make the features of the tiny models."""
    return n // 4 if case.method == "tome" else 1


def _units(report: PruneReport, per: str) -> Iterator[tuple[int, int]]:
    """(tokens, kept) of everything that has a budget of its own."""
    if per == "prompt":
        for _, segments in groupby(report.segments, key=lambda segment: segment.row):
            row = list(segments)
            yield sum(s.n for s in row), sum(s.k for s in row)
        return
    for segment in report.segments:
        if per == "image":
            yield segment.n, segment.k
            continue
        first = 0
        for part in segment.parts:
            last = first + part.grid[0] * part.grid[1]
            yield last - first, sum(first <= index < last for index in segment.keep.tolist())
            first = last
