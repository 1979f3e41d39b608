"""Attention of sinks given to the picture, in the reference: every layer is computed anew, with whole attention maps.

Nothing of vtprune is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Edit:
    """The parameters of the method: arXiv 2503.03321. Without `channels` those of the first token are found."""

    share: float = 0.6
    threshold: float = 20.0
    most: float = 0.5
    least: float = 0.2
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Marks:
    """Of the tokens of one unpadded prompt, which belong to pictures, and which the model did not write."""

    visual: list[bool]
    told: list[bool]

    def at(self, kept: Sequence[int]) -> Marks:
        """Those of some tokens."""
        return Marks([self.visual[i] for i in kept], [self.told[i] for i in kept])

    def padded(self, pad: int) -> Marks:
        """With padding on the left."""
        return Marks([False] * pad + self.visual, [False] * pad + self.told)


@dataclass
class Count:
    """How many rows of heads were changed, how many sinks there were of tokens looked at, by layer."""

    changed: int = 0
    rows: int = 0
    sinks: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def edited(model: nn.Module, marks: Sequence[Marks], edit: Edit) -> Iterator[Count]:
    """In calls inside the block heads give attention of sinks to the picture.

    Args:
        marks: of the tokens of the first call, for every row (which repeats for beams); later tokens were written.
    """
    base = getattr(model, "model", model)
    layers, count = (getattr(base, "language_model", None) or base.text_model).layers, Count()
    visual, told = (torch.tensor([getattr(row, name) for row in marks]) for name in ("visual", "told"))
    handles = []
    for number in range(2, len(layers) - 1):
        find = functools.partial(_find, number, told, edit, count)
        change = functools.partial(_change, number, visual, edit, count)
        handles.append(layers[number].register_forward_pre_hook(find, with_kwargs=True))
        handles.append(layers[number].self_attn.register_forward_hook(change, with_kwargs=True))
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _find(number: int, told: Tensor, edit: Edit, count: Count, module: nn.Module, args: Any, kwargs: Any) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.shape[1] < told.shape[1]:
        return
    rows = []
    for states, own in zip(hidden.double().numpy(), _repeated(told, len(hidden)).numpy(), strict=True):
        first = int(own.argmax())
        channels = edit.channels or massive_channels(states[first], edit.threshold)
        rows.append(
            [
                place < len(own) and own[place] and peak(states[place], channels) > edit.threshold
                for place in range(len(states))
            ]
        )
    count.sinks[number] = torch.tensor(rows)


def massive_channels(first: np.ndarray, threshold: float) -> list[int]:
    """Channels of a hidden state of the first token that are above the threshold, and above ten medians."""
    sizes = np.abs(first) / np.sqrt((first**2).mean())
    middle = np.sort(sizes)[(len(sizes) - 1) // 2]
    return [c for c in range(len(sizes)) if sizes[c] > threshold and sizes[c] > 10 * middle]


def peak(state: np.ndarray, channels: Sequence[int]) -> float:
    """The largest of some channels of a hidden state, in root mean squares."""
    return max((abs(state[c]) / np.sqrt((state**2).mean()) for c in channels), default=0.0)


def redistributed(row: np.ndarray, visual: np.ndarray, sinks: np.ndarray, edit: Edit) -> np.ndarray | None:
    """One row of attention of a head, as it becomes; None where it stays as it is."""
    pictures, stuck = row[visual].sum(), row[visual & sinks].sum()
    if pictures == 0 or pictures < edit.least or stuck / pictures > edit.most or not (visual & ~sinks).any():
        return None
    changed, wanted, budget = row.copy(), row[visual & ~sinks].sum(), 0.0
    for k in np.flatnonzero(sinks):
        changed[k] = edit.share * row[k]
        budget += (1 - edit.share) * row[k]
    for k in np.flatnonzero(visual & ~sinks):
        changed[k] += budget * row[k] / wanted
    return changed


@torch.no_grad()
def _change(
    number: int, visual: Tensor, edit: Edit, count: Count, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    weights, values = attention_map(module, hidden, kwargs)
    B, H, R, n = weights.shape
    marks = _repeated(visual, B)
    marks = nn.functional.pad(marks, (0, n - marks.shape[1])).numpy()
    sinks = nn.functional.pad(count.sinks[number], (0, n - count.sinks[number].shape[1])).numpy()
    maps = weights.double().numpy().copy()
    for b in range(B):
        for place in range(R):
            if marks[b][n - R + place]:
                continue
            for h in range(H):
                count.rows += 1
                changed = redistributed(maps[b, h, place], marks[b], sinks[b], edit)
                if changed is not None:
                    assert abs(changed.sum() - maps[b, h, place].sum()) < 1e-6
                    count.changed += bool(np.abs(changed - maps[b, h, place]).max() > 1e-3)
                    maps[b, h, place] = changed
    mixed = torch.from_numpy(maps).to(values.dtype) @ values
    return (module.o_proj(mixed.transpose(1, 2).reshape(B, R, -1)), *output[1:])


def attention_map(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weights (B, H, R, n) of an attention and its values (B, H, n, d), by eager products."""
    heads = [
        getattr(module, name)(hidden).unflatten(-1, (-1, module.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
    ]
    if hasattr(module, "q_norm"):
        heads[:2] = module.q_norm(heads[0]), module.k_norm(heads[1])
    query, key, value = (part.transpose(1, 2) for part in heads)
    turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
    query, key = turn(query, key, *kwargs["position_embeddings"])
    cache = kwargs.get("past_key_values")
    if cache is not None:
        key, value = (getattr(cache.layers[module.layer_idx], name) for name in ("keys", "values"))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * module.scaling
    R, n = logits.shape[2:]
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.arange(n) <= torch.arange(n - R, n)[:, None]
    logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1).nan_to_num(nan=0.0), value


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows.repeat_interleave(count // len(rows), dim=0)
