"""Uploads: whatever comes is an upright RGB picture, or a sentence."""

from __future__ import annotations

import logging
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import GifImagePlugin, Image

from tests.test_pictures import packed_icon, peak
from vtprune.demo import media as uploads
from vtprune.demo.media import check_question, examples, read_upload
from vtprune.errors import InvalidOption
from vtprune.tiny import PICTURE


def pixels(media: uploads.Media) -> np.ndarray:
    return np.asarray(media.pictures[0])


def turned(picture: Image.Image) -> Image.Image:
    """Lying on its side by Exif."""
    picture.getexif()[0x0112] = 6
    return picture


def saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def test_a_picture_is_read_as_it_is() -> None:
    media = read_upload(PICTURE)
    assert (media.kind, media.name, media.notes, media.size) == ("image", PICTURE.name, (), (128, 128))
    assert np.array_equal(pixels(media), np.asarray(Image.open(PICTURE).convert("RGB")))


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "picture"])
def test_what_is_transparent_becomes_white(tmp_path: Path, as_file: bool) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    picture.putpixel((0, 0), (255, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 128))
    media = read_upload(saved(picture, tmp_path / "a.png") if as_file else picture)
    assert media.pictures[0].mode == "RGB"
    assert pixels(media)[0, 0].tolist() == [255, 255, 255] and pixels(media)[5, 5].tolist() == [255, 0, 0]
    assert abs(int(pixels(media)[0, 1, 0]) - 127) <= 1
    assert media.notes == ("what is transparent is white",)


def test_an_opaque_alpha_channel_is_no_news(tmp_path: Path) -> None:
    media = read_upload(saved(Image.new("RGBA", (8, 8), (9, 8, 7, 255)), tmp_path / "a.png"))
    assert media.notes == () and pixels(media)[3, 3].tolist() == [9, 8, 7]


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    media = read_upload(saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:]))
    assert media.kind == "image" and pixels(media)[0, 0].tolist() == [255, 0, 0]
    assert media.notes == ("the first of several pictures of the file is taken",)


def test_cmyk_is_brought_to_rgb(tmp_path: Path) -> None:
    media = read_upload(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg"))
    red, green, blue = pixels(media)[4, 4].tolist()
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "picture"])
def test_a_turned_photograph_stands_upright(tmp_path: Path, as_file: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    flat = Image.new("RGB", (40, 20), "red")
    flat.paste("blue", (0, 0, 20, 20))
    path = saved(flat, tmp_path / "a.png", exif=exif)
    media = read_upload(path if as_file else Image.open(path))
    assert media.size == (20, 40) and pixels(media)[5, 10].tolist() == [0, 0, 255]


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "array"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, as_file: bool) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    media = read_upload(saved(Image.fromarray(ramp), tmp_path / "a.png") if as_file else ramp)
    assert np.abs(pixels(media)[:, :, 0].astype(float) - ramp / 257).max() <= 1


def test_a_large_picture_is_scaled_down_and_said_to_be() -> None:
    media = read_upload(Image.new("RGB", (3000, 1000), "green"))
    assert media.size == (1536, 512)
    assert media.notes == ("scaled from 3000 x 1000 to 1536 x 512 pixels",)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    picture = Image.fromarray(noise).resize((6500, 4000), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 8
    path = saved(picture, tmp_path / "a.jpg", exif=exif, quality=95)
    media = read_upload(path)
    with Image.open(path) as whole:
        expected = whole.transpose(Image.Transpose.ROTATE_90).resize((945, 1536), Image.Resampling.LANCZOS)
    assert media.notes == ("scaled from 4000 x 6500 to 945 x 1536 pixels",)
    assert np.abs(pixels(media).astype(float) - np.asarray(expected)).max() <= 4


def test_scaling_mixes_no_colour_of_what_is_transparent_in() -> None:
    picture = Image.new("RGBA", (4000, 2000), (255, 0, 0, 255))
    picture.paste((0, 255, 0, 0), (0, 0, 2001, 2000))
    media = read_upload(picture)
    assert media.size == (1536, 768) and "what is transparent is white" in media.notes
    red, green, blue = pixels(media)[300].T.astype(int)
    assert red.min() >= 254 and np.abs(green - blue).max() <= 1


def test_a_transparent_value_of_16_bits(tmp_path: Path) -> None:
    values = (np.arange(64 * 64) * 16).reshape(64, 64).astype(np.uint16)
    media = read_upload(saved(Image.fromarray(values), tmp_path / "a.png", transparency=1040))
    white = np.argwhere(pixels(media)[:, :, 0] == 255)
    assert white[0].tolist() == [1, 1] and pixels(media)[0, 1, 0] == 0


def test_pictures_of_an_animation_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    read: list[int] = []
    seek = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "_seek", lambda own, n, *rest: read.append(n) or seek(own, n, *rest)
    )
    read_upload(path)
    assert max(read) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("mode", "name"), [("I;16", "a.png"), ("F", "a.tiff"), ("RGBA", "a.png"), ("RGB", "a.png"), ("CMYK", "a.jpg")]
)
def test_memory_is_a_few_bytes_a_pixel(tmp_path: Path, mode: str, name: str) -> None:
    """What is decoded takes up to 4; what is made of it at full size at most 4 more."""
    side = 5000
    Image.new(mode, (side, side), 300 if mode in ("I;16", "F") else None).save(tmp_path / name, compress_level=1)
    assert peak(tmp_path / name, module="vtprune.demo.media", function="read_upload") < 11 * side * side


def huge_png(path: Path, side: int = 30_000) -> Path:
    """A PNG that says it is that large, and hardly holds anything."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    return path


def truncated(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    saved(Image.fromarray(noise), path)
    path.write_bytes(path.read_bytes()[:3000])
    return path


def text(path: Path) -> Path:
    path.write_text("this is no picture")
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def nothing(path: Path) -> Path:
    return path


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (huge_png, "huge.png", "megapixels"),
        (truncated, "cut.png", "cannot read the picture cut.png"),
        (truncated, "cut.jpg", "cannot read the picture cut.jpg"),
        (text, "a.txt", "a.txt is no picture, and no clip"),
        (text, "a.mp4", "a.mp4 is no picture, and no clip"),
        (empty, "a.png", "a.png is empty: expected a picture or a clip"),
        (text, "a.png", "a.png is no picture that can be read: save it anew"),
        (packed_icon, "a.ico", "a.ico is of the kind ICO, which may unpack to any size"),
        (packed_icon, "a.png", "a.png is of the kind ICO, which may unpack to any size"),
        (nothing, "a.png", "expected a file that is there"),
    ],
)
def test_bad_files_are_refused_in_a_sentence_without_the_folder(
    tmp_path: Path, make: Any, name: str, words: str
) -> None:
    with pytest.raises(InvalidOption, match=words) as caught:
        read_upload(make(tmp_path / name))
    told = str(caught.value)
    assert name in told and str(tmp_path) not in told and "\n" not in told
    assert "FFmpeg" not in told and "/src/" not in told
    assert "clip" not in told or not name.endswith(".png") or make in (empty, nothing)


def test_what_backends_say_goes_to_the_logger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for backend in ("av", "decord"):
        pytest.importorskip(backend)
    for name in ("a.png", "a.mp4"):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="vtprune"), pytest.raises(InvalidOption) as caught:
            read_upload(text(tmp_path / name))
        assert "pyav" not in str(caught.value) and "decord" not in str(caught.value)
        assert name in caplog.text and "pyav: " in caplog.text and "decord: " in caplog.text


def test_a_file_too_large_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_FILE", 100)
    path = saved(Image.new("RGB", (64, 64)), tmp_path / "a.png", compress_level=0)
    assert os.path.getsize(path) > 100
    with pytest.raises(InvalidOption, match="at most 0 are taken"):
        read_upload(path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "there is no picture"),
        ("", "there is no picture"),
        (7, "got int"),
        ([], "one picture or more"),
        (["a.png"], "one picture or more"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros((4, 4, 7), np.uint8), r"\(4, 4, 7\)"),
        (np.zeros((4, 0, 16, 3), np.uint8), r"\(4, 0, 16, 3\)"),
        (np.zeros((4, 300, 16, 3), np.uint8), "a frame is 16 x 300 pixels"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "expected frames of one size"),
        ([Image.new("RGB", (8, 16)), turned(Image.new("RGB", (8, 16)))], "differ in size"),
        (Image.new("RGB", (1536, 8)), "1536 x 8 pixels: expected a long side of at most 16 times the short one"),
        (Image.new("RGB", (20, 3000)), "crop it first"),
        (Image.new("RGB", (7, 9)), "8 pixels at least"),
    ],
)
def test_what_is_no_upload_is_refused(source: Any, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        read_upload(source)


def test_a_picture_object_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_PIXELS", 100)
    with pytest.raises(InvalidOption, match="20 x 10 pixels"):
        read_upload(Image.new("RGB", (20, 10)))


def test_examples_are_taken_and_have_a_question() -> None:
    found = examples(drawn=2)
    assert [one.name for one in found] == ["a picture", "a clip", "scene 1", "scene 2"]
    assert all(check_question(one.question) and one.answer for one in found)
    assert read_upload(found[2].source).size == (128, 128)


@pytest.mark.parametrize("question", ["", "   ", "\n", None, 7])
def test_an_empty_question_is_refused(question: Any) -> None:
    with pytest.raises(InvalidOption, match="the question is empty"):
        check_question(question)


def test_a_question_without_end_is_refused() -> None:
    with pytest.raises(InvalidOption, match="5000 characters"):
        check_question("why? " * 999 + "why ?")


def test_damage_of_any_kind_is_a_sentence(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 255, (24, 32, 4)).astype(np.uint8)
    whole = saved(Image.fromarray(drawn), tmp_path / "a.tiff").read_bytes()
    chance = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        data = bytearray(whole[: chance.integers(len(whole))] if chance.random() < 0.5 else whole)
        for place in chance.integers(len(data), size=3):
            data[place] = chance.integers(256)
        (tmp_path / "b.tiff").write_bytes(b"II*\0" + bytes(data)[4:])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert read_upload(tmp_path / "b.tiff", timeout=20).pictures[0].mode == "RGB"
        except InvalidOption as error:
            refused += 1
            assert "b.tiff" in str(error) and str(tmp_path) not in str(error)
    assert 0 < refused < 150
