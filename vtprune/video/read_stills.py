"""Clips that are no video files: folders of pictures, arrays on disk, and what is in memory already."""

from __future__ import annotations

import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vtprune._pictures import still_formats, still_suffixes
from vtprune.errors import InvalidOption
from vtprune.video.frames import check_size

logger = logging.getLogger("vtprune")
RATE = 24.0
"""Frames a second where nobody says, as transformers assumes too."""
MAX_FRAMES = 10_000_000
"""Of one clip: when each is shown is held in memory."""
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error)


class StillsVideo:
    """Pictures in a row, all of one size, shown at an even rate.

    Args:
        source: where they are from, for messages.
        count: how many.
        size: (H, W) of each.
        load: gives one by its number as (H, W, 3) uint8, None where it cannot be read.
        rate: frames a second, `RATE` where it is None.
    """

    damage = ""

    def __init__(
        self,
        source: str,
        *,
        backend: str,
        count: int,
        size: tuple[int, int],
        load: Callable[[int], np.ndarray | None],
        rate: float | None,
    ) -> None:
        if count < 1:
            raise InvalidOption(f"{source} holds no frames: expected one at least")
        if count > MAX_FRAMES:
            raise InvalidOption(f"{source} holds {count} frames: at most {MAX_FRAMES} are read, take a part of it")
        if not all(size):
            raise InvalidOption(f"{source} holds frames of {size[1]} x {size[0]} pixels: expected one pixel at least")
        check_size(source, size)
        self.backend, self.size, self._load = backend, size, load
        self.times = np.arange(count) / (rate or RATE)
        self.duration = count / (rate or RATE)
        self.warnings: tuple[str, ...] = ()
        if not rate:
            self.warnings += (f"{source} does not say when frames are shown: {RATE:g} a second assumed",)

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """See `vtprune.video.frames.Video`."""
        for index in indices:
            pixels = self._load(int(index))
            if pixels is not None:
                yield int(index), pixels

    def doubtful(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """None: every picture stands for itself."""
        return []

    def close(self) -> None:
        """Nothing is held open."""


def open_folder(folder: Path, rate: float | None) -> StillsVideo:
    """The pictures of a folder in natural order: frame_2 comes before frame_10. Hidden files are none.

    Raises `InvalidOption` for a folder without pictures, and later for a picture that is not as large as the first one.
    """
    files = [file for file in folder.iterdir() if _is_still(file)]
    if not files:
        raise InvalidOption(f"{folder} holds no pictures: expected a folder of frames, like frame_1.png")
    files.sort(key=_natural)
    several: list[Path] = []
    first = next((pixels for file in files if (pixels := _read(file, None, several)) is not None), None)
    if first is None:
        raise InvalidOption(f"no picture in {folder} can be read: the files are empty, truncated or damaged")
    size = first.shape[:2]

    def load(number: int) -> np.ndarray | None:
        pixels = _read(files[number], size, several)
        if several and several[-1] not in told:
            told.add(several[-1])
            video.warnings += (f"{several[-1].name} holds several pictures: the first one is taken",)
        return pixels

    told: set[Path] = set()
    video = StillsVideo(str(folder), backend="stills", count=len(files), size=size, load=load, rate=rate)
    return video


def open_array_file(path: Path, rate: float | None) -> StillsVideo:
    """Frames (T, H, W, 3) uint8 of a `.npy` file, read when they are asked for.

    Raises `InvalidOption` for anything else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InvalidOption(f"cannot read the array {path}: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InvalidOption(f"{path} holds several arrays: expected one, saved by numpy.save")
    return _open_array(str(path), array, "stills", rate)


def open_memory(source: np.ndarray | Sequence[Image.Image], rate: float | None) -> StillsVideo:
    """An array (T, H, W, 3) uint8, or a list of pictures of one size. Raises `InvalidOption` for anything else."""
    if isinstance(source, np.ndarray):
        return _open_array("the array", source, "memory", rate)
    pictures = list(source)
    strangers = [type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image)]
    if strangers:
        raise InvalidOption(
            f"a list of {strangers[0]}: expected pictures of Pillow, or one array (T, H, W, 3) of uint8"
        )
    size = pictures[0].size if pictures else (0, 0)
    for number, picture in enumerate(pictures):
        if picture.size != size:
            raise InvalidOption(_uneven(f"picture {number} of the list", picture.size, size))
    return StillsVideo(
        "the list of pictures",
        backend="memory",
        count=len(pictures),
        size=size[::-1],
        load=lambda i: _pixels(pictures[i], f"picture {i} of the list"),
        rate=rate,
    )


def _open_array(name: str, array: np.ndarray, backend: str, rate: float | None) -> StillsVideo:
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise InvalidOption(f"{name} is {array.shape} of {array.dtype}: expected (T, H, W, 3) of uint8, in RGB")
    return StillsVideo(
        name, backend=backend, count=len(array), size=array.shape[1:3], load=lambda i: array[i], rate=rate
    )


def _natural(file: Path) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers; the name itself decides between frame_1 and frame_01."""
    parts = re.findall(r"\d+|\D+", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts] + [(-1, file.name)]


def _is_still(file: Path) -> bool:
    """Names that begin with a dot are notes of systems about a file, not the file."""
    return file.suffix.lower() in still_suffixes() and not file.name.startswith(".") and file.is_file()


def _read(file: Path, size: tuple[int, int] | None, several: list[Path]) -> np.ndarray | None:
    """Pixels (H, W, 3) of an upright picture of that size (H, W), None where the file is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=still_formats()) as picture:
                check_size(str(file), picture.size[::-1])
                # The second picture in a photo of a camera is a smaller one, or a map of its depth.
                if picture.format != "MPO" and getattr(picture, "is_animated", False):
                    several.append(file)
                pixels = _pixels(ImageOps.exif_transpose(picture), str(file))
    except Image.DecompressionBombError as error:
        raise InvalidOption(f"{file} is an enormous picture: scale it down first") from error
    except _UNREADABLE as error:
        if isinstance(error, InvalidOption):
            raise
        logger.debug("%s cannot be read: %s", file, error)
        return None
    if size is not None and pixels.shape[:2] != size:
        raise InvalidOption(_uneven(str(file), pixels.shape[1::-1], size[::-1]))
    return pixels


def _pixels(picture: Image.Image, name: str) -> np.ndarray:
    if picture.mode.startswith(("I", "F")):
        raise InvalidOption(f"{name} has more than 8 bits a pixel: save it in 8 bits first")
    return np.asarray(picture.convert("RGB"))


def _uneven(name: str, size: tuple[int, ...], first: tuple[int, ...]) -> str:
    return f"{name} is {size[0]} x {size[1]}, the first one {first[0]} x {first[1]}: expected frames of one size"
