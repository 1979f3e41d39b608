"""The decoder layers of a language model: how queries and keys are made, where cuts may begin."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Host, sliding_window
from vtprune.errors import UnsupportedModel

_IMPLEMENTATIONS = ("sdpa", "eager", "flash")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The layers of a language model, first to last; the first cut may be in front of layer `first`.

    A layer has `input_layernorm` and `self_attn` with `q_proj` and `k_proj`, perhaps norms of each head, and an `mlp`
    where that was asked for. `listed` is where the model has them, and runs what it finds there.
    """

    layers: tuple[nn.Module, ...]
    first: int
    listed: nn.ModuleList | None = None

    def queries(self, number: int, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries (B, H, R, d) of one layer from what `q_proj` gave, (B, R, H d)."""
        return _rotated(projected, self.attention(number), "q_norm", cos, sin)

    def keys(self, number: int, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (B, G, n, d) of one layer from what `k_proj` gave, (B, n, G d)."""
        return _rotated(projected, self.attention(number), "k_norm", cos, sin)

    def ones(self, number: int, cos: Tensor, sin: Tensor) -> Tensor:
        """A vector of ones (B, n, d) at every place, rotated as queries and keys of one layer are."""
        heads = cos.new_ones(*cos.shape[:2], self.attention(number).head_dim, dtype=torch.float32)
        return _partly_turned(heads[:, None], cos.float(), sin.float())[:, 0]

    def values(self, number: int, projected: Tensor) -> Tensor:
        """Values (B, G, n, d) of one layer from what `v_proj` gave, (B, n, G d)."""
        return projected.unflatten(-1, (-1, self.attention(number).head_dim)).transpose(1, 2)

    def attention(self, number: int) -> Host:
        """The attention of one layer."""
        return self.layers[number].self_attn

    def modules(self, number: int) -> tuple[nn.Module, nn.Module]:
        """Attention and MLP of one layer, whose outputs are added to the residual stream."""
        layer: Host = self.layers[number]
        return layer.self_attn, layer.mlp


def decoder_of(inner: Host, lm: Host, *, glances: bool, changes: bool = False, edits: bool = False) -> Decoder:
    """The decoder of a base model; `glances` says that attention of its layers is to be read, `changes` what their
    modules make of tokens, and `edits` that attention is to be changed.

    Raises:
        UnsupportedModel: where layers are of another kind or see a window only, or rotate in a way not known here.
    """
    name, what = type(lm).__name__, "changes of attention" if edits else "cuts between layers"
    layers = getattr(lm, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(map(_is_plain, layers)):
        raise UnsupportedModel(f"the layers of {name} are not of the form that {what} need")
    if len({parameter.device for parameter in lm.parameters()}) > 1:
        raise UnsupportedModel(f"{name} lies on several devices, and {what} work on one: load it on one")
    if sliding_window(inner.config) is not None:
        raise UnsupportedModel(f"layers of {name} see a sliding window, which {what} know nothing of")
    if glances and not all(_rotates_halves(layer.self_attn) for layer in layers):
        raise UnsupportedModel(
            f"it is not known how layers of {name} turn queries and keys, so they cannot be looked at"
        )
    if changes and not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        raise UnsupportedModel(f"layers of {name} have no `mlp`, so it is not known what they make of tokens")
    if edits and not all(_ends_in_values(layer.self_attn) for layer in layers):
        raise UnsupportedModel(
            f"it is not known what layers of {name} do to attention before `o_proj`, so it cannot be changed"
        )
    implementation = lm.config._attn_implementation or "eager"
    if not implementation.startswith(_IMPLEMENTATIONS):
        raise UnsupportedModel(f"attn_implementation={implementation!r}: {what} take sdpa, flash or eager")
    deep = getattr(getattr(inner.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return Decoder(layers=tuple(layers), first=max(1, len(deep)), listed=layers)


def _is_plain(layer: Host) -> bool:
    attention = getattr(layer, "self_attn", None)
    names = ("q_proj", "k_proj", "head_dim", "scaling")
    return hasattr(layer, "input_layernorm") and all(hasattr(attention, name) for name in names)


def _ends_in_values(attention: Host) -> bool:
    """Whether `o_proj` gets the values, weighted by a softmax, and nothing but that."""
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb", "rotary_fn"}
    children = {name for name, _ in attention.named_children()}
    own = {name for name, _ in attention.named_parameters(recurse=False)}
    softcap = any(getattr(attention, name, None) for name in ("attn_logit_softcapping", "softcap", "logit_soft_cap"))
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= children <= known or own or softcap:
        return False
    widths = [getattr(getattr(attention, name), "out_features", None) for name in ("q_proj", "k_proj", "v_proj")]
    return bool(widths[0] == getattr(attention.o_proj, "in_features", None) and widths[1] == widths[2])


def _rotates_halves(attention: Host) -> bool:
    """Whether queries and keys are normalised and rotated as `_rotated` has it: the model's own function is tried."""
    norms = {name for name, _ in attention.named_children() if "norm" in name}
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if not norms <= {"q_norm", "k_norm"} or turn is None:
        return False
    heads, cos, sin = (
        torch.linspace(-1, 2, 8).view(1, 1, 2, 4),
        torch.linspace(-1, 1, 8).view(1, 2, 4),
        torch.linspace(2, 0, 8).view(1, 2, 4),
    )
    try:
        own = turn(heads, heads, cos, sin)[0]
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    return bool(torch.is_tensor(own) and own.shape == heads.shape and torch.allclose(own, _turned(heads, cos, sin)))


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _rotated(projected: Tensor, attention: Host, norm: str, cos: Tensor, sin: Tensor) -> Tensor:
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, norm):
        heads = getattr(attention, norm)(heads)
    return _partly_turned(heads.transpose(1, 2), cos, sin)


def _partly_turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, H, n, d), of which as many numbers are rotated as there are cosines."""
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    return torch.cat([_turned(turned, cos, sin), rest], dim=-1)
