"""The count of cells itself: nothing that failed, was skipped or did not run may pass for held."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import cases, counting
from tests.contracts.counting import FAILED, HELD, NOT_RUN, REFUSED, SKIPPED, outcomes, summary, table

CELL = ("random", "llava", "3 batch")


@dataclass
class Report:
    """As much of a pytest report as the count reads."""

    when: str = "call"
    outcome: str = "passed"
    refused: bool = False
    cell: tuple[str, ...] | None = CELL

    @property
    def failed(self) -> bool:
        return self.outcome == "failed"

    @property
    def skipped(self) -> bool:
        return self.outcome == "skipped"

    @property
    def user_properties(self) -> list[tuple[str, Any]]:
        cell = [] if self.cell is None else [("cell", list(self.cell))]
        return cell + [("refused", "message")] * self.refused


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([Report("setup"), Report(), Report("teardown")], HELD),
        ([Report(refused=True), Report("teardown", refused=True)], REFUSED),
        ([Report(refused=True), Report()], HELD),
        ([Report(), Report(outcome="failed"), Report(refused=True)], FAILED),
        ([Report("setup", outcome="failed")], FAILED),
        ([Report(), Report("teardown", outcome="failed")], FAILED),
        ([Report(), Report(outcome="skipped")], SKIPPED),
        ([Report("setup")], NOT_RUN),
    ],
)
def test_a_cell_is_as_good_as_its_worst_test(reports: list[Report], expected: str) -> None:
    assert outcomes([*reports, Report(cell=None, outcome="failed")]) == {CELL: expected}


def test_the_summary_accounts_for_the_full_product() -> None:
    product = counting.every_cell()
    assert len(product) == len(set(product)) == len(cases.METHODS) * len(cases.FAMILIES) * len(counting.LAWS)
    counted = dict(zip(product, [HELD] * 5 + [REFUSED] * 4 + [FAILED] * 3 + [SKIPPED] * 2 + [NOT_RUN], strict=False))
    line = summary(counted, product)
    assert line.startswith("5 held, 4 refused as documented, 3 failed, 2 skipped; ")
    assert f"{len(product) - 14} of the full product" in line
    assert "not in this selection" not in summary(dict.fromkeys(product, HELD), product)


def test_the_table_has_a_row_for_every_method_and_family() -> None:
    product = counting.every_cell()
    page = table({product[0]: FAILED}, product)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(cases.METHODS) * len(cases.FAMILIES)
    assert page.count("**FAILED**") == 1
    assert page.count("not run") == len(product) - 1


def test_every_law_that_is_counted_has_its_file() -> None:
    """A law that is misspelt, or unmarked, would drop out of the count."""
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_law*.py")]
    named = [re.findall(r'pytestmark = pytest\.mark\.law\("(.+)"\)', source) for source in sources]
    assert sorted(named) == sorted([law] for law in counting.LAWS)


def test_every_selection_has_every_method_and_every_family_and_grows() -> None:
    found = {cell: cases.selection(*cell) for cell in counting.every_cell()}
    default = {cell for cell, selection in found.items() if selection == "default"}
    matrix = default | {cell for cell, selection in found.items() if selection == "matrix"}
    assert default < matrix < found.keys()
    for law in counting.LAWS:
        of_the_methods = law not in cases.RUNTIME_LAWS
        for method in cases.METHODS:
            wanted = 3 if of_the_methods else 0
            assert len({family for m, family, name in default if (m, name) == (method, law)}) >= wanted
            wanted = len(cases.FAMILIES) if of_the_methods else 1
            assert len({family for m, family, name in matrix if (m, name) == (method, law)}) >= wanted
        for family in cases.FAMILIES:
            wanted = set(cases.CORE_METHODS if of_the_methods else cases.WIDE_METHODS)
            assert {method for method, f, name in default if (f, name) == (family, law)} >= wanted


def test_one_core_method_for_each_kind_of_stage() -> None:
    core = set(cases.CORE_METHODS)
    for kind in (cases.MERGING, cases.ADAPTIVE, cases.IN_TOWER, cases.IN_LAYERS):
        assert core & set(kind)
    assert core & {method for method, pipeline in cases.PIPELINES.items() if not pipeline.needs}
    assert core & {method for method, pipeline in cases.PIPELINES.items() if "importance" in pipeline.needs}
