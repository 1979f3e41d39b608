"""Vision encoders by themselves: of timm, open_clip and transformers. Told by their parts, nothing is imported."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from vtprune.adapters.base import Host, Probe, Tower
from vtprune.adapters.towers import vision_tower


def plain_tower(model: Host) -> Tower | None:
    """The tower that a model is, sees with or classifies by; None for any other model."""
    if hasattr(model, "blocks") and hasattr(model, "patch_embed") and hasattr(model, "num_prefix_tokens"):
        return _timm_tower(model)
    visual = getattr(model, "visual", model)
    if hasattr(getattr(visual, "transformer", None), "resblocks") and hasattr(visual, "conv1"):
        return _open_clip_tower(visual)
    return None if hasattr(model, "language_model") else _transformers_tower(model)


def _transformers_tower(model: Host) -> Tower | None:
    """The tower that a model of transformers is, sees with (CLIP and SigLIP), or classifies by."""
    inside = (model, getattr(model, "vision_model", None), getattr(model, "base_model", None))
    towers = (vision_tower(part, -1) for part in inside if hasattr(part, "config"))
    return next((tower for tower in towers if tower is not None), None)


def _timm_tower(model: Host) -> Tower:
    refuses = _timm_refuses(model)
    if refuses is not None:
        return Tower(blocks=(), features=-1, refuses=refuses)
    probes = tuple(
        Probe(
            attention=block.attn,
            block=block,
            has_cls=model.num_prefix_tokens == 1,
            fused="qkv",
            heads=block.attn.num_heads,
            scale=block.attn.scale,
            normalise=partial(_normalised, block.attn),
        )
        for block in model.blocks
    )
    return Tower(blocks=probes, features=len(probes) - 1)


def _timm_refuses(model: Host) -> str | None:
    """Why the sequence cannot be cut, or its attention not be read as that of a plain vision transformer."""
    if model.num_prefix_tokens > 1:
        return f"it has {model.num_prefix_tokens} tokens in front of its patches"
    if model.num_prefix_tokens == 1 and getattr(model, "cls_token", None) is None:
        return "the token in front of its patches is no CLS token"
    if getattr(model, "rope", None) is not None:
        return "its attention depends on where patches are"
    found = [getattr(block, "attn", None) for block in model.blocks]
    plain = all(type(own).__name__ == "Attention" and hasattr(own, "qkv") and hasattr(own, "q_norm") for own in found)
    return None if plain else "its attention depends on where patches are, or is of another kind"


def _normalised(attention: Host, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return attention.q_norm(query), attention.k_norm(key)


def _open_clip_tower(visual: Host) -> Tower:
    batch_first = getattr(visual.transformer, "batch_first", True)
    probes = tuple(
        Probe(
            attention=block.attn,
            block=block,
            has_cls=True,
            joint=_in_projection,
            heads=block.attn.num_heads,
            scale=block.attn.head_dim**-0.5,
        )
        for block in visual.transformer.resblocks
    )
    refuses = (
        None if batch_first and hasattr(probes[0].attention, "in_proj_weight") else "its blocks are of another kind"
    )
    return Tower(blocks=probes, features=len(probes) - 1, refuses=refuses)


def _in_projection(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Queries, keys and values side by side, which `nn.MultiheadAttention` makes without a module of their own."""
    inputs = args[0] if args else kwargs["query"]
    return linear(inputs, attention.in_proj_weight, attention.in_proj_bias)
