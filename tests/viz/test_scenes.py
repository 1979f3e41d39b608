"""The bundled models on drawn scenes: what is kept of the things in them is drawn on the things."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image

from tests.viz import seen
from vtprune.eval.questions import coverage
from vtprune.tiny import load_tiny
from vtprune.tiny.clips import draw_clip
from vtprune.tiny.scenes import DEVELOPMENT, Scene, draw_scene
from vtprune.viz import cells_of, framing_of, overlay, strip, token_at

load = functools.cache(load_tiny)


def boxed(scene: Scene) -> Scene:
    """The same with whole boxes in place of the things that are seen."""
    owner = np.full_like(scene.owner, -1)
    for number, thing in enumerate(scene.things):
        if (scene.owner == number).any():
            left, top, right, bottom = thing.box
            owner[top:bottom, left:right] = number
    return dataclasses.replace(scene, owner=owner)


SCENE = boxed(draw_scene(DEVELOPMENT[3]))
CLIP = draw_clip(DEVELOPMENT[4])
VIEWS = tuple(boxed(view) for view in CLIP.views)


def shown(views, parts, least) -> list[int]:
    """Tokens of whose cells things cover at least that share."""
    return np.flatnonzero(coverage(views, parts).sum(axis=0) >= least).tolist()


def mask(scene, size) -> np.ndarray:
    return np.asarray(Image.fromarray(scene.owner >= 0).resize(size))


def bright(drawn, picture) -> np.ndarray:
    return (np.asarray(drawn) == np.asarray(picture)).all(axis=2)


def agreement(kept: np.ndarray, things: np.ndarray) -> float:
    return (kept & things).sum() / (kept | things).sum()


@pytest.mark.parametrize("size", [(128, 128), (192, 112), (100, 180)], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_bright_patches_are_the_things(name, size) -> None:
    """Cells of 8 pixels on things of 13 to 20: the same bright patches one cell off agree half as well at best."""
    model, processor = load(name)
    picture = Image.fromarray(SCENE.pixels).resize(size)
    batch = seen.encode(processor, picture)
    (segment,) = seen.prefill(model, batch, "random", keep=1.0).segments
    report = seen.keeping(model, batch, [shown([SCENE], segment.parts, 0.5)], segment.n)
    framing = framing_of(processor, size, segment.parts)
    kept = bright(overlay(report, picture, dim=0, upscale=1, framing=framing), picture)
    found = agreement(kept, mask(SCENE, size))
    rows, columns = segment.parts[0].grid
    steps = [(by, axis) for axis, cell in enumerate((size[1] // rows, size[0] // columns)) for by in (cell, -cell)]
    moved = max(agreement(np.roll(kept, by, axis), mask(SCENE, size)) for by, axis in steps)
    assert found > 0.4 and found > 1.6 * moved


def test_a_click_on_a_thing_means_a_token_that_shows_it() -> None:
    model, processor = load("llava")
    size = (192, 112)
    picture = Image.fromarray(SCENE.pixels).resize(size)
    (segment,) = seen.prefill(model, seen.encode(processor, picture), "random", keep=1.0).segments
    covered = coverage([SCENE], segment.parts)
    for number, thing in enumerate(SCENE.things):
        inside = np.argwhere(SCENE.owner == number)
        y, x = inside[np.abs(inside - [thing.y, thing.x]).sum(axis=1).argmin()]
        token = token_at(segment, size, (x + 0.5) * size[0] / 128, (y + 0.5) * size[1] / 128)
        assert token is not None and covered[number, token] > 0
        cell = cells_of(segment, size)[token]
        assert cell.left <= (x + 0.5) * size[0] / 128 < cell.right


def test_frames_of_a_clip_show_the_things_of_their_time() -> None:
    model, processor = load("llava_next_video")
    frames = [Image.fromarray(pixels).resize((128, 96)) for pixels in CLIP.frames]
    batch = seen.encode(processor, frames)
    (segment,) = seen.prefill(model, batch, "random", keep=1.0).segments
    report = seen.keeping(model, batch, [shown(VIEWS, segment.parts, 0.15)], segment.n)
    framing = framing_of(processor, (128, 96), segment.parts)
    drawn = overlay(report, frames, dim=0, upscale=1, framing=framing)
    assert drawn.size == (8 * 132 - 4, 96)
    for number, frame in enumerate(frames):
        kept = bright(drawn.crop((132 * number, 0, 132 * number + 128, 96)), frame)
        things = mask(VIEWS[number], (128, 96))
        assert (kept & things).sum() > 0.7 * things.sum() and kept.sum() < 4 * things.sum()
    assert strip(report, frames, framing=framing).height > 96
