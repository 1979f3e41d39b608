"""Numbers of panes, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.demo.common import ask
from vtprune.demo.panes import agreement, coverage, numbers_of, overlap
from vtprune.errors import InvalidOption
from vtprune.report import PruneReport, SegmentReport, Stopwatch
from vtprune.types import Part


def segment(keep: list[int], *grids: tuple[int, int]) -> SegmentReport:
    parts, start = [], 0
    for h, w in grids:
        parts.append(Part(start=start, stop=start + h * w, kind="frame", grid=(h, w)))
        start += h * w
    stages = torch.full((start,), -2)
    stages[torch.tensor(keep, dtype=torch.long)] = 0
    return SegmentReport(row=0, kind="video", parts=tuple(parts), stages=stages)


def report(*segments: SegmentReport, **more: Any) -> PruneReport:
    known = {"method": "m", "family": "f", "backend": "torch", "positions": "keep", "importance": None}
    rest = {"picks": ("p",), "length_before": (30,), "length_after": (12,), "kv_bytes_saved": 100}
    return PruneReport(**known, **rest, segments=segments, stopwatch=Stopwatch(), **more)  # type: ignore[arg-type]


def test_overlap_is_intersection_over_union() -> None:
    one, other = report(segment([0, 1, 2], (2, 4))), report(segment([2, 3], (2, 4)))
    assert overlap(one, other) == 1 / 4
    assert overlap(one, one) == 1


def test_overlap_counts_all_pictures_together() -> None:
    one = report(segment([0], (1, 4)), segment([0, 1], (1, 4)))
    other = report(segment([1], (1, 4)), segment([1, 2], (1, 4)))
    assert overlap(one, other) == 1 / 5


def test_there_is_no_overlap_of_nothing_and_of_other_pictures() -> None:
    nothing = report(segment([], (2, 4)))
    assert overlap(nothing, nothing) is None
    assert overlap(report(segment([0], (2, 4))), report(segment([0], (2, 2)))) is None


@pytest.mark.parametrize(
    ("keep", "grids", "share"),
    [
        ([0], ((4, 4),), 4 / 16),  # a corner has three neighbours
        ([5], ((4, 4),), 9 / 16),
        ([5, 6], ((4, 4),), 12 / 16),
        ([], ((4, 4),), 0),
        ([8], ((2, 4), (2, 4)), 4 / 16),  # the first token of the second frame does not cover the first frame
        ([1], ((1, 5),), 3 / 5),
    ],
)
def test_coverage_is_the_share_of_tokens_within_a_cell_of_a_kept_one(keep: list[int], grids: Any, share: float) -> None:
    assert coverage([segment(keep, *grids)]) == share


def test_coverage_of_no_picture_is_unknown() -> None:
    assert coverage([]) is None


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ((5, 6, 7), (5, 6, 7), 1),
        ((5, 6, 7), (5, 9, 7), 1 / 3),
        ((5, 6), (5, 6, 7, 8), 1 / 2),
        ((), (4,), 0),
        ((), (), 1),
    ],
)
def test_agreement_is_the_share_up_to_where_answers_part(answer: Any, reference: Any, share: float) -> None:
    assert agreement(answer, reference) == share


def test_numbers_are_those_of_the_report() -> None:
    numbers = numbers_of(report(segment([5], (4, 4))), kv_bytes_whole=250, seconds={"total": 2.0})
    assert (numbers.tokens, numbers.kept, numbers.prompt) == (16, 1, 12)
    assert (numbers.prompt_whole, numbers.prompt_average, numbers.cached) == (30, 12, False)
    assert (numbers.kv_bytes, numbers.kv_bytes_whole, numbers.kv_megabytes) == (150, 250, 150 / 1e6)
    assert numbers.coverage == 9 / 16 and numbers.seconds == {"total": 2.0}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": -3}, "keep"),
        ({"methods": ("vtprune",)}, "methods"),
        ({"seed": -1}, "seed"),
        ({"debiaser": "luck"}, "debiaser"),
        ({"forced_in": (1, 2), "forced_out": (2,)}, r"\[2\]"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidOption, match=word):
        ask(**options)
