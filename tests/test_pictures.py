"""Pictures of the command line: of any mode, depth and orientation, and as the encoder saw them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vtprune
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


def framed(picture: Image.Image, grid: tuple[int, int] = (4, 4), kind: str = "image", **settings: Any) -> Image.Image:
    segment = SimpleNamespace(parts=(SimpleNamespace(kind=kind, grid=grid),))
    processor = SimpleNamespace(image_processor=SimpleNamespace(do_resize=True, **settings))
    return pictures.as_seen(picture, processor, SimpleNamespace(segments=(segment,)))  # type: ignore[arg-type]


def test_the_overlay_is_drawn_on_what_a_cropping_processor_saw() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings: Any = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 6, 3)).astype("uint8")).resize((192, 96))
    own = CLIPImageProcessorPil(**settings, do_normalize=False)(picture, return_tensors="np")["pixel_values"][0]
    seen = framed(picture, **settings)
    assert seen.size == (72, 72)
    drawn = np.asarray(seen.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    assert np.abs(drawn - own).mean() < 0.03
    both: Any = {"do_center_crop": True, "size": {"height": 32, "width": 32}, "crop_size": {"height": 16, "width": 16}}
    assert framed(picture, **both).size == (96, 48)
    assert framed(picture, kind="thumbnail", **settings) is picture
    assert framed(picture, size={"height": 32, "width": 32}) is picture


def test_no_overlay_where_it_is_unknown_what_the_encoder_saw() -> None:
    wide = Image.new("RGB", (64, 32))
    with pytest.raises(vtprune.VtpruneError, match="pads this picture of 64 x 32"):
        framed(wide, do_pad=True)
    assert framed(wide, grid=(4, 8), do_pad=True) is wide
    crop: Any = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
    with pytest.raises(vtprune.VtpruneError, match="not known how the processor crops"):
        framed(wide, size={"longest_edge": 32}, **crop)
    with pytest.raises(vtprune.VtpruneError, match="beyond the edges"):
        framed(wide, size={"shortest_edge": 16}, **crop)
