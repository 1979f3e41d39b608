"""Numbers of `docs/performance.md` are those of the rows that are committed."""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text()
ROWS = list(csv.DictReader((ROOT / "benchmarks" / "results" / "kernels.csv").open()))
LINE = re.compile(
    r"^\| `([\w -]+)` \| ([^|]+=[^|]+) \| ([\d.]+) \| [^|]+ \| (it|ours) is ([\d.]+) \[([\d.]+), ([\d.]+)\]", re.M
)


def told(row: dict[str, str]) -> tuple[str, ...]:
    """The ratio of a row, and its interval, as the page writes them."""
    return tuple(f"{float(row[name]):.3g}" for name in ("ratio", "sure_low", "sure_high"))


def test_every_measured_kernel_is_on_the_page_as_it_was_measured() -> None:
    measured = [row for row in ROWS if row["measured"] == "yes"]
    lines = LINE.findall(PAGE)
    assert {line[:2] for line in lines} == {(row["kernel"], row["shape"]) for row in measured}
    for kernel, shape, milliseconds, which, *ratio in lines:
        arms = {row["arm"]: row for row in measured if (row["kernel"], row["shape"]) == (kernel, shape)}
        assert milliseconds == f"{float(arms['ours']['median_ms']):.3g}"
        beside = [row for arm, row in arms.items() if (arm == "ours") == (which == "ours")]
        assert tuple(ratio) in map(told, beside)


def test_what_no_gpu_measured_is_said_not_to_be() -> None:
    on_gpu = [row for row in ROWS if row["preset"] == "gpu"]
    assert on_gpu
    assert all(row["measured"] == "not measured" and not row["median_ms"] for row in on_gpu)
    assert "## On a GPU: not measured" in PAGE
