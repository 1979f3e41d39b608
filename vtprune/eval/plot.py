"""One picture of the table: accuracy over the share of tokens kept, or budget by budget where lines would be many."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.eval.arms import OWN, WHOLE
from vtprune.eval.controls import is_control
from vtprune.eval.markdown import main_kind
from vtprune.eval.table import Row

_DASHES = {"random": ":", "uniform": ":", "pool": "--", "downsample": "--", "oracle": "-."}
_MARKS = "osD^vP*X<>hd"
_MOST_LINES = 12


def check_plot(path: Path) -> None:
    """Refuse, before anything is computed, a plot that cannot be drawn.

    Raises:
        BackendUnavailable: where matplotlib is not installed.
        InvalidOption: for a name that does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise InvalidOption(f"--plot {path}: expected a name that ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendUnavailable("plots need matplotlib: pip install 'vtprune[plots]', or leave --plot out")


def draw_plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy with 95 % intervals: a line for each method, or, of many methods, a panel for each budget with a row for
    each, the best at the smallest budget on top and those that do not reach it below, the best at the next one first.
    The unpruned and the blind model go across.

    Raises:
        BackendUnavailable: where matplotlib is not installed.
    """
    check_plot(path)
    kind = main_kind(rows)
    every = [row for row in rows if row["kind"] == kind]
    shown = [row for row in every if not row["note"]]
    methods = [method for method in dict.fromkeys(row["method"] for row in shown) if method not in WHOLE]
    title = f"{rows[0]['model']}, {rows[0]['scenes']} {rows[0]['split']} {rows[0]['about']}, {kind}"
    few = len(methods) <= _MOST_LINES
    figure = _draw_lines(shown, methods, title) if few else _draw_panels(every, methods, title)
    figure.savefig(path, metadata={"Software": None})


def _draw_lines(shown: Sequence[Row], methods: Sequence[str], title: str) -> Any:
    """One line for each method; budgets are drawn at the share of tokens that was kept in truth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for method, style, level in _levels(shown):
        axes.axhline(level, color="0.5", linestyle=style, linewidth=1, label=method)
    for number, method in enumerate(methods):
        _draw_line(axes, [row for row in shown if row["method"] == method], number, len(methods))
    axes.set_xscale("log")
    ticks = sorted({_share(row) for row in shown if row["method"] not in WHOLE})
    axes.set_xticks(ticks, [f"{100 * tick:.3g}" for tick in ticks], rotation=60)
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept, %")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _draw_panels(shown: Sequence[Row], methods: Sequence[str], title: str) -> Any:
    """One panel for each budget, one row for each method; what methods are measured against is grey."""
    from matplotlib.figure import Figure

    pruned = [row for row in shown if row["method"] in methods]
    budgets = list(dict.fromkeys(row["keep"] for row in pruned))
    found = {(row["method"], row["keep"]): row for row in pruned}

    def worth(method: str) -> list[float]:
        rows = [found.get((method, budget)) for budget in reversed(budgets)]
        return [float(row["accuracy"]) if row is not None and not row["note"] else -1.0 for row in rows]

    order = sorted(methods, key=worth)
    figure = Figure(figsize=(3 * len(budgets) + 1.5, 0.22 * len(order) + 1.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, sharex=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for method, style, level in _levels(shown):
            axes.axvline(level, color="0.5", linestyle=style, linewidth=1, label=method)
        for place, method in enumerate(order):
            row = found.get((method, budget))
            if row is not None:
                _draw_row(axes, place, row)
        axes.set_title(f"keep {budget}", fontsize=9)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set_xlabel("accuracy, %", fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7, loc="lower left")
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_row(axes: Any, place: int, row: Row) -> None:
    """Accuracy and interval of one method at one budget, or why there is none."""
    if row["note"]:
        side = axes.get_yaxis_transform()
        axes.text(0.02, place, row["note"], transform=side, fontsize=6, color="0.5", va="center")
        return
    at, low, high = (100 * float(row[name]) for name in ("accuracy", "low", "high"))
    measure = row["method"] in OWN or is_control(row["method"])
    axes.hlines(place, low, high, color="0.45" if measure else "C0", linewidth=1.2)
    axes.plot(at, place, "D" if measure else "o", color="0.45" if measure else "C0", markersize=4)


def _levels(shown: Sequence[Row]) -> list[tuple[str, str, float]]:
    """Name, line style and accuracy in percent of what has all tokens."""
    found = {row["method"]: 100 * float(row["accuracy"]) for row in shown if row["method"] in WHOLE}
    return [(name, style, found[name]) for name, style in zip(WHOLE, ("-", ":"), strict=True) if name in found]


def _draw_line(axes: Any, rows: Sequence[Row], number: int, lines: int) -> None:
    points = sorted((_share(row), *(100 * float(row[name]) for name in ("accuracy", "low", "high"))) for row in rows)
    shift = 1 + 0.012 * (number - lines / 2)
    at = [share * shift for share, *_ in points]
    below = [max(0.0, accuracy - low) for _, accuracy, low, _ in points]
    above = [max(0.0, high - accuracy) for _, accuracy, _, high in points]
    method = rows[0]["method"]
    axes.errorbar(
        at,
        [accuracy for _, accuracy, _, _ in points],
        yerr=[below, above],
        label=method,
        linestyle=":" if is_control(method) else _DASHES.get(method, "-"),
        marker=_MARKS[number % len(_MARKS)],
        color=f"C{number % 10}",
        markersize=4,
        linewidth=1.2,
        capsize=2,
    )


def _share(row: Row) -> float:
    return float(row["kept"]) / float(row["tokens"])
