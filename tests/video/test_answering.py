"""Questions about clips in batches: as if each had been asked alone, while every clip is prepared and encoded once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from tests.integration.common import hooks_of
from tests.video.common import answers, known
from vtprune.errors import InvalidOption, MissingEvidence, VtpruneError
from vtprune.tiny.clips import draw_clip
from vtprune.tiny.scenes import DEVELOPMENT
from vtprune.video.answering import Answerer, ClipAsked, DeviceLost, _is_want_of_memory
from vtprune.video.asking import rows_of
from vtprune.video.frames import Frames
from vtprune.video.journal import Record
from vtprune.video.prompting import clip_inputs
from vtprune.video.questions import Question
from vtprune.video.records import plain
from vtprune.video.relevance import score_frames, score_questions
from vtprune.video.sampling import ByRate, Scenes, Uniform
from vtprune.video.task import Task

MODELS = ("llava_next_video", "qwen2_5_vl")
CASES = [(MODELS[0], method) for method in ("vtprune", "quota", "temporal", "random", "pyramiddrop", "look_m")] + [
    (MODELS[1], method) for method in ("vtprune", "quota", "pyramiddrop")
]
TEXTS = ("what color is the circle ?", "is there a red circle ?", "what number is shown ?")


@functools.cache
def loaded(name: str) -> tuple[Any, Any]:
    return vtprune.load_tiny(name)


@functools.cache
def clip(number: int, frames: int = 8) -> Frames:
    """A drawn clip, as a reader gives it, of a frame a second."""
    pixels = draw_clip(DEVELOPMENT[number], frames=frames).frames
    numbers = np.arange(frames)
    return Frames(
        pixels=pixels, times=numbers + 0.5, indices=numbers, total=frames, duration=float(frames), backend="drawn"
    )


def asked(number: int, *texts: str, frames: int = 8) -> ClipAsked:
    questions = [Question(id=f"{number}/{i}", video=f"{number}.mp4", question=text) for i, text in enumerate(texts)]
    return ClipAsked(frames=clip(number, frames), questions=tuple(questions))


def answerer(model: str, method: str = "vtprune", keep: float = 0.25, **fields: Any) -> Answerer:
    task = Task(model=f"tiny:{model}", method=method, keep=keep, max_new_tokens=3, **fields)
    with patch("vtprune.video.task.load_model", lambda source, device: loaded(model)):
        return task.load()


@contextmanager
def counted(model: str) -> Iterator[dict[str, int]]:
    """How often clips are prepared and encoded inside the block."""
    host, processor = loaded(model)
    counts = {"prepared": 0, "encoded": 0}

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*args, **options)

        return functools.wraps(original)(call)

    prepare, encode = type(processor.video_processor).__call__, type(host.model).get_video_features
    with (
        patch.object(type(processor.video_processor), "__call__", counting("prepared", prepare)),
        patch.object(type(host.model), "get_video_features", counting("encoded", encode)),
    ):
        yield counts


@pytest.mark.parametrize("model", MODELS)
def test_with_all_tokens_it_is_the_model_alone(model: str) -> None:
    """Each question by transformers alone, one at a time."""
    host, processor = loaded(model)
    clips = [asked(0, *TEXTS), asked(7, TEXTS[0])]
    records = answers(answerer(model, "identity", 1.0), clips)
    expected = []
    for one in clips:
        for question in one.questions:
            pictures, times = one.frames.pictures, one.frames.times.tolist()
            inputs = clip_inputs(processor, [pictures], [question.question], times=[times], durations=[8.0])
            written = host.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            expected.append(processor.batch_decode(written, skip_special_tokens=True)[0].strip())
    assert [record.answer for record in records] == expected
    assert len(set(expected)) > 1
    assert all(sum(record.kept) == record.tokens for record in records)
    assert not [name for name in hooks_of(host) if "capturing" not in name and name.startswith("model.language")]


@pytest.mark.parametrize(("model", "method"), CASES)
def test_a_batch_is_its_questions_alone(model: str, method: str) -> None:
    """Several questions about several clips, one of them shorter, in batches that end in the middle of a clip."""
    answer = answerer(model, method, **({"scoring": "change"} if method == "quota" else {}))
    clips = [asked(0, *TEXTS), asked(7, *TEXTS[:2]), asked(5, TEXTS[0], frames=4), asked(3, *TEXTS)]
    with counted(model) as counts:
        together = answers(replace(answer, batch=4), clips)
    assert counts == {"prepared": len(clips), "encoded": len(clips)}
    alone = [
        record
        for one in clips
        for question in one.questions
        for record in answers(replace(answer, batch=1), [replace(one, questions=(question,))])
    ]
    assert known(together) == known(alone)
    assert [record.id for record in together] == ["0/0", "0/1", "0/2", "7/0", "7/1", "5/0", "3/0", "3/1", "3/2"]
    assert all(record.error is None and record.reader == "drawn" for record in together)
    parts = 8 if model == "llava_next_video" else 4
    assert [len(record.kept) for record in together] == [parts] * 5 + [parts // 2] + [parts] * 3
    inside = bool(answer.pipeline.inside)
    assert all(inside or round(sum(record.kept)) == round(0.25 * record.tokens) for record in together)


@pytest.mark.parametrize("model", MODELS)
def test_quota_gives_tokens_to_the_frames_that_show_it(model: str) -> None:
    """A blue diamond is seen in the second and third of eight frames."""
    (record,) = answers(answerer(model, "quota"), [asked(7, "is there a blue diamond ?")])
    total = sum(record.kept)
    shown = sum(record.kept[1:3]) if model == "llava_next_video" else sum(record.kept[:2])
    assert shown > 0.9 * total
    assert record.answer == "yes" or model == "qwen2_5_vl", "that one was trained on pictures only"


def test_frames_are_chosen_by_the_question() -> None:
    """Of eight candidates the two best are shown, each question its own; where none is better, evenly spaced ones."""
    answer = answerer("llava_next_video", best=2)
    texts = ("is there a blue diamond ?", "what number is shown ?", "is there a blue diamond ?")
    records = answers(answer, [asked(7, *texts)])
    assert records[0].frames == records[2].frames == (1, 2)
    assert records[1].frames == (2, 6)
    assert records[0].times == (1.5, 2.5)
    assert records[0].answer == "yes" and len(records[0].kept) == 2


def test_frames_are_scored_together_for_all_questions_about_a_clip() -> None:
    """Prepared and encoded once for the scores and once for the answers; each question has its own scores."""
    answer = answerer("llava_next_video", "quota")
    with counted("llava_next_video") as counts:
        records = answers(answer, [asked(7, *TEXTS)])
    assert counts == {"prepared": 2, "encoded": 2}
    host, processor = loaded("llava_next_video")
    together = score_questions(host, processor, clip(7), TEXTS)
    alone = torch.stack([score_frames(host, processor, clip(7), text) for text in TEXTS])
    assert torch.equal(together, alone) and len(together.unique(dim=0)) == len(TEXTS)
    assert len({record.kept for record in records}) > 1


def test_what_fails_in_a_batch_is_asked_alone() -> None:
    """And what fails alone is recorded with its reason; the others have their answers."""
    answer = answerer("llava_next_video")
    clips = [asked(0, *TEXTS), asked(7, *TEXTS)]
    expected = known(answers(answer, clips))
    generate = Answerer._generate

    def failing(self: Answerer, rows: Any, pruner: Any) -> list[Record]:
        if any(row.question.id == "0/1" for row in rows):
            raise RuntimeError("too much\nof it")
        return generate(self, rows, pruner)

    with patch.object(Answerer, "_generate", failing):
        found = answers(answer, clips)
    assert [record.id for record in found] == [record.id for record in expected]
    assert found[1].error == "RuntimeError: too much of it" and found[1].answer is None
    assert [one for one in known(found) if one.error is None] == [one for one in expected if one.id != "0/1"]


def test_batches_that_do_not_fit_the_memory_are_halved_and_stay_so(caplog: pytest.LogCaptureFixture) -> None:
    answer = replace(answerer("llava_next_video"), batch=8)
    clips = [asked(0, *TEXTS), asked(7, *TEXTS), asked(3, *TEXTS), asked(5, *TEXTS)]
    expected = known(answers(answer, clips))
    generate, sizes = Answerer._generate, []

    def small(self: Answerer, rows: Any, pruner: Any) -> list[Record]:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, rows, pruner)

    with patch.object(Answerer, "_generate", small):
        assert known(answers(answer, clips)) == expected
        assert known(answers(answer, clips)) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2, 2] + [2] * 6
    kinds = [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), KeyError("no")]
    assert [_is_want_of_memory(error) for error in kinds] == [True, True, False]
    assert "8 questions at once do not fit the memory: going on with 4" in caplog.text


@pytest.mark.parametrize("error", [MemoryError("no room"), NotImplementedError("not that"), ZeroDivisionError()])
def test_whatever_goes_wrong_with_a_clip_costs_that_clip(error: Exception) -> None:
    answer = answerer("llava_next_video", "quota", scoring="change")
    score = answer.score
    assert score is not None

    def failing(frames: Frames, questions: Any) -> torch.Tensor:
        if frames is clip(7, 8):
            raise error
        return score(frames, questions)

    found = answers(replace(answer, score=failing), [asked(0, TEXTS[0]), asked(7, TEXTS[0]), asked(3, TEXTS[0])])
    assert [record.error is None for record in found] == [True, False, True]
    assert found[1].error is not None and type(error).__name__ in found[1].error


def test_a_device_that_fails_ends_the_run() -> None:
    """Every answer after it would be an error; what came before it is not lost."""
    answer = answerer("llava_next_video")

    class Lost:
        device = torch.device("cuda:77")

    with pytest.raises(DeviceLost, match=r"cuda:77 failed \(RuntimeError: CUDA error: launch failure\).*run it again"):
        replace(answer, model=Lost())._check_device(RuntimeError("CUDA error: launch failure"))
    answer._check_device(RuntimeError("CUDA error: launch failure"))
    replace(answer, model=Lost())._check_device(VtpruneError("ours"))


def test_answers_come_batch_by_batch() -> None:
    """Also those about one clip: what is answered can be noted before the next batch begins."""
    came = answerer("llava_next_video", batch=2)([asked(0, *TEXTS, *TEXTS[:2])])
    assert [len(records) for records in came] == [2, 2, 1]


def test_clips_of_other_sizes_are_asked_together_where_nothing_is_stacked() -> None:
    answer = replace(answerer("qwen2_5_vl"), batch=4)
    came = answer([asked(0, *TEXTS[:2]), asked(5, *TEXTS[:2], frames=4)])
    assert [len(records) for records in came] == [4]


@pytest.mark.parametrize("word", ["<video>", "<image>"])
def test_a_question_with_a_placeholder_costs_its_own_answer_only(word: str) -> None:
    """Nor does it get around the template."""
    answer = answerer("llava_next_video", "quota", scoring="change")
    found = answers(answer, [asked(0, TEXTS[0], f"is there {word} ?", TEXTS[1]), asked(7, f"{word} what ?")])
    assert [record.error is None for record in found] == [True, False, True, False]
    assert f"holds '{word}'" in found[1].error
    plainly = answers(answer, [asked(0, TEXTS[0], TEXTS[1])])
    assert [found[0].answer, found[2].answer] == [record.answer for record in plainly]


def test_a_clip_the_processor_does_not_take() -> None:
    answer = answerer("llava_next_video")
    with patch("vtprune.video.answering.rows_of", side_effect=VtpruneError("not this one")):
        records = answers(answer, [asked(0, *TEXTS)])
    assert [record.error for record in records] == ["not this one"] * 3


def test_pictures_are_prepared_once_and_the_processor_stays_as_it_was() -> None:
    _, processor = loaded("qwen2_5_vl")
    before = processor.video_processor
    with counted("qwen2_5_vl") as counts:
        rows = rows_of(processor, clip(0).pictures, TEXTS, times=clip(0).times.tolist(), duration=8.0)
    assert counts["prepared"] == 1 and processor.video_processor is before
    for row, text in zip(rows, TEXTS):
        pictures = [clip(0).pictures]
        alone = clip_inputs(processor, pictures, [text], times=[clip(0).times.tolist()], durations=[8.0])
        assert row.keys() == alone.keys()
        assert all(torch.equal(torch.as_tensor(row[name]), torch.as_tensor(alone[name])) for name in alone)


def test_what_a_task_refuses() -> None:
    for wrong in ({"batch": 0}, {"max_new_tokens": 0}, {"seed": -1}, {"best": 0}, {"keep": 7.0}, {"timeout": -1.0}):
        with pytest.raises(InvalidOption, match=next(iter(wrong))):
            Task(**wrong)
    with pytest.raises(MissingEvidence, match="reads relevance"):
        answerer("llava_next_video", "cdpruner")
    with pytest.raises(InvalidOption, match="takes no clips"):
        Task(model="tiny:llava").load()
    for unread in ({"scoring": "change"}, {"asked": True}):
        with pytest.raises(InvalidOption, match="method 'vtprune' reads no scores of frames"):
            Task(**unread)
    with pytest.raises(InvalidOption, match="only scoring='yes' looks for things"):
        Task(method="quota", scoring="change", asked=True)
    with pytest.raises(InvalidOption, match="unknown method"):
        answerer("llava_next_video", "nosuch")


def test_a_task_can_be_stored() -> None:
    for sampling in (Uniform(8), ByRate(2.0, 16), Scenes(4)):
        task = Task(method="quota", parameters={"power": 1.0, "within": "prune"}, sampling=sampling, best=3)
        assert Task.from_dict(task.to_dict()) == task


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parameters": {"seed": 3}}, "seed is an option of its own"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": True}, "timeout=True"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        Task(**options)


def test_instructions_hold_no_word_that_stands_for_pictures() -> None:
    """Every answer would be empty."""
    with pytest.raises(InvalidOption, match="the instruction holds '<video>'"):
        Task(instruction="<video> one word").load()


def test_settings_tell_what_answers_depend_on() -> None:
    """Not how many are asked at once."""
    one, other = (answerer("llava_next_video", "quota", batch=batch) for batch in (2, 4))
    task = Task(method="quota", max_new_tokens=3)
    settings = task.settings(one)
    assert settings == replace(task, batch=4, timeout=5.0).settings(other)
    assert settings["pipeline"]["name"] == "quota" and settings["seed"] == 0 and "torch" in settings["versions"]
    different = [{"keep": 0.5}, {"scoring": "change"}, {"sampling": Uniform(4)}, {"instruction": "short"}, {"seed": 1}]
    assert all(replace(task, **change).settings(one) != settings for change in different)
    assert replace(task, model="elsewhere").settings(one) == settings


def test_settings_tell_models_apart_by_what_they_are() -> None:
    """Another head, other words, another template, another generation: each is another job."""
    task, answer = Task(max_new_tokens=3), answerer("llava_next_video")
    settings = task.settings(answer)
    model, processor = vtprune.load_tiny("llava_next_video")
    model.config.text_config.rms_norm_eps *= 2
    assert task.settings(replace(answer, model=model))["configuration"] != settings["configuration"]
    model, processor = vtprune.load_tiny("llava_next_video")
    assert task.settings(replace(answer, model=model, processor=processor)) == settings
    model.generation_config.repetition_penalty = 1.05
    assert task.settings(replace(answer, model=model))["generation"] != settings["generation"]
    processor.chat_template = processor.chat_template.replace("user", "human") + " "
    assert task.settings(replace(answer, processor=processor))["processor"] != settings["processor"]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    assert task.settings(replace(answer, model=model))["weights"] != settings["weights"]
    assert task.settings(replace(answer, scorer="abc"))["scoring"] == "abc"


def test_the_seed_is_that_of_methods_that_draw() -> None:
    drawn = [answerer("llava_next_video", "random", seed=seed) for seed in (0, 0, 1)]
    kept = [[record.kept for record in answers(answer, [asked(0, TEXTS[0])])] for answer in drawn]
    assert kept[0] == kept[1] != kept[2]


def test_pictures_of_another_kind_are_no_clip() -> None:
    _, processor = vtprune.load_tiny("llava")
    with pytest.raises(VtpruneError, match="takes no clips"):
        clip_inputs(processor, [[Image.new("RGB", (8, 8))] * 2], ["what ?"])


@pytest.mark.parametrize(
    ("one", "other"), [("Yes.", "yes"), (" a  Cup", "a cup!"), ("'no'", "No"), ("3", "3."), ("(A)", "a")]
)
def test_answers_are_compared_without_case_and_marks(one: str, other: str) -> None:
    assert plain(one) == plain(other)
