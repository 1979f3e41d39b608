"""Questions about many clips: decoded ahead of the model, answered in batches, noted as they come.

Data flows in one direction: questions, by clip -> `Decoders` -> `Answerer` -> `Journal`.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.errors import InvalidOption, VtpruneError
from vtprune.video.answering import Answerer, ClipAsked
from vtprune.video.frames import Frames
from vtprune.video.guard import Decoders
from vtprune.video.journal import Journal, Record
from vtprune.video.process import NotStarted
from vtprune.video.questions import Question, clip_path
from vtprune.video.reader import check_reads_files
from vtprune.video.records import failed, judged, plainly
from vtprune.video.task import Task

AHEAD = 2
"""Clips on their way beyond those of the next batch, for each process that decodes."""


@dataclass(frozen=True, kw_only=True)
class ClipTask:
    """The questions about one clip that are still to be answered."""

    path: Path
    questions: tuple[Question, ...]


@dataclass(kw_only=True)
class Counts:
    """How far a job is. `waited` are seconds that the model waited for decoding."""

    total: int
    before: int = 0
    answered: int = 0
    failed: int = 0
    waited: float = 0.0

    def add(self, records: Sequence[Record]) -> None:
        """Count what came."""
        self.answered += sum(record.error is None for record in records)
        self.failed += sum(record.error is not None for record in records)


Report = Callable[[Counts, Sequence[Record]], None]


def answer_questions(
    task: Task,
    questions: Sequence[Question],
    directory: Path,
    out: Path,
    *,
    retry: bool = False,
    decoders: int = 1,
    answerer: Answerer | None = None,
    on_records: Report | None = None,
) -> tuple[Counts, dict[str, Record]]:
    """Answer what `out` does not answer yet, and append it there; gives all answers by id.

    Args:
        directory: where the clips lie.
        retry: answer again what ended in an error.
        decoders: processes that decode.
        answerer: that of the task where it is loaded already.
        on_records: called with the counts and the new records after every batch.

    Raises:
        InvalidOption: for an `out` of another job, or one that another run writes to.
        VtpruneError: where the model cannot do the task.
    """
    check_readable(task, questions, directory)
    answerer = answerer or task.load()
    with Journal(out, settings_of(task.settings(answerer), directory), retry=ids_of(questions, retry)) as journal:
        clips, counts, note = noting(questions, journal, directory, on_records)
        with Decoders(workers=decoders, timeout=task.timeout) as pool:
            for records, waited in answered(task, answerer, decoded(task, clips, pool, ahead=decoders * AHEAD)):
                counts.waited += waited
                note(records)
        return counts, dict(journal.records)


def ids_of(questions: Sequence[Question], retry: bool) -> frozenset[str]:
    """The questions whose errors a job forgets: its own, and only where they are to be asked again."""
    return frozenset(question.id for question in questions) if retry else frozenset()


def settings_of(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What the header of the answers says: the settings of a task, and where its clips lie."""
    return {**settings, "videos": os.path.realpath(directory)}


def check_readable(task: Task, questions: Sequence[Question], directory: Path) -> None:
    """Raise `BackendUnavailable` where there are video files and nothing here reads any: no answer would come of it."""
    clips, _ = clips_of(questions, directory)
    if any(clip.path.is_file() and clip.path.suffix.lower() != ".npy" for clip in clips):
        check_reads_files(task.reader)


def noting(
    questions: Sequence[Question], journal: Journal, directory: Path, on_records: Report | None
) -> tuple[list[ClipTask], Counts, Callable[[Sequence[Record]], None]]:
    """The clips that are still to be asked about, the counts of the job, and what notes records and counts them.

    Questions about clips that are not there are noted as errors at once.
    """
    open_ones, done = pending_of(questions, journal)
    counts = Counts(total=len(questions), before=len(done))

    def note(records: Sequence[Record]) -> None:
        journal.add(records)
        counts.add(records)
        if on_records is not None:
            on_records(counts, records)

    clips, lost = clips_of(open_ones, directory)
    note(lost)
    return clips, counts, note


def pending_of(questions: Sequence[Question], journal: Journal) -> tuple[list[Question], list[Question]]:
    """Questions without an answer in the journal, and those with one, judged by the answers expected now.

    Raises:
        InvalidOption: where the journal answers another question under the same id.
    """
    open_ones: list[Question] = []
    done: list[Question] = []
    judged_anew: dict[str, Record] = {}
    again = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
    if again:
        raise InvalidOption(f"several questions have the id {again[0]!r}: expected one of each")
    for question in questions:
        record = journal.records.get(question.id)
        if record is not None and (record.video, record.question) != (question.video, question.question):
            raise InvalidOption(
                f"question {question.id!r} was answered before, about {record.video!r}: {record.question!r}. Give it "
                "another id, or name another file for the answers"
            )
        if record is not None and question.answer is not None and record.expected != question.answer:
            judged_anew[question.id] = judged(record, question.answer)
        (open_ones if record is None else done).append(question)
    journal.change(judged_anew)
    return open_ones, done


def clips_of(questions: Sequence[Question], directory: Path) -> tuple[list[ClipTask], list[Record]]:
    """Questions by clip, in the order in which clips come up first; and errors for clips that are not there."""
    by_path: dict[Path, list[Question]] = {}
    lost: list[Record] = []
    for question in questions:
        try:
            by_path.setdefault(clip_path(directory, question.video), []).append(question)
        except (InvalidOption, OSError) as error:
            lost.append(failed(question, error))
    return [ClipTask(path=path, questions=tuple(own)) for path, own in by_path.items()], lost


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: between pieces that live on it would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


Decoded = tuple[ClipTask, Frames | VtpruneError, float]
"""A clip, its frames or why there are none, and the seconds that were waited for them."""


def decoded(task: Task, clips: Sequence[ClipTask], decoders: Decoders, *, ahead: int) -> Iterator[Decoded]:
    """The frames of every clip, in order.

    On their way, or waiting, are as many as have questions for a batch, and `ahead` more.

    Raises:
        NotStarted: where no process that decodes can be started.
    """
    waiting: deque[tuple[ClipTask, Future[Frames]]] = deque()
    left = iter(clips)

    def wanted() -> bool:
        counts = [len(clip.questions) for clip, _ in waiting]
        return len(counts) <= ahead or sum(counts[:-ahead]) < task.batch

    while True:
        while wanted() and (clip := next(left, None)) is not None:
            future = decoders.submit(clip.path, task.sampling, backend=task.reader, on_truncated=task.on_truncated)
            waiting.append((clip, future))
        if not waiting:
            return
        clip, future = waiting.popleft()
        begin = time.perf_counter()
        try:
            frames: Frames | VtpruneError = future.result()
        except NotStarted:
            raise
        except VtpruneError as error:
            frames = error
        except Exception as error:  # whatever it was, it costs this clip and not the run
            frames = VtpruneError(f"{clip.path} was not read: {plainly(error)}")
        yield clip, frames, time.perf_counter() - begin


def answered(task: Task, answerer: Answerer, clips: Iterable[Decoded]) -> Iterator[tuple[list[Record], float]]:
    """Records as they come, and the seconds waited for clips: as many clips at a time as have questions for a batch."""
    ready: list[ClipAsked] = []
    for clip, frames, seconds in clips:
        if isinstance(frames, Frames):
            ready.append(ClipAsked(frames=frames, questions=clip.questions))
            yield [], seconds
        else:
            yield [failed(question, frames) for question in clip.questions], seconds
        if sum(len(one.questions) for one in ready) >= task.batch:
            yield from ((records, 0.0) for records in answerer(ready))
            ready = []
            _trim()
    if ready:
        yield from ((records, 0.0) for records in answerer(ready))
