"""Files of questions: what is one, what is told by its line, and which clips may be named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vtprune.errors import InvalidOption
from vtprune.video.questions import Malformed, Question, clip_path, read_questions

GOOD = {"id": "1", "video": "a.mp4", "question": "what ?"}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts))
    return path


def test_lines_of_json(tmp_path: Path) -> None:
    """Numbers may be ids and answers; blank lines and a byte order mark are nothing."""
    second = {"id": 2, "video": "b/c", "question": " é ? ", "answer": 3, "more": [1]}
    found, malformed = read_questions(written(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", second))
    assert malformed == ()
    assert found == (
        Question(id="1", video="a.mp4", question="what ?", line=1),
        Question(id="2", video="b/c", question="é ?", answer="3", line=3),
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ([1, 2], "expected an object"),
        ({**GOOD, "id": None}, "'id' is missing"),
        ({**GOOD, "id": True}, "'id' is no text"),
        ({**GOOD, "question": "  "}, "'question' is"),
        ({**GOOD, "video": 7}, "'video' is no text"),
        ({**GOOD, "answer": {"a": 1}}, "'answer' is no text"),
        ({"id": "1", "video": "a.mp4"}, "'question' is missing"),
        ({**GOOD, "question": "other ?"}, "the id '1' is that of line 1 already"),
        ('{"id": "\\ud800", "video": "a.mp4", "question": "what ?"}', "'id' is no UTF-8"),
        ("x" * (1 << 20), "longer than 1024 KiB"),
        ("x" * (5 << 20), "longer than 1024 KiB"),
    ],
)
def test_a_bad_line_is_told_and_the_others_go_on(tmp_path: Path, line: object, reason: str) -> None:
    found, malformed = read_questions(written(tmp_path, GOOD, line, {**GOOD, "id": "3"}))
    assert [question.id for question in found] == ["1", "3"]
    assert [bad.line for bad in malformed] == [2]
    assert isinstance(malformed[0], Malformed) and malformed[0].reason.startswith(reason)


@pytest.mark.parametrize("nothing", ["", None])
def test_an_answer_may_be_empty(tmp_path: Path, nothing: str | None) -> None:
    found, malformed = read_questions(written(tmp_path, {**GOOD, "answer": nothing}))
    assert malformed == () and found[0].answer is None


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text(
        'video,id,question,answer\na.mp4,1,"what, then ?",\nb.mp4,2,"two\nlines",yes\nc.mp4,3\n', "utf-8-sig"
    )
    found, malformed = read_questions(path)
    assert found[0] == Question(id="1", video="a.mp4", question="what, then ?", line=2)
    assert (found[1].question, found[1].answer) == ("two\nlines", "yes")
    assert [(bad.line, bad.reason) for bad in malformed] == [(5, "'question' is missing or empty")]
    many = "".join(f"{number},a,x\n" for number in range(4, 5000))
    path.write_text(f'id,video,question\n1,a,x\n2,b,"y\n{many}')
    found, malformed = read_questions(path)
    assert [question.id for question in found] == ["1", *map(str, range(4, 5000))]
    assert [question.line for question in found[:3]] == [2, 4, 5]
    assert [(bad.line, bad.reason) for bad in malformed] == [(3, "unexpected end of data")]
    path.write_text('id,video,question\n1,"a,x\n2,b,"two\nlines"\n3,"c,z\n' * 1 + '4,"d,z\n' * 3000)
    found, malformed = read_questions(path)
    assert [(question.id, question.question) for question in found] == [("2", "two\nlines")]
    assert [bad.line for bad in malformed] == [2, *range(5, 3006)]
    path.write_bytes(b"id,video,question\n1,\xff,x\n2,b,y\n3,c," + b"z" * 200_000 + b"\n4,d,w\n")
    found, malformed = read_questions(path)
    assert [question.id for question in found] == ["2", "4"]
    assert [(bad.line, bad.reason[:17]) for bad in malformed] == [(2, "'video' is no UTF"), (4, "field larger than")]
    path.write_text("id,video\n1,a.mp4\n")
    with pytest.raises(InvalidOption, match="no column question"):
        read_questions(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"ends in .jsonl or .csv"):
        read_questions(tmp_path / "q.txt")
    with pytest.raises(InvalidOption, match="no file of questions"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(InvalidOption, match="holds no questions"):
        read_questions(written(tmp_path, ""))


@pytest.mark.parametrize("name", ["../secret.mp4", "a/../../secret.mp4", "/etc/passwd", "", ".", "a/..", "a\0.mp4"])
def test_names_do_not_lead_out_of_the_directory(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "clips"
    inside.mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"x")
    with pytest.raises(InvalidOption, match="expected a name inside"):
        clip_path(inside, name)


def test_names_inside(tmp_path: Path) -> None:
    """With and without their ending, in folders, and links to where clips really are."""
    inside, elsewhere = tmp_path / "clips", tmp_path / "disk"
    for folder in (inside / "a", elsewhere):
        folder.mkdir(parents=True)
    (inside / "a" / "1.mkv").write_bytes(b"x")
    (elsewhere / "2.mp4").write_bytes(b"x")
    os.symlink(elsewhere, inside / "b")
    assert (
        clip_path(inside, "a/1.mkv") == clip_path(inside, "a/1") == clip_path(inside, "x/../a/1") == inside / "a/1.mkv"
    )
    assert clip_path(inside, "b/2") == inside / "b" / "2.mp4"
    with pytest.raises(InvalidOption, match="'a/2': there is none in"):
        clip_path(inside, "a/2")
