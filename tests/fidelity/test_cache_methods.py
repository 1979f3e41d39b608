"""MustDrop, ZipVL and LOOK-M: their stages against loops and by hand. Whole caches are rewritten in tests/contracts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity.test_inside_methods import evidence
from tests.fidelity.test_published_methods import drawn, pictures
from vtprune import Pick, Pipeline
from vtprune.catalog import build
from vtprune.errors import InvalidOption
from vtprune.glances import RowAttention
from vtprune.picking import mixed
from vtprune.pipeline import CacheStage, LayerStage
from vtprune.schedule import Schedule
from vtprune.stages.counters import Mass, Negligible
from vtprune.stages.filters import DualFilter, Passing
from vtprune.stages.glances import (
    AttentionWhereSeen,
    MassiveHeads,
    MeanAttention,
    PeakAttention,
    SymmetricText,
    Undecayed,
)
from vtprune.stages.mergers import IntoNearest
from vtprune.stages.scorers import Constant, Given, Glanced, Importance
from vtprune.stages.selectors import TopK
from vtprune.types import Budget, Selection, VisualTokens

LEAST = {"least_overall": 0.06, "least_single": 0.09, "keys": 0.2}


def tokens(N: int, **found: Any) -> VisualTokens:
    named = {name: torch.tensor([values], dtype=torch.float32) for name, values in found.items()}
    return pictures(torch.zeros(1, N, 2), (1, N), **named)


def filtered(weights: np.ndarray, importance: np.ndarray, visual: slice, k: int) -> tuple[list[int], int]:
    """arXiv 2411.10803: keys by the encoder; of the others those with a share of all attention, or much of one word."""
    rows = weights.mean(axis=0)[:, visual]
    whole, single = rows.sum(axis=0), rows.max(axis=0)
    N = len(importance)
    keys = sorted(range(N), key=lambda j: (-importance[j], j))[: math.ceil(LEAST["keys"] * N)]
    passes = [
        j
        for j in range(N)
        if j not in keys and (whole[j] >= LEAST["least_overall"] * whole.sum() or single[j] >= LEAST["least_single"])
    ]
    others = [j for j in range(N) if j not in keys and j not in passes]
    order = [j for tier in (keys, passes, others) for j in sorted(tier, key=lambda j: (-whole[j], j))]
    return sorted(order[:k]), len(keys) + len(passes)


@pytest.mark.parametrize("k", [1, 3, 6, 12, 19])
@pytest.mark.parametrize("seed", range(4))
def test_mustdrop_is_the_loop(k: int, seed: int) -> None:
    """Twenty tokens in front of six words, four heads, two pictures."""
    generator = torch.Generator().manual_seed(seed)
    weights = (2 * torch.randn(2, 4, 6, 30, generator=generator)).softmax(dim=3)
    importance = torch.rand(2, 20, generator=generator)
    visual = slice(4, 24)
    pipeline = build("mustdrop", {"vision": False, "adaptive": True, **LEAST})
    seen = evidence(pipeline, weights, visual) | {"importance": importance}
    stack = pictures(torch.zeros(2, 20, 2), (4, 5), **seen)
    expected = [filtered(w, i, visual, k) for w, i in zip(weights.numpy(), importance.numpy(), strict=True)]
    assert any(4 < count < 20 for _, count in expected), "the filter decides"
    for cut in pipeline.inside:
        assert cut.choice.run(stack, k).keep.tolist() == [kept for kept, _ in expected]
        assert cut.counter is not None
        assert cut.counter(stack, 20).tolist() == [count for _, count in expected]


def test_the_dual_filter_by_hand() -> None:
    """Of a sum of 20 a tenth is 2: tokens 0 and 3 pass by that, token 4 by a single word; token 1 is the key."""
    dual = DualFilter(
        overall=Given(name="all"), single=Given(name="one"), importance=Given(name="worth"), least_overall=0.1, keys=0.1
    )
    stack = tokens(6, all=[2, 1, 1, 14, 1, 1], one=[0, 0, 0, 0, 0.001, 0], worth=[0, 9, 0, 0, 0, 0])
    assert dual.tiers(stack).tolist() == [[1, 2, 0, 1, 1, 0]]
    assert Passing(filter=dual)(stack, 6).tolist() == [4]
    assert TopK()(stack, dual(stack), 4, None).tolist() == [[1, 3, 0, 4]]


def test_mustdrop_protects_whom_the_encoder_looked_at_by_hand() -> None:
    """The second token gets nothing from the words, and stays."""
    pipeline = build("mustdrop", {"vision": False, "keys": 0.25})
    rows = [[[0.4, 0.0, 0.3, 0.2, 0.1]]]
    seen = evidence(pipeline, [rows], slice(0, 4)) | {"importance": torch.tensor([[0.1, 0.9, 0.1, 0.1]])}
    stack = pictures(torch.zeros(1, 4, 2), (2, 2), **seen)
    assert pipeline.inside[0].choice.run(stack, 2).keep.tolist() == [[0, 1]]


def test_the_schedule_of_mustdrop() -> None:
    """Drop points behind layers 2, 6, 10 and 14 of 32, each share the half of the one before."""
    pipeline = build("mustdrop", {"vision": False})
    points = [(cut.at, cut.keep) for cut in pipeline.inside]
    schedule = Schedule.of(points, depth=32)
    assert schedule.layers == (3, 7, 11, 15)
    average = (3 + 4 / 2 + 4 / 4 + 4 / 8 + 17 / 16) / 32
    assert schedule.counts(576, Budget(keep=average)) == (576, 288, 144, 72, 36)


def test_attention_where_seen_by_hand() -> None:
    """Keys 0 to 3, rows at 2 and 3, one head: key 3 is seen by the second row only, and keeps what that pays."""
    weights = torch.tensor([[[[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.1, 0.4]]]])
    real, own = torch.tensor([[True, True]]), torch.tensor([[2, 3]])
    seen = RowAttention(weights=weights, real=real, own=own, visual=torch.ones(1, 4, dtype=torch.bool))
    assert torch.allclose(AttentionWhereSeen()(seen), torch.tensor([[0.375, 0.25, 0.175, 0.4]]))
    assert torch.allclose(PeakAttention()(seen), torch.tensor([[0.5, 0.25, 0.25, 0.4]]))
    padded = RowAttention(weights=weights, real=torch.tensor([[False, True]]), own=own, visual=seen.visual)
    for rule in (AttentionWhereSeen(), PeakAttention(), MeanAttention()):
        assert torch.allclose(rule(padded), weights[:, 0, 1])


@pytest.mark.parametrize("seed", range(4))
def test_negligible_is_the_loop(seed: int) -> None:
    worth = torch.rand(3, 15, generator=torch.Generator().manual_seed(seed)).numpy() / 20
    expected = []
    for own in worth:
        lost, dropped = 0.0, 0
        for value in sorted(own):
            lost += value
            dropped += lost <= 0.07
        expected.append(15 - dropped)
    stack = pictures(torch.zeros(3, 15, 2), (3, 5), worth=worth)
    assert Negligible(scorer=Given(name="worth"), share=0.07)(stack, 15).tolist() == expected


def test_negligible_by_hand() -> None:
    """0.01 and 0.02 go, another 0.03 would be 0.06; nothing goes of what is nowhere negligible, all of nothing."""
    rule = Negligible(scorer=Given(name="worth"), share=0.05)
    assert rule(tokens(4, worth=[0.02, 0.5, 0.01, 0.03]), 4).tolist() == [2]
    assert rule(tokens(3, worth=[0.3, 0.3, 0.4]), 3).tolist() == [3]
    assert rule(tokens(3, worth=[0.0, 0.0, 0.0]), 3).tolist() == [0]


def test_half_the_way_to_the_mean_by_hand() -> None:
    """Token 0 takes 1 and 2 over: (4 + (4 + 8) / 2 + (4 + 0) / 2) / 3 = 4; token 3 stays alone."""
    stack = pictures(torch.tensor([[[4.0, 0.0], [8.0, 0.1], [0.5, 0.1], [0.0, 3.0]]]), (2, 2))
    selection = Selection(keep=torch.tensor([[0, 3]]), taken=torch.zeros(1, 2, dtype=torch.long), counts=(2,))
    groups = IntoNearest(halfway=True)(stack, selection)
    values = torch.tensor([[[4.0], [8.0], [0.0], [7.0]]])
    assert torch.allclose(mixed(groups, values, selection).rows[0, :, 0], torch.tensor([4.0, 7.0]))
    one_each = mixed(groups, torch.eye(4)[None], selection).rows
    assert torch.allclose(one_each, torch.tensor([[[2 / 3, 1 / 6, 1 / 6, 0], [0, 0, 0, 1.0]]]))


def test_a_random_mixture_half_the_way() -> None:
    stack = pictures(drawn(2, (3, 4), 8), (3, 4))
    selection = Pipeline(name="p", picks=(Pick(name="p", scorer=Constant(), selector=TopK()),)).run(stack, 4)
    mean, half = (
        mixed(merger(stack, selection), torch.eye(12).expand(2, -1, -1), selection).rows
        for merger in (IntoNearest(), IntoNearest(halfway=True))
    )
    own = torch.nn.functional.one_hot(selection.keep, 12).float()
    assert torch.allclose(half, (mean + own) / 2)


def from_all(rule: Any, rows: Any = "all") -> Pick:
    return Pick(name="one", scorer=Glanced(rule=rule, rows=rows), selector=TopK())


PICK = Pick(name="one", scorer=Glanced(rule=MeanAttention(), rows="all"), selector=TopK())
NO_MEANS = (AttentionWhereSeen(), PeakAttention(), MassiveHeads(), SymmetricText(), Undecayed(rule=PeakAttention()))
"""Rules whose blocks of rows do not average to what they make of all."""
COUNTER = Mass(scorer=Glanced(rule=MeanAttention()))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CacheStage(picks=(PICK,), heads=True, sparse=True),
        lambda: CacheStage(picks=(PICK,), heads=True, counter=COUNTER),
        lambda: CacheStage(picks=(PICK,), merger=IntoNearest()),
        lambda: CacheStage(picks=()),
        *(lambda rule=rule: CacheStage(picks=(from_all(rule),)) for rule in NO_MEANS),
        lambda: CacheStage(picks=(Pick(name="one", scorer=Importance(), selector=TopK()),)),
        lambda: Pipeline(name="both", picks=(PICK,), cache=CacheStage(picks=(PICK,))),
        lambda: Pipeline(name="trims", picks=(PICK,), trims=True),
        lambda: LayerStage(at=0.5, keep=0.5, picks=(PICK,)),
        lambda: build("zipvl", {"mass": 1.0}),
        lambda: build("mustdrop", {"keys": 1.5}),
    ],
)
def test_stages_that_do_not_go_together_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidOption):
        wrong()


def test_only_means_over_rows_look_from_all_of_them() -> None:
    for rule in (MeanAttention(), Undecayed(rule=MeanAttention())):
        CacheStage(picks=(from_all(rule),))
    for rule in NO_MEANS:
        CacheStage(picks=(from_all(rule, "sampled"),))
        with pytest.raises(InvalidOption, match=rf"'{rule.name}' of rows='all'.* mean over rows"):
            CacheStage(picks=(from_all(rule),))
