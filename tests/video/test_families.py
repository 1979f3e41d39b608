"""Answers about clips by every video family with the processor of transformers for it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

import vtprune
from tests.fidelity.loops_video import shares
from tests.video.common import answers, known
from tests.video.processors import FAMILIES, JOINING, Host, host
from vtprune.types import Budget
from vtprune.video.answering import Answerer, ClipAsked
from vtprune.video.frames import Frames
from vtprune.video.journal import Record
from vtprune.video.questions import Question
from vtprune.video.records import kept_of_parts
from vtprune.video.relevance import Wording, score_frames
from vtprune.video.task import Task

TEXTS = ("what color is the circle ?", "is there a red circle ?", "what number is shown ?")
METHODS = (("vtprune", "yes"), ("quota", "change"), ("quota", "yes"), ("temporal", "yes"))
TOKENS = {"llava_next_video": 4, "llava_onevision": 4}
"""Of a frame; 16 of every other family, of a frame or of two that it joins."""
RATE = 2.0
WRITTEN = 3


def clip(
    seed: int,
    count: int,
    *,
    size: tuple[int, int] = (32, 32),
    times: list[float] | None = None,
    still: tuple[int, ...] = (),
) -> Frames:
    """A clip of noise, of two frames a second; `still` are frames that show what the one before them did, the others
    differ by more or less."""
    rng = np.random.default_rng(seed)
    pixels = (rng.random((count, *size, 3)) * rng.uniform(40, 256, (count, 1, 1, 1))).astype(np.uint8)
    for number in still:
        pixels[number] = pixels[number - 1]
    numbers = np.arange(count)
    at = numbers / RATE if times is None else np.array(times)
    return Frames(pixels=pixels, times=at, indices=numbers, total=count, duration=count / RATE, backend="drawn")


def asked(frames: Frames, name: str, *texts: str) -> ClipAsked:
    questions = [Question(id=f"{name}/{i}", video=name, question=text) for i, text in enumerate(texts)]
    return ClipAsked(frames=frames, questions=tuple(questions))


def answerer(own: Host, method: str = "vtprune", keep: float = 0.25, **fields: Any) -> Answerer:
    scoring = {"scoring": "change"} if method == "quota" else {}
    task = Task(model=own.name, method=method, keep=keep, max_new_tokens=WRITTEN, **scoring | fields)
    with patch("vtprune.video.task.load_model", lambda source, device: (own.model, own.processor)):
        return task.load()


def parts_of(name: str, frames: int) -> int:
    return math.ceil(frames / 2) if name in JOINING else frames


def weights_of(own: Host, frames: Frames) -> list[float]:
    """Of the parts that the model makes of a clip, by how much its frames change."""
    scores = score_frames(own.model, own.processor, frames, "", by="change").tolist()
    pairs = [scores[i : i + 2] for i in range(0, len(scores), 2)]
    return [sum(pair) / len(pair) for pair in pairs] if own.name in JOINING else scores


@contextmanager
def kept() -> Iterator[dict[str, list[list[int]]]]:
    """Which tokens of every picture were kept, by question."""
    found: dict[str, list[list[int]]] = {}
    record = Answerer._record

    def call(self: Answerer, row: Any, number: int, text: str, report: Any, seconds: float) -> Record:
        own = [segment.keep.tolist() for segment in report.segments if segment.row == number]
        found[row.question.id] = own
        return record(self, row, number, text, report, seconds)

    with patch.object(Answerer, "_record", call):
        yield found


@contextmanager
def seen(own: Host) -> Iterator[list[dict[str, Any]]]:
    """What is handed to `generate` inside the block."""
    found: list[dict[str, Any]] = []
    generate = type(own.model).generate

    def call(model: Any, **inputs: Any) -> Any:
        found.append(inputs)
        return generate(model, **inputs)

    with patch.object(type(own.model), "generate", call):
        yield found


@pytest.mark.parametrize(("method", "scoring"), METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_questions_together_are_those_alone(name: str, method: str, scoring: str) -> None:
    """About clips of several lengths, an odd one and a single frame among them, in one call; and every clip keeps
    what its budget says."""
    own = host(name)
    answer = answerer(own, method, scoring=scoring)
    clips = [
        asked(clip(0, 8), "a", *TEXTS),
        asked(clip(1, 8), "b", TEXTS[0]),
        asked(clip(2, 5), "c", *TEXTS[1:]),
        asked(clip(3, 1), "d", TEXTS[0]),
    ]
    with kept() as tokens:
        together = answers(replace(answer, batch=3), clips)
    with kept() as tokens_alone:
        alone = [
            record
            for one in clips
            for question in one.questions
            for record in answers(answer, [replace(one, questions=(question,))])
        ]
    assert [record.error for record in together] == [None] * 7
    assert known(together) == known(alone)
    assert tokens == tokens_alone and len(tokens) == 7
    assert len({record.answer for record in together}) > 2
    for record in together:
        parts = parts_of(name, len(record.frames))
        assert len(record.kept) == parts and record.tokens == parts * TOKENS.get(name, 16)
        assert sum(record.kept) == Budget(keep=0.25).resolve(record.tokens)


@pytest.mark.parametrize("method", ["quota", "temporal"])
@pytest.mark.parametrize("name", JOINING)
def test_upright_and_lying_clips_in_one_batch(name: str, method: str) -> None:
    """They have as many tokens, in other grids."""
    answer = answerer(host(name), method)
    clips = [asked(clip(8, 4, size=size), str(size), TEXTS[0]) for size in ((48, 32), (32, 48))]
    with seen(host(name)) as calls:
        together = answers(answer, clips)
    assert len(calls) == 1 and calls[0]["video_grid_thw"].tolist() == [[2, 12, 8], [2, 8, 12]]
    assert known(together) == known([record for one in clips for record in answers(answer, [one])])
    assert all(record.error is None and sum(record.kept) == 12 for record in together)


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_without_a_score_get_nothing(name: str) -> None:
    """Four frames show nothing new; the others share what the clip may keep by their scores."""
    frames = clip(4, 8, still=(2, 3, 6, 7))
    (record,) = answers(answerer(host(name), "quota"), [asked(frames, "a", TEXTS[0])])
    weights = weights_of(host(name), frames)
    sizes = [TOKENS.get(name, 16)] * parts_of(name, 8)
    assert list(record.kept) == shares(weights, sizes, Budget(keep=0.25).resolve(sum(sizes)), 2.0)
    still = (1, 3) if name in JOINING else (2, 3, 6, 7)
    assert [number for number, count in enumerate(record.kept) if not count] == list(still)


def prepared(own: Host, frames: Frames, text: str) -> Any:
    """By transformers alone; Qwen3-VL refuses a clip of one frame, which stands for two then."""
    content = [{"type": "video"}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    prompt = own.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    count = len(frames.indices)
    told = VideoMetadata(total_num_frames=count, fps=RATE, frames_indices=list(range(count)))
    shown = [*frames.pictures]
    if own.name == "qwen3_vl" and count == 1:
        shown, told.frames_indices = shown * 2, [0, 0]
    return own.processor(
        videos=[shown], text=[prompt], video_metadata=[told], do_sample_frames=False, return_tensors="pt"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_tokens_it_is_transformers_alone(name: str) -> None:
    own = host(name)
    clips = [asked(clip(seed, count), str(seed), *TEXTS) for seed, count in ((0, 8), (2, 5), (3, 1))]
    records = answers(answerer(own, "identity", 1.0), clips)
    assert not hasattr(own.model, "vtprune")
    expected = []
    for one in clips:
        for question in one.questions:
            inputs = prepared(own, one.frames, question.question)
            written = own.model.generate(**inputs, max_new_tokens=WRITTEN, do_sample=False)
            text = own.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            expected.append(text[0].strip())
    assert [record.answer for record in records] == expected
    assert len(set(expected)) > 3
    assert all(sum(record.kept) == record.tokens > 0 for record in records)


@pytest.mark.parametrize("method", ["vtprune", "quota", "temporal"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_the_library_gives_by_hand(name: str, method: str) -> None:
    """The clip encoded with its question, and the scores of frames handed in as the documentation says."""
    own, frames = host(name), clip(9, 5)
    (record,) = answers(answerer(own, method), [asked(frames, "a", TEXTS[0])])
    scores = weights_of(own, frames)
    evidence = {"frames": [[[score] for score in scores]] if name == "internvl" else [scores]}
    inputs = prepared(own, frames, TEXTS[0])
    with vtprune.pruning(own.model, method, keep=0.25, per="prompt" if name == "internvl" else "image") as pruner:
        with pruner.using(**(evidence if method == "quota" else {})):
            written = own.model.generate(**inputs, max_new_tokens=WRITTEN, do_sample=False)
        counts = [count for segment in pruner.last.segments for count in kept_of_parts(pruner.last, segment)]
    assert record.answer == own.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])
    assert list(record.kept) == counts


TIMES = [0.2, 0.4, 1.0, 3.0, 3.5, 3.9, 6.2]
"""Of a variable rate."""


def test_times_stand_in_the_prompt_of_qwen3_vl() -> None:
    """Those of two joined frames, on average; the odd one at the end has its own."""
    own = host("qwen3_vl")
    with seen(own) as calls:
        answers(answerer(own), [asked(clip(5, 7, times=TIMES), "a", *TEXTS)])
    (inputs,) = calls
    for row in own.tokenizer.batch_decode(inputs["input_ids"]):
        assert re.findall(r"< (\d) \. (\d) seconds >", row) == [("0", "3"), ("2", "0"), ("3", "7"), ("6", "2")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_reach_the_positions_of_qwen2_5_vl(dtype: torch.dtype) -> None:
    """In full precision whatever that of the model: positions are made of them."""
    own = host("qwen2_5_vl")
    own = replace(own, model=copy.deepcopy(own.model).to(dtype))
    frames = replace(clip(5, 7, times=TIMES), duration=8.3)
    with seen(own) as calls:
        (record, _) = answers(answerer(own), [asked(frames, "a", *TEXTS[:2])])
    (inputs,) = calls
    assert record.error is None
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * 8.3 / 7] * 2, rel=1e-6)


@pytest.mark.parametrize("things", [["red circle", "square"], []], ids=["things", "events"])
@pytest.mark.parametrize("name", FAMILIES)
def test_frames_scored_together_are_those_alone(name: str, things: list[str]) -> None:
    """The highest probability of yes over all prompts, by transformers alone and frame by frame."""
    own, frames = host(name), clip(6, 5)
    wording = Wording(objects="is there a {object} ?", events="is the {question} shown ?", yes=("yes", "a"))
    prompts = [f"is there a {thing} ?" for thing in things] or ["is the color shown ?"]
    ids = own.tokenizer.convert_tokens_to_ids(["yes", "a"])
    expected = []
    for number in range(5):
        with torch.no_grad():
            rows = [own.model(**prepared(own, frames.taking([number]), prompt)).logits[0, -1] for prompt in prompts]
        expected.append(max(float(row.softmax(dim=-1)[ids].sum()) for row in rows))
    options: dict[str, Any] = {"things": things, "wording": wording, "batch": 2}
    found = score_frames(own.model, own.processor, frames, "color", **options)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-7)
    assert len(set(expected)) == 5
    with vtprune.pruning(own.model, "vtprune", keep=0.25):
        assert torch.equal(score_frames(own.model, own.processor, frames, "color", **options), found)


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_chosen_by_the_question(name: str) -> None:
    """Three of five, which need not be the same ones for every question."""
    answer = answerer(host(name), "quota", keep=0.5, scoring="yes", best=3)
    together = answers(answer, [asked(clip(7, 5), "a", *TEXTS)])
    alone = [record for i, text in enumerate(TEXTS) for record in answers(answer, [asked(clip(7, 5), "a", text)])]
    assert known(together) == [replace(record, id=f"a/{i}") for i, record in enumerate(known(alone))]
    assert all(record.error is None and len(record.frames) == 3 for record in together)
