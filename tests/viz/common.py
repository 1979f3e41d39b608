"""Reports made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from vtprune.types import Part


def segment(*parts: tuple[Any, tuple[int, int]], keep: list[int], taken: Any = None, into: Any = None) -> Any:
    made, start = [], 0
    for kind, (h, w) in parts:
        made.append(Part(start=start, stop=start + h * w, kind=kind, grid=(h, w)))
        start += h * w
    kept = torch.tensor(keep, dtype=torch.long)
    return SimpleNamespace(
        parts=tuple(made),
        keep=kept,
        taken=torch.zeros_like(kept) if taken is None else torch.tensor(taken),
        into=None if into is None else torch.tensor(into),
    )


def report(*segments: Any, picks: tuple[str, ...] = ("pick",)) -> Any:
    return SimpleNamespace(segments=segments, picks=picks)


def grey(width: int, height: int, value: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), (value,) * 3)
