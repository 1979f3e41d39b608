"""What an adapter says about a family of models: values and pure functions, no hooks.

A `Family` describes where a model can be cut, how the attention of its vision encoder can be read (`Tower`, `Probe`),
how the tokens of a picture are packed (`parts`) and how a row per patch becomes a row per token (`rows`). The runtime
installs the hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.types import Modality, Part

Host = Any
"""A transformers base model or tower; a type checker would take each of its attributes for "Tensor | Module"."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One call of `get_image_features` or `get_video_features`, as plain host numbers.

    `lengths` holds the number of tokens of each picture or clip (or of each tile or frame where the encoder returns
    one stacked tensor: `stacked`), in the order transformers scatters them into the prompt. `sizes` are the rows of
    `image_sizes` (height, width) or `*_grid_thw`; `pixels` is the shape of the pixel tensor; `pictures_per_prompt` is
    `batch_num_images` where the processor gave it.
    """

    kind: Modality
    lengths: tuple[int, ...]
    stacked: bool
    sizes: tuple[tuple[int, ...], ...] = ()
    pixels: tuple[int, ...] = ()
    pictures_per_prompt: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Which attention of the vision encoder to read, and how its queries and keys are made.

    `attention` is the module; `query`, `key` and `value` name its projections, or `fused` the joint one; `joint` makes
    that of the arguments of a call where no module does. `normalise` and
    `rotate` are what the family does to q and k (B, H, N, d) before the product; `rotate` receives the keyword
    arguments of the attention call. `has_cls` says that token 0 is a CLS token. Where all pictures of a call share one
    sequence, `segments` gives the lengths of what attends to itself alone (pictures, frames). `whole` is False where
    attention stays within windows: such a block is not read. `block` is what the attention belongs to; its output are
    the hidden states (B, n, D).
    """

    attention: nn.Module
    block: nn.Module
    has_cls: bool
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: str | None = None
    joint: Callable[[Host, tuple[Any, ...], dict[str, Any]], Tensor] | None = None
    heads: int
    scale: float
    normalise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    rotate: Callable[[Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]] | None = None
    segments: Callable[[Encoding], tuple[int, ...]] | None = None
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision encoder: one probe for every block, first to last, which block makes the features, and the projector.

    `projector` turns what the encoder gives, (..., N, C), into tokens; None where it is not known to do so patch by
    patch. `refuses` says why the encoder cannot be pruned inside, None where it can.
    """

    blocks: tuple[Probe, ...]
    features: int
    projector: nn.Module | None = None
    refuses: str | None = None

    @property
    def probe(self) -> Probe:
        """That of the block that makes the features, or of the one before it that sees whole pictures."""
        return self.blocks[self.seeing_whole(self.features)]

    @property
    def has_cls(self) -> bool:
        """Whether token 0 is a CLS token."""
        return self.probe.has_cls

    def seeing_whole(self, block: int) -> int:
        """The last block up to `block` that sees whole pictures, or the first one after it."""
        whole = [number for number, probe in enumerate(self.blocks) if probe.whole]
        return max((number for number in whole if number <= block), default=whole[0])


def no_tower(inner: Host, kind: Modality) -> Tower | None:
    """The tower of a family that serves features-only methods."""
    return None


def same_rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    """Patch-to-token map of families whose encoder rows are the tokens: (rows, N, C) -> one (n, C) each."""
    return list(raw)


def square_grid(n: int) -> tuple[int, int]:
    """The square grid of `n` tokens, or one row where `n` is no square."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else (1, n)


def one_entry(encoding: Encoding) -> int | None:
    """Entries per picture of families that return one entry for each."""
    return 1


def single_parts(inner: Host, encoding: Encoding) -> list[tuple[Part, ...]]:
    """Parts of families where each picture is one grid without separators."""
    return [(Part(start=0, stop=n, kind="image", grid=square_grid(n)),) for n in encoding.lengths]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: names, seam, probes, and how its pictures are packed into tokens.

    `parts(inner, encoding)` gives the parts of each entry of `encoding.lengths`. `entries(encoding)` says how many
    entries make one picture or clip (frames of a clip, say), or None where all entries of one run of placeholders do
    (tiles); with `thumbnail_last` the last of several tiles is a thumbnail. `rows(inner, raw, encoding)` maps what was
    read of patches, (rows, N, C), to one (n, C) per entry, NaN at separators.
    """

    name: str
    model_types: tuple[str, ...]
    tested: str
    tower: Callable[[Host, Modality], Tower | None] = no_tower
    parts: Callable[[Host, Encoding], list[tuple[Part, ...]]] = single_parts
    rows: Callable[[Host, Tensor, Encoding], list[Tensor]] = same_rows
    entries: Callable[[Encoding], int | None] = one_entry
    thumbnail_last: bool = False
    kinds: tuple[Modality, ...] = ("image",)
    notes: str = ""


def language_model(inner: Host) -> nn.Module | None:
    """The module that receives the merged embeddings, or None where the seam is not there."""
    for name in ("language_model", "text_model"):
        module = getattr(inner, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def rope_axes(config: Any) -> int:
    """Rows of the position ids that the rotary embedding reads: 3 or more on M-RoPE (t, h, w), 0 on 1-D RoPE."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return len(rope.get("mrope_section") or ())


def sliding_window(config: Any) -> int | None:
    """Tokens that sliding attention of the language model reaches back, None where no layer slides."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    return None if kinds is not None and not any("sliding" in kind for kind in kinds) else window


def placeholder_id(config: Any, kind: Modality) -> int | None:
    """The token id that stands for a visual token of this kind, None where the config names none."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    return None


def pooled_lengths(pooled: Tensor | list[Tensor] | tuple[Tensor, ...]) -> tuple[tuple[int, ...], bool]:
    """Lengths of the entries of a `pooler_output`, and whether it is one stacked tensor (rows, N, D)."""
    if torch.is_tensor(pooled):
        rows = pooled.shape[0] if pooled.ndim == 3 else 1
        return (pooled.shape[-2],) * rows, True
    return tuple(entry.shape[0] if entry.ndim == 2 else entry.shape[:-1].numel() for entry in pooled), False
