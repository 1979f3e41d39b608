"""What reports say of methods that merge behind the encoder, where two pictures and their parts lie in one prompt."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts import oracle
from tests.integration.common import write
from tests.models import IMAGE, VIDEO, Prompt
from vtprune import Pick, PruneReport
from vtprune.catalog import build
from vtprune.pipeline import Pipeline
from vtprune.stages.peaks import DensityPeaks, IntoPeaks
from vtprune.stages.scorers import Norm
from vtprune.stages.selectors import TopK

METHODS: dict[str, dict[str, Any]] = {
    "visionzip": {"contextual": 0.4},
    "pool": {},
    "prumerge_plus": {},
    "vflowopt_select": {"recycled": 0.4},
}
MEANS = ("visionzip", "pool", "peaks")
PEAKS = Pipeline(
    name="peaks",
    picks=(
        Pick(name="long", scorer=Norm(), selector=TopK(), share=0.6),
        Pick(name="peaks", scorer=Norm(), selector=DensityPeaks(share=0.6)),
    ),
    merger=IntoPeaks(pick=1, share=0.6),
)
"""Stages that no method of the list has in front of the language model."""
PROMPTS = {
    ("llava", "image"): Prompt(images=((32, 32), (32, 32)), seed=6),
    ("llava_next", "image"): Prompt(images=((30, 64), (60, 64)), seed=6),
    ("llava_next_video", "video"): Prompt(clips=((32, 32, 4), (32, 32, 4)), seed=6),
}
KEEP = 0.5

every_place = pytest.mark.parametrize(("name", "kind"), PROMPTS, ids=lambda value: value)
every_budget = pytest.mark.parametrize("per", ["image", "part", "prompt"])
every_method = pytest.mark.parametrize("method", METHODS)
every_merger = pytest.mark.parametrize("method", [*METHODS, "peaks"])
shared = functools.cache(models.build)


@functools.cache
def plain(name: str, kind: Literal["image", "video"]) -> tuple[dict[str, Tensor], Tensor]:
    """A prompt, and what the language model gets of it where nothing is pruned."""
    row = models.inputs(shared(name), (PROMPTS[name, kind],), kind)
    return row, oracle.merge(shared(name), row).embeds[0]


@functools.cache
def pruned(name: str, kind: Any, method: str, per: Any) -> tuple[PruneReport, Tensor]:
    """The report, and what the language model gets."""
    row, _ = plain(name, kind)
    pipeline = PEAKS if method == "peaks" else build(method, METHODS[method])
    return _pruned(shared(name), row, pipeline, keep=KEEP, per=per)


def _pruned(model: nn.Module, row: dict[str, Tensor], method: Pipeline, **options: Any) -> tuple[PruneReport, Tensor]:
    caught: list[Tensor] = []
    with vtprune.pruning(model, method, **options) as pruner:
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        try:
            write(model, row)
        finally:
            handle.remove()
        return pruner.last, caught[0][0]


def together(report: PruneReport, per: str) -> list[tuple[list[int], list[int], list[int], int]]:
    """Kept tokens, `into`, `sizes` and `merged` of whatever is counted from one start, a picture or the prompt."""
    found, start = [], 0
    for segment in report.segments:
        keep = [start + token for token in segment.keep.tolist()]
        found.append((keep, segment.into.tolist(), segment.sizes.tolist(), segment.merged))
        start += segment.n if per == "prompt" else 0
    if per != "prompt":
        return found
    return [tuple(sum((own[i] for own in found), [] if i < 3 else 0) for i in range(4))]


def owners(report: PruneReport, per: str) -> list[list[int]]:
    """Which unit of the budget each token of `together` belongs to."""
    if per == "part":
        units = [models.units_of_parts(segment.parts) for segment in report.segments]
        return [
            [next(n for n, unit in enumerate(own) if token in unit) for token in range(sum(map(len, own)))]
            for own in units
        ]
    lengths = [segment.n for segment in report.segments]
    return [[0] * length for length in (lengths if per == "image" else [sum(lengths)])]


def count(into: list[int]) -> dict[int, int]:
    """How many tokens each one holds."""
    found: dict[int, int] = {}
    for holder in into:
        if holder != -1:
            found[holder] = found.get(holder, 0) + 1
    return found


@every_merger
@every_budget
@every_place
def test_every_token_is_told_where_it_lives(name: str, kind: str, per: str, method: str) -> None:
    """Kept ones in themselves, the others in kept ones of the same unit, or nowhere; sizes count exactly those."""
    report, _ = pruned(name, kind, method, per)
    assert len(report.segments) == 2
    for (keep, into, sizes, merged), owner in zip(together(report, per), owners(report, per), strict=True):
        assert len(into) == len(owner) > len(keep) == len(sizes)
        assert [into[token] for token in keep] == keep
        assert set(into) <= {*keep, -1}
        assert all(owner[holder] == owner[token] for token, holder in enumerate(into) if holder != -1)
        held = count(into)
        assert sizes == [held[token] for token in keep]
        assert merged == sum(sizes) - len(keep) > 0
        assert sum(sizes) + into.count(-1) == len(into)
        assert method in ("prumerge_plus", "peaks") or -1 not in into, "here nothing is lost"
    for segment in report.segments:
        held, sizes = segment.held.tolist(), iter(segment.sizes.tolist())
        assert held == [next(sizes) if token in segment.keep else 0 for token in range(segment.n)]
    assert report.merged == sum(segment.merged for segment in report.segments)


@every_method
@every_place
def test_of_a_prompt_that_shares_one_budget_tokens_are_counted_through_all(name: str, kind: str, method: str) -> None:
    """Those of the second picture begin where the first ends; by likeness tokens of either join the other."""
    first, second = pruned(name, kind, method, "prompt")[0].segments
    assert first.into[first.keep].tolist() == first.keep.tolist()
    assert second.into[second.keep].tolist() == (second.keep + first.n).tolist()
    across = bool((first.into >= first.n).any() or ((second.into >= 0) & (second.into < first.n)).any())
    assert across or method != "visionzip"
    assert not across or method != "pool", "there are more cells than parts"


@pytest.mark.parametrize("method", MEANS)
@every_budget
@every_place
def test_the_language_model_gets_the_means_that_are_reported(name: str, kind: str, per: str, method: str) -> None:
    """At every kept token the mean of those it holds; words and separators as they were."""
    row, before = plain(name, kind)
    report, after = pruned(name, kind, method, per)
    visual = (row["input_ids"][0] == (VIDEO if kind == "video" else IMAGE)).nonzero()[:, 0].numpy()
    at, start = [], 0
    for segment in report.segments:
        length = max(part.stop for part in segment.parts)
        at.append(visual[start : start + length][np.concatenate([part.candidates for part in segment.parts])])
        start += length
    assert start == len(visual)
    expected = {place: before[place] for place in set(range(len(before))) - set(np.concatenate(at).tolist())}
    places = at if per != "prompt" else [np.concatenate(at)]
    for (keep, into, _, _), own in zip(together(report, per), places, strict=True):
        for token in keep:
            members = [int(own[i]) for i, holder in enumerate(into) if holder == token]
            expected[int(own[token])] = sum(before[place].double() for place in members).float() / len(members)
    torch.testing.assert_close(
        after, torch.stack([expected[place] for place in sorted(expected)]), atol=1e-5, rtol=1e-4
    )


def test_a_batch_counts_the_pictures_of_each_prompt_by_themselves() -> None:
    """A row with one picture before one with two: the second row counts from 0."""
    model = shared("llava")
    prompts = (replace(PROMPTS["llava", "image"], images=((32, 32),)), PROMPTS["llava", "image"])
    for method, parameters in METHODS.items():
        pipeline = build(method, parameters)
        report, _ = _pruned(model, models.inputs(model, prompts), pipeline, keep=KEEP, per="prompt")
        alone, _ = _pruned(model, plain("llava", "image")[0], pipeline, keep=KEEP, per="prompt")
        for segment, own in zip(report.segments[1:], alone.segments, strict=True):
            assert segment.into.tolist() == own.into.tolist()
            assert segment.sizes.tolist() == own.sizes.tolist()


@every_method
@pytest.mark.parametrize("per", ["image", "part"])
def test_what_is_forbidden_is_lost_and_counts_nowhere(per: Any, method: str) -> None:
    """Tokens of the first and of the second part of both pictures."""
    row, forbidden = plain("llava_next", "image")[0], [[1, 17, 18], [0, 20]]
    with vtprune.pruning(shared("llava_next"), build(method, METHODS[method]), keep=KEEP, per=per) as pruner:
        with pruner.using(forbid=[forbidden]):
            write(shared("llava_next"), row)
        segments = pruner.last.segments
    for segment, lost in zip(segments, forbidden, strict=True):
        into = segment.into.tolist()
        assert [token for token, holder in enumerate(into) if holder == -1] == lost
        assert segment.sizes.tolist() == [into.count(token) for token in segment.keep.tolist()]
        assert segment.held[lost].tolist() == [0] * len(lost)


def test_where_nothing_is_dropped_every_token_holds_itself() -> None:
    row, before = plain("llava", "image")
    for method, parameters in METHODS.items():
        report, after = _pruned(shared("llava"), row, build(method, parameters), keep=16)
        assert torch.equal(after, before)
        for segment in report.segments:
            assert segment.into.tolist() == list(range(segment.n))
            assert segment.sizes.tolist() == [1] * segment.n
            assert segment.merged == 0
