"""The families of models vtprune knows, and the one it falls back to."""

from __future__ import annotations

from typing import Any

from vtprune.adapters.base import Family
from vtprune.adapters.generic import GENERIC
from vtprune.adapters.internvl import INTERNVL
from vtprune.adapters.llava import LLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION
from vtprune.adapters.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from vtprune.adapters.video_llava import VIDEO_LLAVA

FAMILIES: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_next_video": LLAVA_NEXT_VIDEO,
    "llava_onevision": LLAVA_ONEVISION,
    "video_llava": VIDEO_LLAVA,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "internvl": INTERNVL,
    "generic": GENERIC,
}


def family_of(config: Any) -> Family:
    """The family of a model by its `config.model_type`; `GENERIC` for a type nobody wrote one for."""
    model_type = getattr(config, "model_type", None)
    return next((family for family in FAMILIES.values() if model_type in family.model_types), GENERIC)
