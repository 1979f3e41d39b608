"""The README runs: its snippets print what they claim, its tables are those of the command line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtprune import _console as console
from vtprune.tiny import PICTURE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks_of(page: str) -> list[str]:
    """The blocks of Python of a page, those that no test can run (marked `py`) left out."""
    return re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def prints_what_it_claims(block: str, namespace: dict[str, object]) -> None:
    """Run a block and compare what it prints with its comments `# -> ...`."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(block, "page", "exec", dont_inherit=True), namespace)
    assert shown.getvalue().splitlines() == re.findall(r"# -> (.*)$", block, flags=re.MULTILINE)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_snippets_print_what_they_claim(in_tmp_path: Path) -> None:
    blocks = blocks_of(README)
    assert len(blocks) == 11
    namespace: dict[str, object] = {}
    for block in blocks:
        prints_what_it_claims(block, namespace)
    assert (in_tmp_path / "kept.png").stat().st_size > 0
    assert len((in_tmp_path / "runs.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("methods", console.METHOD_COLUMNS, console.method_rows),
        ("families", console.FAMILY_COLUMNS, console.family_rows),
    ],
)
def test_tables_are_those_of_the_command_line(name: str, columns: tuple[str, ...], rows: object) -> None:
    found = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", README, flags=re.DOTALL)
    assert found is not None
    expected = console.as_markdown(columns, rows())
    assert found[1] == expected, f"run `vtprune {name} --markdown` and paste it into the README"


@pytest.mark.parametrize("marker", ["run", "test"])
def test_commands_are_where_ci_looks_for_them(marker: str) -> None:
    assert (
        len(re.findall(rf"^<!-- command: {marker} -->\n```bash\npip install .*\n```$", README, flags=re.MULTILINE)) == 1
    )


def test_files_the_readme_names_exist() -> None:
    names = re.findall(r"\]\(([\w/.]+)\)|`((?:docs|vtprune)/[\w/.]+)`|`([A-Z]+(?:\.md)?)`", README)
    paths = [next(filter(None, groups)) for groups in names]
    assert "docs/overlay.png" in paths
    missing = [path for path in paths if path not in ("NAME", "MODEL") and not (ROOT / path).exists()]
    assert not missing and PICTURE.exists()
