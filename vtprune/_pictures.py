"""Pictures of the command line: read from files, and checked to be writable."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vtprune.errors import InvalidOption, VtpruneError

MAX_PIXELS = 50_000_000
_DEEP = ("I", "F")


def read_picture(path: Path) -> Image.Image:
    """An RGB picture from a file, upright and in 8 bits.

    Raises `InvalidOption` for anything else, and for a picture too large to be decoded.
    """
    if not path.exists():
        raise InvalidOption(f"no picture at {path}")
    if not path.is_file():
        raise InvalidOption(f"{path} is not a file: expected one picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise InvalidOption(_too_large(path, f"{width} x {height} pixels"))
                return in_8_bits(ImageOps.exif_transpose(picture)).convert("RGB")
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


def in_8_bits(picture: Image.Image) -> Image.Image:
    """Pillow clips what is deeper at 255. White is 1, 255 or 65535 (in 16 bits always), or else the brightest value."""
    if not picture.mode.startswith(_DEEP):
        return picture
    values = np.nan_to_num(np.asarray(picture).astype(np.float64), posinf=0.0, neginf=0.0)
    values -= min(values.min(), 0.0)
    whites = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(picture.mode, (65535.0,))
    brightest = float(values.max())
    white = next((white for white in whites if brightest <= white), brightest)
    return Image.fromarray((values * (255.0 / white) + 0.5).astype(np.uint8))


def check_format(path: Path) -> None:
    """Raise `InvalidOption` where Pillow cannot write an RGB picture under that name."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise InvalidOption(f"cannot write {path}: the name must end like a picture, for example .png")
    try:
        Image.new("RGB", (64, 64)).save(io.BytesIO(), format=kind)
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise InvalidOption(f"cannot write {path}: Pillow reads {kind} but does not write it; try .png") from error
