"""Pictures of the command line: read from files, and checked to be writable."""

from __future__ import annotations

import functools
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vtprune.errors import InvalidOption, VtpruneError

MAX_PIXELS = 50_000_000
_DEEP = ("I", "F")
_STRIP = 1 << 18
"""Pixels of deep pictures that are brought to 8 bits at once."""
_WRAPPED = ("ICO", "ICNS", "BLP", "IPTC", "FITS")
"""Formats that hold something packed of any size, which Pillow unpacks before or whatever their header says."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by its orientation in Exif."""
_DRAWN = (300, 40)
"""Wider than any icon, and neither square nor of sides that are powers of 2."""
_FORMATS = ["PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "QOI"]


@functools.cache
def still_formats() -> tuple[str, ...]:
    """Formats of pictures that Pillow decodes by itself. For others it starts programs on the file, as for EPS."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def still_suffixes() -> frozenset[str]:
    """What the names of still pictures end in."""
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in still_formats())


def read_picture(path: Path) -> Image.Image:
    """An RGB picture from a file, upright and in 8 bits.

    Raises `InvalidOption` for anything else, and for a picture too large to be decoded.
    """
    with opened(path) as picture:
        shown = upright(in_8_bits(picture), orientation(picture))
        # A large one is not held three times.
        return shown if shown.mode == "RGB" and shown is not picture else shown.convert("RGB")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture from a file, not decoded yet; what goes wrong with it in the block is told like what goes wrong before.

    Raises `InvalidOption` for anything else, and for a picture too large to be decoded.
    """
    if not path.exists():
        raise InvalidOption(f"no picture at {path}")
    if not path.is_file():
        raise InvalidOption(f"{path} is not a file: expected one picture")
    try:
        check_wrapping(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=still_formats()) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise InvalidOption(_too_large(path, f"{width} x {height} pixels"))
                if not width * height:
                    raise InvalidOption(f"{path} holds {width} x {height} pixels: expected one picture")
                yield picture
    except Image.DecompressionBombError as error:
        raise InvalidOption(_too_large(path, "an enormous picture")) from error
    except UnidentifiedImageError as error:
        raise InvalidOption(f"{path} is not a picture that Pillow can read") from error
    except (OSError, EOFError, SyntaxError, ValueError, struct.error) as error:
        if isinstance(error, VtpruneError):
            raise
        raise InvalidOption(f"cannot read the picture {path}: {error}") from error


def _too_large(path: Path, size: str) -> str:
    return f"{path} holds {size}: at most {MAX_PIXELS / 1e6:.0f} megapixels are read, scale it down first"


def check_wrapping(path: Path) -> None:
    """Raise `InvalidOption` for a file whose header does not say how much it unpacks to; nothing of it is unpacked."""
    with path.open("rb") as file:
        head = file.read(16)
    Image.init()
    for kind in _WRAPPED:
        _, accepts = Image.OPEN.get(kind, (None, None))
        if accepts is not None and accepts(head):
            raise InvalidOption(f"{path} is of the kind {kind}, which may unpack to any size: save it as PNG first")


def in_8_bits(picture: Image.Image) -> Image.Image:
    """Pillow clips what is deeper at 255. White is 1, 255 or 65535 (in 16 bits always), or else the brightest value."""
    if not picture.mode.startswith(_DEEP):
        return picture
    whites = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(picture.mode, (65535.0,))
    extremes = [(values.min(), values.max()) for _, values in strips(picture)]
    lowest = min(0.0, *(low for low, _ in extremes))
    brightest = float(max(high for _, high in extremes) - lowest)
    white = next((white for white in whites if brightest <= white), brightest)
    found = Image.new("L", picture.size)
    for top, values in strips(picture):
        values -= lowest
        found.paste(Image.fromarray((values * (255.0 / white) + 0.5).astype(np.uint8)), (0, top))
    return found


def strips(picture: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of a deep picture, some at a time: a whole one in double precision would take eight bytes a pixel."""
    width, height = picture.size
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        yield top, np.nan_to_num(np.asarray(strip).astype(np.float64), posinf=0.0, neginf=0.0)


def orientation(picture: Image.Image) -> int:
    """That of Exif, 1 where it is upright. The picture is decoded first: some say only then, or turn by themselves."""
    picture.load()
    told = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return told if told in _TURNS else 1


def upright(picture: Image.Image, told: int) -> Image.Image:
    """A picture of that orientation set upright; the same one where it is."""
    return picture.transpose(_TURNS[told]) if told in _TURNS else picture


def check_format(path: Path) -> None:
    """Raise `InvalidOption` where Pillow cannot write an RGB picture under that name, or writes one of another size."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise InvalidOption(f"cannot write {path}: the name must end like a picture, for example .png")
    file = io.BytesIO()
    try:
        Image.new("RGB", _DRAWN).save(file, format=kind)
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise InvalidOption(f"cannot write {path}: Pillow reads {kind} but does not write it; try .png") from error
    try:
        with Image.open(file) as written:
            size = written.size
    except UnidentifiedImageError:  # written and never read, like PDF
        return
    if size != _DRAWN:
        raise InvalidOption(f"cannot write {path}: {kind} is for icons and changes the size of a picture; try .png")
