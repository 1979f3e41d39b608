"""Every rule against its loop, on the whole map that rules never make, and two cases each worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops_stages as loops
from tests.fidelity.test_published_methods import attention, maps
from vtprune.kernels import attention as kernels
from vtprune.readings import BlockAttention, Projection
from vtprune.stages.rules import (
    ClsOrReceived,
    ClsRow,
    EncoderFeatures,
    Keys,
    MoreVaried,
    PageRank,
    Received,
    SinkRows,
)

SIZES = [(1, (1, 1)), (2, (2, 3)), (3, (5, 3)), (1, (7, 5))]
"""Pictures and their grid."""
RULES = [
    (ClsOrReceived(), loops.importance),
    (Received(), loops.received),
    (MoreVaried(), loops.more_varied),
    (SinkRows(threshold=1.1), lambda weights, has_cls: loops.sink_rows(weights, has_cls, 1.1)),
    (SinkRows(threshold=34.76), lambda weights, has_cls: loops.sink_rows(weights, has_cls, 34.76)),
    (PageRank(steps=1), lambda weights, has_cls: loops.page_rank(weights, has_cls, 1)),
    (PageRank(steps=5), lambda weights, has_cls: loops.page_rank(weights, has_cls, 5)),
]


@pytest.mark.parametrize(("rule", "loop"), RULES, ids=[str(rule) for rule, _ in RULES])
@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize(("S", "grid"), SIZES)
@pytest.mark.parametrize("block", [256, 4])
def test_the_rule_is_the_loop(
    rule: Any, loop: Any, has_cls: bool, S: int, grid: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_QUERIES_PER_BLOCK", block)
    seen = attention(S, grid, has_cls, seed=3)
    found = rule(seen)
    assert found.shape == (S, grid[0] * grid[1])
    np.testing.assert_allclose(found.numpy(), [loop(own, has_cls) for own in maps(seen)], atol=1e-6, rtol=0)


def of_maps(*heads: list[list[float]], has_cls: bool) -> BlockAttention:
    """An attention whose map is the given one: logits are the logarithms of its shares."""
    weights = torch.tensor([heads], dtype=torch.float64)
    return BlockAttention(
        query=weights.log(), key=torch.eye(weights.shape[2]).expand(weights.shape), scale=1.0, has_cls=has_cls
    )


def by_hand(rule: Any, *heads: list[list[float]], has_cls: bool = False) -> list[float]:
    return rule(of_maps(*heads, has_cls=has_cls))[0].tolist()


THIRDS = [[1 / 3] * 3] * 2
"""Two patches that look everywhere alike, the CLS token included."""


def test_cls_row_by_hand() -> None:
    """Two heads give .3 and .5, .5 and .1 to the patches: .4 and .3. What patches pay does not count."""
    heads = ([[0.2, 0.3, 0.5], *THIRDS], [[0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]])
    assert by_hand(ClsRow(), *heads, has_cls=True) == pytest.approx([0.4, 0.3])
    assert by_hand(ClsOrReceived(), heads[0], has_cls=True) == pytest.approx([0.3, 0.5])


def test_received_by_hand() -> None:
    """Columns of .5, .9 and .5, .1: .7 and .3. With a CLS token it votes too: .1, .3, .2 and .3, .6, .3 over three."""
    assert by_hand(Received(), [[0.5, 0.5], [0.9, 0.1]]) == pytest.approx([0.7, 0.3])
    assert by_hand(ClsOrReceived(), [[0.5, 0.5], [0.9, 0.1]]) == pytest.approx([0.7, 0.3])
    with_cls = [[0.6, 0.1, 0.3], [0.1, 0.3, 0.6], [0.5, 0.2, 0.3]]
    assert by_hand(Received(), with_cls, has_cls=True) == pytest.approx([0.2, 0.4])


def test_more_varied_by_hand() -> None:
    """Patches pay .2 and .8 of their attention to patches, evenly: each gets .25, and pays a mean of .1 and .4.

    Where both pay .7 to one and .1 to the other, what is got varies and what is paid does not; without a CLS token it
    never does. The CLS token itself has no vote.
    """
    cls = [0.1, 0.1, 0.8]
    assert by_hand(MoreVaried(), [cls, [0.8, 0.1, 0.1], [0.2, 0.4, 0.4]], has_cls=True) == pytest.approx([0.1, 0.4])
    assert by_hand(MoreVaried(), [cls, [0.2, 0.7, 0.1], [0.2, 0.7, 0.1]], has_cls=True) == pytest.approx([0.7, 0.1])
    assert by_hand(MoreVaried(), [[0.5, 0.5], [0.9, 0.1]]) == pytest.approx([0.7, 0.3])


def test_sink_rows_by_hand() -> None:
    """Patches get .6, .2, .2, a mean of a third: above 1.5 times that only the first lies, which pays .6, .3, .1.

    Where none lies above the threshold it is the first all the same, and above half the mean all lie.
    """
    weights = [[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.6, 0.2, 0.2]]
    assert by_hand(SinkRows(threshold=1.5), weights) == pytest.approx([0.6, 0.3, 0.1])
    assert by_hand(SinkRows(threshold=34.76), weights) == pytest.approx([0.6, 0.3, 0.1])
    assert by_hand(SinkRows(threshold=0.5), weights) == pytest.approx([0.6, 0.2, 0.2])


def test_page_rank_by_hand() -> None:
    """Halves vote .7 and .3 at first, then .7 x .5 + .3 x .9 = .62. A head that votes alike holds .5 and .5.

    Both heads together are the roots of (.49 + .25) / 2 and (.09 + .25) / 2.
    """
    weights = [[0.5, 0.5], [0.9, 0.1]]
    assert by_hand(PageRank(steps=1), weights) == pytest.approx([0.7, 0.3])
    assert by_hand(PageRank(steps=2), weights) == pytest.approx([0.62, 0.38])
    assert by_hand(PageRank(steps=1), weights, [[0.5, 0.5]] * 2) == pytest.approx([0.37**0.5, 0.17**0.5])


def test_vectors_by_hand() -> None:
    """Keys 1, 2, 3 and 3, 4, 7 of two heads: 2, 3, 5 on average, first the CLS token; features as they come."""
    key = torch.tensor([[[[1.0], [2.0], [3.0]], [[3.0], [4.0], [7.0]]]])
    assert Keys()(BlockAttention(query=key, key=key, scale=1.0, has_cls=True)).tolist() == [[[3.0], [5.0]]]
    assert Keys()(BlockAttention(query=key, key=key, scale=1.0, has_cls=False)).tolist() == [[[2.0], [3.0], [5.0]]]
    inputs = torch.tensor([[[1.5, 2.0]]], dtype=torch.float16)
    read = EncoderFeatures()(Projection(inputs=inputs, projector=torch.nn.Identity()))
    assert read.dtype == torch.float32
    assert read.tolist() == [[[1.5, 2.0]]]
