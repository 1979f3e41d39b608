"""Scores of frames without a question to the model, the clips they take, and the parts and methods they go to."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

import vtprune
from tests import models
from tests.video.drawn import CLIP, SHOWN, THING, pictures, tiny
from vtprune.errors import InvalidOption
from vtprune.video.frames import Frames
from vtprune.video.prompting import clip_inputs
from vtprune.video.relevance import per_part, pictures_of, score_frames, score_questions
from vtprune.video.similarity import ImageText


def grey(*values: int) -> np.ndarray:
    return np.stack([np.full((20, 30, 3), value, dtype=np.uint8) for value in values])


def change(*values: int) -> list[float]:
    return score_frames(torch.nn.Identity(), None, grey(*values), "?", by="change").tolist()


def test_change_by_hand() -> None:
    """Differences 0, 100 and 50 over the largest; the first frame has that of the second."""
    assert change(40, 40, 140, 90) == pytest.approx([0.0, 0.0, 1.0, 0.5])
    assert change(0, 200) == [1.0, 1.0]
    assert change(7, 7, 7) == [1.0, 1.0, 1.0]
    assert change(9) == [1.0]


def test_change_is_a_mean_over_the_picture() -> None:
    clip = grey(0, 0, 200)
    clip[1, :10] = 100
    assert score_frames(torch.nn.Identity(), None, clip, "?", by="change").tolist() == pytest.approx(
        [1 / 3, 1 / 3, 1.0], abs=0.01
    )


def test_similarity_is_stretched_over_the_clip() -> None:
    """Cosines of vectors at 0, 60 and 90 degrees: 1, 1/2 and 0; of lighter ones 1, 1/2 only, as 1 and 0."""
    turned = {0: (1.0, 0.0), 1: (0.5, 3**0.5 / 2), 2: (0.0, 1.0)}
    asked = []

    def text(words: str) -> Tensor:
        asked.append(words)
        return torch.tensor([[2.0, 0.0]])

    made = ImageText(
        name="by hand",
        embed_pictures=lambda batch: torch.tensor([turned[picture.getpixel((0, 0))[0]] for picture in batch]),
        embed_text=text,
    )
    scored = functools.partial(score_frames, torch.nn.Identity(), None, by=made)
    assert scored(grey(2, 1, 0, 1), "why ?").tolist() == pytest.approx([0.0, 0.5, 1.0, 0.5], abs=1e-6)
    assert scored(grey(0, 1), "why ?", batch=1).tolist() == pytest.approx([1.0, 0.0])
    assert scored(grey(1, 1), "why ?").tolist() == [1.0, 1.0]
    assert set(asked) == {"why ?"}


def test_by_similarity_frames_are_embedded_once_for_all_questions() -> None:
    embedded: list[int] = []

    def embed(batch: Any) -> Tensor:
        embedded.append(len(batch))
        return torch.tensor([[1.0, float(picture.getpixel((0, 0))[0])] for picture in batch])

    texts = {"why ?": [1.0, 0.0], "what ?": [0.0, 1.0]}
    made = ImageText(name="by hand", embed_pictures=embed, embed_text=lambda words: torch.tensor([texts[words]]))
    found = score_questions(torch.nn.Identity(), None, grey(0, 9), ["why ?", "what ?"], by=made)
    assert embedded == [2] and found.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_clips_come_as_frames_pictures_or_arrays() -> None:
    array = CLIP.frames[:3]
    frames = Frames(pixels=array, times=np.arange(3.0), indices=np.arange(3), total=8, duration=8.0, backend="by hand")
    for clip in (frames, array, [Image.fromarray(frame) for frame in array]):
        assert [np.array(picture).tolist() for picture in pictures_of(clip)] == array.tolist()
    modes = [pictures(1)[0].convert(mode) for mode in ("L", "RGBA", "P", "RGB")]
    assert {picture.mode for picture in pictures_of(modes)} == {"RGB"}
    assert score_frames(*tiny("llava_next_video"), modes, "is there a red circle ?").shape == (4,)


@pytest.mark.parametrize(
    ("clip", "options", "says"),
    [
        ([], {}, "expected a clip of one frame or more"),
        (["a.png"], {}, "expected a clip of one frame or more"),
        (CLIP.frames[:0], {}, "expected a clip of one frame or more"),
        (CLIP.frames[0], {}, r"a clip \(128, 128, 3\) of uint8: expected frames \(T, H, W, 3\)"),
        (CLIP.frames / 255, {}, "of float64: expected frames"),
        (CLIP.frames, {"batch": 0}, "batch=0: expected 1 or more"),
        (CLIP.frames, {"by": "no"}, "by='no': expected 'yes', 'change' or an ImageText"),
        (CLIP.frames, {"things": "cat"}, "expected a list of things"),
    ],
)
def test_mistakes_are_told(clip: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        score_frames(*tiny("llava_next_video"), clip, "is there a red circle ?", **options)


@pytest.mark.parametrize(("frames", "parts"), [(1, [1.0]), (7, [1.5, 3.5, 5.5, 7.0]), (8, [1.5, 3.5, 5.5, 7.5])])
def test_two_frames_of_qwen_make_one_part(frames: int, parts: list[float]) -> None:
    model, processor = tiny("qwen2_5_vl")
    found = per_part(torch.arange(1.0, frames + 1), model)
    assert found.tolist() == parts
    assert len(found) == parts_of(model, processor, frames)


@pytest.mark.parametrize("frames", [1, 7, 8])
def test_a_frame_of_others_is_a_part(frames: int) -> None:
    model, processor = tiny("llava_next_video")
    scores = torch.rand(frames)
    assert torch.equal(per_part(scores, model), scores)
    assert frames == parts_of(model, processor, frames)


def parts_of(model: Any, processor: Any, frames: int) -> int:
    """How many parts a report names of a clip."""
    inputs = clip_inputs(processor, [pictures(frames)], ["red ?"])
    with torch.no_grad(), vtprune.pruning(model, "identity", keep=1.0) as pruner:
        model(**inputs)
    return len(pruner.last.segments[0].parts)


@pytest.mark.parametrize("family", models.VIDEO_FAMILIES)
def test_parts_follow_from_the_config(family: str) -> None:
    model = torch.nn.Identity()
    model.config = AutoConfig.for_model(family)
    assert len(per_part(torch.rand(7), model)) == (4 if family in models.QWEN else 7)


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl"])
def test_scores_are_evidence_for_quota(name: str) -> None:
    """All tokens stay in the parts of the frames that show the thing."""
    model, processor = tiny(name)
    question = f"is there a {THING} ?"
    scores = per_part(score_frames(model, processor, CLIP.frames, question), model)
    together = 8 // len(scores)
    inputs = clip_inputs(processor, [pictures(8)], [question])
    pruning = vtprune.pruning(model, "quota", keep=0.1, within="prune")
    with torch.no_grad(), pruning as pruner, pruner.using(frames=[scores]):
        model(**inputs)
    (segment,) = pruner.last.segments
    kept = [[part.start <= index < part.stop for part in segment.parts].index(True) for index in segment.keep.tolist()]
    assert set(kept) == {frame // together for frame in SHOWN}
