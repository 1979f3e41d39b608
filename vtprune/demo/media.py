"""What users bring: pictures and clips of any kind, checked and brought to RGB, and bundled examples."""

from __future__ import annotations

import logging
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vtprune._pictures import MAX_PIXELS, check_wrapping, opened, still_formats
from vtprune.demo.stills import check_sides, scaled, tidied
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.types import Modality
from vtprune.video.frames import Frames
from vtprune.video.guard import Decoders
from vtprune.video.read_stills import open_memory
from vtprune.video.reader import read_frames
from vtprune.video.sampling import Sampling, Uniform

logger = logging.getLogger("vtprune")
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
_SENTENCE = 400
"""Characters; what is longer repeats what the file holds."""
_BY_NONE = "no backend reads this"
"""How a reader begins to say what each backend did."""

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

    # Of the diamond, which only some frames show: the last question of its kind.
    asked = [one for one in ask_clip(drawn_clip(), Stream(0)) if one.kind == "color"][-1]
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
        InvalidOption: for nothing, what is no picture and no clip, what is damaged, too large or a strip, and for a
            video file where nothing here reads any.
    """
    if source is None or (isinstance(source, str) and not source.strip()):
        raise InvalidOption("there is no picture: upload one, take one with the camera, or choose an example")
    if isinstance(source, Image.Image):
        return _of_picture(source, "picture")
    if isinstance(source, np.ndarray):
        return _of_array(source, frames)
    if isinstance(source, list | tuple):
        return _of_list(source, frames)
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
    if not size:
        raise InvalidOption(f"{path.name} is empty: expected a picture or a clip")
    try:
        media = _of_picture_file(path) if _is_picture(path) else _of_clip_file(path, frames, timeout)
    except VtpruneError as error:
        raise type(error)(_without_folder(str(error), path)) from error
    return replace(media, notes=tuple(_without_folder(note, path) for note in media.notes))


def _without_folder(text: str, path: Path) -> str:
    """Uploads lie in folders whose names are nobody's business."""
    for known in (os.path.realpath(path), os.path.abspath(path), str(path.absolute()), str(path)):
        text = text.replace(known, path.name)
    return text


def _of_picture_file(path: Path) -> Media:
    try:
        with opened(path) as picture:
            found, notes = tidied(picture, path.name, own=True)
    except VtpruneError:
        raise
    except _DAMAGE as error:
        raise InvalidOption(f"cannot read the picture {path.name}: {error}") from error
    return Media(name=path.name, pictures=(found,), notes=notes)


def _is_picture(path: Path) -> bool:
    """Whether Pillow knows the format by its first bytes; the rest may be damaged or too large all the same."""
    try:
        check_wrapping(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=still_formats()) as picture:
                return picture.format not in _NO_PICTURES
    except UnidentifiedImageError:
        return False
    except (Image.DecompressionBombError, *_DAMAGE):
        return True


def _of_picture(picture: Image.Image, name: str) -> Media:
    width, height = picture.size
    if width * height > MAX_PIXELS or not width * height:
        limit = f"expected 1 to {MAX_PIXELS / 1e6:.0f} million pixels, scale it first"
        raise InvalidOption(f"the {name} holds {width} x {height} pixels: {limit}")
    try:
        found, notes = tidied(picture, f"the {name}")
    except _DAMAGE as error:
        if isinstance(error, VtpruneError):
            raise
        raise InvalidOption(f"cannot read the {name}: {error}") from error
    return Media(name=name, pictures=(found,), notes=notes)


def _of_array(array: np.ndarray, frames: int) -> Media:
    clip = array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8
    colours = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not (clip or colours or grey) or not array.size:
        raise InvalidOption(
            f"an array {array.shape} of {array.dtype}: expected (H, W), (H, W, 3), (H, W, 4) or (T, H, W, 3) of uint8"
        )
    if clip:
        return _of_frames(lambda sampling: read_frames(array, sampling), frames, "clip")
    return _of_picture(Image.fromarray(array), "picture")


def _of_list(pictures: Sequence[object], frames: int) -> Media:
    shown = [picture for picture in pictures if isinstance(picture, Image.Image)]
    if not shown or len(shown) < len(pictures):
        raise InvalidOption("a list: expected one picture or more, which make a clip")
    chosen = Uniform(frames).choose(open_memory(shown, None)).tolist()
    cleaned = {number: _of_picture(shown[number], "frame").pictures[0] for number in chosen}
    if len({picture.size for picture in cleaned.values()}) > 1:
        raise InvalidOption("frames of a clip differ in size: expected pictures of equal width and height")
    # The others are not looked at: one of those that are stands for them.
    even = [cleaned.get(number, cleaned[chosen[0]]) for number in range(len(shown))]
    return _of_frames(lambda sampling: read_frames(even, sampling), frames, "clip")


def _of_clip_file(path: Path, frames: int, timeout: float) -> Media:
    if path.suffix.lower() == ".npy":
        return _of_frames(lambda sampling: _of_array_file(path, sampling), frames, path.name)
    with Decoders(workers=1, timeout=timeout) as decoders:
        return _of_frames(lambda sampling: _decoded(path, sampling, decoders), frames, path.name)


def _of_array_file(path: Path, sampling: Sampling) -> Frames:
    try:
        return read_frames(path, sampling)
    except Exception as error:  # the header is a text of Python, and whatever it holds may go wrong
        if isinstance(error, VtpruneError) and len(str(error)) < _SENTENCE:
            raise
        logger.info("%s cannot be read: %s: %s", path, type(error).__name__, error)
        raise InvalidOption(
            f"cannot read the array {path.name}: it is damaged, or no clip (T, H, W, 3) of uint8"
        ) from error


def _decoded(path: Path, sampling: Sampling, decoders: Decoders) -> Frames:
    try:
        return decoders.submit(path, sampling).result()
    except (InvalidOption, BackendUnavailable) as error:
        logger.info("%s cannot be read: %s", path, error)
        kind = Image.registered_extensions().get(path.suffix.lower(), _NO_PICTURES[0])
        if kind not in _NO_PICTURES:
            raise InvalidOption(f"{path.name} is no picture that can be read: save it anew") from error
        # What every backend says of it holds names of its own sources.
        why = "" if str(error).startswith(_BY_NONE) else f": {error}"
        raise InvalidOption(f"{path.name} is no picture, and no clip that can be read{why}") from error


def _of_frames(read: Callable[[Sampling], Frames], count: int, name: str) -> Media:
    """A clip, of which one frame is read first: it tells how large all of them will be."""
    height, width = read(Uniform(1)).pixels.shape[1:3]
    if height * width > MAX_FRAME:
        limit = f"at most {MAX_FRAME / 1e6:.0f} megapixels are taken, scale it down first"
        raise InvalidOption(f"{name} holds frames of {width} x {height} pixels: {limit}")
    check_sides((width, height), f"{name}: a frame")
    found = read(Uniform(count))
    return Media(
        name=name,
        pictures=tuple(scaled(picture, LONGEST_FRAME) for picture in found.pictures),
        kind="video",
        times=tuple(found.times.tolist()),
        duration=found.duration,
        notes=tuple(_notes_of(found)),
    )


def _notes_of(read: Frames) -> Iterator[str]:
    if read.total > len(read.indices):
        yield f"{len(read.indices)} of {read.total} frames are taken, evenly spread"
    yield from read.warnings
