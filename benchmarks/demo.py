"""From the click to the first answer on the page of `vtprune demo`, in a real browser; and pictures of the page.

  python benchmarks/demo.py --csv benchmarks/results/demo.csv
  python benchmarks/demo.py --pictures docs                        the pictures of the README, anew

The page is served by this process, and visited with chromium on the same machine (apt-get install chromium; pip install
playwright). Each round opens the page, which answers a first question by itself, and then presses the button on another
example of the bundled model: seconds until the answer without pruning is there, until that of the first method, and
until all panes are drawn. Wall seconds, since several processes work: the median, and the range of all rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recording import append_rows, csv_path, machine, run

from vtprune.demo.photo_host import PhotoHost
from vtprune.demo.session import Host

MODEL, CLIPS = "tiny:llava", "tiny:llava_next_video"
EXAMPLES = ("scene 1", "scene 2", "scene 3")
PARTS = {"unpruned": "#unpruned", "first method": "#answer-a", "all": "#overlaps"}
"""What is waited for, and how it is found."""


def seen(page: Any, begin: float) -> dict[str, float]:
    """Seconds until each of `PARTS` is there."""
    found = {}
    for name, place in PARTS.items():
        page.locator(place).wait_for()
        found[name] = time.perf_counter() - begin
    return found


def round_of(page: Any, example: str) -> dict[str, dict[str, float]]:
    """Seconds from opening the page, and from the click."""
    import browsing

    begin = time.perf_counter()
    page.reload()
    opening = seen(page, begin)
    browsing.take_example(page, example)
    begin = time.perf_counter()
    page.locator(".vtp-ask:visible").click()
    return {"opening": opening, "click": seen(page, begin)}


def measured(rounds: int) -> list[dict]:
    """A row for each thing that is waited for."""
    import browsing

    hosts = [("model", Host.load(MODEL, "cpu"))]
    with browsing.served(hosts) as address, browsing.visited(address) as page:
        found = [round_of(page, EXAMPLES[turn % len(EXAMPLES)]) for turn in range(rounds)]
    rows = []
    for begin in ("opening", "click"):
        for part in PARTS:
            seconds = [one[begin][part] for one in found]
            row = {"from": begin, "until": part, "rounds": rounds, "seconds": statistics.median(seconds)}
            rows.append({**row, "low": min(seconds), "high": max(seconds), "model": MODEL})
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def table(rows: list[dict]) -> str:
    lines = ["| from | until | seconds | range |", "|---|---|---|---|"]
    lines += [
        f"| {row['from']} | {row['until']} | {row['seconds']:.2f} | {row['low']:.2f} to {row['high']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(folder: Path) -> None:
    """Pictures of the page: a picture, a clip, and a photo on a vision tower if it is installed."""
    import browsing

    hosts = [("picture", Host.load(MODEL, "cpu")), ("clip", Host.load(CLIPS, "cpu")), ("photo", PhotoHost())]
    shots = {"picture": ("a picture", "by the stage that took them"), "clip": ("a clip", "frames and their budgets")}
    shots["photo"] = ("astronaut", "kept patches")
    for title, host in hosts:
        example, view = shots[title]
        with browsing.served([(title, host)]) as address, browsing.visited(address) as page:
            browsing.take_example(page, example)
            browsing.compare(page)
            page.get_by_label(view, exact=True).check()
            page.wait_for_timeout(1500)
            page.screenshot(path=folder / f"demo-{title}.png", full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of opening and clicking (default: 12)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--csv", type=csv_path, help="where the rows go")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the page there, and measure nothing")
    options = parser.parse_args()
    if shutil.which("chromium") is None:
        parser.error("there is no chromium: apt-get install chromium")
    absent = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    if absent:
        parser.error(f"there is no {' and no '.join(absent)}: pip install {' '.join(absent)}")
    torch.set_num_threads(options.threads)
    if options.pictures:
        draw(options.pictures)
        return
    rows = [{**row, **machine("cpu"), "clock": "wall", "threads": options.threads} for row in measured(options.rounds)]
    print(table(rows))
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    run(main)
