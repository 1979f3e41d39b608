"""From a prompt to a cut: layout, evidence, decision, and the shortened inputs of the language model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtprune import positions as position_ids
from vtprune.adapters.base import Encoding, Family
from vtprune.adapters.layout import build_layout
from vtprune.errors import MissingEvidence, UnsupportedCall
from vtprune.kernels import reference as kernels
from vtprune.pipeline import Pipeline
from vtprune.report import DROPPED
from vtprune.runtime import masks
from vtprune.runtime.encoder import Encoded
from vtprune.runtime.evidence import FROM_ENCODER, Forced, Given, encoder_scores, forced_tokens, of_units
from vtprune.runtime.units import Unit, make_units
from vtprune.types import Budget, Layout, Modality, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What stays: `kept` (B, L) bool, at most `size` a row; `stages` (n,) per segment, -2 where dropped."""

    kept: Tensor
    size: int
    row_lengths: tuple[int, ...]
    stages: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the rows of the short sequence come from: `indices`, `valid` (B, K); `kept` (B, L) is the decision."""

    indices: Tensor
    valid: Tensor
    kept: Tensor
    left_padded: bool
    shift: Tensor | None

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, K, D) at the caller's length (B, L, D): each dropped token repeats the kept one before."""
        source = self.kept.cumsum(dim=1) - 1
        if self.left_padded:
            source = source + (self.indices.shape[1] - self.kept.sum(dim=1, keepdim=True))
        return kernels.cut_sequence(hidden, source.clamp(min=0))


def read_layout(
    *,
    ids: Tensor,
    valid: Tensor | None,
    encoded: Mapping[Modality, Encoded],
    tokens: Mapping[Modality, tuple[int, ...]],
    family: Family,
    inner: nn.Module,
) -> tuple[Layout, dict[Modality, Encoding]]:
    """The layout of a call; the one host synchronisation of a prefill happens here."""
    wanted: list[Tensor] = [ids] + ([] if valid is None else [valid])
    for entry in encoded.values():
        wanted += [t for t in (entry.sizes, entry.pictures_per_prompt) if t is not None]
    arrays = iter(_to_host(wanted))
    host_ids = next(arrays)
    host_valid = np.ones(host_ids.shape, dtype=bool) if valid is None else next(arrays).astype(bool)
    encodings: dict[Modality, Encoding] = {}
    for kind, entry in encoded.items():
        sizes = () if entry.sizes is None else tuple(tuple(int(x) for x in row) for row in next(arrays))
        pictures = None if entry.pictures_per_prompt is None else tuple(int(x) for x in next(arrays).reshape(-1))
        encodings[kind] = entry.on_host(sizes, pictures)
    layout = build_layout(
        ids=host_ids, valid=host_valid, tokens=tokens, encodings=encodings, family=family, inner=inner
    )
    return layout, encodings


def _to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    device = tensors[0].device
    flat = torch.cat([tensor.reshape(-1).to(device, torch.int64) for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    return [part.reshape(t.shape) for part, t in zip(np.split(flat, ends[:-1]), tensors, strict=True)]


@torch.no_grad()
def decide(
    *,
    pipeline: Pipeline,
    budget: Budget,
    layout: Layout,
    embeds: Tensor,
    encodings: Mapping[Modality, Encoding],
    encoded: Mapping[Modality, Encoded],
    family: Family,
    inner: nn.Module,
    given: Given | None,
    seen: tuple[int, ...],
) -> Decision:
    """Run the pipeline on every stack of equal units; counts are known from shapes, nothing waits for the device."""
    units = make_units(layout, budget, seen)
    forced = forced_tokens(units, given, layout)
    base = layout.valid.copy()
    for unit in units:
        base[unit.row, unit.positions] = False
    row_lengths = base.sum(axis=1)
    for unit in units:
        row_lengths[unit.row] += unit.k
    kept = torch.from_numpy(base).to(embeds.device)
    scores: dict[str, list[Tensor]] = {}
    if any(unit.k < len(unit.positions) for unit in units):
        scores = _evidence(pipeline, layout, encodings, encoded, family, inner, given, embeds.device)
    stages: dict[int, list[Tensor]] = defaultdict(list)
    decided: dict[int, Tensor] = {}
    for numbers in _stacks(units, forced):
        stacked = [units[number] for number in numbers]
        at = torch.from_numpy(np.stack([unit.positions for unit in stacked])).to(embeds.device)
        rows = torch.tensor([unit.row for unit in stacked], device=embeds.device)[:, None]
        decision = _decide_stack(pipeline, stacked, [forced[number] for number in numbers], embeds, rows, at, scores)
        kept[rows, at] = decision > DROPPED
        decided.update(zip(numbers, decision, strict=True))
    for number, unit in enumerate(units):
        pieces = decided[number].split([piece.stop - piece.start for piece in unit.pieces])
        for piece, part in zip(unit.pieces, pieces, strict=True):
            stages[piece.segment].append(part)
    return Decision(
        kept=kept,
        size=int(row_lengths.max()),
        row_lengths=tuple(int(length) for length in row_lengths),
        stages=tuple(torch.cat(stages[segment]) for segment in range(len(layout.segments))),
    )


def _stacks(units: list[Unit], forced: list[Forced]) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, (unit, force) in enumerate(zip(units, forced, strict=True)):
        groups[(*unit.shape, force.shape)].append(number)
    return list(groups.values())


def _decide_stack(
    pipeline: Pipeline,
    units: list[Unit],
    forced: list[Forced],
    embeds: Tensor,
    rows: Tensor,
    at: Tensor,
    scores: Mapping[str, list[Tensor]],
) -> Tensor:
    """The pick that took each token (S, N), -2 where dropped."""
    S, N = at.shape
    k = units[0].k
    decision = torch.full((S, N), DROPPED, device=at.device)
    if k == N:
        return decision.zero_()
    evidence = {name: of_units(units, per_segment) for name, per_segment in scores.items()}
    if forced[0].protect:
        evidence["protect"] = torch.tensor([force.protect for force in forced], device=at.device)
    if forced[0].forbid:
        banned = torch.tensor([force.forbid for force in forced], device=at.device)
        evidence["forbid"] = torch.zeros(S, N, dtype=torch.bool, device=at.device).scatter_(1, banned, True)
    visual = VisualTokens(
        features=embeds[rows, at],
        parts=units[0].parts,
        ordinals=tuple(unit.ordinal for unit in units),
        evidence=evidence,
    )
    with torch.autocast(embeds.device.type, enabled=False):
        selection = pipeline.run(visual, k)
    return decision.scatter_(1, selection.keep, selection.taken)


def _evidence(
    pipeline: Pipeline,
    layout: Layout,
    encodings: Mapping[Modality, Encoding],
    encoded: Mapping[Modality, Encoded],
    family: Family,
    inner: nn.Module,
    given: Given | None,
    device: torch.device,
) -> dict[str, list[Tensor]]:
    scores: dict[str, list[Tensor]] = {}
    for name in pipeline.needs:
        if name in FROM_ENCODER:
            per_segment = encoder_scores(layout, encodings, encoded, family, inner)
            scores[name] = [score.to(device) for score in per_segment]
        elif given is not None and name in given.values:
            scores[name] = given.scores(name, layout, device)
        else:
            raise MissingEvidence(f"this method reads {name!r}: give it with `with model.vtprune.using({name}=[...])`")
    return scores


def plan_cut(decision: Decision, layout: Layout) -> Cut:
    """Turn a decision into row indices; the padding goes to the side where the prompt has it (left by default)."""
    left = bool(layout.valid[:, -1].all())
    indices, valid = kernels.kept_indices(decision.kept, decision.size, left_padded=left)
    return Cut(indices=indices, valid=valid, kept=decision.kept, left_padded=left, shift=None)


def cut_positions(
    positions: Tensor, cut: Cut, before: Tensor, *, compact: bool
) -> tuple[Tensor, Tensor | None]:
    """Position ids (..., B, K) of the kept tokens and, where compacted, the shift (B, 1) of later ones.

    `positions` is (B, L), (3, B, L) or (4, B, L), where row 0 counts text tokens and takes no part in compaction.
    """
    B = cut.indices.shape[0]
    positions = positions.expand(*positions.shape[:-2], B, positions.shape[-1])
    shift = None
    if compact:
        rope = positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions
        moved, shift = position_ids.compact(rope, before, cut.kept)
        positions = torch.cat([positions[:1], moved]) if rope.shape != positions.shape else moved
    return positions.gather(-1, cut.indices.expand(*positions.shape[:-1], -1)), shift


def cut_deepstack(arguments: dict[str, Any], cut: Cut, layout: Layout, decision: Decision) -> None:
    """Shorten the rows that some models add to hidden states at visual positions (`deepstack_visual_embeds`)."""
    visual = arguments.get("visual_pos_masks")
    if visual is None:
        return
    rows = sum(len(segment.positions) for segment in layout.segments)
    dropped = sum(int(length) for length in layout.valid.sum(axis=1)) - sum(decision.row_lengths)
    embeds = arguments["deepstack_visual_embeds"]
    if any(layer.shape[0] != rows for layer in embeds):
        raise UnsupportedCall(f"deepstack rows {[layer.shape[0] for layer in embeds]}: expected {rows} for each layer")
    flat, _ = kernels.kept_indices(visual.reshape(1, -1).to(cut.kept.device), rows)
    survives = cut.kept.reshape(-1)[flat]
    order, _ = kernels.kept_indices(survives, rows - dropped)
    arguments["deepstack_visual_embeds"] = [layer.index_select(0, order[0].to(layer.device)) for layer in embeds]
    arguments["visual_pos_masks"] = visual.to(cut.kept.device).gather(1, cut.indices) & cut.valid


def cut_mask(mask: Any, cut: Cut, *, stored: Tensor | None, past: int, padded: bool, optional: bool) -> Any:
    """The attention mask of the short call, in the form the caller used.

    Args:
        stored: (B, past) bool, which cached tokens are real; None where nothing is cached.
        padded: whether any token of the short sequence or of the cache is padding.
        optional: whether a mask without padding may be left out.
    """
    if masks.first_square(mask) is not None:
        L = cut.kept.shape[1]
        if isinstance(mask, dict):
            return {k: m if m is None else masks.cut_square(m, cut.indices, cut.valid, past, L) for k, m in mask.items()}
        return masks.cut_square(mask, cut.indices, cut.valid, past, L)
    if optional and not padded:
        return None
    return (cut.valid if stored is None else torch.cat([stored, cut.valid], dim=1)).long()
