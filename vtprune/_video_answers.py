"""What `vtprune video-qa` shows of a job: its progress, the answers as tables, and what became of it."""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from vtprune.video.journal import Record
    from vtprune.video.qa import Counts

_QUIET = 30.0
"""Seconds between lines."""
_SPEED = 600.0
"""Seconds that the rate is one of: batches of large models take a while."""
FEW = 10
"""Answers, or reasons, that are shown."""
_COLUMNS = (
    "id",
    "video",
    "question",
    "answer",
    "expected",
    "correct",
    "error",
    "tokens",
    "kept",
    "frames",
    "times",
    "warnings",
)
_LISTS = ("kept", "frames", "times")


def progress_bar(console: Console) -> Progress:
    """Questions done, how many a minute, the time that is left, and what failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Questions a second of this run."""

        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{60 * task.speed:.0f}/min", style="progress.data.speed")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    failed = TextColumn("[red]{task.fields[failed]}")
    return Progress(
        *columns,
        failed,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=_SPEED,
    )


class Log:
    """Lines for a file, where there is no terminal to draw a bar on: one in half a minute at most."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = time.monotonic()
        self._counts: Counts | None = None

    def tell(self, counts: Counts) -> None:
        """Say how far the job is, if it is time to."""
        self._counts = counts
        if not self._console.is_terminal and time.monotonic() - self._told >= _QUIET:
            self._told = time.monotonic()
            self._console.print(self.line(), markup=False)

    def line(self) -> str:
        """How far the job is."""
        if self._counts is None:
            return "nothing answered yet"
        done = self._counts.before + self._counts.answered + self._counts.failed
        return f"{done} of {self._counts.total} questions done, {self._counts.failed} failed"


def answer_table(records: Sequence[Record]) -> Any:
    """Questions and answers, with the tokens kept of every frame."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("question", "answer", "expected", "tokens", "kept of each frame"):
        table.add_column(column, overflow="fold")
    for record in records:
        kept = " ".join(f"{count:g}" for count in record.kept)
        said = Text(record.answer or "") if record.error is None else Text(record.error, style="red")
        if record.correct is not None:
            said.stylize("green" if record.correct else "red")
        total = f"{sum(record.kept):g} of {record.tokens}"
        table.add_row(Text(record.question), said, Text(record.expected or ""), total, kept)
    return table


def tell(counts: Counts, records: Sequence[Record], malformed: int, console: Console) -> None:
    """What became of the job, for people. `records` are all there are, those of earlier runs among them."""
    judged = [record for record in records if record.correct is not None]
    right = f", {sum(bool(record.correct) for record in judged)} of {len(judged)} rightly (the same words)"
    before = f", {counts.before} were before" if counts.before else ""
    console.print(f"{counts.answered} questions answered{before}{right if judged else ''}", markup=False)
    if malformed:
        console.print(f"{malformed} lines of the questions were left out", markup=False, style="yellow")
    warned = sum(bool(record.warnings) for record in records)
    if warned:
        console.print(f"{warned} answers are from clips with something wrong, see their warnings", markup=False)
    reasons = Counter(record.error for record in records if record.error is not None)
    if reasons:
        console.print(f"{reasons.total()} questions without an answer:", markup=False, style="red")
        for reason, count in reasons.most_common(FEW):
            console.print(f"  {count} x {reason}", markup=False, soft_wrap=True)
        console.print("run again with --retry-errors to try those again", markup=False)


def write_csv(records: Sequence[Record], path: Path) -> None:
    """The answers as a table, in the order of the questions."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            writer.writeheader()
            for record in records:
                row = asdict(record)
                lists = {name: " ".join(f"{number:g}" for number in row[name]) for name in _LISTS}
                writer.writerow({**row, **lists, "warnings": "; ".join(record.warnings)})
    except OSError as error:
        raise VtpruneError(f"cannot write {path}: {error.strerror or error}") from error
