"""The page about the demo: its block prints what it claims, its figures are those of the CSV file."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_readme import blocks_of, prints_what_it_claims

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")


def test_the_block_prints_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    (block,) = blocks_of(PAGE)
    prints_what_it_claims(block, namespace)
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_photographs_are_those_of_the_run() -> None:
    with (ROOT / "benchmarks" / "results" / "photos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [line for line in PAGE.splitlines() if re.match(r"^\| \w+ \| [\w ]+ \| 0\.", line)]
    expected = []
    for photo in dict.fromkeys(row["photo"] for row in rows):
        own = [row for row in rows if row["photo"] == photo]
        chance = f"{float(own[0]['random']):.2f} ± {float(own[0]['random_sd']):.2f}"
        cells = " | ".join(f"{float(row['inside']):.2f}" for row in own)
        expected.append(f"| {photo} | {own[0]['subject']} | {float(own[0]['area']):.2f} | {chance} | {cells} |")
    assert shown == expected and len(shown) == 4


def test_seconds_are_those_of_the_run() -> None:
    with (ROOT / "benchmarks" / "results" / "demo.csv").open(newline="") as file:
        clicks = {row["until"]: float(row["seconds"]) for row in csv.DictReader(file) if row["from"] == "click"}
    assert f"it takes {clicks['first method']:.1f} seconds" in PAGE and f"and {clicks['all']:.1f} until all" in PAGE


def test_files_the_page_names_exist() -> None:
    names = re.findall(r"\]\(([\w./-]+)\)", PAGE)
    assert names and all((ROOT / "docs" / name).is_file() for name in names)
