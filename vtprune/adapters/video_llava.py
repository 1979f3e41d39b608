"""Video-LLaVA: one tower for images and one for clips, whose frames keep their CLS token."""

from __future__ import annotations

from torch import Tensor

from vtprune.adapters.base import Encoding, Family, Host, Tower
from vtprune.adapters.packing import Parts, checked, patch_part, patch_rows, vision_grid
from vtprune.adapters.towers import vision_tower
from vtprune.types import Modality, PartKind


def _tower(inner: Host, kind: Modality) -> Tower | None:
    tower = inner.image_tower if kind == "image" else inner.video_tower
    return vision_tower(tower, inner.config.vision_feature_layer, inner.multi_modal_projector)


def _parts(inner: Host, encoding: Encoding) -> list[Parts]:
    kind: PartKind = "image" if encoding.kind == "image" else "frame"
    grid = vision_grid(inner.config)
    return checked([(patch_part(n, grid, kind=kind),) for n in encoding.lengths], encoding)


def _rows(inner: Host, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    return list(patch_rows(raw, encoding.lengths[0]))


def _entries(encoding: Encoding) -> int:
    return 1 if encoding.kind == "image" else encoding.pixels[1]


VIDEO_LLAVA = Family(
    name="video_llava",
    model_types=("video_llava",),
    tested="tiny random models, images and clips",
    tower=_tower,
    parts=_parts,
    rows=_rows,
    entries=_entries,
    kinds=("image", "video"),
    notes="every frame of a clip keeps its CLS token, as a separator",
)
