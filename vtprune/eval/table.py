"""The table: a row for every method, budget and kind of question, as text that is the same in memory and in a CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vtprune.errors import InvalidOption
from vtprune.eval.intervals import Floats, Resamples
from vtprune.eval.questions import Item, judged
from vtprune.eval.runner import Result
from vtprune.tiny.scenes import KINDS

ALL, ALL_BUT_COUNT = "all", "all but count"
TOLD = ("identity", "blind", "oracle")
"""What no method can be: it sees everything, nothing, or the truth. Not among those that the best is chosen from."""
NUMBERS = (
    "accuracy",
    "low",
    "high",
    "share",
    "agreement",
    "object_recall",
    "kept",
    "tokens",
    "questions",
    "minus_random",
    "minus_random_low",
    "minus_random_high",
    "minus_best",
    "minus_best_low",
    "minus_best_high",
    "minus_control",
    "minus_control_low",
    "minus_control_high",
)
ABOUT = ("model", "weights", "about", "split", "seed", "scenes", "positions", "versions")
COLUMNS = ("method", "keep", "kind", *NUMBERS, "control", "note", "reason", *ABOUT)
"""`control` names the rows of chance at the cuts of a method that cuts between layers."""
_OLDER = tuple(column for column in COLUMNS if "control" not in column)
Row = dict[str, str]


def tabulate(results: Sequence[Result], items: Sequence[Item], about: Mapping[str, object], seed: int) -> list[Row]:
    """Rows with every column of `COLUMNS`, the unpruned model first.

    Args:
        results: from `evaluate`, the first one unpruned.
        about: a value for every column of `ABOUT`.
        seed: of the bootstrap.
    """
    answers = _Answers(results, items, seed)
    rows = []
    for result in results:
        for kind, chosen in answers.kinds.items():
            row = {"method": result.method, "keep": str(result.keep), "kind": kind, "control": result.control}
            row |= {"note": result.note, "reason": result.reason, **{name: str(about[name]) for name in ABOUT}}
            row |= {} if result.note else answers.numbers(result, kind, chosen)
            rows.append({column: row.get(column, "") for column in COLUMNS})
    return rows


class _Answers:
    """Which answers are right, and the statistics of them."""

    def __init__(self, results: Sequence[Result], items: Sequence[Item], seed: int) -> None:
        truth = [judged(item.question.answer) for item in items]
        self._resamples = Resamples([item.number for item in items], seed)
        self._results = [result for result in results if not result.note]
        self._unpruned = self._results[0]
        self._right = {_key(result): _equal(result.words, truth) for result in self._results}
        kinds = np.array([item.question.kind for item in items])
        self.kinds = {kind: kinds == kind for kind in KINDS if (kinds == kind).any()}
        if not (kinds == "count").all():
            self.kinds[ALL_BUT_COUNT] = kinds != "count"
        self.kinds[ALL] = np.ones(len(items), dtype=bool)

    def numbers(self, result: Result, kind: str, chosen: NDArray[np.bool_]) -> Row:
        """The columns of `NUMBERS`."""
        right = self._right[_key(result)]
        low, high = self._resamples.interval(right, chosen)
        unpruned = float(self._right[_key(self._unpruned)][chosen].mean())
        recall = [value for value, asked in zip(result.recall, chosen, strict=True) if asked and value is not None]
        row = {
            "accuracy": _text(right[chosen].mean()),
            "low": _text(low),
            "high": _text(high),
            "share": _text(right[chosen].mean() / unpruned) if unpruned else "",
            "agreement": _text(_equal(result.words, self._unpruned.words)[chosen].mean()),
            "object_recall": _text(np.mean(recall)) if recall else "",
            "kept": f"{np.array(result.kept)[chosen].mean():.4g}",
            "tokens": f"{np.array(self._unpruned.kept)[chosen].mean():.4g}",
            "questions": str(int(chosen.sum())),
        }
        if result.method not in ("identity", "blind"):
            rivals = {other.method: other for other in self._results if str(other.keep) == str(result.keep)}
            row |= self._difference("minus_random", right, rivals.get("random"), chosen)
            row |= self._difference("minus_best", right, self._best(rivals, chosen), chosen)
            row |= self._difference("minus_control", right, rivals.get(result.control), chosen)
        return row

    def _best(self, rivals: Mapping[str, Result], chosen: NDArray[np.bool_]) -> Result | None:
        able = [result for method, result in rivals.items() if method not in TOLD]
        return max(able, key=lambda result: float(self._right[_key(result)][chosen].sum()), default=None)

    def _difference(self, name: str, right: Floats, other: Result | None, chosen: NDArray[np.bool_]) -> Row:
        if other is None:
            return {}
        gap = right - self._right[_key(other)]
        low, high = self._resamples.interval(gap, chosen, least=-1.0)
        return {name: _text(gap[chosen].mean()), f"{name}_low": _text(low), f"{name}_high": _text(high)}


def _key(result: Result) -> tuple[str, str]:
    return (result.method, str(result.keep))


def _equal(words: Sequence[str], others: Sequence[str]) -> Floats:
    return np.array([float(word == other) for word, other in zip(words, others, strict=True)])


def _text(value: float | np.floating) -> str:
    return f"{value + 0.0:.4f}".replace("-0.0000", "0.0000")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the table; `read_csv` gives the same rows back."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a table. Raises `InvalidOption` for a file that is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidOption(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if columns not in (COLUMNS, _OLDER) or not rows or any(None in row or None in row.values() for row in rows):
        raise InvalidOption(f"{path} is no table of `vtprune eval`: expected rows of the columns {', '.join(COLUMNS)}")
    return [{column: row.get(column, "") for column in COLUMNS} for row in rows]
