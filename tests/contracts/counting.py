"""The count at the end of a run: cells of method x family x law that held, were refused as documented, or failed.

A cell is every test of one law that ran for one method and family, with pictures and with clips. It failed if one of
them did, it counts as refused if every one of them ended in a documented refusal, else it held.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

LAWS = (
    "1 identity",
    "1b through the cut",
    "2 by hand",
    "3 batch",
    "4 order and count",
    "5 undo",
    "6 refusal",
    "7 turns",
    "8 modes",
)
HELD, REFUSED, FAILED, SKIPPED, NOT_RUN = "held", "refused", "failed", "skipped", "not run"
MARKS = {HELD: "held", REFUSED: "refused", FAILED: "**FAILED**", SKIPPED: "**skipped**", NOT_RUN: "not run"}
Cell = tuple[str, str, str]
HOW = "`pytest -m matrix --law-table docs/laws.md`"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--law-table PATH`."""
    parser.addoption("--law-table", metavar="PATH", help="write the laws as a table of method, family and law")


def pytest_configure(config: pytest.Config) -> None:
    """Markers that only the law files use."""
    config.addinivalue_line("markers", "law(name): the law of the design that a test checks")
    config.addinivalue_line("markers", "kinds: what depends on kinds of stages alone, by default for the core methods")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name the cell of every test, and mark it `matrix` as far as its selection says so.

    `-m matrix` selects the default cells too: what it leaves out is in neither.
    """
    from tests.contracts import cases

    left_out = "product" if config.option.markexpr.strip() == "matrix" else "default"
    for item in items:
        law, callspec = item.get_closest_marker("law"), getattr(item, "callspec", None)
        if law is None or callspec is None or "case" not in callspec.params:
            continue
        case = callspec.params["case"]
        item.user_properties.append(("cell", (case.method, case.family, law.args[0])))
        again = callspec.params.get("positions", case.positions) != case.positions
        found = cases.selection(case.method, case.family, law.args[0], again=again)
        if found == "default" and item.get_closest_marker("kinds") and case.method not in cases.CORE_METHODS:
            found = "matrix"
        if found != left_out:
            item.add_marker("matrix")


def outcomes(reports: Iterable[Any]) -> dict[Cell, str]:
    """What became of every cell, from the reports of all tests and phases."""
    seen: dict[Cell, list[str]] = {}
    for report in reports:
        properties: dict[str, Any] = dict(getattr(report, "user_properties", ()))
        if "cell" in properties:
            seen.setdefault(tuple(properties["cell"]), []).extend(_outcome(report, "refused" in properties))
    return {cell: _together(found) for cell, found in seen.items()}


def _outcome(report: Any, refused: bool) -> list[str]:
    if report.failed:
        return [FAILED]
    if report.skipped:
        return [SKIPPED]
    return [REFUSED if refused else HELD] if report.when == "call" else []


def _together(found: list[str]) -> str:
    for outcome in (FAILED, SKIPPED):
        if outcome in found:
            return outcome
    if not found:
        return NOT_RUN
    return REFUSED if set(found) == {REFUSED} else HELD


def every_cell() -> list[Cell]:
    """The full product."""
    from tests.contracts import cases

    return [(method, family, law) for family in cases.FAMILIES for method in cases.METHODS for law in LAWS]


def summary(counted: dict[Cell, str], product: list[Cell]) -> str:
    """The count, in one line."""
    counts = Counter(counted.values())
    missing = len(set(product) - set(counted)) + counts[NOT_RUN]
    line = f"{counts[HELD]} held, {counts[REFUSED]} refused as documented, {counts[FAILED]} failed"
    if counts[SKIPPED]:
        line += f", {counts[SKIPPED]} skipped"
    if missing:
        line += f"; {missing} of the full product of {len(product)} not in this selection"
    return line


def _told(method: str, settings: dict[str, Any]) -> str:
    return f"`{method}` is {', '.join(f'`{name}={value}`' for name, value in settings.items())}"


def table(counted: dict[Cell, str], product: list[Cell]) -> str:
    """A Markdown page: one row for each family and method, one column for each law."""
    from tests.contracts import cases

    versions = f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}"
    lines = [
        "# The laws, cell by cell",
        "",
        f"Written by {HOW} with {versions}, on the CPU, tiny random-weight models, fp32.",
        "",
        f"Method x family x law: {summary(counted, product)}.",
        "",
        "A cell is every test of `tests/contracts/` for that law, method and family, with pictures and, where the",
        "family takes them, with clips. *refused*: every test of the cell ends in one of our documented errors and",
        "leaves the model as it was; that is what law 6 asks for. `identity` keeps everything, methods that change",
        "attention do too and are held to law 1 at their neutral settings, the others prune. Those that cut between",
        "decoder layers or change attention run on six layers, the others on two.",
        "Laws 5 to 8 are the runtime's, which sees kinds of stages: methods of a kind of their own are held to them on",
        "every family, each other method on one.",
        "",
        f"Not at default parameters: {'; '.join(_told(*setting) for setting in cases.SETTINGS.items())}.",
        "",
        "| family | method | " + " | ".join(LAWS) + " |",
        "|" + "---|" * (len(LAWS) + 2),
    ]
    for method, family in dict.fromkeys((method, family) for method, family, _ in product):
        marks = [MARKS[counted.get((method, family, law), NOT_RUN)] for law in LAWS]
        lines.append(f"| {family} | {method} | " + " | ".join(marks) + " |")
    return "\n".join(lines) + "\n"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the count, and write the table where `--law-table` asks for it; under xdist too."""
    reports = [r for kind, found in terminalreporter.stats.items() if kind != "deselected" for r in found]
    counted = outcomes(reports)
    if not counted:
        return
    product = every_cell()
    terminalreporter.section("laws: method x family x law")
    terminalreporter.write_line(summary(counted, product))
    for cell, outcome in sorted(counted.items()):
        if outcome in (FAILED, SKIPPED, NOT_RUN):
            terminalreporter.write_line(f"{outcome}: {' x '.join(cell)}")
    if path := config.getoption("--law-table"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(table(counted, product), encoding="utf-8")
        terminalreporter.write_line(f"table written to {path}")
