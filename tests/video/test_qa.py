"""The job and its command: clips are decoded ahead, answers noted as they come, runs go on where they ended."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

import vtprune
from tests.video.common import Recipe, write
from vtprune import _video_answers as shown
from vtprune.cli import main
from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.tiny.bundled_clip import CLIP, QUESTIONS, drawn
from vtprune.video import reader
from vtprune.video import task as tasks
from vtprune.video.answering import Answerer, ClipAsked, DeviceLost
from vtprune.video.guard import Decoders
from vtprune.video.journal import Record
from vtprune.video.qa import ClipTask, Counts, answer_questions, decoded
from vtprune.video.questions import Question, read_questions
from vtprune.video.reader import read_frames
from vtprune.video.sampling import Uniform
from vtprune.video.task import Task

ASKED = ("what color is the circle ?", "is there a blue diamond ?", "what number is shown ?")
TASK = Task(max_new_tokens=3, batch=4, sampling=Uniform(8), timeout=30.0)


@functools.cache
def loaded() -> tuple[Any, Any]:
    return vtprune.load_tiny("llava_next_video")


@pytest.fixture(autouse=True)
def loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "load_model", lambda source, device: loaded())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six clips, of which the fourth is no video, and a file of three questions about each."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(6):
        shutil.copy(CLIP, clips / f"{number}.mp4")
    (clips / "3.mp4").write_bytes(b"no video" * 100)
    lines = [
        {"id": f"{number}/{turn}", "video": f"{number}.mp4", "question": text, "answer": "green" if turn == 0 else None}
        for turn, text in enumerate(ASKED)
        for number in range(6)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def records_of(path: Path) -> dict[str, dict[str, Any]]:
    """Every answer of a file, each once, and without seconds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len({line["id"] for line in lines}) == len(lines), "a question was answered twice"
    return {line.pop("id"): {name: value for name, value in line.items() if name != "seconds"} for line in lines}


def answered(folder: Path, out: Path, **options: Any) -> tuple[Any, dict[str, Record]]:
    questions, _ = read_questions(folder / "q.jsonl")
    return answer_questions(TASK, questions, folder / "clips", out, **options)


def test_every_question_is_answered_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are decoded once for all their questions; one that is no video costs an error for each of its own."""
    decoded: list[str] = []
    submit = Decoders.submit

    def counting(self: Any, source: Any, *args: Any, **options: Any) -> Any:
        decoded.append(Path(source).name)
        return submit(self, source, *args, **options)

    monkeypatch.setattr(Decoders, "submit", counting)
    seen: list[int] = []
    counts, records = answered(folder, folder / "a.jsonl", on_records=lambda counts, new: seen.append(len(new)))
    assert decoded == [f"{number}.mp4" for number in range(6)]
    assert (counts.total, counts.before, counts.answered, counts.failed) == (18, 0, 15, 3)
    assert sum(record.correct is True for record in records.values()) == 5
    assert sum(seen) == 18 and list(records_of(folder / "a.jsonl")) == list(records)
    assert all("3.mp4" in records[f"3/{turn}"].error for turn in range(3))
    assert {records[f"{number}/0"].answer for number in (0, 1, 2, 4, 5)} == {"green"}
    again, _ = answered(folder, folder / "a.jsonl")
    assert (again.before, again.answered, again.failed) == (18, 0, 0)
    assert len(decoded) == 6


def test_interrupted_and_gone_on_with(folder: Path) -> None:
    """As in one go, but for the order in which answers came."""
    _, whole = answered(folder, folder / "whole.jsonl")

    class Enough(Exception):
        pass

    def stop(counts: Any, new: Any) -> None:
        if new:
            raise Enough

    runs = 0
    while True:
        try:
            counts, records = answered(folder, folder / "a.jsonl", on_records=stop)
            break
        except Enough:
            runs += 1
    assert runs > 2 and counts.before == 18
    assert {name: replace(record, seconds={}) for name, record in records.items()} == {
        name: replace(record, seconds={}) for name, record in whole.items()
    }
    assert records_of(folder / "a.jsonl") == records_of(folder / "whole.jsonl")


def test_what_was_broken_is_tried_again_where_asked(folder: Path) -> None:
    answered(folder, folder / "a.jsonl")
    shutil.copy(CLIP, folder / "clips" / "3.mp4")
    counts, _ = answered(folder, folder / "a.jsonl")
    assert counts.before == 18
    counts, records = answered(folder, folder / "a.jsonl", retry=True)
    assert (counts.before, counts.answered, counts.failed) == (15, 3, 0)
    assert records["3/0"].answer == "green" and len(records_of(folder / "a.jsonl")) == 18


def test_another_question_of_the_same_id_is_refused(folder: Path) -> None:
    answered(folder, folder / "a.jsonl")
    other = Question(id="0/0", video="0.mp4", question="is there a star ?")
    with pytest.raises(InvalidOption, match="'0/0' was answered before"):
        answer_questions(TASK, [other], folder / "clips", folder / "a.jsonl")


def test_a_device_that_fails_ends_the_run_and_the_next_gets_past_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered before is there; asked alone, the question that does it has an error of its own."""
    generate, check = Answerer._generate, Answerer._check_device
    broken = False

    def failing(self: Answerer, rows: Any, pruner: Any) -> list[Record]:
        nonlocal broken
        broken = broken or any(row.question.id == "2/1" for row in rows)
        if broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return generate(self, rows, pruner)

    def checking(self: Answerer, error: Exception) -> None:
        if broken:
            raise DeviceLost("the device failed")
        check(self, error)

    monkeypatch.setattr(Answerer, "_generate", failing)
    monkeypatch.setattr(Answerer, "_check_device", checking)
    questions, _ = read_questions(folder / "q.jsonl")
    with pytest.raises(DeviceLost):
        answer_questions(replace(TASK, batch=1), questions, folder / "clips", folder / "a.jsonl")
    before = records_of(folder / "a.jsonl")
    assert not hasattr(loaded()[0], "vtprune")
    assert 1 < len(before) < 18 and before["2/1"]["error"] == "the device failed"
    broken = False
    counts, _ = answer_questions(replace(TASK, batch=1), questions, folder / "clips", folder / "a.jsonl")
    assert counts.before == len(before) and len(records_of(folder / "a.jsonl")) == 18


def test_no_process_that_decodes_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be an error of every clip."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendUnavailable, match="does not start"):
        answered(folder, folder / "a.jsonl")
    assert not records_of(folder / "a.jsonl")


def test_an_answer_is_judged_by_what_is_expected_now(folder: Path) -> None:
    """And by what was expected before where nothing is."""
    asked = Question(id="1", video="0", question=ASKED[0], answer="red")
    for expected, correct in (("red", False), ("green", True), (None, True)):
        _, records = answer_questions(TASK, [replace(asked, answer=expected)], folder / "clips", folder / "a.jsonl")
        assert (records["1"].answer, records["1"].correct) == ("green", correct)
        stored = records_of(folder / "a.jsonl")["1"]
        assert (stored["expected"], stored["correct"]) == (expected or "green", correct)
    with pytest.raises(InvalidOption, match="several questions have the id '1'"):
        answer_questions(TASK, [asked, asked], folder / "clips", folder / "a.jsonl")


def test_errors_of_questions_that_are_not_asked_stay(folder: Path) -> None:
    lost = [Question(id=str(number), video=f"no-such-{number}", question=ASKED[0]) for number in range(3)]
    answer_questions(TASK, lost, folder / "clips", folder / "a.jsonl")
    answer_questions(TASK, lost[:1], folder / "clips", folder / "a.jsonl", retry=True)
    assert sorted(records_of(folder / "a.jsonl")) == ["0", "1", "2"]


@pytest.mark.parametrize("each", [1, 8])
def test_clips_are_decoded_ahead_by_their_questions(each: int) -> None:
    """As many as have questions for a batch, and two more."""
    sent: list[Path] = []

    class Pool:
        def submit(self, path: Path, *args: Any, **options: Any) -> Future[Any]:
            sent.append(path)
            future: Future[Any] = Future()
            future.set_exception(InvalidOption("none"))
            return future

    own = tuple(Question(id=str(number), video="v", question="what ?") for number in range(each))
    clips = [ClipTask(path=Path(str(number)), questions=own) for number in range(40)]
    came = decoded(replace(TASK, batch=8), clips, cast(Any, Pool()), ahead=2)
    next(came)
    assert len(sent) == -(-8 // each) + 2
    assert len(list(came)) == 39 and len(sent) == 40


def test_few_clips_wait_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 clips no more are held than decoding is ahead and a batch takes."""
    alive, most = 0, 0
    submit, answer = Decoders.submit, Answerer.__call__

    def submitting(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return submit(self, *args, **options)

    def answering(self: Any, clips: list[ClipAsked]) -> Iterator[list[Record]]:
        nonlocal alive
        yield from answer(self, clips)
        alive -= len(clips)

    monkeypatch.setattr(Decoders, "submit", submitting)
    monkeypatch.setattr(Answerer, "__call__", answering)
    for number in range(24):
        (folder / "clips" / f"n{number}.mp4").symlink_to(CLIP)
    questions = [Question(id=str(n), video=f"n{n}.mp4", question=ASKED[0]) for n in range(24)]
    counts, _ = answer_questions(replace(TASK, sampling=Uniform(1)), questions, folder / "clips", folder / "b.jsonl")
    assert counts.answered == 24 and alive == 0
    assert most <= 2 * TASK.batch + 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../q.jsonl", "expected a name inside"),
        ("nosuch", "there is none in"),
        ("empty.mp4", "is empty"),
        ("sound.wav", "sound.wav"),
    ],
)
def test_clips_that_are_none(folder: Path, name: str, said: str) -> None:
    (folder / "clips" / "empty.mp4").touch()
    with wave.open(str(folder / "clips" / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    questions = [Question(id="1", video=name, question=ASKED[0]), Question(id="2", video="0", question=ASKED[0])]
    counts, records = answer_questions(TASK, questions, folder / "clips", folder / "a.jsonl")
    assert (counts.answered, counts.failed) == (1, 1)
    assert said in records["1"].error and records["2"].answer == "green"


def test_the_bundled_clip_is_what_was_drawn() -> None:
    """As far as compression leaves it, each frame for a second."""
    frames = read_frames(CLIP, Uniform(8))
    assert frames.indices.tolist() == [4, 12, 20, 28, 36, 44, 52, 60]
    assert abs(frames.pixels.astype(int) - drawn().frames).mean() < 8
    questions, malformed = read_questions(QUESTIONS)
    assert len(questions) == 10 and not malformed and all(question.answer for question in questions)


def test_the_command_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["video-qa"]) == 0
    said = capsys.readouterr().out
    assert "10 questions answered, 10 of 10 rightly" in said
    assert "128 of 512" in said


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Malformed lines and broken clips are told and counted, the table is whole, and a second run adds nothing."""
    with (folder / "q.jsonl").open("a") as file:
        file.write("{broken\n")
    command = ["video-qa", str(folder / "q.jsonl"), "--videos", str(folder / "clips"), "--out", str(folder / "a.jsonl")]
    pruning = ["--method", "quota", "--set", "floor=2", "--scoring", "change", "--keep", "0.5", "--batch", "5"]
    assert main([*command, *pruning, "--csv", str(folder / "a.csv")]) == 1
    captured = capsys.readouterr()
    assert "line 19 of" in captured.err and "no JSON" in captured.err
    assert "15 questions answered" in captured.out and "3 questions without an answer" in captured.out
    assert "1 lines of the questions were left out" in captured.out
    rows = list(csv.DictReader((folder / "a.csv").open()))
    assert len(rows) == 18 and rows[0]["id"] == "0/0" and rows[3]["error"]
    kept = [int(count) for count in rows[0]["kept"].split()]
    assert len(kept) == 8 and sum(kept) == 256 and min(kept) >= 2
    assert main([*command, *pruning]) == 1
    said = capsys.readouterr().out
    assert "0 questions answered, 18 were before" in said and "3 questions without an answer" in said
    assert main([*command, "--keep", "0.5"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch.jsonl", "--out", "a.jsonl"], "no file of questions"),
        (["q.jsonl"], "--out is missing"),
        (["--frames", "0"], "--frames 0"),
        (["--batch", "0"], "--batch 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--fps", "2", "--sampling", "scenes"], "--fps 2"),
        (["--keep", "2.5"], "keep=2.5"),
        (["--method", "nosuch"], "unknown method"),
        (["--method", "cdpruner"], "reads relevance"),
        (["q.jsonl", "--out", "a.jsonl", "--videos", "nosuch"], "no such directory"),
        (["--videos", "clips"], "without a file of questions"),
        (["--replicas", "2"], "--engine ray"),
        (["--threads", "0"], "--threads 0"),
        (["--scoring", "change"], "reads no scores of frames"),
        (["--ask-things"], "reads no scores of frames"),
        (["--engine", "ray", "--decoders", "2"], "--decoders 2"),
        (["--engine", "ray", "--threads", "2"], "--threads 2"),
        (["--scoring", "open_clip:nosuch:nosuch", "--method", "quota"], "open_clip cannot load"),
        (["--set", "x"], "--set x"),
        (["--out", "no/a.jsonl"], "no directory"),
    ],
)
def test_mistakes_in_the_command(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["video-qa", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "a.jsonl").exists()


def test_without_a_reader_nothing_is_noted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many errors as questions would have to be taken back; clips that need no reader are answered."""
    monkeypatch.setattr(reader, "prepare", lambda backend: f"no {backend}")
    with pytest.raises(BackendUnavailable, match=r"no pyav.*no decord.*pip install"):
        answered(folder, folder / "a.jsonl")
    assert not (folder / "a.jsonl").exists()
    np.save(folder / "clips" / "array.npy", drawn().frames)
    asked = [Question(id="1", video="array", question=ASKED[0])]
    _, records = answer_questions(TASK, asked, folder / "clips", folder / "a.jsonl")
    assert records["1"].answer == "green"


def test_a_log_tells_how_far_the_job_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal, a line in half a minute at most."""
    clock = itertools.count(0, 20)
    monkeypatch.setattr(shown.time, "monotonic", lambda: float(next(clock)))
    file = io.StringIO()
    log = shown.Log(Console(file=file))
    for done in (1, 2, 3):
        log.tell(Counts(total=9, before=2, answered=done, failed=1))
    assert file.getvalue().splitlines() == ["5 of 9 questions done, 1 failed"]


def test_a_frame_budget_below_the_number_of_frames(folder: Path) -> None:
    """Three tokens for eight frames: the best three frames have one each, or the best one all."""
    task = replace(TASK, method="quota", keep=3, parameters={"within": "prune"})
    question = Question(id="1", video="0", question="is there a blue diamond ?")
    _, records = answer_questions(task, [question], folder / "clips", folder / "a.jsonl")
    assert sum(records["1"].kept) == 3 and len(records["1"].kept) == 8


def test_a_clip_of_one_frame(folder: Path) -> None:
    write(folder / "clips" / "one.mp4", Recipe(frames=1))
    _, records = answer_questions(
        TASK, [Question(id="1", video="one", question=ASKED[0])], folder / "clips", folder / "a.jsonl"
    )
    assert records["1"].error is None and records["1"].frames == (0,) and len(records["1"].kept) == 1


@pytest.mark.slow
def test_killed_at_random_moments_each_question_is_answered_once(folder: Path) -> None:
    """The command itself, killed with SIGKILL, until it is through; no decoder outlives it."""
    out, stream = folder / "a.jsonl", random.Random(1)
    command = [sys.executable, "-m", "vtprune", "video-qa", str(folder / "q.jsonl"), "--videos", str(folder / "clips")]
    command += ["--out", str(out), "--batch", "1", "--decoders", "2"]
    kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills < 4:
            before = out.stat().st_size if out.exists() else 0
            while process.poll() is None and (out.stat().st_size if out.exists() else 0) <= before:
                time.sleep(0.005)
            time.sleep(stream.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
    assert kills and process.returncode == 1
    found = records_of(out)
    assert len(found) == 18 and sum(record["error"] is not None for record in found.values()) == 3
    answered(folder, folder / "whole.jsonl")
    assert found == records_of(folder / "whole.jsonl")
