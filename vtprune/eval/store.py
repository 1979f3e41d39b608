"""Answers on disk, one line for every batch of every row, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtprune.errors import InvalidOption

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one row of the plan said to the questions from number `first` on.

    `recall` is None where a picture shows nothing or the tokens are not those of the picture; `recipe` is the stored
    pipeline of a method, or what else an arm is known by.
    """

    method: str
    keep: float | int
    first: int
    words: tuple[str, ...]
    kept: tuple[float, ...]
    recall: tuple[float | None, ...]
    recipe: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is found by; 1 and 1.0 are different budgets."""
        return (self.method, str(self.keep), self.first)


class Store:
    """Records by row and batch, kept in a file where one is given.

    Raises:
        InvalidOption: for a file that holds answers under other settings, or something else.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._records: dict[tuple[str, str, int], Record] = {}
        head = json.dumps({"format": FORMAT, "settings": dict(settings)}, sort_keys=True)
        if path is None:
            return
        lines = _whole_lines(path)
        if not lines:
            path.write_text(head + "\n", encoding="utf-8")
            return
        _check_head(path, lines[0], json.loads(head))
        for number, line in enumerate(lines[1:], start=2):
            record = _read(path, number, line)
            self._records[record.key] = record

    def find(self, method: str, keep: float | int, first: int, recipe: Mapping[str, Any] | None) -> Record | None:
        """The record of that row and batch; raises `InvalidOption` where the method was another one then."""
        record = self._records.get((method, str(keep), first))
        if record is not None and record.recipe != recipe:
            raise InvalidOption(
                f"{self._path} holds answers of another version of {method!r}: delete it, or name another file"
            )
        return record

    def add(self, record: Record) -> None:
        """Keep a record, on disk before this returns."""
        self._records[record.key] = record
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file; one that was being written when the run was interrupted is cut off."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidOption(f"{path} holds no answers of an evaluation: name another file") from error
    whole, newline, torn = text.rpartition("\n")
    if torn:
        if not torn.startswith("{"):
            raise InvalidOption(f"{path} holds no answers of an evaluation: name another file")
        path.write_text(whole + newline, encoding="utf-8")
    return whole.splitlines()


def _check_head(path: Path, line: str, wanted: dict[str, Any]) -> None:
    try:
        head = json.loads(line)
        there = head["settings"]
        known = head["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidOption(f"{path} holds no answers of an evaluation: name another file") from error
    now = wanted["settings"]
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    if names or not known:
        found = "; ".join(f"{name}: {there.get(name)!r} there, {now.get(name)!r} now" for name in names)
        raise InvalidOption(
            f"{path} holds answers under other settings ({found or 'another format'}): go on with those settings, "
            "delete it, or name another file"
        )


def _read(path: Path, number: int, line: str) -> Record:
    try:
        fields: dict[str, Any] = json.loads(line)
        for name in ("words", "kept", "recall"):
            fields[name] = tuple(fields[name])
        return Record(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidOption(f"line {number} of {path} is damaged: delete that line or the file") from error


def fingerprint(model: nn.Module) -> str:
    """Hash of the config, and of the names, types and bytes of all weights."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    described = {} if config is None else config.to_dict()
    described.pop("_name_or_path", None)
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
