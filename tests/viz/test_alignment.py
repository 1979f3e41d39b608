"""Kept patches lie where the thing is that they show: pictures and clips that are not square, through every family."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.viz import seen
from vtprune.viz import Box, cells_of, framing_of, overlay, token_at

WIDE, TALL = (96, 48), (48, 96)
FAMILIES = (
    "llava stretched",
    "llava cropped",
    "llava padded",
    "llava cropped beyond the edges",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "video_llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
)
POOLED = ("llava_next_video", "llava_onevision")
CLIPS = ("video_llava", "llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl")


def panels(drawn: Image.Image, width: int) -> list[Image.Image]:
    """The panels of an overlay, four white pixels apart."""
    count = (drawn.width + 4) // (width + 4)
    return [drawn.crop((i * (width + 4), 0, i * (width + 4) + width, drawn.height)) for i in range(count)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("size", "box"), [(WIDE, (48, 0, 72, 24)), (TALL, (24, 48, 48, 72))], ids=["wide", "tall"])
def test_a_thing_whose_edges_are_those_of_cells_is_drawn_exactly(name, size, box):
    model, processor = seen.host(name)
    picture = seen.scene(size, box)
    report = seen.chosen(model, seen.encode(processor, picture))
    framing = framing_of(processor, size, report.segments[0].parts)
    drawn = panels(overlay(report, picture, upscale=1, framing=framing), size[0])
    assert len(drawn) == (2 if name in ("llava_next", "llava_next_video", "llava_onevision", "internvl") else 1)
    for panel in drawn:
        assert seen.iou(seen.kept_pixels(panel, picture), box) == 1.0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("size", "box"), [((190, 100), (40, 15, 150, 90)), ((93, 151), (10, 40, 80, 130))], ids=["wide", "tall"]
)
def test_any_thing_is_drawn_within_a_cell(name, size, box):
    """Tokens are kept that show at least half a cell of it: of a corner, this may leave out 0.71 of a side."""
    model, processor = seen.host(name)
    picture = seen.scene(size, box)
    report = seen.chosen(model, seen.encode(processor, picture))
    segment = report.segments[0]
    framing = framing_of(processor, size, segment.parts)
    cells = cells_of(segment, size, framing)
    y, x = np.mgrid[: size[1], : size[0]]
    encoded = within(x, y, framing, 0)
    for number, panel in enumerate(panels(overlay(report, picture, upscale=1, framing=framing), size[0])):
        bright = seen.kept_pixels(panel, picture)
        cell = cells[-number]
        slack = 0.75 * max(cell.right - cell.left, cell.bottom - cell.top) + 1
        inside, near = within(x, y, Box(*box), -slack) & encoded, within(x, y, Box(*box), slack)
        assert bright.any() and bright[inside].all() and not bright[~near].any(), number


def within(x, y, box, slack):
    """Which pixels lie in a box that grew by `slack` to all sides."""
    across = (x >= box.left - slack) & (x < box.right + slack)
    return across & (y >= box.top - slack) & (y < box.bottom + slack)


@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_clips_are_drawn_where_the_thing_moves(name):
    model, processor = seen.host(name)
    first, then = ((0, 0, 48, 24), (48, 24, 96, 48)) if name in POOLED else ((24, 0, 48, 24), (48, 24, 72, 48))
    boxes = [first, first, then, then]
    frames = [seen.scene(WIDE, box) for box in boxes]
    report = seen.chosen(model, seen.encode(processor, frames))
    (segment,) = report.segments
    framing = framing_of(processor, WIDE, segment.parts)
    drawn = panels(overlay(report, frames, upscale=1, framing=framing), WIDE[0])
    step = len(frames) // len(drawn)
    assert (step, len(drawn)) == ((2, 2) if name.startswith("qwen") else (1, 4))
    for number, panel in enumerate(drawn):
        bright = seen.kept_pixels(panel, frames[number * step])
        assert seen.iou(bright, boxes[number * step]) == 1.0


def test_the_frames_of_internvl_are_pictures():
    model, processor = seen.host("internvl")
    boxes = [(0, 0, 24, 24), (48, 24, 72, 48), (72, 0, 96, 24)]
    frames = [seen.scene(WIDE, box) for box in boxes]
    report = seen.chosen(model, seen.encode(processor, frames))
    for number, (frame, box) in enumerate(zip(frames, boxes)):
        framing = framing_of(processor, WIDE, report.segments[number].parts)
        drawn = overlay(report, frame, number, upscale=1, framing=framing)
        assert seen.iou(seen.kept_pixels(drawn, frame), box) == 1.0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_middle_of_a_cell_is_that_token(name):
    model, processor = seen.host(name)
    picture = seen.scene((131, 77), (40, 20, 90, 60))
    report = seen.prefill(model, seen.encode(processor, picture), "random", keep=1.0)
    (segment,) = report.segments
    framing = framing_of(processor, picture.size, segment.parts)
    cells = cells_of(segment, picture.size, framing)
    assert len(cells) == segment.n
    kinds = [part.kind for part in segment.parts for _ in range(part.tokens)]
    order = sorted(dict.fromkeys(kinds), key=lambda kind: kind != "tile")
    for token, (cell, kind) in enumerate(zip(cells, kinds)):
        x, y = (cell.left + cell.right) / 2, (cell.top + cell.bottom) / 2
        assert token_at(segment, picture.size, x, y, part=order.index(kind), framing=framing) == token
