"""Pictures of the command line: of any mode, depth and orientation."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from vtprune import _pictures as pictures
from vtprune.errors import InvalidOption
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


@pytest.mark.parametrize("turn", range(2, 9))
def test_every_orientation_is_that_of_pillow(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "turned.png"
    Image.open(PICTURE).convert("RGB").crop((0, 0, 100, 60)).save(path, exif=exif)
    assert np.array_equal(
        np.asarray(pictures.read_picture(path)), np.asarray(ImageOps.exif_transpose(Image.open(path)))
    )


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pictures_are_the_same_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 60000, (37, 50))
    kind = {"I;16": "<u2", "I": "<i4", "F": "<f4"}[mode]
    picture = Image.frombytes(mode, (50, 37), values.astype(kind).tobytes())
    whole = np.asarray(pictures.in_8_bits(picture))
    monkeypatch.setattr(pictures, "_STRIP", 101)
    assert np.array_equal(np.asarray(pictures.in_8_bits(picture)), whole)


def packed_icon(path: Path, side: int = 500) -> Path:
    """An icon of 16 pixels by its header, with a picture of another size inside."""
    inside = io.BytesIO()
    Image.new("RGBA", (side, side)).save(inside, "PNG")
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside.getvalue()), 22)
    path.write_bytes(head + inside.getvalue())
    return path


def test_what_may_unpack_to_any_size_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed_icon(tmp_path / "a.ico", 500)
    assert Image.open(path).size == (500, 500)

    def unpacks(*given: object) -> None:
        raise AssertionError("the picture inside was decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", unpacks)
    for name in ("a.ico", "a.png"):
        with pytest.raises(InvalidOption, match="save it as PNG first"):
            pictures.read_picture(path.rename(tmp_path / name))
        path = tmp_path / name


_PEAK = """
from pathlib import Path
from {module} import {function} as read
def most():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
read(Path({small!r}))
before = most()
read(Path({path!r}))
print((most() - before) * 1024)
"""


def peak(path: Path, *, module: str = "vtprune._pictures", function: str = "read_picture") -> int:
    """Bytes more than before that a process of its own needs at most to read a picture."""
    script = _PEAK.format(module=module, function=function, small=str(PICTURE), path=str(path))
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("mode", "name"), [("I;16", "a.png"), ("F", "a.tiff"), ("RGB", "a.png")])
def test_memory_is_a_few_bytes_a_pixel(tmp_path: Path, mode: str, name: str) -> None:
    """What is decoded takes up to 4, an RGB picture 4 more."""
    Image.new(mode, (3000, 3000), 300 if mode != "RGB" else None).save(tmp_path / name)
    assert peak(tmp_path / name) < 11 * 3000 * 3000


def test_formats_that_change_the_size_are_not_written() -> None:
    for name in ("a.ico", "a.icns"):
        with pytest.raises(InvalidOption, match="changes the size of a picture"):
            pictures.check_format(Path(name))
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff", "a.pdf"):
        pictures.check_format(Path(name))
