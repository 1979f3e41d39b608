"""Attention masks of a call, in any of the forms transformers pass: none, 2-D, 4-D, a dictionary of 4-D ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.errors import UnsupportedCall


def first_square(mask: Any) -> Tensor | None:
    """The 4-D mask among `mask`, that of full attention if there is one; None where it is 2-D or absent."""
    found = mask
    if isinstance(mask, dict):
        full = mask.get("full_attention")
        found = full if full is not None else next((m for m in mask.values() if m is not None), None)
    return found if torch.is_tensor(found) and found.ndim == 4 else None


def valid_tokens(mask: Any, B: int, L: int, past: int) -> Tensor | None:
    """(B, L) bool, False at padding among the tokens of this call; None where nothing says so.

    A 4-D mask tells padding by its diagonal: a token that may not see itself is none.
    """
    square = first_square(mask)
    if square is None:
        return mask[:, -L:].bool() if torch.is_tensor(mask) else None
    seen = square if square.dtype == torch.bool else square >= 0
    if seen.shape[-1] < past + L:
        return None
    own = torch.arange(L, device=seen.device)
    return seen[:, 0, own, own + past].expand(B, L)


def cut_square(mask: Tensor, indices: Tensor, valid: Tensor, past: int, L: int) -> Tensor:
    """A 4-D mask (B|1, 1, L, past + L or more) for the tokens at `indices` (B, K); padding is never seen.

    Raises:
        UnsupportedCall: for a mask of fewer columns; it belongs to a window that has moved past the oldest tokens.
    """
    B, K = indices.shape
    if mask.shape[3] < past + L:
        raise UnsupportedCall(
            f"new pictures after {past} cached tokens, with a sliding window of {mask.shape[3] - L}: the cached tokens "
            "have left the window. Start the chat again with a fresh cache"
        )
    mask = mask.expand(B, *mask.shape[1:])
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    stored = torch.arange(past, device=indices.device).expand(B, past)
    columns = torch.cat([stored, indices + past], dim=1)
    rows = mask.gather(2, indices[:, None, :, None].expand(B, mask.shape[1], K, mask.shape[3]))
    cut = rows.gather(3, columns[:, None, None].expand(B, mask.shape[1], K, past + K))
    padding = torch.cat([torch.zeros_like(stored, dtype=torch.bool), ~valid], dim=1)
    cut = cut.masked_fill(padding[:, None, None], blocked)
    room = mask.shape[3] - past - L
    return torch.nn.functional.pad(cut, (0, room + L - K), value=blocked) if room > 0 else cut


def stored_valid(mask: Any, valid: Tensor, stored: int, new: int) -> Tensor:
    """(B, stored) bool: which cached tokens are real; `valid` (B, P) covers the first P of them.

    The tokens after those were never cut, so the end of a 2-D `mask` over the logical length speaks for them.
    """
    later = stored - valid.shape[1]
    if later <= 0:
        return valid[:, :stored]
    if torch.is_tensor(mask) and mask.ndim == 2 and mask.shape[1] >= later + new:
        tail = mask[:, mask.shape[1] - new - later : mask.shape[1] - new].bool()
    else:
        tail = valid.new_ones(valid.shape[0], later)
    return torch.cat([valid, tail.to(valid.device)], dim=1)


def over_keys(valid: Tensor | None, *, queries: int, keys: int, like: Tensor, implementation: str) -> Tensor | None:
    """The causal mask of the last `queries` of `keys` tokens, in the form an attention implementation takes.

    Args:
        valid: (B, keys) bool, False at padding; None where there is none.
        queries: how many tokens are new.
        keys: how many there are with them.
        like: hidden states (B, queries, D).
        implementation: `config._attn_implementation`.

    Returns:
        None where a causal mask without padding is what the implementation does by itself.
    """
    flash, eager = implementation.startswith("flash"), implementation == "eager"
    if valid is None and (flash or queries == 1 or (queries == keys and not eager)):
        return None
    if flash:
        return valid
    ramp = torch.arange(keys, device=like.device)
    seen = ramp <= (ramp[keys - queries :, None])
    seen = seen.expand(like.shape[0], 1, queries, keys)
    if valid is not None:
        seen = seen & valid[:, None, None]
    if not eager:
        return seen
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)
