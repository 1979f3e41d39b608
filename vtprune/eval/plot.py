"""One picture of the table: accuracy over the share of tokens kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.eval.arms import WHOLE
from vtprune.eval.markdown import main_kind
from vtprune.eval.table import Row

_DASHES = {"random": ":", "uniform": ":", "pool": "--", "downsample": "--", "oracle": "-."}
_MARKS = "osD^vP*X<>hd"


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
    """One line for each method, with 95 % intervals; the unpruned and the blind model across. Budgets are drawn at the
    share of tokens that was kept in truth.

    Raises:
        BackendUnavailable: where matplotlib is not installed.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    kind = main_kind(rows)
    shown = [row for row in rows if row["kind"] == kind and not row["note"]]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for method, style in zip(WHOLE, ("-", ":"), strict=True):
        level = [100 * float(row["accuracy"]) for row in shown if row["method"] == method]
        if level:
            axes.axhline(level[0], color="0.5", linestyle=style, linewidth=1, label=method)
    methods = [method for method in dict.fromkeys(row["method"] for row in shown) if method not in WHOLE]
    for number, method in enumerate(methods):
        _draw_line(axes, [row for row in shown if row["method"] == method], number, len(methods))
    axes.set_xscale("log")
    ticks = sorted({_share(row) for row in shown if row["method"] not in WHOLE})
    axes.set_xticks(ticks, [f"{100 * tick:.3g}" for tick in ticks], rotation=60)
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept, %")
    axes.set_ylabel("accuracy, %")
    axes.set_title(
        f"{rows[0]['model']}, {rows[0]['scenes']} {rows[0]['split']} {rows[0]['about']}, {kind}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Software": None})


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
        linestyle=_DASHES.get(method, "-"),
        marker=_MARKS[number % len(_MARKS)],
        color=f"C{number % 10}",
        markersize=4,
        linewidth=1.2,
        capsize=2,
    )


def _share(row: Row) -> float:
    return float(row["kept"]) / float(row["tokens"])
