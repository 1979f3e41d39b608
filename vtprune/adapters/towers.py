"""Probes of the vision towers: which attention makes the features, and how its queries and keys are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Encoding, Host, Probe

_HAS_CLS = {
    "clip_vision_model": True,
    "siglip_vision_model": False,
    "internvl_vision": True,
}


def tower_probe(tower: Host, feature_layer: int | list[int] | tuple[int, ...]) -> Probe | None:
    """Probe of a CLIP, SigLIP or InternViT tower, or None for any other.

    Args:
        tower: the vision tower.
        feature_layer: `vision_feature_layer` of the config: an index into `hidden_states`, whose entry 0 is the
            embedding; of a list, the last entry is taken.
    """
    has_cls = _HAS_CLS.get(getattr(tower.config, "model_type", ""))
    if has_cls is None:
        return None
    layer = _layer_of(tower, feature_layer)
    if layer is None:
        return None
    attention: Host = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    return Probe(
        attention=attention,
        has_cls=has_cls,
        heads=attention.num_heads,
        scale=attention.scale,
        normalise=_joint_norm(attention) if hasattr(attention, "q_norm") else None,
    )


def qwen_probe(tower: Host) -> Probe:
    """Probe of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL tower: its last block that sees whole pictures."""
    full = [index for index in getattr(tower.config, "fullatt_block_indexes", ()) if index < len(tower.blocks)]
    attention = tower.blocks[max(full, default=-1)].attn
    return Probe(
        attention=attention,
        has_cls=False,
        fused="qkv",
        heads=attention.num_heads,
        scale=attention.scaling,
        rotate=_rotate,
        segments=_frames,
    )


def _frames(encoding: Encoding) -> tuple[int, ...]:
    """Patches of every frame of every picture: the blocks with full attention see one frame at a time."""
    return tuple(h * w for t, h, w in encoding.sizes for _ in range(t))


def _layer_of(tower: Host, feature_layer: int | list[int] | tuple[int, ...]) -> Host | None:
    """The layer whose output is the hidden state of that index; None for the embedding."""
    encoder: Host = (tower.vision_model if hasattr(tower, "vision_model") else tower).encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    index = feature_layer if isinstance(feature_layer, int) else feature_layer[-1]
    index = index + len(layers) if index < 0 else index - 1
    return layers[index] if 0 <= index < len(layers) else None


def _joint_norm(attention: Host) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """InternViT normalises queries and keys over all heads together."""

    def apply(norm: nn.Module, heads: Tensor) -> Tensor:
        return norm(heads.transpose(1, 2).flatten(2)).unflatten(-1, (heads.shape[1], -1)).transpose(1, 2)

    def normalise(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return apply(attention.q_norm, query), apply(attention.k_norm, key)

    return normalise


def _rotate(query: Tensor, key: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Axial RoPE of (1, H, N, d) in fp32, from the `position_embeddings` of the attention call: two of (N, d)."""
    cos, sin = (table.float() for table in call["position_embeddings"])

    def turn(heads: Tensor) -> Tensor:
        heads = heads.float()
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin

    return turn(query), turn(key)
