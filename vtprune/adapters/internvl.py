"""InternVL: a picture is several tiles and a thumbnail, each shrunk by pixel shuffle."""

from __future__ import annotations

import math

from torch import Tensor

from vtprune.adapters.base import Encoding, Family, Host, Tower
from vtprune.adapters.packing import Parts, checked, square_parts
from vtprune.adapters.towers import vision_tower
from vtprune.types import Modality


def _tower(inner: Host, kind: Modality) -> Tower | None:
    layer, projector = inner.config.vision_feature_layer, inner.multi_modal_projector
    return vision_tower(inner.vision_tower, layer, projector, refuses="it merges patches")


def _parts(inner: Host, encoding: Encoding) -> list[Parts]:
    return checked(square_parts("tile", encoding), encoding)


def _rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    if raw.shape[:2].numel() == sum(encoding.lengths):
        return list(raw)
    side = math.isqrt(raw.shape[1])
    shuffled = inner.pixel_shuffle(raw.unflatten(1, (side, side)), scale_factor=inner.config.downsample_ratio)
    return list(shuffled.unflatten(-1, (-1, raw.shape[2])).mean(-2).flatten(1, 2))


def _one_run(encoding: Encoding) -> None:
    return None


INTERNVL = Family(
    name="internvl",
    model_types=("internvl",),
    tested="tiny random models, one and several tiles",
    tower=_tower,
    parts=_parts,
    rows=_rows,
    entries=_one_run,
    thumbnail_last=True,
    notes="the frames of a clip are pictures of one tile each",
)
