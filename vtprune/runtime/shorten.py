"""The inputs of the language model, shortened by a cut, or mended for a cache that an earlier cut shortened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache

from vtprune import masks
from vtprune import positions as position_ids
from vtprune.adapters.base import Host, rope_axes, sliding_window
from vtprune.cache import CacheState, physical_length
from vtprune.errors import UnsupportedCall
from vtprune.kernels import reference as kernels
from vtprune.runtime.decide import Decision
from vtprune.types import Layout

_CUT_APART = frozenset({"inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks"})


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a model counts.

    `compact` closes gaps, `axes` is the number of rows of its position ids (0: a single one), `rotary` says that its
    rotary embedding is hooked, `window` how far back its sliding attention reaches; `owner` names the pruner.
    """

    owner: str
    compact: bool
    axes: int
    rotary: bool
    window: int | None = None

    @classmethod
    def of(cls, inner: Host, lm: nn.Module, *, owner: str, compact: bool) -> Scheme:
        """That of a base model and its language model."""
        return cls(
            owner=owner,
            compact=compact,
            axes=rope_axes(inner.config),
            rotary=isinstance(getattr(lm, "rotary_emb", None), nn.Module),
            window=sliding_window(inner.config),
        )

    def counts_text(self, positions: Tensor) -> bool:
        """Whether row 0 of `positions` counts text tokens, for masks only."""
        return positions.ndim == 3 and positions.shape[0] == self.axes + 1


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the rows of the short sequence come from: `indices`, `valid` (B, K); `kept` (B, L) is the decision.

    `slots` (B, L) says where in the short sequence each token stands, or the last kept one before it.
    """

    indices: Tensor
    valid: Tensor
    slots: Tensor
    kept: Tensor
    left_padded: bool

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, K, D) at the caller's length (B, L, D): each dropped token repeats the kept one before."""
        return kernels.rows_at(hidden, self.slots)

    def moved(self, at: Tensor) -> Tensor:
        """Where tokens at places `at`, counted through all B * L, stand in the short sequence, through all B * K."""
        return kernels.moved(at, self.slots, self.valid.shape[1])


@dataclass(frozen=True, kw_only=True)
class Shortened:
    """A short call: its arguments, its cut, what the rotary embedding must see, and the state for the cache."""

    arguments: dict[str, Any]
    cut: Cut
    rotary_positions: Tensor | None
    state: CacheState


def shorten(
    given: Mapping[str, Any],
    *,
    layout: Layout,
    decision: Decision,
    state: CacheState | None,
    pictures: Tensor,
    scheme: Scheme,
) -> Shortened:
    """Cut embeddings, position ids, mask and deepstack rows together; `state` is that of the cache so far."""
    embeds, cache, mask = given["inputs_embeds"], given.get("past_key_values"), given.get("attention_mask")
    B, L = embeds.shape[:2]
    past = physical_length(cache)
    if masks.first_square(mask) is not None:
        _check_square(cache, state, L, scheme)
    cut = _plan(decision, layout)
    real = torch.from_numpy(layout.valid).to(embeds.device, non_blocking=True)
    positions = _incoming_positions(given, state, past)
    positions, shift = _closed_up(positions, cut, real, scheme)
    stored = _stored(mask, state, past, L, B, embeds.device)
    uneven = any(length != decision.size for length in decision.row_lengths)
    padded = uneven or (state.padded if state is not None else past > 0 and torch.is_tensor(mask))
    arguments, new = _cut_together(given, positions, cut, uneven)
    arguments["inputs_embeds"] = _place_merged(arguments["inputs_embeds"], cut, decision)
    seen, rotary_positions = _outgoing_positions(new, _contiguous(cut, past, uneven), scheme)
    arguments["position_ids"] = seen
    optional = not padded and (cache is not None or rotary_positions is not None or scheme.counts_text(seen))
    arguments["attention_mask"] = _cut_mask(mask, cut, stored=stored, past=past, optional=optional)
    _cut_deepstack(arguments, given, cut, layout, decision)
    next_state = CacheState(
        owner=scheme.owner,
        removed=(state.removed if state is not None else 0) + L - decision.size,
        stored=past + decision.size,
        cut_length=past + decision.size - (_text_after(layout) if cut.left_padded else 0),
        valid=cut.valid if stored is None else torch.cat([stored, cut.valid], dim=1),
        padded=padded,
        shift=_add_shifts(None if state is None else state.shift, shift),
        pictures=pictures,
    )
    return Shortened(arguments=arguments, cut=cut, rotary_positions=rotary_positions, state=next_state)


def _check_square(cache: Any, state: CacheState | None, L: int, scheme: Scheme) -> None:
    """Raise `UnsupportedCall` where a 4-D mask cannot be cut: it counts tokens that decoding will not see."""
    if state is not None:
        raise UnsupportedCall(
            "new pictures on a cache that was pruned, under a 4-D mask: its columns count tokens that are not stored "
            "any more. Start the chat again with a fresh cache"
        )
    if isinstance(cache, StaticCache) and scheme.window is not None and scheme.window < L:
        raise UnsupportedCall(
            f"a prompt of {L} tokens in a static cache, with a sliding window of {scheme.window}: the mask counts the "
            "window over tokens that are pruned. Use the dynamic cache"
        )


def resume(given: Mapping[str, Any], state: CacheState) -> dict[str, Any]:
    """A later call on a pruned cache, nothing cut in it: masks count stored tokens, ids skip the vacated ones."""
    embeds, mask = given["inputs_embeds"], given.get("attention_mask")
    B, new = embeds.shape[:2]
    stored = physical_length(given["past_key_values"])
    positions = _incoming_positions(given, state, stored)
    flat = mask if torch.is_tensor(mask) and mask.ndim == 2 else None
    state.padded = state.padded or (new > 1 and flat is not None)
    state.stored = stored + new
    arguments = {**given, "position_ids": positions.expand(*positions.shape[:-2], B, new), "attention_mask": None}
    if state.padded:
        known = masks.stored_valid(mask, state.valid, stored, new)
        fresh = known.new_ones(B, new) if flat is None else flat[:, -new:].bool()
        arguments["attention_mask"] = torch.cat([known, fresh.to(known.device)], dim=1).long()
    return arguments


def _plan(decision: Decision, layout: Layout) -> Cut:
    """Row indices of a decision; padding goes to the side where the prompt has it, left by default."""
    left = bool(layout.valid[:, -1].all())
    indices, valid, slots = kernels.kept_indices(decision.kept, decision.size, left_padded=left)
    return Cut(indices=indices, valid=valid, slots=slots, kept=decision.kept, left_padded=left)


def _place_merged(short: Tensor, cut: Cut, decision: Decision) -> Tensor:
    """Embeddings (B, K, D) of the short sequence, with merged rows where their tokens stand."""
    flat = short.flatten(0, 1)
    for rows, at in decision.merged:
        flat = flat.index_copy(0, cut.moved(at), rows.to(flat.dtype))
    return flat.view(short.shape)


def _incoming_positions(given: Mapping[str, Any], state: CacheState | None, past: int) -> Tensor:
    embeds, positions = given["inputs_embeds"], given.get("position_ids")
    if positions is None:
        logical = past + (state.removed if state is not None else 0)
        positions = torch.arange(logical, logical + embeds.shape[1], device=embeds.device)[None]
    if state is not None and state.shift is not None:
        positions = positions - state.shift
    return positions


def _cut_together(given: Mapping[str, Any], positions: Tensor, cut: Cut, uneven: bool) -> tuple[dict[str, Any], Tensor]:
    """The arguments with all that runs along the sequence cut at once, and position ids (..., B, K) of what is left.

    That is any further input (B, L, ...) as well; everything else stays as it is. Zeros are written at padding.
    """
    embeds, K = given["inputs_embeds"], cut.indices.shape[1]
    along = {
        name: value
        for name, value in given.items()
        if name not in _CUT_APART and torch.is_tensor(value) and value.shape[:2] == cut.kept.shape
    }
    visual = given.get("visual_pos_masks")
    if visual is not None:
        along["visual_pos_masks"] = visual
    along = {name: value.to(embeds.device) for name, value in along.items()}
    ids = positions.reshape(-1, *positions.shape[-2:]).movedim(0, -1)
    valid = cut.valid if uneven or visual is not None else None
    short, ids, *rest = kernels.cut_sequence([embeds, ids, *along.values()], cut.indices, valid)
    own = dict(zip(along, rest, strict=True))
    arguments = {**given, "inputs_embeds": short, **{n: own[n].to(given[n].device) for n in own}}
    return arguments, ids.movedim(-1, 0).view(*positions.shape[:-1], K)


def _closed_up(positions: Tensor, cut: Cut, real: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Position ids (..., B, L) and, where gaps are closed, the shift (B, 1) of later ones.

    `positions` is (B, L) or (rows, B, L); a row that counts text tokens takes no part in compaction.
    """
    positions = positions.expand(*positions.shape[:-2], cut.indices.shape[0], positions.shape[-1])
    shift = None
    if scheme.compact:
        counted = scheme.counts_text(positions)
        moved, shift = position_ids.compact(positions[1:] if counted else positions, real, cut.kept)
        positions = torch.cat([positions[:1], moved]) if counted else moved
    return positions, shift


def _contiguous(cut: Cut, past: int, uneven: bool) -> Tensor:
    """Ids (B, K) that count stored tokens; where rows are `uneven`, padding before a row repeats its first id."""
    if uneven:
        return (cut.valid.cumsum(dim=1) + (past - 1)).clamp(min=past)
    B, K = cut.valid.shape
    return torch.arange(past, past + K, device=cut.valid.device).expand(B, K)


def _outgoing_positions(new: Tensor, contiguous: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Ids for the language model and, apart from them, for its rotary embedding.

    Gaps in the ids would be read as packed sequences, so the model counts contiguously and the rotary is told the ids.
    """
    if scheme.counts_text(new):
        return torch.cat([contiguous[None], new[1:]]), None
    if new.ndim == 2 and scheme.rotary and not scheme.axes:
        return contiguous, new
    return new, None


def _stored(mask: Any, state: CacheState | None, past: int, new: int, B: int, device: torch.device) -> Tensor | None:
    """(B, past) bool, which cached tokens are real; None where nothing is cached."""
    if past == 0:
        return None
    if state is not None:
        return masks.stored_valid(mask, state.valid, past, new)
    if torch.is_tensor(mask) and mask.ndim == 2 and mask.shape[1] == past + new:
        return mask[:, :past].bool()
    return torch.ones(B, past, dtype=torch.bool, device=device)


def _cut_mask(mask: Any, cut: Cut, *, stored: Tensor | None, past: int, optional: bool) -> Any:
    """The attention mask of the short call in the form the caller used; `optional` allows to leave it out."""
    if masks.first_square(mask) is None:
        if optional:
            return None
        return (cut.valid if stored is None else torch.cat([stored, cut.valid], dim=1)).long()
    L = cut.kept.shape[1]
    if isinstance(mask, dict):
        return {
            name: square if square is None else masks.cut_square(square, cut.indices, cut.valid, past, L)
            for name, square in mask.items()
        }
    return masks.cut_square(mask, cut.indices, cut.valid, past, L)


def _text_after(layout: Layout) -> int:
    """Tokens after the last picture, in the row that has the fewest."""
    ends = [segment.runs[-1][1] for segment in layout.segments]
    return layout.length - max(ends, default=0)


def _cut_deepstack(
    arguments: dict[str, Any], given: Mapping[str, Any], cut: Cut, layout: Layout, decision: Decision
) -> None:
    """Shorten the rows that some models add to hidden states at visual positions (`deepstack_visual_embeds`), layers
    together."""
    visual = given.get("visual_pos_masks")
    if visual is None or not given.get("deepstack_visual_embeds"):
        return
    rows = sum(len(segment.positions) for segment in layout.segments)
    dropped = sum(layout.row_lengths) - sum(decision.row_lengths)
    embeds = arguments["deepstack_visual_embeds"]
    if any(layer.shape[0] != rows for layer in embeds):
        raise UnsupportedCall(f"deepstack rows {[layer.shape[0] for layer in embeds]}: expected {rows} for each layer")
    visual = visual.to(cut.kept.device)
    flat, *_ = kernels.kept_indices(visual.reshape(1, -1), rows)
    order, *_ = kernels.kept_indices(cut.kept.reshape(-1)[flat], rows - dropped)
    layers = kernels.cut_sequence([layer[None].to(order.device) for layer in embeds], order)
    arguments["deepstack_visual_embeds"] = [
        short[0].to(layer.device) for short, layer in zip(layers, embeds, strict=True)
    ]


def _add_shifts(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
