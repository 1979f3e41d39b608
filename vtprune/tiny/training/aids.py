"""What only training needs: linear probes on the tower's tokens, and the tokens of a perfect tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vtprune.tiny.scenes import COLORS, NUMBERS, PLACES, SHAPES
from vtprune.tiny.training.concepts import HUES, PEERS, WHATS, Cells
from vtprune.tiny.training.models import WIDTH
from vtprune.tiny.words import WORD_IDS

COMBINATIONS = len(COLORS) * len(SHAPES) + 10
"""What a whole picture can hold: every shape in every colour, and every digit."""


class Probes(nn.Module):
    """Linear readings of what the tower knows of every cell; an `overview` where it has places and a CLS token."""

    def __init__(self, width: int, side: int, *, overview: bool) -> None:
        super().__init__()
        self.what = nn.Linear(width, WHATS)
        self.hue = nn.Linear(width, HUES)
        self.peers = nn.Linear(width, PEERS)
        self.centre = nn.Linear(width, 1)
        self.overview = Overview(width, side) if overview else None


class Overview(nn.Module):
    """Linear readings of where a cell is, and of the whole picture from the CLS token of two layers."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.row = nn.Linear(width, side)
        self.column = nn.Linear(width, side)
        self.whole = nn.Linear(width, COMBINATIONS)
        self.last = nn.Linear(width, COMBINATIONS)


class ThingReadings(nn.Module):
    """Linear readings of the thing that a word names: its row and column, its colour, and what it is."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.row = nn.Linear(WIDTH, side)
        self.column = nn.Linear(WIDTH, side)
        self.hue = nn.Linear(WIDTH, HUES)
        self.what = nn.Linear(WIDTH, WHATS)


class IdealTokens(nn.Module):
    """The token of a perfect tower and projector: the sum of what, which colour, how many and, if `placed`, where.

    They begin as the embeddings of the words that name them, so that question and picture speak alike from the start.
    """

    def __init__(self, side: int, words: Tensor, *, placed: bool) -> None:
        super().__init__()
        self.side = side
        self.placed = placed
        self.sums = nn.Linear(WHATS + HUES + PEERS + 2 * side * placed + 1, WIDTH, bias=False)
        with torch.no_grad():
            self.sums.weight.copy_(_spell(side, words, placed))

    def forward(self, cells: Cells, index: Tensor) -> Tensor:
        """Tokens of the cells with those indices, (B, K, width); unsure cells count as empty."""
        classes = [(cells.what, WHATS), (cells.hue, HUES), (cells.peers, PEERS)]
        if self.placed:
            classes += [(index // self.side % self.side, self.side), (index % self.side, self.side)]
        facts = [one_hot(label.clamp(min=0), count).float() for label, count in classes]
        return self.sums(torch.cat([*facts, cells.centre[..., None]], dim=-1))


def _spell(side: int, words: Tensor, placed: bool) -> Tensor:
    """What each fact adds to a token, (width, facts)."""

    def embed(*names: str) -> Tensor:
        return words[[WORD_IDS[name] for name in names]]

    corners = embed(*PLACES)
    ramp = torch.linspace(-0.3, 0.3, side)[:, None]
    ramp = ramp + 0.2 * ramp.sign()
    down = corners[2] + corners[3] - corners[0] - corners[1]
    right = corners[1] + corners[3] - corners[0] - corners[2]
    places = (ramp * down, ramp * right) if placed else ()
    digits = embed(*"0123456789")
    centre = 0.06 * torch.randn(1, WIDTH)
    empty = 0.06 * torch.randn(3, WIDTH)
    names = (embed(*SHAPES), digits, empty[1:2], embed(*COLORS), empty[2:], embed(*NUMBERS[1:]))
    return torch.cat((empty[:1], *names, *places, centre)).T
