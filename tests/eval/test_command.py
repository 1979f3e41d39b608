"""`vtprune eval` in this process."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest

from tests.eval.common import llava
from vtprune import _console
from vtprune.cli import main
from vtprune.eval.table import COLUMNS
from vtprune.tiny import loading


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_console, "load_model", lambda source, device: (llava().model, llava().processor))


@pytest.mark.usefixtures("small")
def test_everything_at_once_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, page, plot = (tmp_path / f"out.{kind}" for kind in ("csv", "md", "png"))
    arguments = ["eval", "--samples", "2", "--methods", "divprune", "--keep", "0.5", "3", "--positions", "keep"]
    arguments += ["--csv", str(table), "--markdown", str(page), "--plot", str(plot), "--split", "dev", "--batch", "7"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "divprune" in shown.out and "the best is" in shown.out and f"table saved to {table}" in shown.out
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert tuple(rows[0]) == COLUMNS
    assert {(row["split"], row["positions"], row["scenes"]) for row in rows} == {("dev", "keep", "2")}
    assert {row["method"] for row in rows} == {
        *("identity", "blind", "divprune", "random", "uniform", "pool", "downsample", "oracle")
    }
    first, written = table.read_text(), page.read_text(encoding="utf-8")
    assert "![Accuracy over the share of tokens kept](out.png)" in written
    table.unlink()
    assert main(arguments) == 0
    assert table.read_text() == first
    page.unlink()
    assert main(["eval", "--from-csv", str(table), "--markdown", str(page), "--plot", str(plot)]) == 0
    assert page.read_text(encoding="utf-8") == written
    assert "delete it, or name another file" in failure(capsys, *arguments[1:], "--seed", "5")


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--samples", "1", "--methods", "fastervlm", "--keep", "0.11"]) == 0
    assert "28 of 256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "divprun"], "did you mean 'divprune'"),
        (["--keep", "0.5", "1.5"], "keep=1.5: expected a share"),
        (["--keep", "lots"], "--keep lots: expected a share such as 0.25"),
        (["--samples", "0"], "--samples 0: expected 1 or more"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--batch", "0"], "--batch 0: expected 1 or more"),
        (["--csv", "no/such/out.csv"], "there is no directory"),
        (["--markdown", "."], "it is a directory"),
        (["--csv", ""], "--csv is empty"),
        (["--csv", "same.csv", "--markdown", "same.csv"], "this is the file of --csv"),
        (["--plot", "out.pdf"], "expected a name that ends in .png"),
        (["--model", "tiny:lava"], "did you mean 'llava'"),
        (["--from-csv", "no.csv"], "say what to make of it"),
        (["--from-csv", "no.csv", "--markdown", "out.md"], "cannot read no.csv"),
        (["--from-csv", "no.csv", "--csv", "out.csv"], "runs nothing"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_console, "load_model", lambda *_: pytest.fail("loaded"))
    assert says in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_plot_without_matplotlib_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'vtprune[plots]'" in failure(capsys, "--plot", str(tmp_path / "out.png"))


def test_a_directory_is_named_by_its_last_part(tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    folder = str(loading.tiny_folder("llava"))
    arguments = ["--samples", "1", "--methods", "divprune", "--keep", "0.05", "--csv", str(table)]
    assert main(["eval", "--model", folder, *arguments]) == 0
    assert {row["model"] for row in csv.DictReader(table.open(encoding="utf-8"))} == {"llava"}


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("oracle", "blind", "vtprune eval --csv", "--from-csv", "interrupted"))
