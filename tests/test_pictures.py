"""Pictures of the command line: of any mode, depth and orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtprune import _pictures as pictures
from vtprune.tiny import PICTURE


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_are_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.open(PICTURE).convert(mode).save(path)
    picture = pictures.read_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (128, 128)) and np.asarray(picture).std() > 0


@pytest.mark.parametrize(
    ("mode", "white"), [("I;16", 65535), ("I;16B", 65535), ("I", 65535), ("I", 255), ("F", 1), ("F", 255), ("F", 1e6)]
)
def test_deep_pictures_are_scaled_to_8_bits(tmp_path: Path, mode: str, white: float) -> None:
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
    ramp = np.linspace(0, white, 64 * 64).reshape(64, 64).astype(kind)
    path = tmp_path / "deep.tiff"
    Image.frombytes(mode, (64, 64), ramp.tobytes()).save(path)
    read = np.asarray(pictures.read_picture(path))[:, :, 0].astype(float)
    assert np.abs(read - ramp * (255 / white)).max() <= 1


def test_a_rotated_photograph_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    flat = Image.new("RGB", (40, 20), "red")
    flat.paste("blue", (0, 0, 20, 20))
    flat.save(path, exif=exif)
    read = pictures.read_picture(path)
    assert read.size == (20, 40) and read.getpixel((10, 5)) == (0, 0, 255) and read.getpixel((10, 35)) == (255, 0, 0)
