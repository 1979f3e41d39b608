"""What each visual token shows, as numbers: targets of the tower, and what ideal tokens are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtprune.tiny.scenes import COLORS, NUMBERS, SHAPES, Scene, Thing

WHATS = 1 + len(SHAPES) + 10
"""Nothing, a shape, or a digit."""
HUES = 1 + len(COLORS)
PEERS = len(NUMBERS)
"""How many things of the same shape the picture holds, the thing itself among them; zero where there is no shape."""
UNSURE = -100
"""Label of a cell that a thing touches, but too little to be told."""
_CLEAR = 9.6
"""So many painted pixels make a cell show a thing: 15 % of one of 8 x 8."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Labels of B x N cells, row by row.

    `what`, `hue`, `peers`: class, or `UNSURE`. `owner`: index of the thing shown, or -1. `centre`: 1 in the cell that
    holds the centre of a thing. `share`: painted share of the cell.
    """

    what: Tensor
    hue: Tensor
    peers: Tensor
    owner: Tensor
    centre: Tensor
    share: Tensor

    def at(self, index: Tensor) -> Cells:
        """The cells with those indices; B x K."""
        return Cells(*(field.gather(1, index) for field in self._fields()))

    def to(self, device: str) -> Cells:
        """The same on a device."""
        return Cells(*(field.to(device) for field in self._fields()))

    def _fields(self) -> tuple[Tensor, ...]:
        return self.what, self.hue, self.peers, self.owner, self.centre, self.share


def label_cells(pictures: Sequence[Sequence[Scene]], patch: int) -> Cells:
    """Labels of every `patch` x `patch` field of pictures of one view each, or of clips of as many as they have frames.

    The views of a clip share their things; what a view does not show does not count in it.
    """
    rows = [
        [torch.cat(column) for column in zip(*(_label(view, patch) for view in views), strict=True)]
        for views in pictures
    ]
    return Cells(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _label(scene: Scene, patch: int) -> tuple[Tensor, ...]:
    side = len(scene.owner) // patch
    share = torch.from_numpy(scene.coverage(patch)).float().flatten(1)
    best, owner = share.max(dim=0) if len(share) else (torch.zeros(side * side), torch.zeros(side * side).long())
    classes = torch.tensor([_classes(scene, thing) for thing in scene.things] or [(0, 0, 0)])[owner]
    clear, touched = best >= _CLEAR / patch**2, best > 0
    centre = torch.zeros(side * side)
    for thing in _seen(scene):
        centre[thing.y // patch * side + thing.x // patch] = 1
    unsure = torch.where(touched, UNSURE, 0)
    return (
        *torch.where(clear[:, None], classes, unsure[:, None]).T,
        torch.where(clear, owner, -1),
        centre,
        share.sum(dim=0),
    )


def label_things(scenes: Sequence[Scene], patch: int) -> Tensor:
    """Cell of the centre, hue and what of every thing: (B, things, 3), zeros where a scene has fewer."""
    most = max(1, *(len(scene.things) for scene in scenes))
    labels = torch.zeros(len(scenes), most, 3, dtype=torch.long)
    for i, scene in enumerate(scenes):
        side = len(scene.owner) // patch
        for k, thing in enumerate(scene.things):
            what, hue, _ = _classes(scene, thing)
            labels[i, k] = torch.tensor([thing.y // patch * side + thing.x // patch, hue, what])
    return labels


def _classes(scene: Scene, thing: Thing) -> tuple[int, int, int]:
    """What, hue and peers."""
    if thing.shape is None or thing.color is None:
        return 1 + len(SHAPES) + (thing.digit or 0), 0, 0
    peers = sum(other.shape == thing.shape for other in _seen(scene))
    return 1 + SHAPES.index(thing.shape), 1 + tuple(COLORS).index(thing.color), peers


def _seen(scene: Scene) -> list[Thing]:
    return [scene.things[i] for i in np.unique(scene.owner) if i >= 0]
