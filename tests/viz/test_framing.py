"""What of a picture the encoder saw, against what the processors of transformers make of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtprune.errors import InvalidOption
from vtprune.types import Part
from vtprune.viz import Box, framing_of

SIZES = [(192, 96), (97, 203), (50, 50), (31, 64)]


def part(grid: tuple[int, int] = (4, 4), kind: Any = "image") -> Part:
    return Part(start=0, stop=grid[0] * grid[1], kind=kind, grid=grid)


def settings(**own: Any) -> Any:
    return SimpleNamespace(image_processor=SimpleNamespace(do_resize=True, **own))


def smooth(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (3, 6, 3)).astype("uint8")
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 24, "width": 24}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}},
        {"size": {"height": 32, "width": 48}, "crop_size": {"height": 24, "width": 20}},
        {"size": {"height": 24, "width": 24}, "do_center_crop": False, "do_pad": True},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_pad": True},
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 28, "width": 24}},
        {"do_resize": False, "crop_size": {"height": 48, "width": 41}},
    ],
    ids=["stretched", "cropped", "stretched and cropped", "padded", "padded and cropped", "beyond", "not resized"],
)
def test_the_framing_scaled_down_is_what_the_processor_makes(size: tuple[int, int], options: dict[str, Any]) -> None:
    """Up to how pixels are rounded: edges of what is padded lie between pixels."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    own = LlavaImageProcessorPil(**options, do_normalize=False, image_mean=[0.0, 0.0, 0.0])
    picture = smooth(size)
    made = own(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    framing = framing_of(SimpleNamespace(image_processor=own), size, (part(),))
    expected = seen_through(picture, framing, (made.shape[1], made.shape[0]))
    assert np.abs(expected - made).mean() < 0.03
    shifted = Box(framing.left + 0.25 * size[0], framing.top, framing.right + 0.25 * size[0], framing.bottom)
    assert np.abs(seen_through(picture, shifted, (made.shape[1], made.shape[0])) - made).mean() > 0.06


def seen_through(picture: Image.Image, framing: Box, size: tuple[int, int]) -> np.ndarray:
    """The framing in so many pixels, black beyond the edges of the picture."""
    margin = 4 * max(picture.size)
    wide = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin))
    wide.paste(picture, (margin, margin))
    box = tuple(edge + margin for edge in framing)
    return np.asarray(wide.resize(size, Image.Resampling.BICUBIC, box=box)) / 255


def test_the_square_around_a_picture_of_odd_sides_begins_at_a_whole_pixel() -> None:
    padding = settings(do_pad=True, size={"height": 24, "width": 24}, pad_to_square=None)
    assert framing_of(padding, (101, 40), (part(),)) == Box(0, -30, 101, 71)
    assert framing_of(padding, (40, 101), (part(),)) == Box(-30, 0, 71, 101)
    assert framing_of(padding, (60, 60), (part(),)) == Box(0, 0, 60, 60)


@pytest.mark.parametrize("kind", ["thumbnail", "crop", "tile"])
def test_crops_and_tiles_cover_the_picture(kind: str) -> None:
    cropping = settings(do_center_crop=True, do_pad=True, size={"shortest_edge": 24}, pad_to_square=None)
    assert framing_of(cropping, (96, 40), (part(kind=kind),)) == Box(0, 0, 96, 40)


def test_what_is_padded_to_equal_numbers_of_crops_is_not_padded_itself() -> None:
    """LLaVA-OneVision leaves the crops out where a prompt has several pictures: one stretched picture each."""
    crops = settings(do_pad=True, size={"height": 24, "width": 24}, image_grid_pinpoints=[[24, 48]], pad_to_square=None)
    assert framing_of(crops, (96, 40), (part(),)) == Box(0, 0, 96, 40)


def test_a_resolution_of_its_own_covers_the_picture() -> None:
    area = settings(size={"shortest_edge": 3136, "longest_edge": 12845056}, patch_size=14)
    assert framing_of(area, (96, 40), (part((2, 5)),)) == Box(0, 0, 96, 40)
    longest = settings(do_pad=True, size={"longest_edge": 64})
    assert framing_of(longest, (96, 48), (part((4, 8)),)) == Box(0, 0, 96, 48)


def test_frames_go_by_the_settings_for_clips() -> None:
    crop = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 24}}
    plain = SimpleNamespace(do_resize=True, size={"height": 24, "width": 24})
    cropping = SimpleNamespace(do_resize=True, **crop)
    both = SimpleNamespace(image_processor=plain, video_processor=cropping)
    assert framing_of(both, (96, 48), (part(kind="frame"),)) == Box(24, 0, 72, 48)
    assert framing_of(both, (96, 48), (part(),)) == Box(0, 0, 96, 48)
    assert framing_of(cropping, (96, 48), (part(kind="frame"),)) == Box(24, 0, 72, 48)


def test_what_does_not_fill_a_patch_is_not_covered() -> None:
    """SigLIP: 27 patches of 14 pixels in 384, 6 are left over."""
    siglip = settings(size={"height": 384, "width": 384})
    siglip.patch_size = 14
    assert framing_of(siglip, (768, 384), (part((27, 27)),)) == Box(0, 0, 756, 378)
    assert framing_of(siglip, (768, 384), (part((14, 14)),)) == Box(0, 0, 768, 384)


def test_a_report_without_parts_says_nothing() -> None:
    assert framing_of(settings(do_center_crop=True), (96, 48), ()) == Box(0, 0, 96, 48)


def test_it_is_refused_where_it_is_unknown_what_the_encoder_saw() -> None:
    with pytest.raises(InvalidOption, match="not known where the processor pads this picture of 64 x 32"):
        framing_of(settings(do_pad=True), (64, 32), (part(),))
    crop: Any = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
    with pytest.raises(InvalidOption, match="not known how the processor crops this picture of 64 x 32"):
        framing_of(settings(size={"longest_edge": 32}, **crop), (64, 32), (part(),))
    with pytest.raises(InvalidOption, match="not known how the processor crops"):
        framing_of(settings(size={"height": 32, "width": 32}, do_center_crop=True), (64, 32), (part(),))
