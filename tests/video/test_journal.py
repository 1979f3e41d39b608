"""Answers on disk: torn lines, other settings, other writers, and runs that are killed at any moment."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from vtprune.errors import InvalidOption
from vtprune.video.journal import Journal, Record

SETTINGS = {"keep": 0.25, "pipeline": {"name": "random"}}


def record(name: str, **fields: object) -> Record:
    return replace(Record(id=name, video="a.mp4", question="what ?", answer="é\u2028x"), **fields)


def answers(path: Path) -> list[str]:
    """Ids in the order of the file, read without the journal."""
    return [json.loads(line)["id"] for line in path.read_text("utf-8").split("\n")[1:-1]]


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    full = record(
        "1", kept=(3, 0.5), frames=(1, 4), times=(0.1, 0.4), seconds={"answer": 1.5}, warnings=("w",), tokens=8
    )
    with Journal(path, SETTINGS) as journal:
        journal.add([full, record("2", answer=None, error="no clip")])
        journal.add([])
    with Journal(path, SETTINGS) as journal:
        assert journal.records == {"1": full, "2": record("2", answer=None, error="no clip")}
        journal.add([record("3")])
    assert answers(path) == ["1", "2", "3"]
    assert json.loads(path.read_text("utf-8").split("\n")[0])["settings"] == SETTINGS


def test_every_cut_of_a_file_is_gone_on_from(tmp_path: Path) -> None:
    """Whatever byte a run ended at: whole lines stay, the rest is written again, and the file is the same at last."""
    path = tmp_path / "a.jsonl"
    rows = [record(str(number)) for number in range(3)]
    with Journal(path, SETTINGS) as journal:
        journal.add(rows)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with Journal(path, SETTINGS) as journal:
            journal.add([row for row in rows if row.id not in journal.records])
        assert path.read_bytes() == whole


def test_a_line_is_on_the_disk_before_add_returns(tmp_path: Path) -> None:
    synchronised: list[int] = []
    with Journal(tmp_path / "a.jsonl", SETTINGS) as journal, patch("os.fsync", synchronised.append):
        journal.add([record("1"), record("2")])
        assert len(synchronised) == 1
        assert answers(tmp_path / "a.jsonl") == ["1", "2"]
        with pytest.raises(AssertionError, match="answered twice"):
            journal.add([record("2")])


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path, SETTINGS).close()
    before = path.read_bytes()
    with pytest.raises(InvalidOption, match=r"other settings \(keep: 0.25 there, 0.5 now; seed: None there, 3 now\)"):
        Journal(path, {**SETTINGS, "keep": 0.5, "seed": 3})
    other = {**SETTINGS, "pipeline": {"name": "quota", "picks": [1]}}
    with pytest.raises(InvalidOption, match=r"\(pipeline.name: 'random' there, 'quota' now\)"):
        Journal(path, other)
    assert path.read_bytes() == before
    Journal(path, SETTINGS).close()


@pytest.mark.parametrize(
    "text", ["hello\n", "hello", '{"a": 1}\n', "[]\n", '{"kind": "vtprune video-qa"}\n', "\0" * 50]
)
def test_other_files_are_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidOption, match="holds no answers"):
        Journal(path, SETTINGS)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 3 .* is damaged"),
        ('{"id": 1}', "line 3 .* is damaged"),
        (None, "line 3 .* answers '1' again"),
    ],
)
def test_lines_that_cannot_be_are_named(tmp_path: Path, line: str | None, said: str) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("1")])
    with path.open("a") as file:
        file.write((line or path.read_text().split("\n")[1]) + "\n")
    with pytest.raises(InvalidOption, match=said):
        Journal(path, SETTINGS)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS), pytest.raises(InvalidOption, match="being written by another run"):
        Journal(path, SETTINGS)
    Journal(path, SETTINGS).close()


def test_errors_are_tried_again_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("1"), record("2", error="x"), record("3")])
    with Journal(path, SETTINGS) as journal:
        assert list(journal.records) == ["1", "2", "3"]
    with Journal(path, SETTINGS, retry={"2"}) as journal:
        assert list(journal.records) == ["1", "3"]
        with pytest.raises(InvalidOption, match="another run"):
            Journal(path, SETTINGS)
        journal.add([record("2")])
    assert answers(path) == ["1", "3", "2"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_errors_of_other_questions_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("1", error="x"), record("2", error="x"), record("3")])
    with Journal(path, SETTINGS, retry={"1", "3", "4"}) as journal:
        assert list(journal.records) == ["2", "3"]
    assert answers(path) == ["2", "3"]


def test_records_are_changed_on_the_disk_all_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("1"), record("2"), record("3")])
        before = path.read_bytes()
        with patch("os.replace", side_effect=OSError(28, "No space left")):
            journal.change({"2": record("2", expected="red")})
        assert "still holds what was expected before: No space left" in caplog.text and path.read_bytes() == before
        assert [own.expected for own in journal.records.values()] == [None, "red", None]
        journal.change({"2": record("2", expected="blue")})
        journal.add([record("4")])
    with Journal(path, SETTINGS) as journal:
        assert [own.expected for own in journal.records.values()] == [None, "blue", None, None]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_a_killed_run_left_behind_goes_and_a_link_is_not_followed(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".a.jsonl.new").symlink_to(other)
    with Journal(path, SETTINGS) as journal:
        journal.add([record("1", error="x")])
    Journal(path, SETTINGS, retry={"1"}).close()
    assert answers(path) == [] and other.read_text() == "mine"
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl", "other"}


def test_answers_are_not_written_to_a_pipe(tmp_path: Path) -> None:
    """They would be read from it first, for ever."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidOption, match="is no file"):
        Journal(tmp_path / "fifo", SETTINGS)


def test_a_file_written_anew_stays_where_and_what_it_was(tmp_path: Path) -> None:
    """A link goes on leading to it, and who may read it stays so; a file of a similar name is nobody's business."""
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "a.jsonl", tmp_path / "a.jsonl"
    link.symlink_to(path)
    (tmp_path / "real" / "a.jsonl.new").write_text("mine")
    with Journal(link, SETTINGS) as journal:
        journal.add([record("1"), record("2", error="x")])
    path.chmod(0o640)
    with Journal(link, SETTINGS, retry={"2"}) as journal:
        journal.add([record("2")])
    assert link.is_symlink() and answers(path) == ["1", "2"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (tmp_path / "real" / "a.jsonl.new").read_text() == "mine" and len(list(path.parent.iterdir())) == 2


def test_a_file_that_was_replaced_before_it_was_locked_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("1"), record("2", error="x")])
    lock, done = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not done:
            done.append(file)
            Journal(path, SETTINGS, retry={"2"}).close()
        lock(file, how)

    with patch("fcntl.flock", late), Journal(path, SETTINGS) as journal:
        journal.add([record("2")])
    assert answers(path) == ["1", "2"]


def test_where_there_are_no_locks_one_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refused = OSError(errno.ENOLCK, "No locks available")
    with patch("fcntl.flock", side_effect=refused), Journal(tmp_path / "a.jsonl", SETTINGS) as journal:
        journal.add([record("1")])
    assert "cannot be locked (No locks available)" in caplog.text
    assert answers(tmp_path / "a.jsonl") == ["1"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="cannot write"):
        Journal(tmp_path / "no" / "a.jsonl", SETTINGS)
    with pytest.raises(InvalidOption, match="cannot write"):
        Journal(tmp_path, SETTINGS)


WRITER = """
import sys, time
from pathlib import Path
from vtprune.video.journal import Journal, Record
most = int(sys.argv[2])
with Journal(Path(sys.argv[1]), {"keep": 0.25}) as journal:
    print("open", flush=True)
    left = [n for n in range(3000) if str(n) not in journal.records]
    while left:
        if most == 0:
            time.sleep(600)
        most -= 1
        some, left = left[:7], left[7:]
        journal.add([Record(id=str(n), video="a.mp4", question="?" * (n % 50), answer="x" * 300) for n in some])
"""


def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    """A process writes, is killed with SIGKILL after a random time, and is started again: until all is there.

    Those that are killed stop after 30 batches, so that none is through before.
    """
    path, stream, grown = tmp_path / "a.jsonl", random.Random(0), 0
    for most in [*[30] * 12, -1]:
        command = [sys.executable, "-c", WRITER, str(path), str(most)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        if most > 0:
            time.sleep(stream.uniform(0.0, 0.03))
            process.send_signal(signal.SIGKILL)
        assert process.wait() == (-signal.SIGKILL if most > 0 else 0)
        process.stdout.close()
        there = path.read_bytes().count(b"\n")
        assert there >= grown
        grown = there
    assert answers(path) == [str(number) for number in range(3000)]
    assert os.listdir(tmp_path) == ["a.jsonl"]
