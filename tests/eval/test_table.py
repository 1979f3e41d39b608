"""The table by hand, its way through a CSV, and the page and plot that are made of it."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path

import pytest

from vtprune.cli import main
from vtprune.errors import InvalidOption
from vtprune.eval.markdown import as_markdown, best_lines
from vtprune.eval.plot import draw_plot
from vtprune.eval.questions import Item, draw_items, judged
from vtprune.eval.runner import Result
from vtprune.eval.table import ABOUT, COLUMNS, read_csv, tabulate, write_csv

DOCS = Path(__file__).parents[2] / "docs"
ITEMS = draw_items("test", 0, 24)
TRUTH = [judged(item.question.answer) for item in ITEMS]
FACTS = {**dict.fromkeys(ABOUT, "x"), "seed": 0, "scenes": 24}


def result(method: str, keep: float, wrong: int, step: int = 1) -> Result:
    """Every `step`-th answer wrong until there are `wrong` of them."""
    words = list(TRUTH)
    for number in range(wrong):
        words[number * step] = "nothing"
    n = len(words)
    return Result(method=method, keep=keep, words=words, kept=[int(16 * keep)] * n, recall=[keep] * n)


RESULTS = [
    result("identity", 1.0, 12),
    dataclasses.replace(result("blind", 1.0, 135), recall=[None] * len(ITEMS)),
    result("divprune", 0.5, 15),
    Result(method="fastervlm", keep=0.5, note="no evidence", reason="there is no probe"),
    result("random", 0.5, 72, 2),
    result("uniform", 0.5, 75, 2),
    dataclasses.replace(result("pool", 0.5, 15, 10), recall=[None] * len(ITEMS)),
    result("oracle", 0.5, 0),
]
ROWS = tabulate(RESULTS, ITEMS, FACTS, seed=0)


def row(method: str, kind: str = "all") -> dict[str, str]:
    (found,) = (row for row in ROWS if (row["method"], row["kind"]) == (method, kind))
    return found


def test_there_is_a_row_for_every_method_budget_and_kind() -> None:
    assert all(tuple(row) == COLUMNS for row in ROWS)
    kinds = {item.question.kind for item in ITEMS} | {"all", "all but count"}
    assert {(row["method"], row["kind"]) for row in ROWS} == {(r.method, kind) for r in RESULTS for kind in kinds}
    assert len(ROWS) == len(RESULTS) * len(kinds)


def test_numbers_by_hand() -> None:
    n = len(ITEMS)
    found = row("divprune")
    assert float(found["accuracy"]) == pytest.approx((n - 15) / n, abs=1e-4)
    assert float(found["share"]) == pytest.approx((n - 15) / (n - 12), abs=1e-4)
    assert float(found["agreement"]) == pytest.approx((n - 3) / n, abs=1e-4)
    assert float(found["minus_random"]) == pytest.approx(57 / n, abs=1e-4)
    assert float(found["low"]) <= float(found["accuracy"]) <= float(found["high"])
    assert (found["kept"], found["tokens"], found["questions"]) == ("8", "16", str(n))
    assert float(found["object_recall"]) == 0.5
    assert float(row("identity")["agreement"]) == float(row("identity")["share"]) == 1.0
    assert row("identity")["minus_random"] == row("identity")["minus_best"] == row("pool")["object_recall"] == ""
    parts = [row("uniform", kind) for kind in {item.question.kind for item in ITEMS}]
    assert sum(int(part["questions"]) for part in parts) == n
    right = sum(float(part["accuracy"]) * int(part["questions"]) for part in parts)
    assert float(row("uniform")["accuracy"]) == pytest.approx(right / n, abs=1e-3)
    counting = sum(item.question.kind == "count" for item in ITEMS)
    assert int(row("uniform", "all but count")["questions"]) == n - counting


def test_words_are_compared_with_the_unpruned_answer_also_where_it_is_wrong() -> None:
    same = [Result(**{**vars(RESULTS[0]), "method": name, "keep": 0.5}) for name in ("random", "pool")]
    rows = tabulate([RESULTS[0], *same], ITEMS, FACTS, seed=0)
    assert {row["agreement"] for row in rows} == {"1.0000"}


def test_a_row_without_evidence_has_no_number() -> None:
    for found in (row for row in ROWS if row["method"] == "fastervlm"):
        assert found["note"] == "no evidence" and found["accuracy"] == found["kept"] == found["low"] == ""
    page = as_markdown(ROWS)
    assert "| `fastervlm` | 0.5 |  | no evidence |" in page
    assert "- `fastervlm`, no evidence: there is no probe" in page


def test_what_lies_inside_the_noise_is_marked() -> None:
    page = as_markdown(ROWS)
    lines = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    main = {
        line.split("|")[1].strip(" `"): line
        for line in page.split("## Every kind")[0].splitlines()
        if "| 0.5 |" in line
    }
    assert "≈" in main["uniform"] and "≈" not in main["divprune"] and "≈" not in main["random"]
    assert "≈" not in lines["identity"]


def test_the_best_is_chosen_among_what_can_be_used() -> None:
    (line,) = best_lines(ROWS, "all")
    assert line == "keep 0.5: the best is `divprune`, not distinguishable from it: `pool`."
    (line,) = best_lines(tabulate([*RESULTS[:3], RESULTS[4], RESULTS[7]], ITEMS, FACTS, seed=0), "all")
    assert line == "keep 0.5: the best is `divprune`, the others are worse beyond the noise."


def test_a_run_of_counting_alone_has_a_table() -> None:
    items = tuple(item for item in ITEMS if item.question.kind == "count")
    rows = tabulate([_only(result, items) for result in RESULTS if result.words], items, FACTS, seed=0)
    assert {row["kind"] for row in rows} == {"count", "all"}
    assert "## All kinds of questions\n" in as_markdown(rows)


def _only(result: Result, items: tuple[Item, ...]) -> Result:
    kept = [number for number, item in enumerate(ITEMS) if item in items]
    lists = {name: [getattr(result, name)[i] for i in kept] for name in ("words", "kept", "recall")}
    return dataclasses.replace(result, **lists)


def test_the_csv_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(ROWS, path)
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert read_csv(path) == ROWS
    assert as_markdown(read_csv(path)) == as_markdown(ROWS)


def test_a_table_from_before_chance_at_cuts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    older = [column for column in COLUMNS if "control" not in column]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, older, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ROWS)
    assert read_csv(path) == ROWS
    path.write_text(path.read_text().replace("minus_best_high,", "minus_best_high,minus_control,"))
    with pytest.raises(InvalidOption, match="is no table of"):
        read_csv(path)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", ",".join(COLUMNS) + "\n", ",".join(COLUMNS) + "\n1,2\n"])
def test_another_csv_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InvalidOption, match="is no table of"):
        read_csv(path)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    draw_plot(ROWS, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 300


def test_many_methods_get_a_panel_for_each_budget(tmp_path: Path) -> None:
    """Wider with every budget and higher with every method, one of which may have no number."""
    from PIL import Image

    def size(methods: int, budgets: int) -> tuple[int, int]:
        rows = [{**row, "model": "m"} for row in ROWS if row["method"] in ("identity", "blind")]
        for number, keep in itertools.product(range(methods), (0.5, 0.25, 0.11)[:budgets]):
            given = {"method": f"m{number}", "keep": keep, "note": "no evidence" if number == 3 else ""}
            rows += [{**row, **given} for row in ROWS if row["method"] == "pool"]
        draw_plot(rows, tmp_path / "plot.png")
        return Image.open(tmp_path / "plot.png").size

    few, more, higher = size(14, 2), size(14, 3), size(28, 2)
    assert more[0] > few[0] and more[1] == few[1]
    assert higher[1] > 1.5 * few[1] and higher[0] == few[0]


def test_committed_pages_are_what_their_tables_make(tmp_path: Path) -> None:
    """For every docs/accuracy-NAME.csv: the page beside it is what one command makes of it."""
    tables = sorted(DOCS.glob("accuracy-*.csv"))
    pages = sorted(DOCS.glob("accuracy-*.md"))
    assert [page.stem for page in pages] == [table.stem for table in tables]
    for table, page in zip(tables, pages):
        made, plot = tmp_path / page.name, tmp_path / f"{page.stem}.png"
        drawn = ["--plot", str(plot)] if page.with_suffix(".png").exists() else []
        assert main(["eval", "--from-csv", str(table), "--markdown", str(made), *drawn]) == 0
        assert made.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
