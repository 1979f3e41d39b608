"""Which pick took a token that is left: the one of the last cut it passed, counted through the whole pipeline."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests import models
from tests.inside.common import ONE, fresh, model_of, run
from tests.inside.test_stages import Ends, stage
from vtprune import Pick, Pipeline, viz
from vtprune.stages.scorers import Constant

FRONT = (Pick(name="front", scorer=Constant(), selector=Ends(False)),)


def taken_by(keep, *stages, **options):
    model = model_of("llava")
    report = run(model, Pipeline(name="ends", inside=stages, **options), models.inputs(model, ONE), keep=keep).report
    (segment,) = report.segments
    return [report.picks[pick] for pick in segment.taken], segment.taken.tolist(), segment.keep.tolist()


def two(at, keep):
    """A stage whose first pick takes the first tokens, and whose second takes as many of the last ones."""
    picks = tuple(
        Pick(name=name, scorer=Constant(), selector=Ends(last), share=share)
        for name, last, share in (("first", False, 0.5), ("last", True, 1.0))
    )
    return type(stage(at, keep, False))(at=at, keep=keep, picks=picks)


def test_the_last_cut_counts():
    """(2 x 16 + 2 x 8 + 2 x 4) / 6 tokens: the first cut has one pick, the second two."""
    names, numbers, keep = taken_by(3.5 / 6, stage(2, 0.5, False), two(4, 0.25), picks=())
    assert (names, numbers, keep) == (["first"] * 2 + ["last"] * 2, [1, 1, 2, 2], [0, 1, 6, 7])


def test_picks_in_front_are_counted_first():
    """(2 x 8 + 4 x 4) / 6 tokens."""
    names, numbers, _ = taken_by(2 / 6, two(2, 0.25), picks=FRONT, before=0.5)
    assert (names, numbers) == (["first"] * 2 + ["last"] * 2, [1, 1, 2, 2])


def test_a_stage_that_is_skipped_is_counted():
    """Both fall on layer 4, and only the later one cuts: (4 x 16 + 2 x 4) / 6 tokens."""
    _, numbers, _ = taken_by(4.5 / 6, stage(4, 0.5, False), two(4, 0.25), picks=())
    assert numbers == [1, 1, 2, 2]


def test_what_passes_where_nothing_leaves_stays_taken_by_the_pick_before():
    names, numbers, _ = taken_by(4 / 6, two(2, 0.5), stage(4, 0.5, True), picks=())
    assert numbers == [0] * 4 + [1] * 4 and names == ["first"] * 4 + ["last"] * 4


@pytest.mark.parametrize("recycled", [0.4, 0.6])
def test_methods_with_several_picks_at_a_cut(recycled):
    model = fresh("llava")
    report = run(model, "sparsevlm", models.inputs(model, ONE), recycled=recycled).report
    (segment,) = report.segments
    names = [report.picks[pick] for pick in segment.taken]
    last = len(report.picks) - 2
    assert set(names) == {"rated", "recycled"} and set(segment.taken.tolist()) == {last, last + 1}
    assert torch.equal(segment.stages >= 0, segment.depths == report.layers)
    viz.overlay(report, Image.new("RGB", (32, 32)), stages=True)
