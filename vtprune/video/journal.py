"""Answers on disk, one JSON line each, so that a run that ended at any moment goes on where it was."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vtprune.errors import InvalidOption

logger = logging.getLogger("vtprune")
FORMAT = 1
_KIND = "vtprune video-qa"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a question: an `answer`, or an `error`.

    `correct` says whether the answer is the expected one; None where that is not known. `kept` are the tokens kept of
    each part (a frame, or frames that the encoder joins), averaged over decoder layers, of `tokens` in all. `frames`
    are those of the video that were shown, `times` when they are, in seconds. `reader` and `backend` say what decoded
    and what pruned; `seconds` are those of the clip (decode, encode), and the question's own (score, answer: its share
    of the batch).
    """

    id: str
    video: str
    question: str
    answer: str | None = None
    error: str | None = None
    expected: str | None = None
    correct: bool | None = None
    kept: tuple[float, ...] = ()
    tokens: int = 0
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    reader: str = ""
    backend: str = ""
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises `ValueError`, `TypeError` or `KeyError` for anything else than a record."""
        fields: dict[str, Any] = json.loads(line)
        for name in ("kept", "frames", "times", "warnings"):
            fields[name] = tuple(fields[name])
        record = cls(**fields)
        if not all(isinstance(text, str) for text in (record.id, record.video, record.question)):
            raise ValueError("no record")
        return record


class Journal:
    """The file of answers of one job: a line that says under which settings, then one for each question.

    What `add` returned from is on the disk. A line that was being written when a run was killed is cut off when the
    file is opened again. Only one process writes at a time (where the system has such locks).

    Args:
        retry: ids of questions whose errors are forgotten.

    Raises:
        InvalidOption: for a file of another job, of other settings, or of something else, or one that is being written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, retry: Collection[str] = ()) -> None:
        self._path = path
        self._head = json.dumps({"kind": _KIND, "format": FORMAT, "settings": dict(settings)}, sort_keys=True)
        self.records: dict[str, Record] = {}
        try:
            self._file = self._opened()
            try:
                self._read()
                failed = {id for id, record in self.records.items() if record.error is not None}
                if again := failed.intersection(retry):
                    self._write_anew({id: own for id, own in self.records.items() if id not in again})
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise InvalidOption(f"cannot write {path}: {error.strerror or error}") from error

    def add(self, records: Sequence[Record]) -> None:
        """Append some answers: they are on the disk when this returns."""
        if not records:
            return
        repeated = [record.id for record in records if record.id in self.records]
        assert not repeated, f"answered twice: {repeated}"
        try:
            _write(self._file, "".join(record.to_json() + "\n" for record in records))
        except OSError as error:
            raise InvalidOption(f"cannot write {self._path}: {error.strerror or error}; what is there stays") from error
        self.records.update((record.id, record) for record in records)

    def change(self, records: Mapping[str, Record]) -> None:
        """Put other records in the place of some that are there; all of them, or none, are on the disk.

        Where the directory takes no new file they are changed here alone, and a warning says so.
        """
        if not records:
            return
        try:
            self._write_anew({**self.records, **records})
        except OSError as error:
            logger.warning("%s still holds what was expected before: %s", self._path, error.strerror or error)
            self.records.update(records)

    def close(self) -> None:
        """Let other processes write."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise InvalidOption(f"{self._path} is no file: answers are read again, name a file on a disk")
                _lock(file, self._path)
                if _is_at(file, self._path):
                    return file
            except BaseException:
                os.close(file)
                raise
            # Another run wrote the file anew between the two lines, and this is the old one.
            os.close(file)

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if not whole and not self._head.encode().startswith(raw):
            raise InvalidOption(f"{self._path} holds no answers of vtprune video-qa: name another file")
        if len(whole) < len(raw):
            os.ftruncate(self._file, len(whole))
        if not whole:
            _write(self._file, self._head + "\n")
            _sync_folder(self._path)
            return
        lines = whole.decode("utf-8", errors="replace").split("\n")[:-1]
        self._check_head(lines[0])
        for number, line in enumerate(lines[1:], start=2):
            record = self._record(number, line)
            self.records[record.id] = record

    def _record(self, number: int, line: str) -> Record:
        try:
            record = Record.from_json(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidOption(f"line {number} of {self._path} is damaged: delete that line") from error
        if record.id in self.records:
            raise InvalidOption(f"line {number} of {self._path} answers {record.id!r} again: delete that line")
        return record

    def _check_head(self, line: str) -> None:
        try:
            head = json.loads(line)
            ours = head["kind"] == _KIND
            there, known = head["settings"], head["format"] == FORMAT
            now = json.loads(self._head)["settings"]
            found = "; ".join(_differences(there, now))
        except (ValueError, KeyError, TypeError, AttributeError):
            ours = False
        if not ours:
            raise InvalidOption(f"{self._path} holds no answers of vtprune video-qa: name another file")
        if found or not known:
            raise InvalidOption(
                f"{self._path} holds answers under other settings ({found or 'another format'}): go on with those, "
                "delete it, or name another file"
            )

    def _write_anew(self, records: Mapping[str, Record]) -> None:
        """Write the file with these records alone, in one step."""
        lines = [self._head, *(record.to_json() for record in records.values())]
        path = Path(os.path.realpath(self._path))
        fresh = path.with_name(f".{path.name}.new")
        # Ours alone, as the file is locked: one that a killed run left behind goes, and a link is not followed.
        fresh.unlink(missing_ok=True)
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            os.chmod(fresh, stat.S_IMODE(os.fstat(self._file).st_mode))
            _lock(file, path)
            _write(file, "".join(line + "\n" for line in lines))
            os.replace(fresh, path)
        except BaseException:
            os.close(file)
            fresh.unlink()
            raise
        os.close(self._file)
        self._file = file
        self.records = dict(records)
        _sync_folder(path)


def _write(file: int, text: str) -> None:
    """All of it, onto the disk."""
    rest = memoryview(text.encode())
    while rest:
        rest = rest[os.write(file, rest) :]
    os.fsync(file)


def _sync_folder(path: Path) -> None:
    """That the file has its name is on the disk as well, where folders can be synchronised."""
    if os.name != "posix":
        return
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has none of these locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidOption(f"{path} is being written by another run: wait for it, or name another file") from error
    except OSError as error:  # some file systems over a network have none
        logger.warning("%s cannot be locked (%s): see to it that one run writes at a time", path, error.strerror)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _differences(there: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two settings, by name; of a method that is another one its name alone."""
    if there == now:
        return []
    if not isinstance(there, dict) or not isinstance(now, dict):
        return [f"{name}: {_short(there)} there, {_short(now)} now"]
    names = ["name"] if there.get("name") != now.get("name") else list({**there, **now})
    inside = [_differences(there.get(own), now.get(own), f"{name}.{own}".lstrip(".")) for own in names]
    return [difference for differences in inside for difference in differences]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
