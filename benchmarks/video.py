"""Video question answering end to end: clips a minute with and without pruning, decoding, memory over many clips.

  python benchmarks/video.py --csv benchmarks/results/video.csv
  python benchmarks/video.py --clips 20 --memory-clips 250 --rounds 2           a first look

Clips are drawn, encoded with H.264 at 640 x 360 and 30 frames a second, 10 seconds long with a key frame a second, and
`vtprune.video.answer_questions` reads 8 frames of each, as `vtprune video-qa` does: one process decodes ahead.

- Speed: each round answers the same clips under every arm, one after the other, an arm at a different place in every
  round. Wall seconds, since two processes work: the median, and the range of all rounds. `decode` is the
  seconds of the decoding process for a clip, `waited` the share of the time in which the model waited for it.
- Memory: resident megabytes of this process and of the decoding one after every 50 of the clips, in one long job with
  the house default: the median of the first and of the last third of the readings, the first 100 clips left out.

The model is the bundled tiny one, whose language model is so small that its prefill is a small part of the work: ratios
of larger models are those of `vtprune bench prefill`, and what decoding takes beside them must be measured with them.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from recording import append_rows, csv_path, machine, run
from rich.console import Console
from rich.progress import track

from vtprune._torchvision import heal
from vtprune.tiny.clips import draw_clip
from vtprune.tiny.scenes import DEVELOPMENT
from vtprune.video import Task, Uniform, answer_questions
from vtprune.video.journal import Record
from vtprune.video.qa import Counts
from vtprune.video.questions import Question

RATE, SECONDS, SIZE = 30, 10, (640, 360)
DISTINCT = 10
EVERY, SETTLED = 50, 100
ASKED = "what color is the circle ?"
BASE = Task(max_new_tokens=3, batch=16, sampling=Uniform(8))
ARMS = {
    "all tokens": replace(BASE, method="identity", keep=1.0),
    "vtprune 0.25": replace(BASE, keep=0.25),
    "vtprune 0.11": replace(BASE, keep=0.11),
    "temporal 0.11": replace(BASE, method="temporal", keep=0.11),
    "quota 0.11, change": replace(BASE, method="quota", keep=0.11, scoring="change"),
    "quota 0.11, yes": replace(BASE, method="quota", keep=0.11, scoring="yes"),
}
MEMORY = "vtprune 0.11"


def write_clip(path: Path, number: int) -> None:
    """A drawn clip, scaled up, each of its frames shown in turn."""
    import av

    frames = [Image.fromarray(frame).resize(SIZE) for frame in draw_clip(DEVELOPMENT[number]).frames]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": str(RATE)})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        total = RATE * SECONDS
        for index in range(total):
            frame = av.VideoFrame.from_ndarray(np.asarray(frames[index * len(frames) // total]), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def questions_about(count: int) -> list[Question]:
    """One question about each of so many names of clips."""
    return [Question(id=str(i), video=f"{i}.mp4", question=ASKED) for i in range(count)]


def speeds(clips: Path, count: int, rounds: int, out: Path) -> dict[str, list[dict[str, float]]]:
    """For every arm and round: clips a minute, seconds of decoding a clip, and the share of time spent waiting."""
    loaded = {name: task.load() for name, task in ARMS.items()}
    names, found = list(ARMS), {name: [] for name in ARMS}
    for turn in track(range(rounds + 1), description="rounds", console=Console(stderr=True), transient=True):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            journal = out / f"{turn}-{names.index(name)}.jsonl"
            begin = time.perf_counter()
            counts, records = answer_questions(
                ARMS[name], questions_about(count), clips, journal, answerer=loaded[name]
            )
            seconds = time.perf_counter() - begin
            assert counts.answered == count, counts
            decode = statistics.mean(record.seconds["decode"] for record in records.values())
            if turn:  # the first round warms up
                found[name].append({"rate": 60 * count / seconds, "decode": decode, "waited": counts.waited / seconds})
    return found


def resident() -> tuple[float, float]:
    """Megabytes of this process, and of those it started."""
    import psutil

    own = psutil.Process()
    children = sum(child.memory_info().rss for child in own.children(recursive=True))
    return own.memory_info().rss / 1e6, children / 1e6


def memory(clips: Path, count: int, out: Path) -> list[tuple[float, float]]:
    """Readings over one job."""
    readings: list[tuple[float, float]] = []

    def note(counts: Counts, records: Sequence[Record]) -> None:
        if counts.answered // EVERY > (counts.answered - len(records)) // EVERY:
            readings.append(resident())

    counts, _ = answer_questions(ARMS[MEMORY], questions_about(count), clips, out / "memory.jsonl", on_records=note)
    assert counts.answered == count, counts
    return readings[SETTLED // EVERY :]


def rows_of(found: dict[str, list[dict[str, float]]], readings: list[tuple[float, float]], options) -> list[dict]:
    told = {**machine("cpu"), "clock": "wall", "threads": options.threads, "model": BASE.model}
    whole = statistics.median(one["rate"] for one in found["all tokens"]) if found else 0.0
    rows = []
    for name, rounds in found.items():
        rates = [one["rate"] for one in rounds]
        row = {"arm": name, "clips": options.clips, "rounds": len(rounds)}
        row |= {"clips_a_minute": statistics.median(rates), "low": min(rates), "high": max(rates)}
        row |= {"times_all_tokens": statistics.median(rates) / whole}
        row |= {key: statistics.median(one[key] for one in rounds) for key in ("decode", "waited")}
        rows.append({**row, **told})
    third = max(1, len(readings) // 3)
    for place, whose in enumerate(("this process", "the decoding process")):
        own = [reading[place] for reading in readings]
        row = {"arm": f"memory of {whose}", "clips": options.memory_clips}
        row |= {"first_mb": statistics.median(own[:third]), "last_mb": statistics.median(own[-third:])}
        rows.append({**row, **told})
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def table(rows: Sequence[dict]) -> str:
    lines = ["| arm | clips a minute | of all tokens | decoding a clip, ms | waited % |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['arm']} | {row['clips_a_minute']:.0f} [{row['low']:.0f}, {row['high']:.0f}] | "
        f"{row['times_all_tokens']:.2f} | {1000 * row['decode']:.0f} | {100 * row['waited']:.0f} |"
        for row in rows
        if "rounds" in row
    ]
    lines += [
        f"{row['arm']}: {row['first_mb']:.0f} MB, then {row['last_mb']:.0f} MB, over {row['clips']} clips"
        for row in rows
        if "first_mb" in row
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60, help="of a round (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up; 0: memory only (default: 5)")
    parser.add_argument("--memory-clips", type=int, default=1000, help="of the long job (default: 1000)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--csv", type=csv_path, help="where the rows go")
    options = parser.parse_args()
    if importlib.util.find_spec("psutil") is None:
        parser.error("memory is read with psutil: pip install psutil")
    if options.memory_clips < SETTLED + 3 * EVERY:
        parser.error(f"--memory-clips {options.memory_clips}: expected {SETTLED + 3 * EVERY} or more")
    heal()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        clips, out = Path(folder) / "clips", Path(folder) / "out"
        clips.mkdir()
        out.mkdir()
        for number in range(max(options.clips, options.memory_clips)):
            path = clips / f"{number}.mp4"
            if number < DISTINCT:
                write_clip(path, number)
            else:
                path.symlink_to(clips / f"{number % DISTINCT}.mp4")
        found = speeds(clips, options.clips, options.rounds, out) if options.rounds else {}
        rows = rows_of(found, memory(clips, options.memory_clips, out), options)
    print(table(rows))
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    run(main)
