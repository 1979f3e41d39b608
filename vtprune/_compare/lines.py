"""The rows of `vtprune compare`: on the terminal, as CSV, and as a page."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune import _console as helpers

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.comparing import Comparison

NUMBERS = (
    "method",
    "keep",
    "tokens",
    "kept",
    "average",
    "answer",
    "agreement",
    "iou",
    "iou_with",
    "kv_bytes_saved",
    "select_seconds",
    "prefill_seconds",
)
ABOUT = (
    "model",
    "prompt",
    "image",
    "per",
    "positions",
    "debias",
    "calibration",
    "seed",
    "max_new_tokens",
    "device",
    "versions",
)
_HEAD = ("method", "keep", "tokens", "same", "IoU", "KV saved MB", "select", "prefill", "answer")
_PAGE = ("method", "keep", "tokens kept", "same answer", "IoU", "KV saved MB", "select ms", "prefill ms", "answer")
_TIMES = "select and prefill: milliseconds of one run each, and the first runs also warm up; no benchmark"
_LEAST_ANSWER = 8


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row with its answer as text.

    `iou` is that of the choice with the one of `iou_with`, the first method, None where that has none at this budget.
    """

    row: Comparison
    answer: str
    iou: float | None
    iou_with: str

    @property
    def unpruned(self) -> bool:
        """Whether this is the answer from all tokens."""
        return self.row.method == "identity"


def line_of(row: Comparison, answer: str, before: Sequence[Line]) -> Line:
    """The line of a row, behind those `before`: the first method is that of the second."""
    from vtprune.comparing import overlap

    if not before:
        return Line(row=row, answer=answer, iou=None, iou_with="")
    first = before[1].row.method if len(before) > 1 else row.method
    rows = [*(line.row for line in before), row]
    rival = next((one for one in rows if one.method == first and _same_keep(one, row)), None)
    return Line(
        row=row, answer=answer, iou=None if rival is None else overlap(rival.report, row.report), iou_with=first
    )


def _same_keep(row: Comparison, other: Comparison) -> bool:
    """1 is one token and 1.0 all of them."""
    return repr(row.keep) == repr(other.keep)


def show_last(lines: Sequence[Line], wide: int, console: Console) -> None:
    """Print the last line, below a head where it is the first; only a terminal gets its answer shortened.

    `wide` is the number of letters of the longest method.
    """
    from rich.text import Text

    line = lines[-1]
    widths = (wide, 5, max(6, 2 * len(str(line.row.tokens)) + 3), 4, 4, 11, 7, 7)
    if len(lines) == 1:
        console.print(Text(_aligned(_HEAD, widths), style="bold"), soft_wrap=True)
    cells = _cells(line)
    room = max(_LEAST_ANSWER, console.width - sum(widths) - len(widths))
    if console.is_terminal and len(cells[-1]) > room:
        cells[-1] = f"{cells[-1][: room - 1]}…"
    console.print(Text(_aligned(cells, widths)), soft_wrap=True)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers, answer = cells
    right = (f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
    return " ".join((f"{name:<{widths[0]}}", *right, answer))


def _cells(line: Line) -> list[str]:
    """A line for people, under `_HEAD` or `_PAGE`; a dash for what there is none of."""
    row = line.row
    seconds = helpers.part_seconds(row.report)
    return [
        row.method,
        str(row.keep),
        f"{round(row.report.average, 1):g}/{row.tokens}",
        "-" if line.unpruned else "yes" if row.agreement == 1 else "no",
        "-" if line.iou is None else f"{line.iou:.2f}",
        "-" if line.unpruned else f"{row.report.kv_bytes_saved / 1e6:.2f}",
        helpers.milliseconds(seconds.get("select")),
        helpers.milliseconds(seconds.get("prefill")),
        line.answer or "(empty)",
    ]


def tell(lines: Sequence[Line], *, every: bool, console: Console) -> None:
    """What the columns mean; with `every`, which methods are not in the table."""
    from vtprune.catalog import build, list_methods

    for note in _notes(lines):
        console.print(note, markup=False, soft_wrap=True)
    there = {line.row.method.partition("+")[0] for line in lines}
    missing = [name for name in list_methods() if name not in there and build(name).drops]
    if every and missing:
        told = f"not in the table: {', '.join(missing)} (name one with --methods to be told why, or to add it)"
        console.print(told, markup=False, soft_wrap=True)


def _notes(lines: Sequence[Line]) -> list[str]:
    told = f"IoU: of the choice with that of {lines[-1].iou_with} at the same --keep"
    return [told, _TIMES]


def write_csv(lines: Sequence[Line], about: Mapping[str, object], path: Path) -> None:
    """Write every number; `about` has a value for every column of `ABOUT`. Empty where there is none."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, (*NUMBERS, *ABOUT), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            seconds = helpers.part_seconds(line.row.report)
            numbers = {
                "average": line.row.report.average,
                "kv_bytes_saved": line.row.report.kv_bytes_saved,
                **{f"{part}_seconds": seconds.get(part) for part in ("select", "prefill")},
                **{name: getattr(line.row, name) for name in ("method", "keep", "tokens", "kept", "agreement")},
                **{name: getattr(line, name) for name in ("answer", "iou", "iou_with")},
            }
            writer.writerow({**numbers, **about})


def write_page(lines: Sequence[Line], about: Mapping[str, object], path: Path) -> None:
    """Write the table as Markdown."""
    rows = [[line.row.method, *map(_escaped, _cells(line)[1:])] for line in lines]
    paragraphs = (
        "# One question under many methods",
        f"Model `{about['model']}`, picture `{about['image']}`:",
        f"> {_escaped(' '.join(str(about['prompt']).split()))}",
        helpers.as_markdown(_PAGE, rows),
        "\n".join(f"- {_escaped(note)}" for note in _notes(lines)),
        str(about["versions"]),
    )
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]" else letter for letter in text)
