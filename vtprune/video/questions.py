"""Questions about clips from a file, and where the clips lie. Lines that are none are told, and the others go on."""

from __future__ import annotations

import csv
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.errors import InvalidOption

_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".npy")
_LONGEST = 1 << 20
"""Bytes of a line."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a clip; `answer` is the right one, where it is known, and `line` where it stands."""

    id: str
    video: str
    question: str
    answer: str | None = None
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """A line that is no question, and why."""

    line: int
    reason: str


def read_questions(path: Path) -> tuple[tuple[Question, ...], tuple[Malformed, ...]]:
    """The questions of a `.jsonl` or `.csv` file with `id`, `video`, `question` and perhaps `answer`; and bad lines.

    Raises:
        InvalidOption: for a file that is not there, has another ending, is no text or holds no line.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_lines}
    if path.suffix.lower() not in readers:
        raise InvalidOption(f"{path}: expected a file of questions that ends in .jsonl or .csv")
    if not path.is_file():
        raise InvalidOption(f"no file of questions at {path}")
    found: dict[str, Question] = {}
    malformed: list[Malformed] = []
    try:
        for number, fields in readers[path.suffix.lower()](path):
            question = fields if isinstance(fields, str) else _question(number, fields)
            if isinstance(question, Question) and question.id in found:
                question = f"the id {question.id!r} is that of line {found[question.id].line} already"
            if isinstance(question, str):
                malformed.append(Malformed(line=number, reason=question))
            else:
                found[question.id] = question
    except (OSError, csv.Error) as error:
        raise InvalidOption(f"cannot read the questions in {path}: {error}") from error
    if not found and not malformed:
        raise InvalidOption(f"{path} holds no questions")
    return tuple(found.values()), tuple(malformed)


def clip_path(directory: Path, name: str) -> Path:
    """The file of a clip inside `directory`; a name without an ending may stand for one with it.

    Links are followed; names that lead out of the directory are not.

    Raises:
        InvalidOption: for a name that leads out of it, or nothing there.
    """
    root = os.path.abspath(directory)
    wanted = os.path.normpath(os.path.join(root, name))
    if "\0" in name or os.path.isabs(name) or os.path.commonpath([root, wanted]) != root or wanted == root:
        raise InvalidOption(f"video {name!r}: expected a name inside {directory}")
    path = Path(wanted)
    if path.exists():
        return path
    near = [path.with_name(path.name + suffix) for suffix in _SUFFIXES]
    found = next((other for other in near if other.exists()), None)
    if found is None:
        raise InvalidOption(f"video {name!r}: there is none in {directory}")
    return found


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            text = raw.removeprefix(b"\xef\xbb\xbf").strip()
            if len(raw) == _LONGEST and not raw.endswith(b"\n"):
                while (rest := file.readline(_LONGEST)) and not rest.endswith(b"\n"):
                    pass
                yield number, f"longer than {_LONGEST >> 10} KiB"
            elif text:
                yield number, _json_line(text)


def _json_line(text: bytes) -> Mapping[str, Any] | str:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return fields if isinstance(fields, dict) else f"expected an object with id, video and question, got {fields!r:.40}"


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    # Bytes that are no UTF-8 come through as halves of characters, and cost their own line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = _csv_records(file)
        _, head = next(records, (1, []))
        if isinstance(head, str):
            raise InvalidOption(f"{path}: the head line is damaged ({head}): expected id, video, question, answer")
        missing = [name for name in ("id", "video", "question") if name not in head]
        if missing:
            raise InvalidOption(f"{path} has no column {', '.join(missing)}: expected id, video, question, answer")
        for number, cells in records:
            if isinstance(cells, str):
                yield number, cells
            elif len(cells) > len(head):
                yield number, "more cells than columns"
            else:
                yield number, dict(zip(head, cells, strict=False))


def _csv_records(file: Iterable[str]) -> Iterator[tuple[int, list[str] | str]]:
    """The cells of each record that has some with the line where it begins, or what is wrong with that line.

    The line behind a damaged one is the next that is read: a quote that is not closed does not swallow what follows.
    """
    again: deque[str] = deque()
    number = 1
    while True:
        taken: list[str] = []
        try:
            cells = next(csv.reader(_noted(file, again, taken), strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            yield number, str(error)
            again.extendleft(reversed(taken[1:]))
            number += 1
            continue
        if cells:
            yield number, cells
        number += len(taken)


def _noted(file: Iterable[str], again: deque[str], taken: list[str]) -> Iterator[str]:
    """The lines, those that are read again first, with a note of those that were taken."""
    lines = iter(file)
    while (line := again.popleft() if again else next(lines, None)) is not None:
        taken.append(line)
        yield line


def _question(line: int, fields: Mapping[str, Any]) -> Question | str:
    """The question, or why there is none."""
    texts: dict[str, str] = {}
    for name in ("id", "video", "question", "answer"):
        value = fields.get(name)
        if value in (None, "") and name == "answer":
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name in ("id", "answer"):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            return (
                f"{name!r} is missing or empty"
                if value is None or value == ""
                else f"{name!r} is no text: {value!r:.40}"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return f"{name!r} is no UTF-8"
        texts[name] = value.strip()
    return Question(**texts, line=line)
