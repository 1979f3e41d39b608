"""Evaluation on clips: what frames show, and the arms of a clip of several parts."""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from tests import models
from tests.eval.common import batch_of
from vtprune import _console
from vtprune._prompts import prompt_text
from vtprune.cli import main
from vtprune.errors import UnsupportedCall
from vtprune.eval.arms import arm_of
from vtprune.eval.questions import coverage, draw_items, in_turn, object_tokens
from vtprune.eval.subject import Subject
from vtprune.tiny.clips import CLIP_KINDS, FRAMES, draw_clip
from vtprune.tiny.scenes import TEST
from vtprune.tiny.training.models import build_llava_next_video
from vtprune.tiny.words import VIDEO, build_tokenizer
from vtprune.types import Part

ITEMS = draw_items("test", 0, 3, "video")
FEW = (*ITEMS[:2], *ITEMS[-2:])
CELLS = 64


class ClipProcessor:
    """As far as an evaluation needs one, without torchvision."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer(special={"video_token": "<video>"})
        self.video_token = "<video>"

    def __call__(self, *, videos: list[Any], text: list[str], **options: Any) -> BatchFeature:
        frames = torch.stack([torch.stack([torch.from_numpy(np.array(view)) for view in own]) for own in videos])
        words = [own.replace("<video>", "<video>" * (CELLS * frames.shape[1])) for own in text]
        ids = self.tokenizer(words, padding=True, return_tensors="pt")
        return BatchFeature({"pixel_values_videos": frames.permute(0, 1, 4, 2, 3) / 255 - 0.5, **ids})

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return [" ".join(f"w{token}" for token in row) for row in ids.tolist()]


@functools.cache
def subject() -> Subject:
    torch.manual_seed(0)
    model = build_llava_next_video().eval()
    models.randomise(model)
    models.settle_generation(model, [VIDEO])
    return Subject(model=model, processor=ClipProcessor())


def frames(count: int, side: int) -> list[Part]:
    size = side**2
    return [Part(kind="frame", grid=(side, side), start=i * size, stop=(i + 1) * size) for i in range(count)]


def test_items_are_about_the_clips_of_the_split() -> None:
    assert {item.question.kind for item in draw_items("test", 0, 40, "video")} == set(CLIP_KINDS)
    clip = draw_clip(TEST[0])
    assert len(ITEMS[0].views) == FRAMES
    assert all((view.pixels == pixels).all() for view, pixels in zip(ITEMS[0].views, clip.frames))
    assert (ITEMS[0].other[0].pixels == draw_clip(TEST[1]).frames[0]).all()


def test_tokens_of_a_frame_show_what_the_frame_shows() -> None:
    covered = coverage(ITEMS[0].views, frames(FRAMES, 8)).reshape(-1, FRAMES, CELLS)
    clip = draw_clip(TEST[0])
    for thing in range(len(clip.things)):
        assert [t for t in range(FRAMES) if covered[thing, t].any()] == clip.frames_with(thing)
    both = coverage(ITEMS[0].views, frames(FRAMES // 2, 8)).reshape(-1, FRAMES // 2, CELLS)
    np.testing.assert_allclose(both, (covered[:, ::2] + covered[:, 1::2]) / 2)


@pytest.mark.parametrize("arm", ["random", "uniform", "pool", "oracle", "divprune", "fastervlm"])
def test_an_arm_keeps_what_the_budget_allows(arm: str) -> None:
    batch = batch_of(subject(), FEW)
    answers = arm_of(arm)(batch, 0.25)
    assert batch.n == FRAMES * CELLS
    assert answers.kept == (batch.n // 4,) * len(FEW)
    assert all(answers.words)


def test_oracle_begins_with_what_shows_every_thing_once() -> None:
    batch = batch_of(subject(), FEW)
    answers = arm_of("oracle")(batch, 0.11)
    for item, kept in zip(FEW, answers.tokens):
        things = coverage(item.views, batch.parts)
        assert (things[:, kept.numpy()].max(axis=1) > 0).all()
        assert set(in_turn(things)[: len(things)]) <= set(kept.tolist())
        assert object_tokens(item.views, batch.parts)[kept.numpy()].any()


@pytest.mark.parametrize(("keep", "chosen"), [(1.0, range(8)), (0.5, [1, 3, 5, 7]), (0.3, [2, 6]), (0.125, [4])])
def test_a_smaller_clip_is_one_of_fewer_frames(keep: float, chosen: Any) -> None:
    fewer = [dataclasses.replace(item, views=tuple(item.views[i] for i in chosen)) for item in FEW]
    answers = arm_of("downsample")(batch_of(subject(), FEW), keep)
    assert answers.kept == (len(list(chosen)) * CELLS,) * len(FEW)
    assert answers.words == batch_of(subject(), fewer).whole[0].words


def test_a_budget_below_one_frame_has_no_smaller_clip() -> None:
    with pytest.raises(UnsupportedCall, match="one frame alone is more than 56 tokens"):
        arm_of("downsample")(batch_of(subject(), FEW), 0.11)


def test_blind_is_the_answer_to_the_next_clip() -> None:
    swapped = [dataclasses.replace(item, views=item.other) for item in ITEMS]
    answers = arm_of("blind")(batch_of(subject(), ITEMS), 1.0)
    assert answers.words == batch_of(subject(), swapped).whole[0].words


def test_the_prompt_of_a_clip_has_its_token() -> None:
    assert prompt_text(ClipProcessor(), "why ?", "video") == "<video>\nwhy ?"
    assert prompt_text(ClipProcessor(), "<video> why ?", "video") == "<video> why ?"


def test_frames_that_cannot_be_told_are_refused() -> None:
    for count in (3, 16):
        with pytest.raises(UnsupportedCall, match=f"which of 8 frames {count} parts show"):
            coverage(ITEMS[0].views, frames(count, 8))


def test_a_model_for_clips_is_asked_about_clips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_console, "load_model", lambda source, device: (subject().model, subject().processor))
    table = tmp_path / "out.csv"
    assert main(["eval", "--samples", "1", "--methods", "uniform", "--keep", "0.25", "--csv", str(table)]) == 0
    with table.open(encoding="utf-8") as file:
        assert {row["about"] for row in csv.DictReader(file)} == {"clips"}
