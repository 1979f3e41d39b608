"""Frames of a clip, and what a reader makes of an opened video. Shapes: T frames, H rows and W columns of pixels."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from vtprune.errors import InvalidOption

MAX_PIXELS = 50_000_000
"""Of one frame."""
_MOST_SECONDS = sys.float_info.max
MAX_BYTES = 4 << 30
"""Of all frames that are asked for together."""


class Refused(InvalidOption):
    """A file that was understood and is not to be read as video: no other backend is asked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """Some frames of a clip, in the order they are shown.

    `pixels` are (T, H, W, 3) uint8 RGB, upright. `times` (T,) are seconds from the first frame of the video on,
    `indices` (T,) which of its `total` frames these are. `warnings` say what is not as the file promised, `seconds` how
    long opening and decoding took.
    """

    pixels: np.ndarray
    times: np.ndarray
    indices: np.ndarray
    total: int
    duration: float
    backend: str
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.indices)
        assert self.pixels.shape == (count, *self.pixels.shape[1:3], 3), self.pixels.shape
        assert self.pixels.dtype == np.uint8 and len(self.times) == count, (self.pixels.dtype, len(self.times))

    def taking(self, numbers: Sequence[int] | np.ndarray) -> Frames:
        """Only those frames, by where they stand in here; raises `InvalidOption` where there is no such frame."""
        chosen = np.asarray(numbers, dtype=np.int64).reshape(-1)
        count = len(self.indices)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= count):
            raise InvalidOption(f"frames {chosen.tolist()} of {count}: expected numbers from 0 to {count - 1}")
        return replace(self, pixels=self.pixels[chosen], times=self.times[chosen], indices=self.indices[chosen])

    @property
    def pictures(self) -> list[Image.Image]:
        """The frames as RGB pictures."""
        return [Image.fromarray(frame) for frame in self.pixels]


class Video(Protocol):
    """An opened video, whose frames are decoded when they are asked for.

    `times` (T,) are seconds from the first frame on, ascending; `size` is (H, W) of upright frames. `damage` says what
    of the file is missing or broken, if anything is; `warnings` say what else a user should know.
    """

    @property
    def backend(self) -> str: ...
    @property
    def times(self) -> np.ndarray: ...
    @property
    def duration(self) -> float: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def damage(self) -> str: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Index and pixels (H, W, 3) of frames, one at a time; those that cannot be decoded are left out.

        Args:
            indices: (K,) distinct, ascending, in [0, T).
        """
        ...

    def doubtful(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """Those of the frames given out so far that may show damage: they lean on what could not be decoded."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


def check_timeout(timeout: object) -> None:
    """Raise `InvalidOption` for what is no number of seconds above 0."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= _MOST_SECONDS:
        raise InvalidOption(f"timeout={timeout!r}: expected seconds above 0")


def check_size(name: str, size: tuple[int, int], count: int = 1) -> None:
    """Raise `Refused` where `count` frames of `size` (H, W) are more than is decoded at once."""
    pixels = size[0] * size[1]
    if pixels > MAX_PIXELS:
        raise Refused(
            f"{name} holds frames of {size[1]} x {size[0]} pixels: at most {MAX_PIXELS / 1e6:.0f} megapixels are read, "
            "scale it down first"
        )
    if count * pixels * 3 > MAX_BYTES:
        raise Refused(
            f"{count} frames of {name} at {size[1]} x {size[0]} are {count * pixels * 3 / 2**30:.1f} GiB: at most "
            f"{MAX_BYTES / 2**30:.0f} GiB are read at once, ask for fewer frames"
        )
