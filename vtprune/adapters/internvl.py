"""InternVL: a picture is several tiles and a thumbnail, each shrunk by pixel shuffle."""

from __future__ import annotations

import math

from torch import Tensor

from vtprune.adapters.base import Encoding, Family, Host, Probe
from vtprune.adapters.packing import Parts, checked, square_parts
from vtprune.adapters.towers import tower_probe
from vtprune.types import Modality


def _probe(inner: Host, kind: Modality) -> Probe | None:
    return tower_probe(inner.vision_tower, inner.config.vision_feature_layer)


def _parts(inner: Host, encoding: Encoding) -> list[Parts]:
    return checked(square_parts("tile", encoding), encoding)


def _scores(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    side = math.isqrt(raw.shape[1])
    grid = raw.reshape(-1, side, side, 1)
    return list(inner.pixel_shuffle(grid, scale_factor=inner.config.downsample_ratio).mean(-1).flatten(1))


def _one_run(encoding: Encoding) -> None:
    return None


INTERNVL = Family(
    name="internvl",
    model_types=("internvl",),
    tested="tiny random models, one and several tiles",
    probe=_probe,
    parts=_parts,
    scores=_scores,
    entries=_one_run,
    thumbnail_last=True,
    notes="the frames of a clip are pictures of one tile each",
)
