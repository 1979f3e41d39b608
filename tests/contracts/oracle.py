"""The reference: transformers alone, fed short `inputs_embeds` and `position_ids` built here.

Nothing of vtprune is imported. `decode` runs a row without padding and without a cache, every step recomputes
everything; `generate` lets transformers run its own beam search or sampling on the short prompts. Tokens that are
dropped between decoder layers are hidden there, see `dense`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.contracts import dense
from tests.contracts import edits as attention


@dataclass
class Merged:
    """What the language model gets for one unpadded prompt: embeddings (1, L, D), ids (1 or 3, L), deepstack rows."""

    embeds: Tensor
    positions: Tensor
    visual: Tensor | None = None
    deepstack: list[Tensor] | None = None


class _Caught(Exception):
    pass


@torch.no_grad()
def merge(model: nn.Module, inputs: dict[str, Tensor]) -> Merged:
    """Stop an unwrapped model where it calls its language model, and keep what it was about to pass."""
    caught: dict[str, Any] = {}

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _Caught

    handle = model.model.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _Caught:
        pass
    finally:
        handle.remove()
    embeds, positions = caught["inputs_embeds"], caught.get("position_ids")
    L = embeds.shape[1]
    positions = torch.arange(L)[None] if positions is None else positions[-3:].reshape(-1, L)
    return Merged(
        embeds=embeds,
        positions=positions,
        visual=caught.get("visual_pos_masks"),
        deepstack=caught.get("deepstack_visual_embeds"),
    )


def replaced(prompt: Merged, kept: list[int], rows: Tensor) -> Merged:
    """The prompt with embeddings `rows` (1, K, D) at the kept tokens."""
    embeds = prompt.embeds.clone()
    embeds[:, kept] = rows
    return replace(prompt, embeds=embeds)


def join(pieces: Sequence[Merged], positions: Tensor) -> Merged:
    """The pieces of a conversation one after the other, at the given ids (1 or 3, L) of the whole."""
    joined = Merged(embeds=torch.cat([piece.embeds for piece in pieces], dim=1), positions=positions)
    if any(piece.deepstack for piece in pieces):
        blank = [torch.zeros(1, piece.embeds.shape[1], dtype=torch.bool) for piece in pieces]
        masks = [none if piece.visual is None else piece.visual for piece, none in zip(pieces, blank, strict=True)]
        joined.visual = torch.cat(masks, dim=1)
        layers = zip(*(piece.deepstack for piece in pieces if piece.deepstack), strict=True)
        joined.deepstack = [torch.cat(rows) for rows in layers]
    return joined


def compacted(positions: Tensor, kept: list[int]) -> tuple[Tensor, int]:
    """Ids (R, K) of the kept tokens with every vacated id removed, and how many were vacated."""
    before = {int(i) for i in positions.flatten()}
    after = {int(i) for i in positions[:, kept].flatten()}
    vacated = sorted(before - after)
    moved = [[int(i) - sum(v < int(i) for v in vacated) for i in row] for row in positions[:, kept]]
    return torch.tensor(moved), len(vacated)


def shorten(prompt: Merged, kept: list[int], *, compact: bool) -> Merged:
    """The tokens at `kept` alone."""
    positions = compacted(prompt.positions, kept)[0] if compact else prompt.positions[:, kept]
    short = Merged(embeds=prompt.embeds[:, kept], positions=positions)
    if prompt.visual is not None and prompt.deepstack is not None:
        rows = prompt.visual[0].nonzero()[:, 0].tolist()
        chosen = [rows.index(position) for position in kept if position in rows]
        short.deepstack = [layer[chosen] for layer in prompt.deepstack]
        short.visual = prompt.visual[:, kept]
    return short


@torch.no_grad()
def decode(
    model: nn.Module,
    prompt: Merged,
    kept: list[int],
    *,
    steps: int,
    compact: bool,
    forbidden: list[int],
    depths: list[int] | None = None,
    merges: Sequence[dense.Merge] = (),
    later: list[int] | None = None,
    since: list[int] | None = None,
    edits: attention.Told | None = None,
) -> tuple[list[int], Tensor]:
    """Greedy tokens and raw logits (steps, V) of the shortened prompt.

    Args:
        depths: how many decoder layers each of the tokens at `kept` is seen in; None: all of them.
        later: how many of them later tokens see it in; None: as many.
        since: from which of the tokens at `kept` on those are; None: behind the last.
        merges: which of them go into which between layers.
        edits: where the method changes attention, and then all tokens are kept.
    """
    assert edits is None or len(kept) == prompt.embeds.shape[1]
    short = shorten(prompt, kept, compact=compact)
    next_id = int(prompt.positions[0, -1]) + 1
    if compact:
        next_id -= compacted(prompt.positions, kept)[1]
    embeds, positions = short.embeds, short.positions
    extra: dict[str, Any] = {}
    tokens, logits = [], []
    for _ in range(steps):
        length = embeds.shape[1]
        if short.visual is not None:
            extra["visual_pos_masks"] = nn.functional.pad(short.visual, (0, length - short.visual.shape[1]))
            extra["deepstack_visual_embeds"] = short.deepstack
        ids = positions if positions.shape[0] == 1 else positions[:, None]
        with (
            dense.hidden(model, [depths or []], [merges], later=later and [later], since=since and [since]),
            attention.edited(model, [edits], [0]),
        ):
            hidden = model.model.language_model(
                inputs_embeds=embeds, position_ids=ids, attention_mask=torch.ones(1, length, dtype=torch.long), **extra
            ).last_hidden_state
        step = model.lm_head(hidden[:, -1])[0]
        logits.append(step)
        allowed = step.clone()
        allowed[forbidden] = float("-inf")
        tokens.append(int(allowed.argmax()))
        word = model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        embeds = torch.cat([embeds, word], dim=1)
        positions = torch.cat([positions, torch.full((positions.shape[0], 1), next_id)], dim=1)
        next_id += 1
    return tokens, torch.stack(logits)


@torch.no_grad()
def generate(
    model: nn.Module,
    shorts: Sequence[Merged],
    depths: Sequence[list[int]],
    merges: Sequence[Sequence[dense.Merge]],
    later: Sequence[list[int]],
    edits: Sequence[attention.Told | None],
    **mode: Any,
) -> Tensor:
    """New tokens (rows, steps) of transformers' own `generate` from the short prompts, left padded.

    Args:
        depths: for every prompt, how many decoder layers each of its tokens is seen in.
        merges: for every prompt, which of its tokens go into which between layers.
        later: how many layers new words see each of its tokens in.
        edits: for every prompt, where the method changes attention.
    """
    width = max(short.embeds.shape[1] for short in shorts)
    pads = [width - short.embeds.shape[1] for short in shorts]
    embeds = torch.cat([nn.functional.pad(s.embeds, (0, 0, pad, 0)) for s, pad in zip(shorts, pads, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    ids = torch.stack([nn.functional.pad(s.positions, (pad, 0)) for s, pad in zip(shorts, pads, strict=True)], dim=1)
    text = (mask.cumsum(dim=1) - 1).clamp(min=0)
    position_ids = ids[0] if len(ids) == 1 else torch.cat([text[None], ids])
    moved = [[one.placed(range(pad, width)) for one in own] for own, pad in zip(merges, pads, strict=True)]
    handle = model.model.language_model.register_forward_pre_hook(_deepstack_of(shorts, pads), with_kwargs=True)
    try:
        rows, after = ([[0] * pad + row for row, pad in zip(one, pads, strict=True)] for one in (depths, later))
        with dense.hidden(model, rows, moved, later=after), attention.edited(model, edits, pads):
            return model.generate(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, **mode)
    finally:
        handle.remove()


def _deepstack_of(shorts: Sequence[Merged], pads: list[int]) -> Any:
    """A hook that adds deepstack rows to the prefill, since `generate` cannot be handed them; rows repeat for beams."""

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        B, length = kwargs["inputs_embeds"].shape[:2]
        if length == 1 or all(short.deepstack is None for short in shorts):
            return None
        repeats = B // len(shorts)
        visual = torch.cat([nn.functional.pad(s.visual, (pad, 0)) for s, pad in zip(shorts, pads, strict=True)])
        layers = zip(*(short.deepstack for short in shorts), strict=True)
        kwargs["visual_pos_masks"] = visual.repeat_interleave(repeats, dim=0)
        kwargs["deepstack_visual_embeds"] = [
            torch.cat([row for row in rows for _ in range(repeats)]) for rows in layers
        ]
        return args, kwargs

    return add
