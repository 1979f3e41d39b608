"""Estimates from shapes: operations and KV cache of a language model, and how text outweighs the picture.

A multiplication and an addition count as two operations. Norms, rotations and softmaxes (under one in a hundred) are
left out, so is what choosing tokens costs. Operations are no seconds: for speed, measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.errors import InvalidOption


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder: `layers`, width `d`, `heads` and `key_heads` of size `head_dim`, `inner` width and `vocabulary`."""

    layers: int
    d: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """That of a text config of transformers."""
        return cls(
            layers=config.num_hidden_layers,
            d=config.hidden_size,
            heads=config.num_attention_heads,
            key_heads=_key_heads(config),
            head_dim=_head_dim(config),
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
        )


def layer_flops(shape: Shape, n: int) -> int:
    """Operations of one decoder layer on `n` tokens: projections, causal attention, gated MLP."""
    attention = shape.heads * shape.head_dim
    projections = 4 * n * shape.d * (attention + shape.key_heads * shape.head_dim)
    return projections + 2 * attention * n * (n + 1) + 6 * n * shape.d * shape.inner


def prefill_flops(shape: Shape, lengths: Sequence[int]) -> int:
    """Operations of a prefill with so many tokens in each layer, and one row of logits.

    Raises:
        InvalidOption: for another number of lengths than layers.
    """
    _check_lengths(shape, lengths)
    return sum(layer_flops(shape, n) for n in lengths) + 2 * shape.d * shape.vocabulary


def decode_flops(shape: Shape, cached: Sequence[int]) -> int:
    """Operations of one decoded token with so many tokens cached in each layer, itself included.

    Raises:
        InvalidOption: for another number of lengths than layers.
    """
    _check_lengths(shape, cached)
    attention = shape.heads * shape.head_dim
    fixed = 4 * shape.d * (attention + shape.key_heads * shape.head_dim) + 6 * shape.d * shape.inner
    return sum(fixed + 4 * attention * length for length in cached) + 2 * shape.d * shape.vocabulary


def kv_bytes(shape: Shape, cached: Sequence[int], itemsize: int) -> int:
    """Bytes of keys and values of one row with so many tokens cached in each layer.

    Raises:
        InvalidOption: for another number of lengths than layers.
    """
    _check_lengths(shape, cached)
    return 2 * shape.key_heads * shape.head_dim * itemsize * sum(cached)


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Bytes of KV cache that one token takes over all attention layers.

    Args:
        config: the text config; layers of linear attention store no keys and count nothing.
        itemsize: bytes of one element.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("linear" not in kind for kind in kinds)
    return 2 * _key_heads(config) * _head_dim(config) * layers * itemsize


def modality_dominance(text_mass: float, other_mass: float, text: int, others: int) -> float:
    """MDI: attention that a text token of the prompt gets, over that of another token; above 1 text dominates.

    It grows by itself as the others get fewer: compare at equal numbers. Source: arXiv 2508.10552.

    Args:
        text_mass: attention of the generated tokens to all text tokens of the prompt.
        other_mass: the same to all others.
        text: number of text tokens.
        others: number of the others.
    """
    _check_masses(text_mass, other_mass, text, others)
    return (text_mass / text) / (other_mass / others)


def attention_efficiency(text_mass: float, other_mass: float, text: int, others: int) -> tuple[float, float]:
    """AEI of text and of the others: share of attention over share of tokens. Their ratio is the MDI.

    Arguments and source are those of `modality_dominance`.
    """
    _check_masses(text_mass, other_mass, text, others)
    whole, count = text_mass + other_mass, text + others
    return (text_mass / whole) / (text / count), (other_mass / whole) / (others / count)


def _key_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_lengths(shape: Shape, lengths: Sequence[int]) -> None:
    if len(lengths) != shape.layers:
        raise InvalidOption(f"{len(lengths)} lengths: expected one for each of {shape.layers} layers")


def _check_masses(text_mass: float, other_mass: float, text: int, others: int) -> None:
    if min(text_mass, other_mass) <= 0 or min(text, others) < 1:
        raise InvalidOption("attention and tokens of text and of the others: expected more than nothing of each")
