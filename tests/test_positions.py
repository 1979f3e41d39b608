"""Compaction of position ids: exactly the vacated ids close."""

from __future__ import annotations

import random

import pytest
import torch

from tests.contracts.oracle import compacted
from vtprune.positions import compact


def test_keeping_everything_is_the_identity_also_with_gaps() -> None:
    """A clip with frames at 2, 6, 10: nothing was dropped, so nothing moves."""
    positions = torch.tensor([[0, 1, 2, 6, 10, 11]])
    every = torch.ones(1, 6, dtype=torch.bool)
    moved, shift = compact(positions, every, every)
    assert moved.tolist() == positions.tolist()
    assert shift.tolist() == [[0]]


def test_vacated_ids_close_and_old_gaps_stay() -> None:
    positions = torch.tensor([[0, 1, 2, 6, 10, 11]])
    kept = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    moved, shift = compact(positions, torch.ones_like(kept), kept)
    assert moved[kept].tolist() == [0, 1, 5, 9, 10]
    assert shift.tolist() == [[1]]


def test_an_id_stays_occupied_while_any_axis_of_a_kept_token_has_it() -> None:
    """2 x 2 tokens at (0, h, w): dropping one corner vacates nothing, dropping a column vacates its w and no more."""
    grid = torch.tensor([[[0, 0, 0, 0, 3]], [[1, 1, 2, 2, 3]], [[1, 2, 1, 2, 3]]])
    every = torch.ones(1, 5, dtype=torch.bool)
    corner = torch.tensor([[1, 1, 1, 0, 1]]).bool()
    assert torch.equal(compact(grid, every, corner)[0], grid)
    row = torch.tensor([[1, 0, 0, 0, 1]]).bool()
    moved, shift = compact(grid, every, row)
    assert moved[:, 0, [0, 4]].tolist() == [[0, 2], [1, 2], [1, 2]]
    assert shift.tolist() == [[1]]


def test_padding_occupies_nothing() -> None:
    positions = torch.tensor([[0, 0, 0, 1, 2, 3]])
    real = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    kept = torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()
    moved, shift = compact(positions, real, kept)
    assert moved[kept].tolist() == [0, 1, 2]
    assert shift.tolist() == [[1]]


@pytest.mark.parametrize("axes", [1, 3])
def test_random_cuts_are_those_of_the_loop(axes: int) -> None:
    draw = random.Random(axes)
    for _ in range(50):
        L = draw.randint(1, 30)
        positions = torch.tensor([[draw.randint(0, 40) for _ in range(L)] for _ in range(axes)])
        kept = [i for i in range(L) if draw.random() < 0.6] or [0]
        expected, vacated = compacted(positions, kept)
        mask = torch.zeros(1, L, dtype=torch.bool)
        mask[0, kept] = True
        given = positions if axes == 1 else positions[:, None]
        moved, shift = compact(given, torch.ones_like(mask), mask)
        assert moved.reshape(axes, L)[:, kept].tolist() == expected.tolist()
        assert shift.tolist() == [[vacated]]
