"""How well the probes read what the tower sees."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from vtprune.tiny.scenes import COLORS, SHAPES, Scene, Thing
from vtprune.tiny.training.aids import COMBINATIONS, Overview, ThingReadings
from vtprune.tiny.training.batches import Batch
from vtprune.tiny.training.concepts import UNSURE
from vtprune.tiny.training.student import Sight, Student


def probe_loss(student: Student, sight: Sight, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """What the probes get wrong, and the share of shown cells that they read rightly."""
    probes, cells = student.probes, batch.cells
    what = probes.what(sight.cells)
    loss = _balanced(what, cells.what) + 0.5 * _balanced(probes.hue(sight.cells), cells.hue)
    peers = probes.peers(sight.cells)
    loss = loss + _balanced(peers, cells.peers)
    centre = probes.centre(sight.cells).float()[..., 0]
    loss = loss + 0.5 * binary_cross_entropy_with_logits(centre, cells.centre, pos_weight=centre.new_tensor(5.0))
    if probes.overview is not None:
        loss = loss + _overview_loss(probes.overview, sight, batch.scenes, student.side)
    shown = cells.what > 0
    return loss, {
        "cells right": (what.argmax(dim=-1) == cells.what)[shown].float().mean().item(),
        "peers right": (peers.argmax(dim=-1) == cells.peers)[cells.peers > 0].float().mean().item(),
    }


def _balanced(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy: three quarters for the cells that show something, however few they are."""
    losses = cross_entropy(logits.float().flatten(0, 1), label.flatten(), reduction="none", ignore_index=UNSURE)
    return 0.75 * losses[label.flatten() > 0].mean() + 0.25 * losses[label.flatten() == 0].mean()


def _overview_loss(overview: Overview, sight: Sight, scenes: list[Scene], side: int) -> Tensor:
    """Where every cell is, and what the whole picture holds."""
    index = torch.arange(side**2, device=sight.cells.device).expand(len(sight.cells), -1)
    loss = 0.1 * place_loss((overview.row(sight.cells), overview.column(sight.cells)), index)
    held = contents(scenes).to(sight.cells.device)
    for reading in (overview.whole(sight.whole), overview.last(sight.last)):
        loss = loss + 3 * binary_cross_entropy_with_logits(reading.float(), held)
    return loss


def place_loss(places: tuple[Tensor, ...], index: Tensor) -> Tensor:
    """Cross-entropy of the rows and columns, (B, K, side) each, that are read from the cells `index`, (B, K)."""
    row, column = (logits.float().flatten(0, 1) for logits in places)
    side, cells = row.shape[1], index.flatten()
    return cross_entropy(row, cells // side % side) + cross_entropy(column, cells % side)


def places_right(places: tuple[Tensor, ...], index: Tensor) -> float:
    """Share of the cells of which row and column are read rightly."""
    side = places[0].shape[-1]
    read = places[0].argmax(dim=-1) * side + places[1].argmax(dim=-1)
    return (read == index % side**2).float().mean().item()


def thing_loss(readings: ThingReadings, hidden: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """What is read wrongly of the things that words name, and the share of places and colours that is right.

    Args:
        hidden: (M, width), states of the words.
        labels: (M, 3), cell, hue and what of the thing each of them names.
    """
    cell, hue, what = labels[None].unbind(2)
    places = readings.row(hidden)[None], readings.column(hidden)[None]
    hues, whats = readings.hue(hidden).float(), readings.what(hidden).float()
    loss = place_loss(places, cell) + cross_entropy(hues, hue[0]) + cross_entropy(whats, what[0])
    return loss, {
        "things placed": places_right(places, cell),
        "hues right": (hues.argmax(dim=-1) == hue[0]).float().mean().item(),
    }


def contents(scenes: list[Scene]) -> Tensor:
    """Which of all combinations a picture holds, (B, combinations), 0 or 1."""
    held = torch.zeros(len(scenes), COMBINATIONS)
    for i, scene in enumerate(scenes):
        held[i, [_combination(thing) for thing in scene.things]] = 1
    return held


def _combination(thing: Thing) -> int:
    if thing.shape is None or thing.color is None:
        return len(COLORS) * len(SHAPES) + (thing.digit or 0)
    return tuple(COLORS).index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)
