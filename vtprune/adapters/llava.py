"""LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Encoding, Family, Host, Tower
from vtprune.adapters.packing import (
    Parts,
    checked,
    crop_ends,
    frame_parts,
    patch_part,
    patch_rows,
    rows_part,
    square_parts,
    unpadded,
    vision_grid,
)
from vtprune.adapters.towers import vision_tower
from vtprune.errors import UnsupportedCall
from vtprune.types import Modality, Part


def _tower(inner: Host, kind: Modality) -> Tower | None:
    return vision_tower(inner.vision_tower, inner.config.vision_feature_layer, inner.multi_modal_projector)


def _stitched_tower(inner: Host, kind: Modality) -> Tower | None:
    layer, projector = inner.config.vision_feature_layer, inner.multi_modal_projector
    return vision_tower(inner.vision_tower, layer, projector, refuses="its crops and frames are stitched or pooled")


def _llava_parts(inner: Host, encoding: Encoding) -> list[Parts]:
    patch = getattr(inner.config.vision_config, "patch_size", None)
    if not isinstance(patch, int):
        return square_parts("image", encoding)
    sizes = encoding.sizes or (encoding.pixels[-2:],) * len(encoding.lengths)
    grids = [(height // patch, width // patch) for height, width in sizes]
    return checked([(patch_part(n, grid),) for n, grid in zip(encoding.lengths, grids, strict=True)], encoding)


def _llava_rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    return list(patch_rows(raw, encoding.lengths[0]))


def _crop_counts(inner: Host, encoding: Encoding) -> list[tuple[int, int]]:
    """Crops (rows, columns) of every picture; (0, 0) where only the thumbnail is encoded."""
    from transformers.image_processing_utils import select_best_resolution

    pictures = encoding.pictures_per_prompt
    alone = [True] * len(encoding.sizes) if pictures is None else [n == 1 for n in pictures for _ in range(n)]
    side = inner.config.vision_config.image_size
    best = [select_best_resolution(size, inner.config.image_grid_pinpoints) for size in encoding.sizes]
    return [
        (height // side, width // side) if one else (0, 0) for (height, width), one in zip(best, alone, strict=True)
    ]


def _stitched(inner: Host, crops: tuple[int, int], size: tuple[int, ...], limit: int | None, start: int) -> Part:
    """The crops after unpadding, scaled down where they hold more than `limit` crops' worth of tokens."""
    side, _ = vision_grid(inner.config)
    h, w = left = unpadded((crops[0] * side, crops[1] * side), size)
    scale = math.sqrt(h * w / (limit * side**2)) if limit else 0.0
    if scale > 1.1:
        h, w = int(h // scale), int(w // scale)
    rows, columns = (crop_ends(side, *along) for along in zip(crops, left, (h, w), strict=True))
    return rows_part(start, (h, w), (rows, columns))


def _anyres_parts(inner: Host, encoding: Encoding, limit: int | None = None) -> list[Parts]:
    if len(encoding.sizes) != len(encoding.lengths):
        raise UnsupportedCall(
            f"got {len(encoding.sizes)} image_sizes for {len(encoding.lengths)} images: pass those of the processor"
        )
    grid = vision_grid(inner.config)
    n = grid[0] * grid[1]
    entries: list[Parts] = []
    for crops, size in zip(_crop_counts(inner, encoding), encoding.sizes, strict=True):
        if crops == (0, 0):
            entries.append((Part(start=0, stop=n + 1, kind="image", grid=grid, separators=(n,)),))
        else:
            thumbnail = Part(start=0, stop=n, kind="thumbnail", grid=grid)
            entries.append((thumbnail, _stitched(inner, crops, size, limit, n)))
    return checked(entries, encoding)


def _pack(inner: Host, raw: Tensor, encoding: Encoding, options: Mapping[str, Any]) -> list[Tensor]:
    """Rows of patches through transformers' own packing, with NaN for a newline."""
    counts = [1 + rows * columns for rows, columns in _crop_counts(inner, encoding)]
    newline = torch.full(raw.shape[2:], float("nan"), device=raw.device)
    rows = list(raw.split(counts))
    packed, _ = inner.pack_image_features(rows, list(encoding.sizes), image_newline=newline, **options)
    return list(packed)


def _next_parts(inner: Host, encoding: Encoding) -> list[Parts]:
    if encoding.kind == "image":
        return _anyres_parts(inner, encoding)
    stride = inner.config.spatial_pool_stride
    h, w = (side // stride for side in vision_grid(inner.config))
    return checked([frame_parts(encoding.pixels[1], (h, w))] * len(encoding.lengths), encoding)


def _next_rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    if encoding.kind == "image":
        return _pack(inner, raw, encoding, {"vision_feature_select_strategy": "full"})
    if raw.shape[:2].numel() == sum(encoding.lengths):
        pooled = raw
    elif inner.config.spatial_pool_mode == "conv":
        grid = raw.unflatten(1, vision_grid(inner.config)).movedim(-1, 1)
        pooled = nn.functional.avg_pool2d(grid, inner.config.spatial_pool_stride).flatten(2).transpose(1, 2)
    else:
        pooled = inner.vision_resampler(raw)
    return list(pooled.unflatten(0, (-1, encoding.pixels[1])).flatten(1, 2))


def _onevision_parts(inner: Host, encoding: Encoding) -> list[Parts]:
    if encoding.kind == "image":
        limit = int(inner.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        return _anyres_parts(inner, encoding, limit)
    h, w = (math.ceil(side / 2) for side in vision_grid(inner.config))
    return checked([frame_parts(encoding.pixels[1], (h, w), newline=True)] * len(encoding.lengths), encoding)


def _onevision_rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    if encoding.kind == "image":
        return _pack(inner, raw, encoding, {"vision_aspect_ratio": inner.config.vision_aspect_ratio})
    clips = inner.apply_pooling(raw).unflatten(0, (-1, encoding.pixels[1])).flatten(1, 2)
    return list(nn.functional.pad(clips, (0, 0, 0, 1), value=float("nan")))


LLAVA = Family(
    name="llava",
    model_types=("llava",),
    tested="tiny random models with CLIP and SigLIP towers",
    tower=_tower,
    parts=_llava_parts,
    rows=_llava_rows,
    notes="Pixtral and other towers: methods that need features only",
)
LLAVA_NEXT = Family(
    name="llava_next",
    model_types=("llava_next",),
    tested="tiny random models, crop grids 1x2, 2x2 and 1x3",
    tower=_stitched_tower,
    parts=_next_parts,
    rows=_next_rows,
)
LLAVA_NEXT_VIDEO = Family(
    name="llava_next_video",
    model_types=("llava_next_video",),
    tested="tiny random models, images and clips",
    tower=_stitched_tower,
    parts=_next_parts,
    rows=_next_rows,
    kinds=("image", "video"),
    notes="a convolutional pooler pools scores by their mean",
)
LLAVA_ONEVISION = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    tested="tiny random models, images (one and several a prompt) and clips",
    tower=_stitched_tower,
    parts=_onevision_parts,
    rows=_onevision_rows,
    kinds=("image", "video"),
)
