"""Law 4: kept indices are ascending and unique, and exactly as many as the budget says, which rounds half up.

Where tokens leave between decoder layers too, the budget is what a layer sees on average, met to within half a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.cases import (
    ADAPTIVE,
    CACHING,
    EXACT_METHODS,
    FILTERING,
    IN_LAYERS,
    IN_TOWER,
    LEAVING,
    NEUTRAL,
    PIPELINES,
    PRUNING_METHODS,
    Case,
    cells,
    depths_of,
    stored_in,
)
from tests.models import QWEN, Prompt, units_of_parts
from vtprune.errors import InvalidOption
from vtprune.report import PruneReport, SegmentReport
from vtprune.types import Budget

pytestmark = pytest.mark.law("4 order and count")

BUDGETS = (0.1, 1 / 3, 0.5, 0.999, 3)
BOUNDED = tuple(method for method in IN_LAYERS if not PIPELINES[method].picks)
"""Methods that let the first decoder layers see all tokens: a single one is no average they reach."""
SINGLE = tuple(m for m in PRUNING_METHODS if m not in ("tome", *BOUNDED, *LEAVING, *CACHING))
"""Methods that can leave one token of every picture to all layers."""
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
def _lengths_in_the_model(model: nn.Module) -> Iterator[list[int]]:
    """Lengths of the sequences that the decoder layers see, one after the other."""
    seen: list[int] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _prefill(case: Case, prompts: tuple[Prompt, ...], **options: object) -> PruneReport:
    """The report of one prefill, checked against what every decoder layer was given and stored."""
    with case.pruned(prompts, **options) as pruner, _lengths_in_the_model(case.model) as lengths:
        cache = case.model(**case.inputs(prompts), use_cache=True).past_key_values
        report = pruner.last
    assert lengths == [max(_lengths(report, layer)) for layer in range(case.layers)]
    stored = [layer.keys.shape[2] for layer in cache.layers]
    if case.method not in CACHING:
        assert stored == [max(_lengths(report, layer, stored=True)) for layer in range(case.layers)]
    elif len(prompts) == 1:
        left_out = sum(float((case.layers - s.cached).sum()) for s in report.segments if s.cached is not None)
        assert sum(stored) == pytest.approx(case.layers * report.length_before[0] - left_out)
    assert report.length_after == _lengths(report, case.layers - 1)
    for row, (before, after) in enumerate(zip(report.length_before, report.length_after, strict=True)):
        assert before - after == sum(s.n - s.k for s in report.segments if s.row == row)
    for segment in report.segments:
        _check_order(segment)
    return report


def _lengths(report: PruneReport, layer: int, *, stored: bool = False) -> tuple[int, ...]:
    """Real tokens of every row that decoder layer `layer` sees, or has `stored`, as the report has it."""

    def reached(segment: SegmentReport) -> list[int]:
        depths = depths_of(segment, report.layers)
        return stored_in(segment, depths) if stored else depths

    return tuple(
        before - sum(depth <= layer for s in report.segments if s.row == row for depth in reached(s))
        for row, before in enumerate(report.length_before)
    )


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


@cells(methods=[method for method in IN_LAYERS if method not in LEAVING], kinds=("image",))
def test_the_average_over_layers_is_every_number_that_is_not_refused(case: Case) -> None:
    n = _prefill(case, (SMALL,), keep=1.0).tokens
    depths = {depth for keep in (0.4, 0.6, 0.8) for depth in _depths(_prefill(case, (SMALL,), keep=keep), "image")[0]}
    first = min(depths - {0})
    assert 0 < first < case.layers == max(depths)
    for k in [*range(2, n + 1), n + 3]:
        if not PIPELINES[case.method].picks and k * case.layers == first * n:
            continue  # the very edge of what floats can reach
        if not PIPELINES[case.method].picks and k * case.layers < first * n:
            with pytest.raises(InvalidOption, match=f"average over {case.layers} decoder layers"):
                _prefill(case, (SMALL,), keep=k)
            continue
        report = _prefill(case, (SMALL,), keep=k)
        (unit,) = _depths(report, "image")
        _check_average(unit, min(k, n), case.layers)
        assert report.average * case.layers == sum(unit)
        assert report.kept == sum(depth == case.layers for depth in unit)


@cells(methods=IN_LAYERS)
@pytest.mark.parametrize("per", ["image", "part", "prompt"])
def test_the_average_over_layers_is_the_budget_of_every_unit(case: Case, per: str) -> None:
    everything = _depths(_prefill(case, MANY[case.kind], keep=1.0, per=per), per)
    half_of_the_largest = max(map(len, everything)) // 2
    shares = (0.4, 0.5, 2 / 3, 0.999)
    for keep in shares if case.method in IN_TOWER and per == "prompt" else (*shares, half_of_the_largest):
        report = _prefill(case, MANY[case.kind], keep=keep, per=per)
        for unit in _depths(report, per):
            n = len(unit)
            wanted = min(keep, n) if isinstance(keep, int) else keep * n
            if case.method not in FILTERING or len(unit) == 1:
                _check_average(unit, wanted, case.layers, at_most=case.method in LEAVING)
            assert sum(unit) / case.layers <= max(wanted + 0.5, 1) + 1e-9


def _check_average(depths: list[int], wanted: float, layers: int, *, at_most: bool = False) -> None:
    """Tokens a layer sees of a unit: the average is met, unless a single one stays where it should be fewer."""
    seen = [sum(depth > layer for depth in depths) for layer in range(layers)]
    assert seen == sorted(seen, reverse=True)
    assert min(seen) >= 1 or at_most
    off = sum(seen) / layers - wanted
    assert off <= (0.5 + 1e-9 if min(seen) > 1 else 1)
    assert off >= -0.5 - 1e-9 or (at_most and min(seen) == 0)


@cells(
    methods=[method for method in PRUNING_METHODS if method not in ("tome", *BOUNDED, *LEAVING, *CACHING)],
    kinds=("image",),
)
def test_one_token_is_the_least(case: Case) -> None:
    least = _prefill(case, MANY[case.kind], keep=0.001)
    with pytest.warns(UserWarning, match="1.0 keeps all"):
        one = _prefill(case, MANY[case.kind], keep=1)
    for report in (one, least):
        assert [segment.k for segment in report.segments] == [1, 1, 1]


@cells(methods=CACHING)
@pytest.mark.parametrize("per", ["image", "part", "prompt"])
def test_caches_store_what_the_budget_says(case: Case, per: str) -> None:
    """In every layer; of an adaptive method at most."""
    for keep in BUDGETS:
        report = _prefill(case, MANY[case.kind], keep=keep, per=per)
        for unit in _stored(report, per):
            n, stored = len(unit), sum(unit) / report.layers
            if PIPELINES[case.method].adaptive:
                assert stored <= counted(keep, n) + 1e-4
            else:
                assert stored == pytest.approx(counted(keep, n))


@cells(methods=ADAPTIVE)
@pytest.mark.parametrize("per", ["image", "part", "prompt"])
def test_an_adaptive_method_keeps_what_it_wants_but_at_most_the_budget(case: Case, per: str) -> None:
    most = _units(_prefill(case, MANY[case.kind], keep=0.8, per=per), per)
    for keep in (0.1, 1 / 3, 0.5, 3):
        report = _prefill(case, MANY[case.kind], keep=keep, per=per)
        for (n, k), (same, wanted) in zip(_units(report, per), most, strict=True):
            assert n == same
            assert k == min(counted(keep, n), wanted)
    assert any(wanted < counted(0.8, n) for n, wanted in most), "the budget is not what decides"


@cells(methods=NEUTRAL)
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


def _units(report: PruneReport, per: str) -> list[tuple[int, int]]:
    """(tokens, kept) of everything that has a budget of its own."""
    return [(len(depths), sum(depth == report.layers for depth in depths)) for depths in _depths(report, per)]


def _stored(report: PruneReport, per: str) -> list[list[float]]:
    """In how many layers each of its tokens is stored, for everything that has a budget of its own."""
    return _by_unit([(segment, segment.cached.tolist()) for segment in report.segments], per)


def _depths(report: PruneReport, per: str) -> list[list[int]]:
    """How many layers each of its tokens goes through, for everything that has a budget of its own."""
    return _by_unit([(segment, depths_of(segment, report.layers)) for segment in report.segments], per)


def _by_unit(rows: list[tuple[SegmentReport, list[Any]]], per: str) -> list[list[Any]]:
    """Numbers of the tokens of each segment, as numbers of the tokens of everything that has a budget of its own."""
    if per == "prompt":
        found = groupby(rows, key=lambda row: row[0].row)
        return [[depth for _, depths in row for depth in depths] for _, row in found]
    if per == "image":
        return [depths for _, depths in rows]
    return [[depths[token] for token in unit] for segment, depths in rows for unit in units_of_parts(segment.parts)]
