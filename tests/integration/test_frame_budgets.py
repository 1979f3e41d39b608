"""Budgets that parts share by their scores, and counters: exact sums, vanished frames, batches, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import models
from tests.fidelity import loops_stages as loops
from tests.fidelity.loops_video import shares
from tests.integration.common import CLIPS_OF, Frames, by_hand, kept_of, logits, write
from tests.models import Prompt
from vtprune import Pick, Pipeline
from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.stages.budgets import Proportional
from vtprune.stages.counters import Above, Mass, Outliers
from vtprune.stages.mergers import IntoNearest
from vtprune.stages.scorers import Given, Norm
from vtprune.stages.selectors import TopK
from vtprune.types import Ordinal, Part, VisualTokens

CLIP = Prompt(clips=((32, 32, 8),), seed=3)
OTHER_CLIP = Prompt(clips=((32, 32, 8),), text_after=7, seed=4)
PICTURES = (Prompt(images=((32, 32),), seed=1), Prompt(images=((32, 32),), text_after=7, seed=9))
COUNTERS = {
    "mass": (Mass(scorer=Given(name="worth"), share=0.5), lambda own: loops.mass(own, 0.5)),
    "above": (Above(scorer=Given(name="worth")), lambda own: sum(score >= max(own) / 2 for score in own)),
    "outliers": (Outliers(scorer=Given(name="worth"), factor=2.0), lambda own: 2 * loops.outliers(own)),
}


def clip_of(sizes: list[int], scores: Tensor) -> VisualTokens:
    """Stacked clips whose frames have a score each."""
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = tuple(Part(start=stop - size, stop=stop, kind="frame", grid=(1, size)) for stop, size in zip(stops, sizes))
    spread = scores.repeat_interleave(torch.tensor(sizes), dim=1)
    return VisualTokens(
        features=torch.zeros(len(scores), sum(sizes), 2),
        parts=parts,
        ordinals=tuple(Ordinal(segment=i) for i in range(len(scores))),
        evidence={"frames": spread},
    )


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sizes", [[16] * 8, [9] * 3, [4, 16, 1, 9], [7]])
@pytest.mark.parametrize("share", [0.02, 0.25, 0.6, 0.97])
@pytest.mark.parametrize(("floor", "cap"), [(0, 1.0), (2, 1.0), (0, 0.5), (1, 0.3)])
def test_proportional_is_the_loop(power: float, sizes: list[int], share: float, floor: int, cap: float) -> None:
    scores = torch.randn(6, len(sizes), generator=torch.Generator().manual_seed(len(sizes)), dtype=torch.float64) ** 3
    k = max(1, int(share * sum(sizes)))
    budget = Proportional(scorer=Frames(), power=power, floor=floor, cap=cap)
    found = budget(clip_of(sizes, scores), k).tolist()
    assert found == [shares(own, sizes, k, power, floor=floor, cap=cap) for own in scores.tolist()]
    assert all(sum(own) == k and all(0 <= n <= size for n, size in zip(own, sizes)) for own in found)


def given(scores: list[float], sizes: list[int], k: int, power: float = 1.0, **bounds: Any) -> list[int]:
    budget = Proportional(scorer=Frames(), power=power, **bounds)
    (found,) = budget(clip_of(sizes, torch.tensor([scores])), k).tolist()
    return found


def test_proportional_by_hand() -> None:
    """1 : 2 : 1 of 8; squared 1 : 4 : 1 of 6; of 7 the first of equal remainders has one more."""
    assert given([0.5, 1.0, 0.5], [9, 9, 9], 8) == [2, 4, 2]
    assert given([0.5, 1.0, 0.5], [9, 9, 9], 6, power=2) == [1, 4, 1]
    assert given([1.0, 1.0, 1.0], [9, 9, 9], 7) == [3, 2, 2]


def test_what_exceeds_a_part_goes_to_the_others_by_weight() -> None:
    """9 : 1 : 0 of 8 would be 7.2, 0.8 and 0; four fit, and the second takes the others."""
    assert given([9.0, 1.0, 0.0], [4, 4, 4], 8) == [4, 4, 0]
    assert given([9.0, 1.0, 0.0], [4, 4, 4], 10) == [4, 4, 2]
    assert given([12.0, 2.0, 1.0], [8, 8, 8], 14) == [8, 4, 2]
    assert given([5.0, 1.0], [4, 4], 8) == [4, 4]


def test_floor_and_cap_by_hand() -> None:
    """A floor of 2 takes 6 of 10, and 8 : 1 : 1 of 4 are 3.2, .4 and .4. A cap of half of 8 is 4; where all are at
    theirs, what is left goes on by weight."""
    assert given([8.0, 1.0, 1.0], [8, 8, 8], 10, floor=2) == [5, 3, 2]
    assert given([8.0, 1.0, 1.0], [8, 8, 8], 2, floor=2) == [2, 0, 0]
    assert given([8.0, 1.0, 1.0], [8, 8, 8], 10, cap=0.5) == [4, 3, 3]
    assert given([8.0, 1.0, 1.0], [8, 8, 8], 17, cap=0.5) == [8, 5, 4]


@pytest.mark.parametrize("wrong", [{"floor": -1}, {"floor": 1.5}, {"cap": 0.0}, {"cap": 1.1}])
def test_floor_and_cap_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(wrong))):
        Proportional(scorer=Frames(), **wrong)


def test_parts_without_a_score_get_nothing_and_parts_all_alike_their_size() -> None:
    assert given([0.0, 1.0, 0.0, 1.0], [8, 8, 8, 8], 6) == [0, 3, 0, 3]
    assert given([-3.0, 1.0, -1.0, 1.0], [8, 8, 8, 8], 6) == [0, 3, 0, 3]
    for equal in (1.0, 0.3, 0.0, -2.0):
        assert given([equal] * 4, [8, 8, 8, 8], 12) == [3, 3, 3, 3]
        assert given([equal] * 2, [12, 4], 8) == [6, 2]


@pytest.mark.parametrize("wrong", [0, -1.0, True, "2", None])
def test_the_power_is_checked(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="power"):
        Proportional(scorer=Frames(), power=wrong)


def quota(*, merger: Any = None, power: float = 1.0) -> Pipeline:
    pick = Pick(name="long", scorer=Norm(), selector=TopK())
    return Pipeline(name="quota", picks=(pick,), frames=Proportional(scorer=Frames(), power=power), merger=merger)


def per_part(segment: Any) -> list[int]:
    """Kept tokens of every part, separators left out of the count."""
    bounds = [sum(part.tokens for part in segment.parts[:i]) for i in range(len(segment.parts) + 1)]
    return [sum(low <= token < high for token in segment.keep.tolist()) for low, high in itertools.pairwise(bounds)]


def weights_for(count: int) -> list[float]:
    """Every second frame has none."""
    return [float(i // 2 + 1) if i % 2 else 0.0 for i in range(count)]


@pytest.mark.parametrize("merger", [None, IntoNearest()], ids=["pick", "merge"])
@pytest.mark.parametrize("name", CLIPS_OF)
def test_frames_without_weight_vanish(name: str, merger: Any) -> None:
    """The others keep the longest tokens, by their shares; the report tells of every part."""
    model = models.build(name)
    row = models.inputs(model, (CLIP,), "video")
    with vtprune.pruning(model, "random", keep=0.2) as pruner:
        write(model, row)
        sizes = [part.tokens for part in pruner.last.segments[0].parts]
    with vtprune.pruning(model, quota(merger=merger), keep=0.2) as pruner:
        with pruner.using(frames=[weights_for(len(sizes))]):
            written = write(model, row)
        (segment,), k = pruner.last.segments, math.floor(0.2 * sum(sizes) + 0.5)
        expected = shares(weights_for(len(sizes)), sizes, k, 1.0)
        assert per_part(segment) == expected
        assert segment.k == k == sum(expected)
        assert 0 in expected and max(expected) > 0
        assert pruner.last.length_before[0] - pruner.last.length_after[0] == sum(sizes) - k
        report = pruner.last
    assert written.shape[1] == 4
    if merger is None and segment.separators == 0:
        assert written[0].tolist() == by_hand(model, row, report, compact=report.positions == "compact")


@pytest.mark.parametrize("name", ["video_llava", "qwen2_5_vl"])
def test_a_batch_is_its_rows_alone(name: str) -> None:
    model = models.build(name)
    rows = [models.inputs(model, (prompt,), "video") for prompt in (CLIP, OTHER_CLIP)]
    with vtprune.pruning(model, quota(power=2), keep=0.3) as pruner:
        with pruner.using(frames=[torch.ones(1)] * 2), pytest.raises(UnsupportedCall, match="got 1 scores"):
            write(model, models.inputs(model, (CLIP, OTHER_CLIP), "video"))
        count = 8 if name == "video_llava" else 4
        weights = [weights_for(count), weights_for(count)[::-1]]
        alone = []
        for row, own in zip(rows, weights):
            with pruner.using(frames=[own]):
                alone.append((write(model, row).tolist()[0], kept_of(pruner.last)[0]))
        with pruner.using(frames=weights):
            written = write(model, models.inputs(model, (CLIP, OTHER_CLIP), "video")).tolist()
        assert list(zip(written, kept_of(pruner.last))) == alone


@pytest.mark.parametrize("merger", [None, IntoNearest()], ids=["pick", "merge"])
def test_the_pictures_of_a_prompt_share_its_budget(merger: Any) -> None:
    """The frames of a clip for InternVL: pictures of one tile, with one score for each; those without a weight vanish,
    and a batch is its prompts alone."""
    model = models.build("internvl")
    prompts = [Prompt(images=((32, 32),) * count, text_after=after, seed=count) for count, after in ((5, 4), (4, 7))]
    weights = [[[weight] for weight in weights_for(len(prompt.images))] for prompt in prompts]
    alone, reports = [], []
    with vtprune.pruning(model, quota(merger=merger), keep=0.25, per="prompt") as pruner:
        for prompt, own in zip(prompts, weights):
            row = models.inputs(model, (prompt,))
            with pruner.using(frames=[own]):
                alone.append((write(model, row).tolist()[0], kept_of(pruner.last)))
            reports.append(pruner.last)
            k = math.floor(0.25 * 16 * len(own) + 0.5)
            expected = shares([score for (score,) in own], [16] * len(own), k, 1.0)
            assert [len(segment.keep) for segment in pruner.last.segments] == expected
            assert expected[0] == expected[2] == 0 and sum(expected) == k
            assert pruner.last.length_before[0] - pruner.last.length_after[0] == 16 * len(own) - k
        with pruner.using(frames=weights):
            written, kept = write(model, models.inputs(model, prompts)).tolist(), kept_of(pruner.last)
    assert list(zip(written, (kept[:5], kept[5:]))) == alone
    for prompt, report, (answer, _) in zip(prompts, reports, alone):
        assert merger or answer == by_hand(model, models.inputs(model, (prompt,)), report, compact=True)


def test_pictures_of_one_part_and_everything_kept_need_no_shares() -> None:
    """And a token protected in a frame that vanishes is an error."""
    model = models.build("llava")
    row = models.inputs(model, PICTURES[:1])
    with vtprune.pruning(model, quota(), keep=5) as pruner, pruner.using(frames=[[1.0]]):
        write(model, row)
        assert pruner.last.kept == 5
    model = models.build("video_llava")
    row = models.inputs(model, (CLIP,), "video")
    plain = logits(model, row)
    with vtprune.pruning(model, quota(), keep=1.0):
        assert torch.equal(logits(model, row), plain)
    with vtprune.pruning(model, quota(), keep=0.2) as pruner:
        with pruner.using(frames=[weights_for(8)], protect=[[0]]), pytest.raises(UnsupportedCall, match="only 0 of 16"):
            write(model, row)
        with pruner.using(frames=[weights_for(8)], protect=[[16]]):
            write(model, row)
            assert 16 in kept_of(pruner.last)[0]


def counted(name: str) -> Pipeline:
    counter, _ = COUNTERS[name]
    pick = Pick(name="worth", scorer=Given(name="worth"), selector=TopK())
    return Pipeline(name=name, picks=(pick,), counter=counter)


def worths() -> list[Tensor]:
    """One token worth far more than the others, and many worth something."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(16, generator=generator) + 1
    flat[4:9] += 5
    single = torch.rand(16, generator=generator) * 0.01
    single[7] = 3.0
    return [single, flat]


@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.parametrize("keep", [2, 7, 15, 16, 20])
def test_counters_keep_what_a_picture_is_worth(name: str, keep: int) -> None:
    """The best ones, at most the budget and one at least; different pictures differently, in a batch as alone."""
    model = models.build("llava")
    rows = [models.inputs(model, (prompt,)) for prompt in PICTURES]
    _, loop = COUNTERS[name]
    counts = [min(keep, max(1, loop(own.double().numpy()))) for own in worths()]
    best = [sorted(own.argsort(descending=True)[:k].tolist()) for own, k in zip(worths(), counts)]
    with vtprune.pruning(model, counted(name), keep=keep) as pruner:
        alone = []
        for row, own, expected in zip(rows, worths(), best):
            with pruner.using(worth=[own]):
                alone.append(write(model, row).tolist()[0])
            assert kept_of(pruner.last) == [expected]
        with pruner.using(worth=worths()):
            together = write(model, models.inputs(model, PICTURES)).tolist()
        assert kept_of(pruner.last) == best
        assert together == alone
    assert counts[0] != counts[1] or keep == 2


def test_a_counter_keeps_one_where_nothing_is_worth_anything() -> None:
    model = models.build("llava")
    with vtprune.pruning(model, counted("mass"), keep=5) as pruner, pruner.using(worth=[torch.zeros(16)]):
        write(model, models.inputs(model, PICTURES[:1]))
        assert kept_of(pruner.last) == [[0]]
        with pruner.using(protect=[[3, 8, 9]]):
            write(model, models.inputs(model, PICTURES[:1]))
            assert kept_of(pruner.last) == [[3, 8, 9]]


def test_a_counter_and_shares_of_frames_are_refused_together() -> None:
    counter, _ = COUNTERS["mass"]
    with pytest.raises(InvalidOption, match="do not go together"):
        Pipeline(name="both", picks=quota().picks, frames=quota().frames, counter=counter)
