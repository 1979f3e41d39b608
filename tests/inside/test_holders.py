"""Who holds a token that merged in front of the language model or between its layers, cut after cut."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import vtprune
from tests import models
from tests.contracts.cases import answer
from tests.contracts.merges import merges_of
from tests.inside.common import FAMILIES, LAYERS, ONE, model_of, pruned, run
from tests.inside.test_stages import Ends
from tests.models import ONE_AND_TWO, Prompt
from vtprune import Pick, Pipeline
from vtprune.pipeline import LayerStage
from vtprune.stages.counters import AllOrNone
from vtprune.stages.mergers import IntoNearest
from vtprune.stages.scorers import Constant, Norm
from vtprune.stages.selectors import TopK

LOST = -1


@dataclass(frozen=True)
class Halves:
    """Of 2 k tokens, k of them kept: each joins the kept one that is as far behind the first."""

    def __call__(self, tokens, selection):
        S, K = selection.keep.shape
        assert tokens.features.shape[1] == 2 * K
        weights = torch.eye(K).repeat(1, 2).expand(S, K, 2 * K)
        return weights / 2


def ends(last):
    return (Pick(name="ends", scorer=Constant(), selector=Ends(last)),)


def two_cuts(*mergers, **options):
    """Of 16 tokens the first eight stay in front of layer 2, of these the last four in front of layer 4."""
    stages = (
        LayerStage(at=2, keep=0.5, picks=ends(False), merger=mergers[0]),
        LayerStage(at=4, keep=0.25, picks=ends(True), merger=mergers[1]),
    )
    return Pipeline(name="ends", picks=(), inside=stages, **options)


@pytest.mark.parametrize(
    ("mergers", "into"),
    [
        ((Halves(), Halves()), [4, 5, 6, 7] * 4),
        ((Halves(), None), [LOST] * 4 + [4, 5, 6, 7] + [LOST] * 4 + [4, 5, 6, 7]),
        ((None, Halves()), [4, 5, 6, 7] * 2 + [LOST] * 8),
    ],
    ids=["both", "first", "second"],
)
def test_two_cuts_by_hand(mergers, into):
    """8 to 15 join 0 to 7; then 0 to 3 join 4 to 7 with what they hold. Without a merger all that is lost."""
    model = model_of("llava")
    report = run(model, two_cuts(*mergers), models.inputs(model, ONE), keep=3.5 / 6).report
    (segment,) = report.segments
    assert segment.depths.tolist() == [4] * 4 + [6] * 4 + [2] * 8
    assert segment.keep.tolist() == [4, 5, 6, 7]
    assert segment.into.tolist() == into
    assert segment.sizes.tolist() == [into.count(4)] * 4
    assert segment.held.tolist() == [0] * 4 + [into.count(4)] * 4 + [0] * 8
    assert segment.merged == report.merged == sum(holder != LOST for holder in into) - 4
    described = segment.to_dict()
    assert (described["into"], described["sizes"]) == (into, [into.count(4)] * 4)


def test_without_a_merger_nobody_holds_anything():
    model = model_of("llava")
    (segment,) = run(model, two_cuts(None, None), models.inputs(model, ONE), keep=3.5 / 6).report.segments
    assert (segment.into, segment.held, segment.sizes.tolist()) == (None, None, [1] * 4)


@pytest.mark.parametrize(
    ("first", "second", "into"),
    [
        (Halves(), Halves(), [4, 5, 6, 7] * 4),
        (Halves(), None, [LOST] * 4 + [4, 5, 6, 7] + [LOST] * 4 + [4, 5, 6, 7]),
        (None, Halves(), [4, 5, 6, 7] * 2 + [LOST] * 8),
    ],
    ids=["both", "before", "inside"],
)
def test_a_cut_in_front_of_the_language_model_goes_first(first, second, into):
    """The same tokens, of which the last eight never enter."""
    model = model_of("llava")
    inside = (LayerStage(at=4, keep=0.25, picks=ends(True), merger=second),)
    pipeline = Pipeline(name="ends", picks=ends(False), merger=first, before=0.5, inside=inside)
    (segment,) = run(model, pipeline, models.inputs(model, ONE), keep=2.5 / 6).report.segments
    assert segment.depths.tolist() == [4] * 4 + [6] * 4 + [0] * 8
    assert segment.into.tolist() == into
    assert segment.sizes.tolist() == [into.count(4)] * 4


def test_what_an_exit_takes_with_it_is_lost():
    """Scores add up to nothing: all leave in front of layer 4, also those who held others."""
    model = model_of("llava")
    stages = (
        LayerStage(at=2, keep=0.5, picks=ends(False), merger=Halves()),
        LayerStage(at=4, keep=0.5, picks=ends(False), counter=AllOrNone(scorer=Constant(), below=0.5)),
    )
    pipeline = Pipeline(name="exit", picks=(), inside=stages)
    (segment,) = run(model, pipeline, models.inputs(model, ONE), keep=4 / 6).report.segments
    assert segment.depths.tolist() == [4] * 8 + [2] * 8
    assert segment.into.tolist() == [LOST] * 16
    assert (segment.sizes.tolist(), segment.merged) == ([], 0)


def nearest(at, keep):
    """A cut after which the longest tokens take in the others."""
    return LayerStage(
        at=at, keep=keep, picks=(Pick(name="long", scorer=Norm(), selector=TopK()),), merger=IntoNearest()
    )


METHODS = {
    "sparsevlm": {},
    "vflowopt": {},
    "nearest": {"keep": 0.6},
}


def method_of(name):
    """`nearest`: nothing is ever lost."""
    return Pipeline(name=name, picks=(), inside=(nearest(2, 0.5), nearest(4, 0.25))) if name == "nearest" else name


def check(report, per):
    """Kept tokens hold themselves, others are held by kept ones or lost; sizes count those that are alive."""
    rows = {}
    for segment in report.segments:
        rows.setdefault(segment.row if per == "prompt" else id(segment), []).append(segment)
    for segments in rows.values():
        into = [holder for segment in segments for holder in segment.into.tolist()]
        starts = [sum(segment.n for segment in segments[:number]) for number in range(len(segments))]
        keep = [s + token for s, segment in zip(starts, segments) for token in segment.keep.tolist()]
        sizes = [size for segment in segments for size in segment.sizes.tolist()]
        assert [into[token] for token in keep] == keep
        assert set(into) <= {*keep, LOST}
        assert sizes == [into.count(token) for token in keep]
        assert sum(sizes) == sum(holder != LOST for holder in into)
        assert sum(segment.merged for segment in segments) == sum(sizes) - len(keep)
    for segment in report.segments:
        held = torch.zeros(segment.n, dtype=torch.long)
        held[segment.keep] = segment.sizes
        assert torch.equal(segment.held, held)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per", ["image", "part", "prompt"])
@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_told_where_it_lives(method, per, family):
    model = model_of(family)
    report = run(model, method_of(method), models.inputs(model, ONE_AND_TWO), per=per, **METHODS[method]).report
    check(report, per)
    assert report.merged > 0
    lost = sum(int((segment.into == LOST).sum()) for segment in report.segments)
    assert (lost > 0) == (method != "nearest")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["sparsevlm", "nearest"])
def test_it_is_what_happened_at_every_cut(method, family):
    """Followed one by one: who is in a mean goes with it, who leaves alone is lost with all it held."""
    model = model_of(family)
    inputs = models.inputs(model, ONE_AND_TWO)
    got = run(model, method_of(method), inputs, **METHODS[method])
    for row in (0, 1):
        held = {token: [token] for token, depth in enumerate(depths_of(got, inputs, row))}
        depths = depths_of(got, inputs, row)
        for layer in sorted({depth for depth in depths if depth < LAYERS}):
            for merge in (one for one in merges_of(got.report, row) if one.layer == layer):
                for member in merge.members:
                    if member != merge.at:
                        held[merge.at] += held.pop(member)
            for token, depth in enumerate(depths):
                if depth == layer:
                    held.pop(token, None)
        assert alive(got, inputs, row) == {
            holder: sorted(own) for holder, own in held.items() if is_visual(inputs, row, holder)
        }


def depths_of(got, inputs, row):
    """Layers that the real tokens of a row went through."""
    return got.reach[row][inputs["attention_mask"][row].bool()].tolist()


def is_visual(inputs, row, token):
    return int(inputs["input_ids"][row][inputs["attention_mask"][row].bool()][token]) == models.IMAGE


def alive(got, inputs, row):
    """What the report says, in the same numbers."""
    found = {}
    visual = [token for token in range(len(depths_of(got, inputs, row))) if is_visual(inputs, row, token)]
    for segment in (one for one in got.report.segments if one.row == row):
        own, visual = visual[: segment.parts[-1].stop], visual[segment.parts[-1].stop :]
        always = {offset for part in segment.parts for offset in part.separators}
        tokens = [token for offset, token in enumerate(own) if offset not in always]
        found |= {own[offset]: [own[offset]] for offset in always}
        for token, holder in zip(tokens, segment.into.tolist(), strict=True):
            if holder != LOST:
                found.setdefault(tokens[holder], []).append(token)
    return {holder: sorted(own) for holder, own in found.items()}


@pytest.mark.parametrize("method", ["sparsevlm", "vflowopt"])
def test_where_nothing_is_cut_every_token_holds_itself(method):
    model = model_of("llava")
    with pruned(model, method, keep=1.0) as pruner:
        answer(model, models.inputs(model, ONE_AND_TWO), steps=1)
    for segment in pruner.last.segments:
        assert segment.into.tolist() == list(range(segment.n))
        assert (segment.sizes == 1).all()
    assert pruner.last.merged == 0


def test_later_turns_and_beams_tell_their_own():
    """Of a batch, of its beams, and of the picture of a second turn."""
    model = model_of("llava")
    inputs = models.inputs(model, ONE_AND_TWO)
    plain, beams = (run(model, "sparsevlm", inputs, mode) for mode in ({}, {"num_beams": 3}))
    told = [segment.into.tolist() for segment in plain.report.segments]
    assert [segment.into.tolist() for segment in beams.report.segments] == [
        *(told[:1] * 3),
        *(told[1:] * 3),
    ]
    first, second = (models.inputs(model, (Prompt(images=((30, 64),), seed=seed),)) for seed in (1, 2))
    with pruned(model, "sparsevlm") as pruner:
        said = answer(model, first, steps=2)
        ids = torch.cat([said.sequences, second["input_ids"]], dim=1)
        given = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer(model, given, steps=1, past_key_values=said.cache)
        check(pruner.last, "image")
        assert len(pruner.last.segments) == 1 and pruner.last.merged > 0


def test_a_summary_counts_them():
    model = model_of("llava")
    with vtprune.pruning(model, two_cuts(Halves(), Halves()), keep=3.5 / 6) as pruner:
        answer(model, models.inputs(model, ONE), steps=1)
    assert "kept 4 of 16 tokens of 1 picture, 12 of the others merged into them" in pruner.last.summary()
    assert pruner.last.to_dict()["merged"] == 12
