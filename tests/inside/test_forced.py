"""Tokens that the user forces in stay through every cut between layers, those forced out leave at the first."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.contracts.cases import answer
from tests.inside.common import (
    BUDGETS,
    DEEP,
    EARLY,
    EXITS,
    LAYERS,
    ONE,
    SOME,
    STEPS,
    Run,
    assert_same,
    dense,
    merges,
    model_of,
    pruned,
    reach,
    run,
)
from tests.inside.test_turns import FIRST, PICTURES, Chat
from tests.models import ONE_AND_TWO
from vtprune.catalog import build
from vtprune.errors import UnsupportedCall

methods = pytest.mark.parametrize("method", [method for method in BUDGETS if method not in EXITS])
"""Where whole pictures leave no token can be forced: see `test_where_all_leave_none_can_be_protected` and the next."""
deep = pytest.mark.parametrize("method", [method for method in DEEP if method not in EXITS])
some = pytest.mark.parametrize("family", SOME)
PROTECT = [[3], [[0, 5], None]]
FORBID = [[1, 2], [None, [4]]]
"""Of a row with one picture and a row with two: three pictures, with other numbers of tokens forced in each."""
IN, OUT = [[3], [0, 5], []], [[1, 2], [], [4]]
"""The same, picture by picture."""
OPTIONS = {
    "sparsevlm_plus": {"keep": 0.6},
    "transprune": {"keep": 0.45},
    "information_horizon": {"horizon": None},
}
"""So that as many leave at the first cut as are forced out, and the last one leaves as many as are forced in."""


def forced(model, method, inputs, mode=None, evidence=None, **options):
    """What `run` gives, with tokens forced."""
    with pruned(model, method, **{**OPTIONS.get(method, {}), **options}) as pruner:
        with pruner.using(**({"protect": PROTECT, "forbid": FORBID} if evidence is None else evidence)):
            got = answer(model, inputs, **{"steps": STEPS, **(mode or {})})
        report = pruner.last
    beams = len(report.length_before) // len(inputs["input_ids"])
    ids, attended = (inputs[name].repeat_interleave(beams, dim=0) for name in ("input_ids", "attention_mask"))
    return Run(got, report, reach(report, ids), merges(report, attended))


def unforced(model, method, inputs, **options):
    """The report of the same call in which nothing is forced."""
    return run(model, method, inputs, **{**OPTIONS.get(method, {}), **options}).report


def first_cut(free):
    """How far a token goes that leaves at the first cut, by the report of a call in which nothing is forced."""
    return min(int(segment.depths.min()) for segment in free.segments)


@some
@methods
def test_in_a_batch_of_rows_with_other_numbers_of_them(method, family):
    """They go as far as is said, as many tokens as ever go as far, and the answer is that of the dense model."""
    model, inputs = model_of(family), models.inputs(model_of(family), ONE_AND_TWO)
    free = unforced(model, method, inputs, positions="keep")
    got = forced(model, method, inputs, positions="keep")
    report = got.report
    for segment, before, protect, forbid in zip(report.segments, free.segments, IN, OUT, strict=True):
        assert segment.depths[protect].tolist() == [LAYERS] * len(protect)
        assert segment.depths[forbid].tolist() == [first_cut(free)] * len(forbid)
        assert sorted(segment.depths.tolist()) == sorted(before.depths.tolist())
        assert [token for token, pick in zip(segment.keep.tolist(), segment.taken.tolist()) if pick == -1] == protect
    assert (got.reach[0] < LAYERS).any() and [one.depths.tolist() for one in report.segments] != [
        one.depths.tolist() for one in free.segments
    ]
    if method != "vflowopt":  # it merges in front of the language model, and the reference only inside
        assert_same(got.answer, dense(model, inputs, got.reach, got.merges))


@some
@methods
def test_rows_alone_without_a_cache_and_in_beams(method, family):
    model, inputs = model_of(family), models.inputs(model_of(family), ONE_AND_TWO)
    together = forced(model, method, inputs)
    uncached = forced(model, method, inputs, {"use_cache": False})
    assert torch.equal(uncached.reach, together.reach)
    assert_same(uncached.answer, together.answer)
    searched = forced(model, method, inputs, {"num_beams": 2})
    assert torch.equal(searched.reach, together.reach.repeat_interleave(2, dim=0))
    for row, prompt in enumerate(ONE_AND_TWO):
        evidence = {"protect": PROTECT[row : row + 1], "forbid": FORBID[row : row + 1]}
        alone = forced(model, method, models.inputs(model, (prompt,)), evidence=evidence)
        assert [one.depths.tolist() for one in alone.report.segments] == [
            one.depths.tolist() for one in together.report.segments if one.row == row
        ]
        assert_same(alone.answer, together.answer, [row])


@deep
def test_one_that_is_forced_in_takes_the_place_of_one_that_is_forced_out(method):
    """At the first cut all the others are chosen as ever: up to there attention is that of the whole model."""
    model, inputs = model_of("llava"), models.inputs(model_of("llava"), ONE)
    free = unforced(model, method, inputs).segments[0].depths
    first = int(free.min())
    (left,), (gone,) = ((free > first).nonzero()[:1, 0].tolist(), (free == first).nonzero()[:1, 0].tolist())
    evidence = {"protect": [[gone]], "forbid": [[left]]}
    report = forced(model, method, inputs, evidence=evidence).report
    passed = set((report.segments[0].depths > first).nonzero()[:, 0].tolist())
    assert passed == set((free > first).nonzero()[:, 0].tolist()) - {left} | {gone}


@methods
def test_as_many_as_the_last_cut_leaves_are_all_that_it_leaves(method):
    model, inputs = model_of("llava"), models.inputs(model_of("llava"), ONE)
    count = unforced(model, method, inputs).kept
    chosen = list(range(16))[:: 16 // count][:count]
    report = forced(model, method, inputs, evidence={"protect": [chosen]}).report
    assert report.segments[0].keep.tolist() == chosen
    assert report.segments[0].taken.tolist() == [-1] * count


@pytest.mark.parametrize("per", ["part", "prompt"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
@methods
def test_budgets_of_parts_and_of_whole_prompts(method, family, per):
    model, inputs = model_of(family), models.inputs(model_of(family), ONE_AND_TWO)
    free = unforced(model, method, inputs, per=per)
    last = [segment.n - 1 for segment in free.segments]
    evidence = {"protect": [[last[0]], [[last[1]], None]], "forbid": [None, [None, [0]]]}
    report = forced(model, method, inputs, evidence=evidence, per=per).report
    assert [int(report.segments[i].depths[last[i]]) for i in (0, 1)] == [LAYERS] * 2
    assert int(report.segments[2].depths[0]) == first_cut(free)
    assert report.average == pytest.approx(free.average)


@pytest.mark.parametrize("below", [0.0, 1.0])
def test_where_a_picture_may_leave_the_protected_ones_are_the_least_that_stays(below):
    """Every row decides by itself, with other numbers of protected tokens; where nothing leaves, they are no more."""
    model, inputs = model_of("llava"), models.inputs(model_of("llava"), ONE_AND_TWO)
    with pruned(model, build("todre", {"below": below}), keep=0.4, positions="keep") as pruner:
        free = [one.k for one in (answer(model, inputs), pruner.last)[1].segments]
        with pruner.using(protect=PROTECT, forbid=FORBID):
            got = answer(model, inputs, steps=STEPS)
        report = pruner.last
        reached = reach(report, inputs["input_ids"])
    assert free == [0, 0, 0] if below else min(free) > 2
    if below:
        assert [one.keep.tolist() for one in report.segments] == IN
    else:
        assert [one.k for one in report.segments] == free
        assert all(set(own) <= set(one.keep.tolist()) for own, one in zip(IN, report.segments))
    assert_same(got, dense(model, inputs, reached))


@deep
def test_pictures_of_a_later_turn(method):
    """On a cache whose layers are of different length."""
    with pruned(model_of("llava"), method) as pruner:
        chat = Chat("llava", pruner)
        chat.turn(FIRST)
        with pruner.using(protect=[[[3], None], [[6]]], forbid=[[None, [1]], None]):
            reply, told, reached, merged = chat.turn(PICTURES)
        depths = [segment.depths for segment in pruner.last.segments]
    assert (int(depths[0][3]), int(depths[2][6]), int(depths[1][1])) == (LAYERS, LAYERS, int(depths[1].min()))
    assert_same(reply, dense(model_of("llava"), told, reached, merged))


def refused(method, match, evidence, **options):
    """The call is refused, and the next one is right."""
    model, inputs = model_of("llava"), models.inputs(model_of("llava"), ONE)
    with pruned(model, method, **options) as pruner:
        expected = answer(model, inputs)
        with pytest.raises(UnsupportedCall, match=match), pruner.using(**evidence):
            answer(model, inputs)
        assert torch.equal(answer(model, inputs).logits, expected.logits)


@pytest.mark.parametrize(
    ("method", "keep", "count"), [("fastv", 7 / 12, 8), ("pyramiddrop", 3.125 / 6, 2), ("adaptinfer", 0.25, 1)]
)
def test_more_than_the_last_cut_leaves(method, keep, count):
    evidence = {"protect": [list(range(count + 1))]}
    refused(method, f"{count + 1} tokens protected, but only {count} of 16 ", evidence, keep=keep)


@pytest.mark.parametrize("method", ["information_horizon", *EXITS])
def test_where_all_leave_none_can_be_protected(method):
    """A horizon behind which no token is left is honoured or the protection is: never the one in silence."""
    refused(method, "1 tokens protected, but only 0 of 16 stay", {"protect": [[3]]})


@pytest.mark.parametrize("method", EXITS)
def test_where_all_leave_together_none_can_be_forbidden(method):
    """None leaves before the others."""
    refused(method, "1 of 16 tokens forbidden, but 16 must stay at the first cut", {"forbid": [[1]]})


@pytest.mark.parametrize(
    ("method", "keep", "count"),
    [("fastv", 7 / 12, 8), ("pyramiddrop", 3.125 / 6, 8), ("information_horizon", 0.375, 8)],
)
def test_more_forbidden_than_leave_at_the_first_cut(method, keep, count):
    """Of an early pick that is the one in front of the language model."""
    settings = {"horizon": None} if method in EARLY else {}
    refused(
        method,
        f"{17 - count} of 16 tokens forbidden, but {count} must ",
        {"forbid": [list(range(17 - count))]},
        keep=keep,
        **settings,
    )


def test_a_first_cut_at_which_nothing_leaves_has_no_room_for_a_forbidden_token():
    refused("pyramiddrop", "1 of 16 tokens forbidden, but 16 must stay", {"forbid": [[1]]}, keep=16)
