"""The page that teaches: its blocks run in order and print what they claim, its tables name what there is."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.test_readme import blocks_of, prints_what_it_claims
from vtprune import _console as console
from vtprune.methods import METHODS
from vtprune.protocols import EncoderStage
from vtprune.stages import STAGES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
SHARED = {"METHODS", "STAGES", "Pick", "Pipeline", "Reading", "Rule", "MissingEvidence", "VisualTokens"} | {
    "Title",
    "Source",
    "Deviations",
    "Published",
    "Args",
}
"""Names in code style that are no stages."""


def cases(test: Callable[..., None]) -> list[dict[str, Any]]:
    """The arguments that `pytest.mark.parametrize` gives a test."""
    axes = []
    for mark in test.pytestmark:  # type: ignore[attr-defined]
        names, values = mark.args
        axes.append([{names: value} if isinstance(names, str) else dict(zip(names, value)) for value in values])
    return [{name: value for part in chosen for name, value in part.items()} for chosen in itertools.product(*axes)]


def test_a_method_is_added_as_the_page_says() -> None:
    namespace: dict[str, Any] = {}
    with patch.dict(METHODS):
        for block in blocks_of(PAGE):
            prints_what_it_claims(block, namespace)
        row = re.search(r"<!-- row: rising -->\n```\n(.*)\n```", PAGE)
        assert row is not None
        assert row[1] in console.as_markdown(console.METHOD_COLUMNS, console.method_rows()).splitlines()
        tests = {name: value for name, value in namespace.items() if name.startswith("test_")}
        assert len(tests) == 2
        for test in tests.values():
            for case in cases(test):
                test(**case)
    assert "rising" not in METHODS


def test_stages_the_page_names_exist() -> None:
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", prose)) - SHARED
    assert named - STAGES.keys() == set()


def test_stages_inside_the_encoder_need_a_cls_token_as_the_table_says() -> None:
    found = dict(re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|$", PAGE, flags=re.MULTILINE))
    assert len(found) == 4
    for name, answer in found.items():
        stage: type[EncoderStage] = STAGES[name]
        assert stage.needs_cls == (answer == "yes")


def test_files_the_page_names_exist() -> None:
    names = set(re.findall(r"`((?:vtprune|tests|\.ci)/[\w/.]+)`", PAGE))
    assert "vtprune/methods/rising.py" in names
    assert {name for name in names if not (ROOT / name).exists()} == {"vtprune/methods/rising.py"}
