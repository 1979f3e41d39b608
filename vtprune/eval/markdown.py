"""The table for people: what is told of it follows from its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vtprune.eval.arms import OWN, WHOLE, about
from vtprune.eval.controls import ABOUT, is_control
from vtprune.eval.intervals import FEW
from vtprune.eval.questions import OBJECT_SHARE
from vtprune.eval.runner import NO_EVIDENCE, OUT_OF_REACH
from vtprune.eval.table import ALL, ALL_BUT_COUNT, TOLD, Row
from vtprune.tiny.scenes import KINDS

INSIDE = "≈"


def as_markdown(rows: Sequence[Row], plot: str | None = None) -> str:
    """A page with the rows over kinds, a table of every kind for each budget, and what the arms are.

    Args:
        rows: from `tabulate` or `read_csv`.
        plot: name of a picture to show.
    """
    main = main_kind(rows)
    first = rows[0]
    lines = [
        f"# Answers of `{first['model']}` from fewer visual tokens",
        "",
        *_facts(first, questions=max(int(row["questions"] or 0) for row in rows)),
        "",
        *([f"![Accuracy over the share of tokens kept]({plot})", ""] if plot else []),
        f"## {_heading(main)}",
        "",
        *_main_table(rows, main),
        "",
        *_legend(),
        *(f"- {line}" for line in best_lines(rows, main)),
        "",
        *_against_chance([row for row in rows if row["kind"] == main]),
    ]
    for keep in budgets(rows):
        lines += [f"## Every kind, keep {keep}", "", *_kind_table(rows, keep), ""]
    reasons = [f"- `{row['method']}`, {row['note']}: {row['reason']}" for row in without_a_number(rows)]
    lines += ["## Without a number", "", *reasons, ""] if reasons else []
    lines += ["## What methods are measured against", "", *_arms(rows)]
    return "\n".join(lines) + "\n"


def main_kind(rows: Sequence[Row]) -> str:
    """The kind that the first table and the plot show: all but counting, where there is more than counting."""
    return ALL_BUT_COUNT if any(row["kind"] == ALL_BUT_COUNT for row in rows) else ALL


def budgets(rows: Sequence[Row]) -> list[str]:
    """The budgets of the methods, in the order of the table."""
    return list(dict.fromkeys(row["keep"] for row in rows if row["method"] not in WHOLE))


def _heading(kind: str) -> str:
    return "All kinds of questions but counting" if kind == ALL_BUT_COUNT else "All kinds of questions"


def _facts(row: Row, questions: int) -> Iterator[str]:
    first = int(row["seed"]) * int(row["scenes"])
    last = first + int(row["scenes"]) - 1
    yield (
        f"{questions} questions about {row['scenes']} drawn {row['about']}, "
        f"{row['split']} {row['about']} {first} to {last}; "
        f"positions {row['positions']}; weights {row['weights']}; {row['versions']}."
    )
    yield "Made by `vtprune eval`, and made again from its CSV by `vtprune eval --from-csv`."


def _main_table(rows: Sequence[Row], kind: str) -> Iterator[str]:
    yield (
        "| method | keep | tokens | accuracy % | share of unpruned % | same answer as unpruned % "
        "| object tokens kept % | points above `random` |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in in_order([row for row in rows if row["kind"] == kind]):
        cells = [f"`{row['method']}`", row["keep"], *main_cells(row)]
        yield f"| {' | '.join(cells)} |"


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows of one kind as they are shown: last those without a number, one for all budgets that share a note."""
    bare: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["note"]:
            before = bare.get((row["method"], row["note"]))
            keep = row["keep"] if before is None else f"{before['keep']}, {row['keep']}"
            bare[row["method"], row["note"]] = {**row, "keep": keep}
    return [*(row for row in rows if not row["note"]), *bare.values()]


def without_a_number(rows: Sequence[Row]) -> list[Row]:
    """One row for every reason why there is none; that an average is out of reach is one reason for all budgets."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["note"]:
            reason = "" if row["note"].startswith(OUT_OF_REACH) else row["reason"]
            found.setdefault((row["method"], row["note"], reason), row)
    return list(found.values())


def main_cells(row: Row) -> list[str]:
    """Tokens, accuracy, share, agreement, recall and the difference to `random`, for people."""
    if row["note"]:
        return ["", row["note"], *[""] * 4]
    kept = f"{row['kept']} of {row['tokens']}"
    accuracy = _accuracy(row)
    others = [_percent(row[name]) if row[name] else "" for name in ("share", "agreement", "object_recall")]
    return [kept, accuracy, *others, gap(row)]


def _accuracy(row: Row) -> str:
    return f"{_percent(row['accuracy'])} [{_percent(row['low'])}, {_percent(row['high'])}]"


def gap(row: Row, other: str = "minus_random") -> str:
    """The paired difference to another row, for people; empty where there is none."""
    if not row[other] or row["method"] == "random":
        return ""
    interval = f"[{_signed(row[f'{other}_low'])}, {_signed(row[f'{other}_high'])}]"
    mark = f"{INSIDE} " if inside_noise(row, other) else ""
    return f"{mark}{_signed(row[other])} {interval}"


def _against_chance(rows: Sequence[Row]) -> Iterator[str]:
    """Of rows of one kind, methods that cut between layers, each beside chance at the same cuts."""
    found = {(row["method"], row["keep"]): row for row in rows if not row["note"]}
    methods = [row for row in rows if row["control"]]
    if not methods:
        return
    yield "## Cuts between layers, and chance at the same cuts"
    yield ""
    yield (
        "Behind `random@` are the layers that are cut in front of, 0 being the front of the language model: as many "
        "tokens leave there as with the method, but chance decides which. Tokens are averages over layers, as measured."
    )
    yield ""
    yield "| method | keep | tokens in a layer | accuracy % | chance | accuracy of chance % | points above chance |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in in_order(methods):
        other = found.get((row["control"], row["keep"]))
        cells = main_cells(row)[:2]
        cells += [f"`{row['control']}`", _accuracy(other) if other else "", gap(row, "minus_control")]
        yield f"| `{row['method']}` | {row['keep']} | {' | '.join(cells)} |"
    yield ""


def inside_noise(row: Row, difference: str) -> bool:
    """Whether the interval of a paired difference holds zero."""
    return float(row[f"{difference}_low"]) <= 0 <= float(row[f"{difference}_high"])


def _legend() -> Iterator[str]:
    yield (
        f"In brackets: 95 % bootstrap intervals over scenes or clips. {INSIDE}: the difference to `random` at the same "
        "budget lies inside the noise (the interval of the paired difference holds 0); so it is for a kind that was "
        f"asked in fewer than {FEW} of them. Nothing is corrected for many comparisons, and the best of several is "
        "partly lucky. `all` is the mean over questions, not over kinds. Object tokens are those whose cells "
        f"things cover by {OBJECT_SHARE:.0%} or more."
    )
    yield ""


def best_lines(rows: Sequence[Row], kind: str) -> Iterator[str]:
    """For every budget, the best method and those that cannot be told from it; `oracle` takes no part."""
    for keep in budgets(rows):
        able = [
            row
            for row in rows
            if (row["keep"], row["kind"]) == (keep, kind) and row["minus_best"] and row["method"] not in TOLD
        ]
        if not able:
            continue
        best = max(able, key=lambda row: float(row["accuracy"]))
        equals = [f"`{row['method']}`" for row in able if row is not best and inside_noise(row, "minus_best")]
        others = (
            f"not distinguishable from it: {', '.join(equals)}" if equals else "the others are worse beyond the noise"
        )
        yield f"keep {keep}: the best is `{best['method']}`, {others}."


def _kind_table(rows: Sequence[Row], keep: str) -> Iterator[str]:
    there = {row["kind"] for row in rows}
    kinds = [kind for kind in (*KINDS, ALL_BUT_COUNT, ALL) if kind in there]
    asked = {row["kind"]: row["questions"] for row in rows if row["questions"]}
    yield f"| accuracy % | {' | '.join(f'{kind} ({asked.get(kind, 0)})' for kind in kinds)} |"
    yield f"| --- {'| --- ' * len(kinds)}|"
    shown = [row for row in rows if row["method"] in WHOLE or row["keep"] == keep]
    for method in dict.fromkeys(row["method"] for row in sorted(shown, key=lambda row: bool(row["note"]))):
        cells = {row["kind"]: _cell(row) for row in shown if row["method"] == method}
        yield f"| `{method}` | {' | '.join(cells[kind] for kind in kinds)} |"


def _cell(row: Row) -> str:
    if row["note"]:
        return row["note"]
    marked = row["minus_random"] and row["method"] != "random" and inside_noise(row, "minus_random")
    return f"{_percent(row['accuracy'])}{f' {INSIDE}' if marked else ''}"


def _arms(rows: Sequence[Row]) -> Iterator[str]:
    for method in (*WHOLE, *OWN):
        if about(method) and any(row["method"] == method for row in rows):
            yield f"- `{method}`: {about(method)}"
    if any(is_control(row["method"]) for row in rows):
        yield f"- `random@` and layers: {ABOUT}"
    if any("+" in row["method"] for row in rows):
        yield (
            "- `method+debiaser`: with the debiaser in front of every choice by attention; `method+calibrated`: with "
            "what `vtprune calibrate` measured of the model."
        )
    if any(row["note"] == NO_EVIDENCE for row in rows):
        yield f"- {NO_EVIDENCE}: the method reads something that this model does not give."


def _percent(text: str) -> str:
    return f"{100 * float(text):.1f}"


def _signed(text: str) -> str:
    return f"{100 * float(text) + 0.0:+.1f}".replace("-0.0", "+0.0")
