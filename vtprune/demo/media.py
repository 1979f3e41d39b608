"""What users bring: pictures and clips of any kind, checked and brought to RGB, and bundled examples."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vtprune._pictures import MAX_PIXELS, in_8_bits, read_picture
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.types import Modality
from vtprune.video.frames import Frames
from vtprune.video.guard import Decoders
from vtprune.video.reader import read_frames
from vtprune.video.sampling import Uniform

LONGEST_SIDE = 1536
"""Pixels of a picture; larger ones are scaled down."""
LONGEST_FRAME = 768
FRAMES = 8
MAX_FILE = 256 << 20
"""Bytes of an upload."""
MAX_FRAME = 4096 * 2304
"""Pixels of a frame."""
SECONDS = 60.0
A_CLIP = "a clip"
"""The name of the example that is one."""
MAX_QUESTION = 2000
"""Characters."""
_NO_PICTURES = ("MPEG", "PDF", "EPS", "WMF")
"""Formats that Pillow knows by their first bytes and does not decode, or only with other programs."""
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error)
"""What Pillow raises over damaged files."""

Source = str | os.PathLike[str] | Image.Image | np.ndarray | Sequence[Image.Image] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """A picture, or the frames of a clip: upright, RGB, 8 bits.

    `times` (T,) of a clip are seconds, and so is `duration`. `notes` say what was changed on the way.
    """

    name: str
    pictures: tuple[Image.Image, ...]
    kind: Modality = "image"
    times: tuple[float, ...] = ()
    duration: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pictures[0].size


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A bundled picture or clip: what `read_upload` takes, and a question with its answer."""

    name: str
    source: Path | Image.Image
    question: str
    answer: str


def examples(drawn: int = 3) -> tuple[Example, ...]:
    """The bundled picture and clip, and so many drawn scenes."""
    from vtprune.tiny import ANSWER, PICTURE, QUESTION
    from vtprune.tiny.bundled_clip import CLIP
    from vtprune.tiny.bundled_clip import drawn as drawn_clip
    from vtprune.tiny.clips import ask_clip
    from vtprune.tiny.drawing import Stream
    from vtprune.tiny.scenes import DEVELOPMENT, ask, draw_scene

    asked = next(one for one in ask_clip(drawn_clip(), Stream(0)) if one.kind == "color")
    found = [
        Example(name="a picture", source=PICTURE, question=QUESTION, answer=ANSWER),
        Example(name=A_CLIP, source=CLIP, question=asked.text, answer=asked.answer),
    ]
    for number, seed in enumerate(DEVELOPMENT[:drawn], start=1):
        scene = draw_scene(seed)
        first = ask(scene, Stream(~seed))[0]
        picture = Image.fromarray(scene.pixels)
        found.append(Example(name=f"scene {number}", source=picture, question=first.text, answer=first.answer))
    return tuple(found)


def check_question(question: object) -> str:
    """The question without spaces around it; raises `InvalidOption` where nothing is left, or far too much."""
    text = question.strip() if isinstance(question, str) else ""
    if not text:
        raise InvalidOption("the question is empty: write one, for example 'what color is the cross ?'")
    if len(text) > MAX_QUESTION:
        raise InvalidOption(f"the question has {len(text)} characters: at most {MAX_QUESTION} are taken, shorten it")
    return text


def read_upload(source: Source, *, frames: int = FRAMES, timeout: float = SECONDS) -> Media:
    """A picture or clip as the page gets it.

    Args:
        source: a file; a picture of Pillow; an array (H, W), (H, W, 3), (H, W, 4) or, for a clip, (T, H, W, 3) of
            uint8 or, for grey pictures, uint16; a list of pictures, which is a clip.
        frames: taken of a clip, evenly spread, at most.
        timeout: seconds for a video file, which is decoded in a process of its own.

    Raises:
        InvalidOption: for nothing, what is no picture and no clip, what is damaged or too large, and for a video file
            where nothing here reads any.
    """
    if source is None or (isinstance(source, str) and not source.strip()):
        raise InvalidOption("there is no picture: upload one, take one with the camera, or choose an example")
    if isinstance(source, Image.Image):
        return _of_picture(source, "picture")
    if isinstance(source, np.ndarray):
        return _of_array(source, frames)
    if isinstance(source, list | tuple):
        return _of_frames(_sampled(source, frames), "clip")
    if not isinstance(source, str | os.PathLike):
        raise InvalidOption(f"got {type(source).__name__}: expected a file, a picture or an array")
    return _of_file(Path(source), frames, timeout)


def _of_file(path: Path, frames: int, timeout: float) -> Media:
    if not path.is_file():
        raise InvalidOption(f"{path.name}: expected a file that is there, with a picture or a clip")
    size = path.stat().st_size
    if size > MAX_FILE:
        raise InvalidOption(
            f"{path.name} has {size / 2**20:.0f} MiB: at most {MAX_FILE >> 20} are taken, cut or scale it down first"
        )
    try:
        if not _is_picture(path):
            return _of_clip(path, frames, timeout)
        return _of_picture_file(path)
    except VtpruneError as error:
        # Uploads lie in folders whose names are nobody's business.
        told = str(error).replace(str(path.absolute()), path.name).replace(str(path), path.name)
        raise type(error)(told) from error


def _of_picture_file(path: Path) -> Media:
    try:
        upright = read_picture(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return _finished(upright, _alpha_of(opened), path.name, _notes_of(opened))
    except VtpruneError:
        raise
    except _DAMAGE as error:
        raise InvalidOption(f"cannot read the picture {path.name}: {error}") from error


def _is_picture(path: Path) -> bool:
    """Whether Pillow knows the format by its first bytes; the rest may be damaged or too large all the same."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return picture.format not in _NO_PICTURES
    except UnidentifiedImageError:
        return False
    except (Image.DecompressionBombError, *_DAMAGE):
        return True


def _notes_of(picture: Image.Image) -> tuple[str, ...]:
    count = getattr(picture, "n_frames", 1)
    return (f"the first of {count} pictures of the file is taken",) if count > 1 else ()


def _alpha_of(picture: Image.Image) -> Image.Image | None:
    """How opaque every pixel is, upright; None where all are."""
    if not picture.has_transparency_data:
        return None
    return ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")


def _finished(upright: Image.Image, alpha: Image.Image | None, name: str, notes: tuple[str, ...]) -> Media:
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes += ("what is transparent is white",)
        upright = Image.composite(upright, Image.new("RGB", upright.size, "white"), alpha)
    small = _scaled(upright, LONGEST_SIDE)
    if small.size != upright.size:
        notes += ("scaled from {} x {} to {} x {} pixels".format(*upright.size, *small.size),)
    return Media(name=name, pictures=(small,), notes=notes)


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    longest = max(picture.size)
    if longest <= side:
        return picture
    width, height = (max(1, round(length * side / longest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _of_picture(picture: Image.Image, name: str) -> Media:
    width, height = picture.size
    if width * height > MAX_PIXELS or not width * height:
        limit = f"expected 1 to {MAX_PIXELS / 1e6:.0f} million pixels, scale it first"
        raise InvalidOption(f"the {name} holds {width} x {height} pixels: {limit}")
    try:
        upright = in_8_bits(ImageOps.exif_transpose(picture)).convert("RGB")
        return _finished(upright, _alpha_of(picture), name, _notes_of(picture))
    except _DAMAGE as error:
        raise InvalidOption(f"cannot read the {name}: {error}") from error


def _of_array(array: np.ndarray, frames: int) -> Media:
    clip = array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8
    colours = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not (clip or colours or grey) or not array.size:
        raise InvalidOption(
            f"an array {array.shape} of {array.dtype}: expected (H, W), (H, W, 3), (H, W, 4) or (T, H, W, 3) of uint8"
        )
    if clip:
        return _of_frames([Image.fromarray(frame) for frame in _sampled(array, frames)], "clip")
    return _of_picture(Image.fromarray(array), "picture")


def _sampled(values: Any, count: int) -> list[Any]:
    """The middle of each of `count` equal stretches, or all where they are fewer."""
    T = len(values)
    few = min(count, T)
    return [values[(2 * number + 1) * T // (2 * few)] for number in range(few)]


def _of_frames(pictures: Sequence[Any], name: str) -> Media:
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise InvalidOption("a list: expected one picture or more, which make a clip")
    cleaned = [_of_picture(picture, "frame").pictures[0] for picture in pictures]
    if len({picture.size for picture in cleaned}) > 1:
        raise InvalidOption("frames of a clip differ in size: expected pictures of equal width and height")
    count = len(cleaned)
    return Media(
        name=name,
        pictures=tuple(_scaled(picture, LONGEST_FRAME) for picture in cleaned),
        kind="video",
        times=tuple(map(float, range(count))),
        duration=float(count),
    )


def _of_clip(path: Path, frames: int, timeout: float) -> Media:
    try:
        read = _decoded(path, frames, timeout)
    except (InvalidOption, BackendUnavailable) as error:
        raise InvalidOption(f"{path.name} is no picture, and no clip that can be read: {error}") from error
    pictures = tuple(_scaled(picture, LONGEST_FRAME) for picture in read.pictures)
    return Media(
        name=path.name,
        pictures=pictures,
        kind="video",
        times=tuple(read.times.tolist()),
        duration=read.duration,
        notes=tuple(_notes_of_clip(read)),
    )


def _decoded(path: Path, frames: int, timeout: float) -> Frames:
    """Frames of a file; of one frame first, which tells how large all of them will be."""
    if path.suffix.lower() == ".npy":
        return read_frames(path, Uniform(frames))
    with Decoders(workers=1, timeout=timeout) as decoders:
        height, width = decoders.submit(path, Uniform(1)).result().pixels.shape[1:3]
        if height * width > MAX_FRAME:
            limit = f"at most {MAX_FRAME / 1e6:.0f} megapixels are taken, scale it down first"
            raise InvalidOption(f"it holds frames of {width} x {height} pixels: {limit}")
        return decoders.submit(path, Uniform(frames)).result()


def _notes_of_clip(read: Frames) -> Iterator[str]:
    if read.total > len(read.indices):
        yield f"{len(read.indices)} of {read.total} frames are taken, evenly spread"
    yield from read.warnings
