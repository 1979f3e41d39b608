"""The table at the end of a run: which classes without an adapter of their own are pruned, and which are refused."""

from __future__ import annotations

from typing import Any


def print_table(terminalreporter: Any) -> None:
    """Print what `test_prunes_or_refuses` found for every class; under xdist too."""
    table: dict[str, str] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            table |= dict(value for key, value in getattr(report, "user_properties", ()) if key == "sweep")
    if not table:
        return
    terminalreporter.section("transformers classes served by the generic family")
    width = max(map(len, table))
    for name, outcome in sorted(table.items()):
        terminalreporter.write_line(f"{name:{width}}  {outcome}")
