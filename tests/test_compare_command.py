"""`vtprune compare`: rows, files and refusals, against `vtprune.compare` called directly."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import vtprune
from tests.test_cli import failure
from vtprune import _compare
from vtprune import _console as helpers
from vtprune._compare import lines as shown
from vtprune._compare import sheet
from vtprune._pictures import read_picture
from vtprune.catalog import build
from vtprune.cli import main
from vtprune.comparing import Comparison
from vtprune.methods import METHODS
from vtprune.report import PruneReport, SegmentReport, Stopwatch
from vtprune.tiny import PICTURE, QUESTION
from vtprune.types import Part

NAMED = ("divprune", "fastv")
KEEPS = (0.5, 40)
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command left behind, and the tiles of its sheet, the unpruned one last."""

    table: list[dict[str, str]]
    page: str
    picture: Image.Image
    tiles: list[sheet.Tile]
    out: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("compared")
    files = {name: folder / f"out.{name}" for name in ("csv", "md", "png")}
    arguments = ["compare", "--methods", *NAMED, "--keep", *map(str, KEEPS), "--seed", str(SEED), "--device", "cpu"]
    arguments += ["--csv", str(files["csv"]), "--markdown", str(files["md"]), "--sheet", str(files["png"])]
    tiles: list[sheet.Tile] = []

    def noted(*given: Any) -> sheet.Tile:
        tiles.append(tile_of(*given))
        return tiles[-1]

    tile_of = sheet.tile_of
    with redirect_stdout(io.StringIO()) as out, patch.object(sheet, "tile_of", noted):
        assert main(arguments) == 0
    return Done(
        table=read(files["csv"]),
        page=files["md"].read_text(encoding="utf-8"),
        picture=Image.open(files["png"]),
        tiles=tiles,
        out=out.getvalue(),
    )


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any, Any]:
    model, processor = vtprune.load_tiny("llava")
    return model, processor, helpers.build_inputs(processor, read_picture(PICTURE), QUESTION, model)


@pytest.fixture(scope="module")
def direct(bundled: tuple[Any, Any, Any]) -> list[Comparison]:
    model, _, inputs = bundled
    chance = build("random", {"seed": SEED})
    return vtprune.compare(model, inputs, [*NAMED, chance], KEEPS, max_new_tokens=4)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def only(*names: str) -> Iterator[None]:
    """As if there were no other methods."""
    with patch.dict(METHODS, {name: METHODS[name] for name in names}, clear=True):
        yield


def asked(output: str) -> list[tuple[str, str]]:
    """Method and budget of every row on the terminal."""
    return re.findall(r"^(\S+) +(1\.0|0\.\d+|\d+) +[\d.]+/256 ", output, flags=re.MULTILINE)


def overlap(row: Comparison, other: Comparison) -> float:
    """Token by token, in layers."""
    both = either = 0.0
    for own, theirs in zip(*(in_layers(one) for one in (row, other)), strict=True):
        both, either = both + min(own, theirs), either + max(own, theirs)
    return both / either


def in_layers(row: Comparison) -> list[float]:
    (segment,) = row.report.segments
    if segment.depths is not None:
        return [depth / row.report.layers for depth in segment.depths.tolist()]
    return [float(token in segment.keep.tolist()) for token in range(segment.n)]


def test_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """All that are able, at the budgets they reach: fastv does not reach 0.11, cdpruner needs what nobody gives."""
    with only("vtprune", "cdpruner", "fastv", "random", "identity"):
        assert main(["compare"]) == 0
    captured = capsys.readouterr()
    everywhere = [(name, keep) for name in ("vtprune", "fastv", "random") for keep in ("0.5", "0.25", "0.11")]
    assert asked(captured.out) == [("identity", "1.0"), *(row for row in everywhere if row != ("fastv", "0.11"))]
    assert f"prompt: {QUESTION}" in captured.out and "not in the table: cdpruner (" in captured.out
    assert "of one run each" in captured.out and "no benchmark" in captured.out and captured.err == ""
    assert captured.out.count(" orange\n") >= 2


def test_the_csv_holds_what_the_api_returns(
    done: Done, direct: list[Comparison], bundled: tuple[Any, Any, Any]
) -> None:
    _, processor, _ = bundled
    assert [row["method"] for row in done.table] == ["identity", *(m for m in (*NAMED, "random") for _ in KEEPS)]
    for written, row in zip(done.table, direct, strict=True):
        assert (written["method"], written["keep"]) == (row.method, str(row.keep))
        assert (int(written["tokens"]), int(written["kept"])) == (row.tokens, row.kept)
        assert float(written["average"]) == row.report.average
        assert float(written["agreement"]) == row.agreement
        assert int(written["kv_bytes_saved"]) == row.report.kv_bytes_saved
        assert written["answer"] == processor.batch_decode(row.answer, skip_special_tokens=True)[0].strip()
        assert float(written["prefill_seconds"]) > 0
        assert bool(written["select_seconds"]) == (row.method != "identity")
        assert (written["prompt"], written["model"], written["seed"]) == (QUESTION, "tiny:llava", str(SEED))
        assert f"torch {torch.__version__}" in written["versions"]
    assert float(done.table[3]["average"]) != int(done.table[3]["kept"])


def test_the_overlap_is_that_with_the_first_named_method_at_the_same_budget(
    done: Done, direct: list[Comparison]
) -> None:
    first = {str(row.keep): row for row in direct if row.method == NAMED[0]}
    assert done.table[0]["iou"] == done.table[0]["iou_with"] == ""
    for written, row in zip(done.table[1:], direct[1:], strict=True):
        assert written["iou_with"] == NAMED[0]
        assert float(written["iou"]) == pytest.approx(overlap(row, first[str(row.keep)]), abs=1e-9)
    assert {written["iou"] for written in done.table[1:3]} == {"1.0"}
    assert all(0 < float(written["iou"]) < 1 for written in done.table[3:])


def test_the_page_holds_a_row_for_every_row_of_the_table(done: Done) -> None:
    head, rule, *rows = [line for line in done.page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, rule, *rows)]
    assert set(cells[1]) == {"---"} and {len(row) for row in cells} == {len(cells[0])}
    names = cells[0]
    for row, written in zip(cells[2:], done.table, strict=True):
        told = dict(zip(names, row, strict=True))
        assert (told["method"], told["keep"], told["answer"]) == (
            f"`{written['method']}`",
            written["keep"],
            written["answer"],
        )
        assert float(told["tokens kept"].split("/")[0]) == pytest.approx(float(written["average"]), abs=0.051)
    assert f"> {QUESTION}" in done.page and "no benchmark" in done.page and "vtprune 0." in done.page


def test_the_sheet_has_a_tile_for_every_row(done: Done) -> None:
    *pruned, unpruned = done.tiles
    assert [(tile.count.split(" of ")[0], tile.answer) for tile in pruned] == [
        (f"{round(float(row['average']), 1):g}", row["answer"]) for row in done.table[1:]
    ]
    assert [tile.count.endswith("on average") for tile in pruned] == [False, False, True, True, False, False]
    assert [tile.changed for tile in pruned] == [float(row["agreement"]) != 1 for row in done.table[1:]]
    whole = read_picture(PICTURE)
    side = whole.width * 3
    whole = whole.resize((side, side), Image.Resampling.NEAREST).resize((240, 240), Image.Resampling.LANCZOS)
    assert (unpruned.count, unpruned.changed, unpruned.word) == ("256 of 256", False, "")
    assert unpruned.picture.tobytes() == whole.tobytes()
    assert len({tile.picture.tobytes() for tile in done.tiles}) == len(done.tiles)


def places(drawn: Image.Image, tile: sheet.Tile) -> list[tuple[int, int]]:
    """Left upper corners of where the picture of a tile lies."""
    pixels, own = np.asarray(drawn), np.asarray(tile.picture)
    high, wide = own.shape[:2]
    found = (pixels[: -high + 1 or None, : -wide + 1 or None] == own[0, 0]).all(axis=2)
    return [(x, y) for y, x in np.argwhere(found) if np.array_equal(pixels[y : y + high, x : x + wide], own)]


def test_methods_have_a_row_and_budgets_a_column(done: Done) -> None:
    *pruned, unpruned = done.tiles
    (head,) = places(done.picture, unpruned)
    corners = [places(done.picture, tile)[0] for tile in pruned]
    by_method = [corners[number : number + 2] for number in (0, 2, 4)]
    assert all(one[1] == other[1] for one, other in by_method) and len({row[0][1] for row in by_method}) == 3
    assert len({one[0] for one, _ in by_method}) == len({other[0] for _, other in by_method}) == 1
    assert by_method[0][0][0] + 240 < by_method[0][1][0] and head[1] + 240 < by_method[0][0][1]
    assert done.picture.height < 2.5 * done.picture.width


def row_of(name: str, keep: float = 0.5, *, agreement: float = 1.0, answer: str = "blue", kept: int = 2) -> shown.Line:
    """A line of a picture of four tokens."""
    stages = torch.full((4,), -2)
    stages[:kept] = 0
    segment = SegmentReport(
        row=0, kind="image", parts=(Part(start=0, stop=4, kind="crop", grid=(2, 2)),), stages=stages
    )
    known = {"family": "f", "backend": "torch", "positions": "keep", "importance": None, "picks": ("p",)}
    costs = {"length_before": (9,), "length_after": (7,), "kv_bytes_saved": 1_500_000, "stopwatch": Stopwatch()}
    report = PruneReport(method=name, segments=(segment,), **known, **costs)  # type: ignore[arg-type]
    row = Comparison(
        method=name, keep=keep, tokens=4, kept=kept, answer=torch.ones(1, 1), agreement=agreement, report=report
    )
    return shown.Line(row=row, answer=answer, iou=None, iou_with="")


def test_changed_answers_are_red_and_framed_and_extremes_have_a_word() -> None:
    picture = Image.new("RGB", (60, 60), (90, 120, 150))
    lines = [row_of("identity", 1.0, kept=4), row_of("a"), row_of("b", agreement=0.0, answer="red")]
    plain = np.asarray(sheet.draw_sheet(lines[:2], picture, None, "what ?"))
    drawn = sheet.draw_sheet(lines, picture, None, "what ?")
    red = (np.asarray(drawn) == sheet.CHANGED).all(axis=2)
    assert not (plain == sheet.CHANGED).all(axis=2).any() and red.any(axis=1).sum() > 248
    framed = sheet.tile_of(lines[2], picture, None)
    (_, (x, y)) = places(drawn, framed)
    assert red[y - 4 : y, x - 4 : x + 244].all() and red[y + 240 : y + 244, x : x + 240].all()
    assert red[y + 260 :, x - 4 : x + 100].any(), "the answer below"
    words = [sheet.tile_of(row_of("c", kept=kept), picture, None).word for kept in (0, 2, 4)]
    assert words == ["behind the last cut: none", "", "all tokens pass"]
    assert sheet.LETTERS * 12 >= sheet.TILE


@pytest.mark.parametrize(("methods", "blocks"), [(1, 1), (4, 1), (12, 2), (36, 3)])
def test_many_methods_are_in_blocks_beside_each_other(methods: int, blocks: int) -> None:
    picture = Image.new("RGB", (24, 24), (90, 120, 150))
    lines = [row_of(f"method {number:02}", keep) for number in range(methods) for keep in (0.5, 0.25)]
    drawn = sheet.draw_sheet(lines, picture, None, "what ?")
    corners = places(drawn, sheet.tile_of(lines[0], picture, None))
    assert len(corners) == 2 * methods and len({x for x, _ in corners}) == 2 * blocks
    assert drawn.height <= 2.5 * drawn.width or methods == 1


def test_saved_bytes_are_in_millions_as_on_the_page_of_the_demo(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    shown.show_last([row_of("a")], 12, console)
    head, line = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "KV saved MB" in head and " 1.50 " in line
    shown.write_page([row_of("a")], dict.fromkeys(shown.ABOUT, "x"), tmp_path / "out.md")
    assert "| KV saved MB |" in (tmp_path / "out.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("prompt", "told"), [("what color is the big huge cross ?", "big, huge"), (QUESTION, "")])
def test_words_that_a_tiny_model_does_not_know_are_told(
    capsys: pytest.CaptureFixture[str], prompt: str, told: str
) -> None:
    assert main(["compare", "--methods", "random", "--keep", "0.5", "--max-new-tokens", "1", "--prompt", prompt]) == 0
    errors = capsys.readouterr().err
    assert errors == (f"the model does not know these words: {told}\n" if told else "")


def test_rows_on_the_terminal_are_those_of_the_table(done: Done) -> None:
    assert asked(done.out) == [(row["method"], row["keep"]) for row in done.table]
    assert "not in the table" not in done.out


def test_a_seed_draws_other_random_tokens_for_all_methods_too(tmp_path: Path, bundled: tuple[Any, Any, Any]) -> None:
    model, _, inputs = bundled
    out = tmp_path / "out.csv"
    with only("divprune", "random", "uniform", "identity"):
        assert main(["compare", "--keep", "0.25", "--seed", "5", "--max-new-tokens", "1", "--csv", str(out)]) == 0
    table = {row["method"]: row for row in read(out)}
    chances = [build("random", {"seed": seed}) for seed in (5, 0)]
    _, first, five, zero = vtprune.compare(model, inputs, ["divprune", *chances], [0.25], max_new_tokens=1)
    assert list(table) == ["identity", "divprune", "uniform", "random"]
    assert float(table["random"]["iou"]) == pytest.approx(overlap(five, first), abs=1e-9)
    assert overlap(zero, first) != overlap(five, first)


def test_random_comes_along_with_a_debiaser_it_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--methods", "random", "fastervlm", "identity", "--debias", "trend", "--keep", "0.5", "0.5"]
    assert main(["compare", *arguments, "--max-new-tokens", "1"]) == 0
    rows = asked(capsys.readouterr().out)
    assert rows == [("identity", "1.0"), ("fastervlm+trend", "0.5"), ("random", "0.5")]


def test_budgets_nobody_asked_for_are_left_out_where_a_named_method_does_not_reach_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "--methods", "fastv", "--max-new-tokens", "1"]) == 0
    captured = capsys.readouterr()
    assert [keep for _, keep in asked(captured.out)] == ["1.0", "0.5", "0.25", "0.5", "0.25"]
    assert captured.err.startswith("left out: fastv at keep 0.11") and "reaches 0.125 to 1" in captured.err


@pytest.mark.parametrize(("terminal", "whole"), [(True, False), (False, True)])
def test_answers_are_shortened_on_a_terminal_only(direct: list[Comparison], terminal: bool, whole: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    answer = "one two three " * 20
    first = shown.line_of(direct[0], answer, [])
    shown.show_last([first], 12, console)
    out: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert (answer in out) == whole and ("…" in out) == terminal
    assert not terminal or max(map(len, out.splitlines())) <= 80


def test_answers_do_not_break_the_page(tmp_path: Path, direct: list[Comparison]) -> None:
    line = shown.line_of(direct[0], "a | b `c` <d>", [])
    about = dict.fromkeys(shown.ABOUT, "x")
    shown.write_page([line], about, tmp_path / "out.md")
    row = (tmp_path / "out.md").read_text(encoding="utf-8").split("| `identity` |")[1].splitlines()[0]
    assert "a \\| b \\`c\\` \\<d\\>" in row and len(re.findall(r"(?<!\\)\|", row)) == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "divprun"], "did you mean 'divprune'"),
        (["--methods", "fastv", "--keep", "0.11"], "fastv at keep 0.11: keep=0.11 is the average"),
        (["--methods", "divprune", "cdpruner"], "cdpruner needs relevance: that is given from Python only"),
        (
            ["--model", "tiny:qwen2_5_vl", "--methods", "tome"],
            "tome at keep 0.5: method 'tome' prunes inside the encoder",
        ),
        (["--methods", "divprune", "--debias", "recency"], "method 'divprune' looks at no attention"),
        (["--debias", "bias"], "--debias bias: expected one of"),
        (["--keep", "0"], "keep=0: expected at least 1 token"),
        (["--keep", "0.5", "lots"], "--keep lots: expected a share"),
        (["--model", "tiny:lava"], "did you mean 'llava'"),
        (["--model", "./nowhere"], "there is no such directory"),
        (["--image", "nowhere.png"], "no picture at nowhere.png"),
        (["--prompt", " "], "--prompt is empty"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--threads", "0"], "--threads 0: expected 1 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 or more"),
        (["--device", "toaster"], "--device toaster: no such device"),
        (["--calibration", "nowhere.json"], "nowhere.json"),
        (["--csv", "nowhere/out.csv"], "there is no directory"),
        (["--sheet", "sheet.docx"], "must end like a picture"),
        (["--sheet", "sheet.ico"], "changes the size of a picture"),
        (["--csv", "same.csv", "--markdown", "same.csv"], "this is the file of --csv"),
        (["--markdown", ""], "--markdown is empty"),
    ],
)
def test_mistakes_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    told = failure(capsys, "compare", *arguments)
    assert says in told and "\n" not in told
    assert not list(tmp_path.iterdir())


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compare", "--help"])
    shown_help = capsys.readouterr().out
    assert left.value.code == 0 and _compare.__all__ == ["add_compare"]
    assert "random tokens, which are added" in shown_help and "no benchmark" in shown_help
    named = re.findall(r"^  vtprune compare .*--methods ((?:[a-z_]+ ?)+)", shown_help, flags=re.MULTILINE)
    assert len(named) == 4 and all(name in METHODS for names in named for name in names.split())
