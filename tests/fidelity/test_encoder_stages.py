"""Every stage inside an encoder against its loop, over several blocks; its schedule; two cases each worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops_encoder as loops
from tests.fidelity.test_methods import at_angles
from vtprune.catalog import build
from vtprune.errors import InvalidOption
from vtprune.readings import BlockAttention
from vtprune.runtime.encoder_cut import Going
from vtprune.stages.encoder import Flow, MatchAndMerge, MergeWindows, RankAndPrune
from vtprune.types import EncoderCut

METHODS = ("tome", "flowcut", "mustdrop_vision", "zero_tprune")
WALKS = [(1, 16, 4, 2), (2, 49, 20, 3), (3, 25, 17, 4), (2, 30, 11, 5), (2, 36, 36, 3), (1, 9, 1, 4)]
"""Pictures, patches, how many stay, and after how many blocks."""
SCHEDULES = [(n, k) for n in (1, 2, 9, 16, 48, 64, 576) for k in (1, 2, 7, 16, 47, 192, 576) if k <= n]


def attention(S: int, n: int, has_cls: bool, seed: int) -> BlockAttention:
    """Queries, keys and values of a block of two heads."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, S, 2, n + has_cls, 4)
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5
    return BlockAttention(query=query, key=key, value=value, scale=0.5, has_cls=has_cls)


def block_of(seen: BlockAttention, patches: torch.Tensor, row: int) -> loops.Block:
    """One picture of it, for the loop."""
    return loops.Block(
        query=seen.query[row].numpy(),
        key=seen.key[row].numpy(),
        value=seen.value[row].numpy(),
        scale=seen.scale,
        first=int(seen.has_cls),
        patches=patches[row].double().numpy(),
    )


@pytest.mark.parametrize(
    ("method", "has_cls"), [(name, cls) for name in METHODS for cls in (True, False) if cls or name != "flowcut"]
)
@pytest.mark.parametrize(("S", "n", "k", "blocks"), WALKS)
def test_the_walk_through_the_blocks_is_the_loop(
    method: str, S: int, n: int, k: int, blocks: int, has_cls: bool
) -> None:
    """What stays, what it holds and what it is a mean of, after every block; then in which order it would go."""
    stage = build(method).encoder
    patches = torch.randn(S, n, 5, generator=torch.Generator().manual_seed(n))
    counts = stage.counts(n, k, blocks)
    assert list(counts) == loops.counts_of(method, n, k, blocks)
    going, walks = Going(patches, counts), [loops.Walk(n) for _ in range(S)]
    for number, count in enumerate(counts):
        seen = attention(S, patches.shape[1], has_cls, seed=100 * n + number)
        own = [block_of(seen, patches, row) for row in range(S)]
        patches = going.advance(patches, stage(seen, patches, count, going.memory))
        for row, (walk, block) in enumerate(zip(walks, own)):
            expected = walk.advance(block.patches, loops.cut_of(method, walk, block, count, number))
            assert going.alive[row].tolist() == walk.alive
            assert holds(going, row) == walk.holds
            np.testing.assert_allclose(patches[row].double().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(going.survivors().numpy(), [walk.worth() for walk in walks], atol=1e-6)
    assert going.size.tolist() == [[len(own) for own in walk.holds] for walk in walks]


def holds(going: Going, row: int) -> list[list[int]]:
    home = going.home[row].tolist()
    return [[i for i, place in enumerate(home) if place == own] for own in range(going.alive.shape[1])]


@pytest.mark.parametrize("blocks", [1, 2, 4, 23])
@pytest.mark.parametrize(("n", "k"), SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_schedules_end_at_the_budget_never_rise_and_are_the_loop(method: str, n: int, k: int, blocks: int) -> None:
    stage = build(method).encoder
    if method == "tome" and loops.tome_counts(n, k, blocks) is None:
        with pytest.raises(InvalidOption, match=f"in {blocks} blocks leaves"):
            stage.counts(n, k, blocks)
        return
    counts = stage.counts(n, k, blocks)
    assert counts[-1] == k
    assert len(counts) == blocks
    assert all(before >= after >= k for before, after in zip((n, *counts), counts))
    assert list(counts) == loops.counts_of(method, n, k, blocks)


@pytest.mark.parametrize(("n", "k"), SCHEDULES)
def test_tome_never_merges_more_than_half(n: int, k: int) -> None:
    counts = MatchAndMerge().counts(n, k, 23)
    assert all(after >= math.ceil(before / 2) for before, after in zip((n, *counts), counts))


def seen_as(key: torch.Tensor, query: Any = None, value: Any = None, *, cls: bool = False) -> BlockAttention:
    """One picture and one head of (1, n, d); without queries every token attends to all alike."""
    query = torch.zeros_like(key) if query is None else query
    value = None if value is None else value[:, None]
    return BlockAttention(query=query[:, None], key=key[:, None], value=value, scale=1.0, has_cls=cls)


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor([[[number] for number in numbers]])


def cut_lists(cut: EncoderCut) -> tuple[list[int], list[int]]:
    return cut.keep[0].tolist(), cut.into[0].tolist()


def test_tome_by_hand() -> None:
    """Angles 0, 10, 90, 180: the even patches 0 and 2 both lie nearest to 1 (10 and 80 degrees away), 0 nearer.

    With 30, 0, 100, 95 patch 2 merges first, into 3.
    """
    tome, patches = MatchAndMerge(), column(2.0, 4.0, 9.0, 7.0)
    assert cut_lists(tome(seen_as(at_angles(0, 10, 90, 180)), patches, 3, None)) == ([1, 2, 3], [0, 0, 1, 2])
    assert cut_lists(tome(seen_as(at_angles(0, 10, 90, 180)), patches, 2, None)) == ([1, 3], [0, 0, 0, 1])
    assert cut_lists(tome(seen_as(at_angles(30, 0, 100, 95)), patches, 3, None)) == ([0, 1, 3], [0, 1, 2, 2])


def test_means_over_two_blocks_by_hand() -> None:
    """2 and 4 become 3, which stands for two; merged with 9 later it makes (2 x 3 + 9) / 3 = 5. 7 stays alone."""
    patches = column(2.0, 4.0, 9.0, 7.0)
    going = Going(patches, (3, 2))
    patches = going.advance(patches, MatchAndMerge()(seen_as(at_angles(0, 10, 90, 180)), patches, 3, None))
    assert patches[0, :, 0].tolist() == [3.0, 9.0, 7.0]
    patches = going.advance(patches, MatchAndMerge()(seen_as(at_angles(0, 5, 180)), patches, 2, None))
    assert patches[0, :, 0].tolist() == [5.0, 7.0]
    assert (going.alive.tolist(), going.home.tolist(), going.size.tolist()) == ([[2, 3]], [[0, 0, 0, 1]], [[3.0, 1.0]])
    assert going.restored(patches)[0, :, 0].tolist() == [5.0, 5.0, 5.0, 7.0]
    assert going.survivors().tolist() == [[0.0, 0.0, 2.0, 1.5]]


def test_lost_patches_come_back_as_zeros() -> None:
    patches = column(2.0, 4.0, 9.0)
    going = Going(patches, (2,))
    scores = column(0.0, 1.0, 5.0, 3.0)
    cut = Flow()(seen_as(torch.zeros(1, 4, 1), value=scores, cls=True), patches, 2, None)
    assert going.restored(going.advance(patches, cut))[0, :, 0].tolist() == [0.0, 4.0, 9.0]
    assert going.survivors().tolist() == [[0.0, 2.0, 1.5]]


def test_flow_score_by_hand() -> None:
    """Attention and likeness alike for all: 2/3 of the length of the value.

    With keys of 0, 0, log 3 and values 1, log 2, log 6 both are 1/4 and 3/4: scores of log 2 / 2 and 3 log 6 / 2.
    """
    patches = column(0.0, 0.0, 0.0)
    flat = seen_as(torch.zeros(1, 4, 1), value=column(0.0, 3.0, -6.0, 1.5), cls=True)
    assert Flow()(flat, patches, 3, None).memory.tolist() == [[pytest.approx(2), pytest.approx(4), pytest.approx(1)]]
    key, value = column(0.0, 0.0, math.log(3)), column(1.0, math.log(2), math.log(6))
    seen = seen_as(key, torch.ones(1, 3, 1), value, cls=True)
    expected = [math.log(2) / 2, 3 * math.log(6) / 2]
    assert Flow()(seen, patches[:, :2], 2, None).memory[0].tolist() == pytest.approx(expected)


def test_flow_averages_over_blocks_by_hand() -> None:
    """Scores 2, 4, 1 after 4, 0, 9 make 3, 2, 5: the second goes. With momentum 0 the past is forgotten: the third."""
    flat = seen_as(torch.zeros(1, 4, 1), value=column(0.0, 3.0, -6.0, 1.5), cls=True)
    before, patches = torch.tensor([[4.0, 0.0, 9.0]]), column(0.0, 0.0, 0.0)
    cut = Flow()(flat, patches, 2, before)
    assert cut_lists(cut) == ([0, 2], [0, -1, 1])
    assert cut.memory[0].tolist() == pytest.approx([3.0, 2.0, 5.0])
    assert cut_lists(Flow(momentum=0.0)(flat, patches, 2, before)) == ([0, 1], [0, 1, -1])


def test_flow_schedule_by_hand() -> None:
    """Of 10 down to 2 in 4 blocks: 8 / sqrt(2) x 0.5 = 2.8 go at first, then none, then the rest.

    Of 24 blocks whose last but one makes the features, blocks 1, 3, ..., 21 prune, as the authors' do.
    """
    assert Flow(pace=0.5).counts(10, 2, 4) == (7, 7, 2, 2)
    assert Flow(pace=0.5).counts(10, 2, 1) == (2,)
    counts = Flow().counts(576, 64, 23)
    assert [block for block in range(23) if counts[block] < (576, *counts)[block]] == list(range(1, 22, 2))


def test_mustdrop_windows_by_hand() -> None:
    """4 x 4 in windows of 2 x 2: one of equal patches, one of 30 degrees apart, two of more; then one of 3 x 3."""
    angles = [0, 0, 0, 90, 0, 0, 180, 270, 0, 30, 0, 80, 30, 0, 80, 0]
    patches = at_angles(*angles)
    seen, drop = seen_as(torch.zeros(1, 16, 1)), MergeWindows(side=2)
    keep, into = cut_lists(drop(seen, patches, 13, None))
    assert keep == [2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert [into[i] for i in (0, 1, 4, 5)] == [2] * 4
    keep, into = cut_lists(drop(seen, patches, 10, None))
    assert keep == [2, 3, 5, 6, 7, 10, 11, 13, 14, 15]
    assert [into[i] for i in (8, 9, 12, 13)] == [7] * 4
    keep, into = cut_lists(MergeWindows()(seen, patches, 8, None))
    assert keep == [3, 7, 10, 11, 12, 13, 14, 15]
    assert [into[i] for i in (0, 1, 2, 4, 5, 6, 8, 9, 10)] == [2] * 9


@pytest.mark.parametrize(("n", "k"), [(25, 9), (24, 16), (16, 1), (10, 2)])
def test_mustdrop_in_a_single_block_keeps_by_attention_where_windows_are_too_few(n: int, k: int) -> None:
    """What is left to drop is a multiple of a window here, but there is one window, or none, in the grid."""
    seen, drop = attention(1, n, True, seed=n), MergeWindows()
    assert drop.counts(n, k, 1) == (k,)
    expected = loops.best(loops.importance(loops.attention_map(*maps(seen), 0.5), True), k)
    assert drop(seen, torch.randn(1, n, 3), k, None).keep[0].tolist() == sorted(expected)


def maps(seen: BlockAttention) -> tuple[np.ndarray, np.ndarray]:
    return seen.query[0].numpy(), seen.key[0].numpy()


def test_zero_tprune_by_hand() -> None:
    """All equal in rank, so by index: the lower half is 3, 4, 5. Of two that go one is 3, a copy of 0, and one is 5.

    If 5 is the copy, 4 goes as well. Of one that goes none goes for likeness.
    """
    patches = torch.zeros(1, 6, 1)
    copy_at_3, copy_at_5 = at_angles(0, 90, 180, 0, 45, 225), at_angles(0, 90, 180, 225, 45, 0)
    assert cut_lists(RankAndPrune()(seen_as(copy_at_3), patches, 4, None))[0] == [0, 1, 2, 4]
    assert cut_lists(RankAndPrune()(seen_as(copy_at_5), patches, 4, None))[0] == [0, 1, 2, 3]
    assert cut_lists(RankAndPrune()(seen_as(copy_at_3), patches, 5, None))[0] == [0, 1, 2, 3, 4]


def test_page_rank_decides_who_is_in_the_lower_half() -> None:
    """Every query looks at key 3: of four, 3 is the first in rank, so that 3 and 0 are the upper half."""
    key = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [9.0, 0.0]]])
    seen = seen_as(key, torch.tensor([[[1.0, 0.0]] * 4]))
    assert cut_lists(RankAndPrune()(seen, torch.zeros(1, 4, 1), 2, None))[0] == [0, 3]


@pytest.mark.parametrize("stage", [MatchAndMerge(), Flow(), MergeWindows(), RankAndPrune()], ids=str)
def test_where_nothing_goes_nothing_changes(stage: Any) -> None:
    """Also where a patch is infinite: no mean is taken."""
    patches = torch.tensor([[[1.0], [float("inf")], [3.0], [4.0]]])
    going = Going(patches, (4,))
    assert going.advance(patches, stage(attention(1, 4, True, 0), patches, 4, None)) is patches
    assert going.size.tolist() == [[1.0] * 4]
