"""Tokens that leave between decoder layers, in the reference: every layer gets all of them and a mask that hides some.

Nothing of vtprune is imported. Nothing is shortened here: no token changes its place, and caches hold all of them.
Where tokens go into another in front of a layer, that becomes their mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Merge:
    """In front of `layer` the token of a row at `at` becomes the mean of its `members`, itself among them."""

    layer: int
    at: int
    members: tuple[int, ...]

    def placed(self, places: Sequence[int]) -> Merge:
        """With its numbers of tokens as numbers of their places."""
        return Merge(layer=self.layer, at=places[self.at], members=tuple(places[one] for one in self.members))


@contextmanager
def hidden(
    model: nn.Module,
    depths: Tensor | Sequence[Sequence[int]],
    merges: Sequence[Sequence[Merge]] = (),
    *,
    later: Tensor | Sequence[Sequence[int]] | None = None,
    since: Tensor | Sequence[Sequence[int]] | None = None,
) -> Iterator[None]:
    """In calls inside the block a token is seen in as many decoder layers as `depths` says, in none of those behind.

    Args:
        depths: for every row (which repeats for beams) and every token of the first call; later ones are never hidden.
        merges: for every row what happens in the first call, and wherever nothing is cached.
        later: as `depths`, for what later tokens see; None: as all do.
        since: from which token on those count as later, for every token; None: behind those of the first call.
    """
    rows = torch.as_tensor(depths)
    afterwards = rows if later is None else torch.as_tensor(later)
    starts = torch.full_like(rows, rows.shape[1]) if since is None else torch.as_tensor(since)
    handles = []
    for number, layer in enumerate(model.model.language_model.layers):
        gone, gone_later = rows <= number, afterwards <= number
        due = [(row, one) for row, own in enumerate(merges) for one in own if one.layer == number]
        if gone_later.any() or due:
            hide = functools.partial(_hide, number, gone, gone_later, starts, due)
            handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hide(
    number: int,
    gone: Tensor,
    gone_later: Tensor,
    since: Tensor,
    merges: Sequence[tuple[int, Merge]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The call of layer `number` with the tokens that are `gone` (rows, tokens) hidden from all but themselves.

    For the tokens from number `since` (rows, tokens) on it is those that are `gone_later`.
    """
    states = args[0] if args else kwargs["hidden_states"]
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    queries = states.shape[1]
    keys = queries + (0 if cache is None else cache.get_seq_length(number))
    own, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    eager = module.self_attn.config._attn_implementation == "eager"
    seen = key <= own if mask is None else mask >= 0 if eager else mask
    assert seen.dtype == torch.bool and seen.shape[-1] == keys, "the reference runs sdpa or eager"
    if keys == queries:
        states = _merged(states, merges, len(states) // len(gone))
    first, behind, start = (
        nn.functional.pad(one.repeat_interleave(len(states) // len(one), 0), (0, keys - one.shape[1]))[:, None, None]
        for one in (gone, gone_later, since)
    )
    seen = (seen & ~torch.where(own >= start, behind, first)) | (key == own)
    if eager:
        seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    changed = {**kwargs, "attention_mask": seen}
    return ((states, *args[1:]), changed) if args else (args, {**changed, "hidden_states": states})


def _merged(states: Tensor, merges: Sequence[tuple[int, Merge]], repeats: int) -> Tensor:
    """Hidden states (B, L, D) with means at their places; every row of the merges stands for `repeats` of them."""
    found = states.clone()
    for row, merge in merges:
        for beam in range(row * repeats, (row + 1) * repeats):
            found[beam, merge.at] = states[beam, list(merge.members)].mean(dim=0)
    return found
