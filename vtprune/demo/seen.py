"""What a vision tower sees of a photo: the piece it is shown, features of its patches, and all of its attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vtprune.errors import InvalidOption
from vtprune.readings import BlockAttention, Projection, Reading
from vtprune.report import Stopwatch
from vtprune.types import VisualTokens
from vtprune.viz import Box

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the channels, of values from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of a picture, in whole pixels of it: `right` and `bottom` lie outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def corners(self) -> Box:
        """As Pillow and `viz` take them."""
        return Box(self.left, self.top, self.right, self.bottom)

    def cut(self, height: float, width: float) -> Piece:
        """These shares of it from its upper left corner, a pixel at least."""
        wide, high = round(width * (self.right - self.left)), round(height * (self.bottom - self.top))
        return replace(self, right=self.left + max(1, wide), bottom=self.top + max(1, high))


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a tower takes pictures: `size` (height, width), and shares of `white` less `mean`, over `std`."""

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    resample: Image.Resampling = Image.Resampling.BICUBIC
    white: float = 255.0

    @classmethod
    def told(cls, size: tuple[int, int], settings: Mapping[str, Any]) -> Framing:
        """By settings as timm and open_clip keep them: `mean`, `std` and `interpolation`."""
        return cls(
            size=size,
            mean=tuple(settings.get("mean") or IMAGENET[0]),
            std=tuple(settings.get("std") or IMAGENET[1]),
            resample=_resampling(settings.get("interpolation")),
        )

    @classmethod
    def of_processor(cls, size: tuple[int, int], processor: Any) -> Framing:
        """By a processor of transformers. What it leaves out is left out here too.

        Raises:
            InvalidOption: where it normalises without saying by what.
        """
        mean: tuple[float, ...] = (0.0,) * 3
        std: tuple[float, ...] = (1.0,) * 3
        if getattr(processor, "do_normalize", True):
            mean, std = _channels(processor, "image_mean"), _channels(processor, "image_std")
        if 0.0 in std:
            raise InvalidOption(f"the processor has image_std={processor.image_std}: expected no 0")
        rescales = getattr(processor, "do_rescale", True)
        return cls(
            size=size,
            mean=mean,
            std=std,
            resample=_resampling(processor.resample),
            white=1 / float(getattr(processor, "rescale_factor", 1 / 255)) if rescales else 1.0,
        )

    def box(self, picture: Image.Image) -> Piece:
        """The largest centred piece of the shape of `size`: nothing is stretched, and nothing else is cut off."""
        scale = min(picture.width / self.size[1], picture.height / self.size[0])
        width, height = max(1, round(self.size[1] * scale)), max(1, round(self.size[0] * scale))
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return Piece(left=left, top=top, right=left + width, bottom=top + height)

    def pixels(self, picture: Image.Image, box: Piece) -> Tensor:
        """That piece as the tower takes it, (1, 3, height, width)."""
        height, width = self.size
        # Cropped first: `resize(box=...)` mixes in pixels from beyond the box.
        small = picture.convert("RGB").crop(box.corners).resize((width, height), self.resample)
        values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(height, width, 3)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return ((values / self.white - mean) / std).permute(2, 0, 1)[None].contiguous()


def _resampling(told: Any) -> Image.Resampling:
    """By Pillow's number or name; what is neither is bicubic."""
    if isinstance(told, int):
        return Image.Resampling(told)
    return Image.Resampling.__members__.get(str(told).upper(), Image.Resampling.BICUBIC)


def _channels(processor: Any, name: str) -> tuple[float, ...]:
    """A number for each channel, or one for all of them."""
    told = getattr(processor, name, None)
    found = (told,) * 3 if isinstance(told, int | float) else tuple(told or ())
    if len(found) != 3 or not all(isinstance(value, int | float) and math.isfinite(value) for value in found):
        raise InvalidOption(f"the processor normalises and has {name}={told}: expected three numbers, or one")
    return tuple(map(float, found))


def pair(side: Any) -> tuple[int, int]:
    """Height and width, from a number for both, a pair, or what has them by name.

    Raises:
        InvalidOption: where only the shortest side is told, since pictures of any shape come out then.
    """
    if isinstance(side, int):
        return side, side
    named = hasattr(side, "height")
    if named or isinstance(side, Mapping):
        height, width = (getattr(side, name) if named else side.get(name) for name in ("height", "width"))
        if height is None or width is None:
            told = {name: value for name, value in dict(side).items() if value is not None}
            raise InvalidOption(f"the processor makes pictures of {told}: expected height and width, or a crop_size")
    else:
        height, width = side
    return int(height), int(width)


def made_size(processor: Any) -> tuple[int, int] | None:
    """Height and width that a processor of transformers makes; None where it does not say, raises as `pair` does."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", True) else None
    told = crop or getattr(processor, "size", None)
    return None if told is None else pair(told)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """A photo as a tower saw it: `picture` is the piece inside `box` of the photo, at its own size.

    `tokens` are (1, N, D); their evidence is what the last block says by names that methods ask for. `attentions` are
    those of all blocks, from which `read` takes the rest. `registers` stand between the CLS token and the patches.
    """

    picture: Image.Image
    box: Piece
    tokens: VisualTokens
    attentions: tuple[BlockAttention, ...] = field(repr=False)
    registers: int
    stopwatch: Stopwatch = field(repr=False)

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token stands in front."""
        return self.attentions[-1].has_cls

    def read(self, reading: Reading) -> Tensor:
        """A reading of the tower: (1, N), or (1, N, C) where a patch has several numbers."""
        return read(reading, self.attentions, self.tokens.features, self.registers)


@torch.no_grad()
def read(reading: Reading, attentions: Sequence[BlockAttention], features: Tensor, registers: int) -> Tensor:
    """A reading of blocks, first to last, or of what a projector would get, `features` (1, N, D).

    Returns:
        (1, N), or (1, N, C) where a patch has several numbers.
    """
    if reading.rule.of == "projector":
        return reading.rule(Projection(inputs=features, projector=nn.Identity()))
    numbers = reading.blocks(len(attentions), len(attentions) - 1)
    found = (reading.rule(attentions[number])[:, registers:] for number in numbers)
    return functools.reduce(torch.add, found)
