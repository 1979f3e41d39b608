"""The page about clips: its blocks run in order and print what they claim, its figures are those of the CSV files."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from tests.test_readme import blocks_of, prints_what_it_claims
from vtprune.video.journal import Record

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "video.md").read_text(encoding="utf-8")


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_blocks_print_what_they_claim() -> None:
    namespace: dict[str, Any] = {}
    blocks = blocks_of(PAGE)
    assert len(blocks) == 3
    for block in blocks:
        prints_what_it_claims(block, namespace)


def test_the_table_names_every_field_of_an_answer() -> None:
    section = PAGE.partition("## Frames of a file")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`.*?) \|", section, flags=re.MULTILINE))))
    assert named == set(Record.__dataclass_fields__)


def test_frame_budgets_are_those_of_the_run() -> None:
    """Accuracy with its interval, and the difference to equal tokens, row by row."""
    found = [line.split(" | ")[1:] for line in PAGE.splitlines() if re.match(r"^\| .* \| \d+\.\d \[", line)]
    expected = []
    for row in rows_of("frame_budgets"):
        cells = [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * float(row[name]) for name in ("accuracy", "low", "high"))),
            "",
        ]
        if row["minus_equal"]:
            gap = (100 * float(row[f"minus_equal{end}"]) for end in ("", "_low", "_high"))
            cells[1] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap)
        expected.append(cells)
    assert [[cells[0], cells[1].rstrip(" |")] for cells in found] == expected
    best = rows_of("frame_budgets")[0]
    assert best["arm"] == "quota pool yes" and float(best["minus_equal_low"]) > 0


def test_speeds_and_memory_are_those_of_the_run() -> None:
    rows = rows_of("video")
    for row in rows:
        if row["rounds"]:
            rate = "{:.0f} [{:.0f}, {:.0f}]".format(*(float(row[name]) for name in ("clips_a_minute", "low", "high")))
            decode, waited = 1000 * float(row["decode"]), 100 * float(row["waited"])
            cells = f"| {row['arm']} | {rate} | {float(row['times_all_tokens']):.2f} | {decode:.0f} | {waited:.0f} |"
            assert cells in PAGE
    told = [f"{float(row['first_mb']):.0f} and {float(row['last_mb']):.0f}" for row in rows if row["first_mb"]]
    assert len(told) == 2 and all(pair in PAGE for pair in told)
