"""The reference for law 2: transformers alone, fed short `inputs_embeds` and `position_ids` built here, row by row.

Nothing of vtprune is imported. A row is run without padding and without a cache; every step recomputes everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
    embeds = caught["inputs_embeds"]
    positions = caught.get("position_ids")
    positions = torch.arange(embeds.shape[1])[None] if positions is None else positions[-3:].reshape(-1, embeds.shape[1])
    return Merged(
        embeds=embeds,
        positions=positions,
        visual=caught.get("visual_pos_masks"),
        deepstack=caught.get("deepstack_visual_embeds"),
    )


def compacted(positions: Tensor, kept: list[int]) -> tuple[Tensor, int]:
    """Ids (R, K) of the kept tokens with every vacated id removed, and how many were vacated."""
    before = {int(i) for i in positions.flatten()}
    after = {int(i) for i in positions[:, kept].flatten()}
    vacated = sorted(before - after)
    moved = [[int(i) - sum(v < int(i) for v in vacated) for i in row] for row in positions[:, kept]]
    return torch.tensor(moved), len(vacated)


@torch.no_grad()
def decode(
    model: nn.Module, prompt: Merged, kept: list[int], *, steps: int, compact: bool, forbidden: list[int]
) -> tuple[list[int], Tensor]:
    """Greedy tokens and raw logits (steps, V) of the shortened prompt."""
    next_id = int(prompt.positions[0, -1]) + 1
    positions = prompt.positions[:, kept]
    if compact:
        positions, vacated = compacted(prompt.positions, kept)
        next_id -= vacated
    embeds = prompt.embeds[:, kept]
    extra: dict[str, Any] = {}
    if prompt.visual is not None:
        rows = prompt.visual[0].nonzero()[:, 0].tolist()
        chosen = [rows.index(position) for position in kept if position in rows]
        extra["deepstack_visual_embeds"] = [layer[chosen] for layer in prompt.deepstack]
        visual = prompt.visual[:, kept]
    tokens, logits = [], []
    for _ in range(steps):
        length = embeds.shape[1]
        if prompt.visual is not None:
            extra["visual_pos_masks"] = nn.functional.pad(visual, (0, length - visual.shape[1]))
        ids = positions if positions.shape[0] == 1 else positions[:, None]
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
