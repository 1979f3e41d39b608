"""Scores of frames by what a model says: as a plain loop makes them, whatever the batch and the wrapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import Tensor

import vtprune
from tests.integration.common import hooks_of
from tests.video.drawn import CLIP, SHOWN, THING, pictures, tiny
from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.seam import find_base
from vtprune.video.prompting import clip_inputs
from vtprune.video.relevance import TINY, Wording, score_frames

LOOSE = {"atol": 2e-5, "rtol": 1e-4}
NAMED = Wording(
    objects="is there a {object} ?", events="what is shown in this video ?", yes=("yes", "red"), things=lambda _: ()
)


@torch.no_grad()
def by_hand(name: str, clip: Sequence[Image.Image], prompts: Sequence[str], words: Sequence[str]) -> Tensor:
    """(T,) one frame and one prompt at a time: the greatest sum of probabilities of the words over the prompts."""
    model, processor = tiny(name)
    ids = [processor.tokenizer.convert_tokens_to_ids(word) for word in words]
    kind = "video" if hasattr(processor, "video_processor") else "image"
    found = []
    for picture in clip:
        said = []
        for prompt in prompts:
            chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": prompt}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            seen = {"videos": [[picture]]} if kind == "video" else {"images": [picture]}
            inputs = processor(**seen, text=[text], return_tensors="pt")
            said.append(model(**inputs).logits[0, -1].softmax(dim=-1)[ids].sum())
        found.append(torch.stack(said).max())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl", "llava"])
@pytest.mark.parametrize("things", [("red circle",), ("blue star", "red ring"), ()])
def test_the_loop_agrees(name: str, things: tuple[str, ...]) -> None:
    """LLaVA takes no clips: it sees frames as pictures."""
    prompts = [f"is there a {thing} ?" for thing in things] or ["what is shown in this video ?"]
    expected = by_hand(name, pictures(), prompts, ("yes", "red"))
    found = score_frames(*tiny(name), pictures(), "what color is it ?", things=things, wording=NAMED)
    assert found.shape == (3,) and found.dtype == torch.float32 and found.device.type == "cpu"
    torch.testing.assert_close(found, expected, **LOOSE)
    assert expected.min() < 0.999 and len(set(expected.tolist())) > 1


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl"])
def test_frames_that_show_a_thing_score_high(name: str) -> None:
    scores = score_frames(*tiny(name), CLIP.frames, f"is there a {THING} ?")
    assert [t for t, score in enumerate(scores.tolist()) if score > 0.5] == SHOWN
    assert torch.equal(scores, score_frames(*tiny(name), CLIP.frames, "where is it ?", things=[THING]))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_scores_do_not_depend_on_the_batch(batch: int) -> None:
    question = {"question": "is there a red circle ?", "things": ("red circle", "blue star")}
    whole = score_frames(*tiny("llava_next_video"), pictures(5), **question)
    found = score_frames(*tiny("llava_next_video"), pictures(5), **question, batch=batch)
    torch.testing.assert_close(found, whole, **LOOSE)
    backwards = score_frames(*tiny("llava_next_video"), pictures(5)[::-1], **question, batch=batch)
    torch.testing.assert_close(backwards.flip(0), whole, **LOOSE)


def test_frames_of_several_shapes_score_as_alone() -> None:
    """Rows of a batch that differ in length are padded."""
    shapes = [(128, 128), (64, 256), (200, 72)]
    clip = [picture.resize(shape) for picture, shape in zip(pictures(), shapes)]
    expected = by_hand("qwen2_5_vl", clip, ["is there a red circle ?"], ("yes",))
    lengths = [clip_inputs(tiny("qwen2_5_vl")[1], [[picture]], ["red ?"])["input_ids"].shape[1] for picture in clip]
    assert len(set(lengths)) > 1
    found = score_frames(*tiny("qwen2_5_vl"), clip, "is there a red circle ?")
    torch.testing.assert_close(found, expected, **LOOSE)


class Counting:
    """Counts calls of a feature method, and the rows of pixels it was given."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.rows = original, []

    def __get__(self, model: Any, owner: type) -> Callable[..., Any]:
        def get_video_features(pixel_values_videos: Tensor, **options: Any) -> Any:
            self.rows.append(len(pixel_values_videos))
            return self.original(model, pixel_values_videos, **options)

        return get_video_features


@pytest.mark.parametrize("prompts", [1, 3])
def test_each_frame_is_encoded_once_whatever_is_asked(prompts: int) -> None:
    model, processor = tiny("llava_next_video")
    kind = type(find_base(model))
    counting = Counting(kind.get_video_features)
    with patch.object(kind, "get_video_features", counting):
        score_frames(
            model, processor, pictures(5), "?", things=("red circle", "blue star", "red ring")[:prompts], batch=2
        )
    assert counting.rows == [2, 2, 1]


def test_a_model_that_takes_no_features_encodes_for_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("llava_next_video")
    question = {"question": "?", "things": ("red circle", "blue star")}
    expected = score_frames(model, processor, pictures(), **question)
    original = model.forward

    def forward(pixel_values_videos: Tensor, **options: Any) -> Any:
        return original(pixel_values_videos=pixel_values_videos, **options)

    monkeypatch.setattr(model, "forward", forward)
    torch.testing.assert_close(score_frames(model, processor, pictures(), **question), expected, **LOOSE)


@pytest.mark.parametrize("method", ["vtprune", "quota", "pyramiddrop"])
def test_a_wrapped_model_scores_as_an_unwrapped_one_and_stays_wrapped(method: str) -> None:
    model, processor = tiny("llava_next_video")
    plain = score_frames(model, processor, pictures(), "is there a red circle ?")
    bare = hooks_of(model)
    with vtprune.pruning(model, method, keep=0.25) as pruner:
        hooks, handle = hooks_of(model), model.vtprune
        assert torch.equal(score_frames(model, processor, pictures(), "is there a red circle ?"), plain)
        assert hooks_of(model) == hooks and model.vtprune is handle
        inputs = clip_inputs(processor, [pictures(8)], ["is there a red circle ?"])
        evidence = {"frames": [torch.ones(8)]} if method == "quota" else {}
        with torch.no_grad(), pruner.using(**evidence):
            model(**inputs)
        (segment,) = pruner.last.segments
        assert pruner.last.average_of(segment) == pytest.approx(128, abs=1)
    assert hooks_of(model) == bare != hooks


def test_a_processor_that_raises_leaves_the_model_wrapped() -> None:
    model, processor = tiny("llava_next_video")
    asked, bare = [], hooks_of(model)

    class Failing(Recording):
        def __call__(self, **options: Any) -> Any:
            asked.append(options)
            if len(asked) < 3:
                return super().__call__(**options)
            raise RuntimeError("no more")

    with vtprune.pruning(model, "vtprune", keep=0.25):
        hooks = hooks_of(model)
        with pytest.raises(UnsupportedCall, match="does not take these frames and questions: no more"):
            score_frames(model, Failing(processor), pictures(5), "is there a red circle ?", batch=2)
        assert hooks_of(model) == hooks != bare and hasattr(model, "vtprune")
    assert len(asked) == 3 and hooks_of(model) == bare


class Recording:
    """A processor, and the texts it was given."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, **options: Any) -> Any:
        self.texts += options["text"]
        return self.processor(**options)


def texts(wording: Wording | None, question: str, things: Sequence[str] | None = None) -> list[str]:
    model, processor = tiny("llava_next_video")
    recording = Recording(processor)
    score_frames(model, recording, pictures(1), question, things=things, wording=wording)
    return recording.texts


def test_prompts_reach_the_processor_in_the_chat_template() -> None:
    start, end = "user : <video> ", " assistant :"
    assert texts(TINY, "?", ["red ring", "blue star"]) == [
        f"{start}is there a red ring ?{end}",
        f"{start}is there a blue star ?{end}",
    ]
    assert texts(None, "is there a red ring ?") == [f"{start}is there a red ring ?{end}"]
    asked = texts(Wording(yes=("a",)), "What is the man in the red coat carrying?")
    assert asked == [f"{start}{Wording().objects.replace('{objects}', 'man, red coat')}{end}"]
    (asked,) = texts(Wording(yes=("a",)), "Why?")
    assert asked.startswith(f"{start}Question: Why?\nDoes this picture hold")


def test_wordings_by_hand() -> None:
    plain = Wording(objects="any of {objects}, {question}?", events="of {question}, {question}?")
    assert plain.prompts("Who holds the {question} cup?") == ("any of cup, {question}?",)
    assert plain.prompts("Why?") == ("of Why?, Why??",)
    assert plain.prompts("Why {objects}?", ["a", "{objects}"]) == ("any of a, {objects}, {question}?",)
    assert plain.prompts("Who holds the cup?", []) == ("of Who holds the cup?, Who holds the cup??",)
    apart = Wording(objects="a {object}?", events=None)
    assert apart.prompts("Is there a cat or a dog?") == ("a cat?", "a dog?")
    assert apart.prompts("Why?") == apart.prompts("A cat?", ()) == ()
    assert Wording(things=str.split, objects="{objects}").prompts("a b") == ("a, b",)
    with pytest.raises(InvalidOption, match=r"things='cat': expected a list of things, such as \['cat'\]"):
        apart.prompts("Why?", "cat")


def test_without_a_prompt_all_frames_are_alike() -> None:
    assert score_frames(*tiny("llava_next_video"), pictures(), "what number is shown ?").tolist() == [1.0, 1.0, 1.0]


def test_ways_to_say_yes_that_are_no_single_token_are_left_out() -> None:
    model, processor = tiny("llava_next_video")
    asked = {"question": "?", "things": ["red circle"]}
    plain = score_frames(model, processor, pictures(), **asked, wording=Wording(objects="a {object} ?", yes=("yes",)))
    ways = ("yes", " yes", "yes yes", "Yes", "unheard", "")
    wording = Wording(objects="a {object} ?", yes=ways)
    assert torch.equal(score_frames(model, processor, pictures(), **asked, wording=wording), plain)
    for ways in ((), ("unheard",), ("red circle", "")):
        with pytest.raises(InvalidOption, match="expected a word that is one token"):
            score_frames(model, processor, pictures(), **asked, wording=Wording(objects="{object} ?", yes=ways))
