"""Reading the attention of a few rows of a decoder layer, next to whatever attention the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vtprune.adapters.decoder import Decoder
from vtprune.glances import Glance, RowAttention
from vtprune.inside.hooks import allowed_by, tables_at
from vtprune.inside.stacks import Entry
from vtprune.inside.walk import Walk
from vtprune.kernels import attention as attentions
from vtprune.kernels import reference as kernels

MOST_ROWS = 256
"""Of longer texts the last rows are read: their attention takes heads x rows x keys numbers."""


@torch.no_grad()
def find_raters(embeds: Tensor, rows: Tensor, real: Tensor, visual: Tensor) -> Tensor:
    """(B, R), the rows of text that pictures are nearer to than to the average one: SparseVLM, arXiv 2410.04417.

    Args:
        embeds: (B, K, D), what enters the language model.
        rows: (B, R), where the text is.
        real: (B, R), False at what only fills up.
        visual: (B, K), True at the tokens of pictures.
    """
    text = kernels.rows_at(embeds, rows).float()
    nearness = (embeds.float() @ text.transpose(1, 2)).masked_fill(~real[:, None], float("-inf")).softmax(dim=2)
    mean = (visual[:, None].float() @ nearness)[:, 0] / visual.sum(dim=1, keepdim=True).clamp_min(1)
    above = real & (mean > mean.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp_min(1))
    return torch.where(above.any(dim=1, keepdim=True), above, real)


def rated(entry: Entry, embeds: Tensor, visual: Tensor) -> Entry:
    """The entry that knows which of its rows of text rate the pictures; all else as in `find_raters`."""
    return replace(entry, raters=find_raters(embeds, entry.rows, entry.real, visual))


@torch.no_grad()
def look(
    glance: Glance,
    walk: Walk,
    *,
    decoder: Decoder,
    layer: int,
    queries: Tensor,
    keys: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Any,
    past_valid: Tensor | None,
) -> Tensor:
    """What a glance sees of the K tokens of the sequence as it is now: (B, K).

    Args:
        queries: what `q_proj` gave at the rows of the walk, (B, R, H d).
        keys: (B, G, past + K, d), rotated.
        rotary: cosines and sines (B, K, d).
        mask: what the layer was given; where it is 4-D it says what rows may see.
        past_valid: (B, past) bool, None where nothing cached is padding.
    """
    real = walk.entry.real_of(glance.rows)
    count = real.shape[1]
    seen = seen_by(
        walk,
        walk.rows[:, -count:],
        real,
        decoder=decoder,
        layer=layer,
        queries=queries[:, -count:],
        keys=keys,
        rotary=rotary,
        mask=mask,
        past_valid=past_valid,
        divides=glance.divides,
    )
    with kernels.exact(queries.device):
        return glance.rule(seen)[:, keys.shape[2] - walk.valid.shape[1] :]


class Place(Protocol):
    """A sequence of B rows of K tokens: which of them are real, and which belong to pictures."""

    @property
    def valid(self) -> Tensor: ...
    @property
    def visual(self) -> Tensor: ...


def seen_by(
    place: Place,
    rows: Tensor,
    real: Tensor,
    *,
    decoder: Decoder,
    layer: int,
    queries: Tensor,
    keys: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Any,
    past_valid: Tensor | None,
    divides: bool,
) -> RowAttention:
    """What `rows` (B, R) of a sequence attend to, those that are `real`; all else as in `look`.

    `divides` asks for the decay of the rotary embedding as well.
    """
    query = decoder.queries(layer, queries, *tables_at(rotary, rows))
    past = keys.shape[2] - place.valid.shape[1]
    allowed = _allowed(place, rows, past, mask, past_valid)
    with kernels.exact(query.device):
        weights = attentions.rows_attention(query, keys, allowed, scale=decoder.attention(layer).scaling)
    visual = torch.nn.functional.pad(place.visual, (past, 0))
    decay = _decay(decoder.ones(layer, *rotary), rows, past) if divides else None
    return RowAttention(weights=weights, real=real, own=rows + past, visual=visual, decay=decay)


def _decay(ones: Tensor, rows: Tensor, past: int) -> Tensor:
    """Products (B, R, past + K) of ones (B or 1, K, d), rotated, at rows with those at keys; 1 with themselves.

    So it is with cached keys, of whose places nothing is known here.
    """
    ones = ones.expand(len(rows), -1, -1)
    own = kernels.rows_at(ones, rows)
    decay = own @ ones.transpose(1, 2) / own.square().sum(dim=2, keepdim=True)
    return torch.nn.functional.pad(decay, (past, 0), value=1.0)


def _allowed(place: Place, rows: Tensor, past: int, mask: Any, past_valid: Tensor | None) -> Tensor:
    """(B, R, past + K) bool: which keys each row may see."""
    B, K = place.valid.shape
    if not (torch.is_tensor(mask) and mask.ndim == 4):
        before = place.valid.new_ones(B, past) if past_valid is None else past_valid
        mask = torch.cat([before, place.valid], dim=1)
    return allowed_by(mask, rows, K, past + K)


def named(glances: Mapping[str, Glance], at: str) -> dict[str, Glance]:
    """The glances at the layer `"before"` or `"behind"` drop points."""
    return {name: glance for name, glance in glances.items() if glance.at == at}
