"""The vision towers: their blocks, which of them makes the features, and how queries and keys are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Encoding, Host, Probe, Tower

_HAS_CLS = {
    "clip_vision_model": True,
    "siglip_vision_model": False,
    "internvl_vision": True,
    "vit": True,
    "dinov2": True,
}


def vision_tower(
    tower: Host,
    feature_layer: int | list[int] | tuple[int, ...],
    projector: nn.Module | None = None,
    *,
    refuses: str | None = None,
) -> Tower | None:
    """A CLIP, SigLIP, InternViT, ViT or DINOv2 tower, or None for any other.

    Args:
        tower: the vision tower.
        feature_layer: `vision_feature_layer` of the config: an index into `hidden_states`, whose entry 0 is the
            embedding; of a list, the last entry is taken.
        projector: what turns its features into tokens.
        refuses: why the encoder cannot be pruned inside.
    """
    has_cls = _HAS_CLS.get(getattr(tower.config, "model_type", ""))
    if has_cls is None:
        return None
    root: Host = tower.vision_model if hasattr(tower, "vision_model") else tower
    encoder: Host = getattr(root, "encoder", root)
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    index = feature_layer if isinstance(feature_layer, int) else feature_layer[-1]
    features = index + len(layers) if index < 0 else index - 1
    if not 0 <= features < len(layers):
        return None
    probes = tuple(_layer_probe(layer, has_cls) for layer in layers)
    if refuses is None and not isinstance(feature_layer, int):
        refuses = "its features are taken from several layers"
    return Tower(blocks=probes, features=features, projector=projector, refuses=refuses)


def _layer_probe(layer: Host, has_cls: bool) -> Probe:
    attention: Host = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    return Probe(
        attention=attention,
        block=layer,
        has_cls=has_cls,
        heads=attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads,
        scale=attention.scale if hasattr(attention, "scale") else attention.scaling,
        normalise=_joint_norm(attention) if hasattr(attention, "q_norm") else None,
    )


def qwen_tower(tower: Host) -> Tower:
    """The tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL, with the merger as its projector."""
    whole = getattr(tower.config, "fullatt_block_indexes", None)
    probes = tuple(
        Probe(
            attention=block.attn,
            block=block,
            has_cls=False,
            fused="qkv",
            heads=block.attn.num_heads,
            scale=block.attn.scaling,
            rotate=_rotate,
            segments=_frames,
            whole=whole is None or number in whole,
        )
        for number, block in enumerate(tower.blocks)
    )
    return Tower(blocks=probes, features=len(probes) - 1, projector=tower.merger, refuses="it merges patches")


def _frames(encoding: Encoding) -> tuple[int, ...]:
    """Patches of every frame of every picture: the blocks with full attention see one frame at a time."""
    return tuple(h * w for t, h, w in encoding.sizes for _ in range(t))


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
