"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense and mixture of experts): images and clips of any size, M-RoPE."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtprune.adapters.base import Encoding, Family, Host, Tower
from vtprune.adapters.packing import Parts, checked, frame_parts
from vtprune.adapters.towers import qwen_tower
from vtprune.types import Modality, Part


def _tower(inner: Host, kind: Modality) -> Tower:
    return qwen_tower(inner.visual)


def _token_grids(inner: Host, encoding: Encoding) -> list[tuple[int, int, int]]:
    """Tokens (t, h, w) of every picture: patches over the merge size."""
    merge = inner.config.vision_config.spatial_merge_size
    return [(t, h // merge, w // merge) for t, h, w in encoding.sizes]


def _parts(inner: Host, encoding: Encoding) -> list[Parts]:
    entries: list[Parts] = []
    for t, h, w in _token_grids(inner, encoding):
        if encoding.kind == "image" and t == 1:
            entries.append((Part(start=0, stop=h * w, kind="image", grid=(h, w)),))
        else:
            entries.append(frame_parts(t, (h, w)))
    return checked(entries, encoding)


def _rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    return list(_merged(inner, raw).split(encoding.lengths))


def _merged(inner: Host, raw: Tensor) -> Tensor:
    """Rows of patches (1, N, C) as those of tokens (N / merge², C): the patches of a token stand next to each other."""
    return raw[0].unflatten(0, (-1, inner.config.vision_config.spatial_merge_size**2)).mean(1)


def _windowed_rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    """Qwen2.5-VL orders its patches by attention windows; only the merged tokens return to raster order."""
    vision = inner.config.vision_config
    window = vision.window_size // vision.spatial_merge_size // vision.patch_size
    place = torch.from_numpy(np.argsort(window_order(_token_grids(inner, encoding), window)))
    place = place.to(raw.device, non_blocking=True)
    return list(_merged(inner, raw)[place].split(encoding.lengths))


def window_order(grids: list[tuple[int, int, int]], window: int) -> np.ndarray:
    """Raster numbers of the tokens in the order of the tower: frame by frame, window by window, raster within."""
    orders, start = [], 0
    for t, h, w in grids:
        frame, y, x = np.indices((t, h, w)).reshape(3, -1)
        orders.append(start + np.lexsort((x, y, x // window, y // window, frame)))
        start += t * h * w
    return np.concatenate(orders)


QWEN2_VL = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    tested="tiny random models, images and clips",
    tower=_tower,
    parts=_parts,
    rows=_rows,
    kinds=("image", "video"),
)
QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    tested="tiny random models, images and clips",
    tower=_tower,
    parts=_parts,
    rows=_windowed_rows,
    kinds=("image", "video"),
    notes="reads the last block with full attention",
)
QWEN3_VL = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    tested="tiny random models, dense and mixture of experts, images and clips",
    tower=_tower,
    parts=_parts,
    rows=_rows,
    kinds=("image", "video"),
    notes="a clip has one run of placeholders per temporal patch; deepstack rows are cut with their tokens, not merged",
)
