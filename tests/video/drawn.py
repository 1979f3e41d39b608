"""A drawn clip, and the tiny models that are asked about it."""

from __future__ import annotations

import functools
from typing import Any

from PIL import Image

import vtprune
from vtprune.tiny.clips import draw_clip
from vtprune.tiny.scenes import DEVELOPMENT

CLIP = draw_clip(DEVELOPMENT[5])
THING, SHOWN = "white cross", [3, 4]
"""One of the things of the clip, and the frames that show it."""


@functools.cache
def tiny(name: str) -> tuple[Any, Any]:
    """A tiny model and its processor."""
    return vtprune.load_tiny(name)


def pictures(count: int = 3) -> list[Image.Image]:
    """The last frames of the clip."""
    return [Image.fromarray(frame) for frame in CLIP.frames[-count:]]
