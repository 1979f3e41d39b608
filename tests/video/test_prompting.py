"""What processors are told of clips that were read already: frames, times, and the question in the chat template."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from vtprune.errors import UnsupportedCall
from vtprune.tiny.clips import draw_clip
from vtprune.tiny.scenes import DEVELOPMENT
from vtprune.video.prompting import clip_inputs, takes_clips

CLIP = draw_clip(DEVELOPMENT[5])
UNEVEN = (0.0, 0.1, 0.5, 2.0)
"""Seconds at which four frames are shown, of a clip of 2.5 seconds: 1.6 frames a second."""


@functools.cache
def processor(name: str) -> Any:
    return vtprune.load_tiny(name)[1]


def pictures(count: int = 4) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in CLIP.frames[:count]]


def test_qwen_is_told_the_times() -> None:
    """Two frames make one step: 2 / 1.6 = 1.25 seconds; of eight frames, one a second, 2 seconds."""
    made = clip_inputs(processor("qwen2_5_vl"), [pictures()], ["red ?"], times=[UNEVEN], durations=[2.5])
    assert np.asarray(made["second_per_grid_ts"]).tolist() == pytest.approx([1.25])
    assert made["video_grid_thw"].tolist() == [[2, 32, 32]]
    plain = clip_inputs(processor("qwen2_5_vl"), [pictures(8)], ["red ?"])
    assert np.asarray(plain["second_per_grid_ts"]).tolist() == pytest.approx([2.0])


def test_every_clip_has_its_own_times() -> None:
    made = clip_inputs(
        processor("qwen2_5_vl"),
        [pictures(), pictures(2)],
        ["red ?", "is there a red circle ?"],
        times=[UNEVEN, np.array([0.0, 0.04])],
        durations=[2.5, 0.08],
    )
    assert np.asarray(made["second_per_grid_ts"]).tolist() == pytest.approx([1.25, 0.08])


def test_without_durations_the_last_frame_is_shown_for_a_second() -> None:
    made = clip_inputs(processor("qwen2_5_vl"), [pictures()], ["red ?"], times=[UNEVEN])
    assert np.asarray(made["second_per_grid_ts"]).tolist() == pytest.approx([2 * 3.0 / 4])


class Told:
    """A processor that notes what it is given."""

    video_processor = object()
    video_token = "<video>"
    chat_template = None

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __call__(self, **given: Any) -> dict[str, Any]:
        self.given = given
        return given


def test_frames_go_as_they_are_with_their_times_in_milliseconds() -> None:
    told = Told()
    clip_inputs(told, [pictures()], ["why ?"], times=[UNEVEN], durations=[2.5])
    assert told.given["videos"] == [pictures()] and told.given["do_sample_frames"] is False
    assert told.given["text"] == ["<video>\nwhy ?"]
    assert (told.given["padding"], told.given["padding_side"], told.given["return_tensors"]) == (True, "left", "pt")
    assert told.given["video_metadata"] == [
        {
            "total_num_frames": 2500,
            "fps": 1000.0,
            "duration": 2.5,
            "frames_indices": [0, 100, 500, 2000],
            "width": 128,
            "height": 128,
            "video_backend": "vtprune",
        }
    ]


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl"])
def test_questions_go_in_the_chat_template_padded_left(name: str) -> None:
    made = clip_inputs(processor(name), [pictures(2), pictures(2)], ["red ?", "is there a red circle ?"])
    tokenizer = processor(name).tokenizer
    short, long = made["input_ids"]
    assert (short == tokenizer.pad_token_id).sum() == 4 == (made["attention_mask"][0] == 0).sum()
    assert made["attention_mask"][0, :4].sum() == 0 and made["attention_mask"][1].all()
    assert tokenizer.decode(long).startswith("<s> user : ") and tokenizer.decode(long).endswith("circle ? assistant :")
    alone = clip_inputs(processor(name), [pictures(2)], ["red ?"])
    assert torch.equal(alone["input_ids"][0], short[4:])


def test_a_processor_of_pictures_gets_a_frame_as_a_picture() -> None:
    made = clip_inputs(processor("llava"), [pictures(1), pictures(1)], ["red ?", "red ?"])
    assert made["pixel_values"].shape == (2, 3, 128, 128)
    with pytest.raises(UnsupportedCall, match="LlavaProcessor takes no clips: choose a model that does"):
        clip_inputs(processor("llava"), [pictures(2)], ["red ?"])
    assert [takes_clips(processor(name)) for name in ("llava", "llava_next_video", "qwen2_5_vl")] == [False, True, True]


def test_what_a_processor_refuses_is_told() -> None:
    with pytest.raises(UnsupportedCall, match="the processor does not take these frames and questions"):
        clip_inputs(processor("llava_next_video"), [pictures(2)], ["<video> <video> ?"])
