"""Candidates for the house default.

Candidates for the house default on development scenes: does any beat plain MMR outside the interval?

  python benchmarks/house_default.py --csv benchmarks/results/house_default.csv
  python benchmarks/house_default.py --samples 20 --keep 0.11          a first look

Candidates are training-free and text-free, so that a choice survives the next turn of a chat. The interval is a 95 %
bootstrap interval over scenes of the difference in accuracy to the default, over all kinds but counting. Tiny models
only: no claim about others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from recording import append_rows, commit, csv_path, run
from rich.progress import track

from vtprune import Pick, Pipeline, load_tiny
from vtprune._torchvision import heal
from vtprune.catalog import build
from vtprune.eval.intervals import Resamples
from vtprune.eval.questions import draw_items, judged
from vtprune.eval.subject import Batch, Subject
from vtprune.runtime.evidence import readings_of
from vtprune.stages.debiasers import MinMax, WithoutHighNorms, WithoutSinks, WithoutTrend
from vtprune.stages.rules import ClsOrReceived
from vtprune.stages.scorers import Importance, Read
from vtprune.stages.selectors import MMR

DEFAULT = "vtprune"
BATCH = 64


def mmr(name: str, *debiasers: Callable, lam: float = 0.5, since: float | None = None) -> Pipeline:
    """MMR with other weights, debiasers in front, or importance of more layers."""
    scorer = Importance() if since is None else Read(rule=ClsOrReceived(), since=since)
    pick = Pick(name="mmr", scorer=scorer, debiasers=(*debiasers, MinMax()), selector=MMR(lam=lam))
    return Pipeline(name=name, picks=(pick,))


CANDIDATES = [
    build(DEFAULT),
    mmr("mmr 0.3", lam=0.3),
    mmr("mmr 0.7", lam=0.7),
    mmr("mmr 0.9", lam=0.9),
    mmr("mmr, later layers", since=0.5),
    mmr("mmr without sinks", WithoutSinks()),
    mmr("mmr without high norms", WithoutHighNorms()),
    mmr("mmr without trend", WithoutTrend()),
    build("fastervlm"),
    build("hiprune"),
    build("vispruner"),
    build("vispruner", {"important": 0.75}),
    build("scope"),
    build("cdpruner", {"evidence": "importance"}),
    build("todre_select"),
    build("visionzip"),
    build("divprune"),
    build("holov"),
    build("prunesid"),
    build("dart"),
    build("zoo_prune"),
]


def right_answers(model: str, items: list, keeps: list[float]) -> dict[tuple[str, float], np.ndarray]:
    """Whether each question is answered rightly, (questions,), under every candidate and budget."""
    loaded, processor = load_tiny(model)
    subject = Subject(model=loaded, processor=processor)
    readings = {name: reading for method in CANDIDATES for name, reading in readings_of(method).items()}
    found: dict[tuple[str, float], list[bool]] = {}
    for first in track(range(0, len(items), BATCH), description=f"{model}: batches of {BATCH} questions"):
        batch = Batch(subject=subject, items=tuple(items[first : first + BATCH]), readings=readings)
        wanted = [judged(item.question.answer) for item in batch.items]
        for number, candidate in enumerate(CANDIDATES):
            for keep in keeps:
                words = batch.answer(candidate, keep).words
                marks = [word == answer for word, answer in zip(words, wanted, strict=True)]
                found.setdefault((label(number), keep), []).extend(marks)
    return {step: np.array(marks) for step, marks in found.items()}


def table(rows: list[dict]) -> str:
    """A Markdown table: one line for each candidate, one column for each budget."""
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    found = {(row["candidate"], row["keep"]): row for row in rows}

    def cell(name: str, keep: float) -> str:
        row = found[name, keep]
        apart = "" if name == DEFAULT else f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        return f"{100 * row['accuracy']:.1f}{apart}"

    lines = ["| candidate | " + " | ".join(f"keep {keep}" for keep in keeps) + " |", "|---" * (1 + len(keeps)) + "|"]
    for name in dict.fromkeys(row["candidate"] for row in rows):
        lines.append(f"| {name} | " + " | ".join(cell(name, keep) for keep in keeps) + " |")
    return "\n".join(lines)


def label(number: int) -> str:
    """A name that no other candidate has."""
    name = CANDIDATES[number].name
    earlier = sum(candidate.name == name for candidate in CANDIDATES[:number])
    return name if not earlier else f"{name} ({earlier + 1})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava", help="a bundled tiny model (default: llava)")
    parser.add_argument("--samples", type=int, default=100, help="development scenes (default: 100)")
    parser.add_argument(
        "--keep", type=float, nargs="+", default=[0.11, 0.05, 0.03], help="shares (default: 0.11 0.05 0.03)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--csv", type=csv_path, help="where the rows go")
    options = parser.parse_args()
    heal()
    torch.set_num_threads(options.threads)
    modality = "video" if options.model == "llava_next_video" else "image"
    items = draw_items("dev", 0, options.samples, modality)
    right = right_answers(options.model, items, options.keep)
    chosen = np.array([item.question.kind != "count" for item in items])
    resamples = Resamples([item.number for item in items], seed=0)
    rows = []
    for (name, keep), marks in right.items():
        apart = marks.astype(float) - right[DEFAULT, keep]
        low, high = resamples.interval(apart, chosen, least=-1.0)
        rows.append(
            {
                "model": options.model,
                "keep": keep,
                "candidate": name,
                "accuracy": round(float(marks[chosen].mean()), 4),
                "minus_default": round(float(apart[chosen].mean()), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "scenes": options.samples,
                "questions": int(chosen.sum()),
                "commit": commit(),
            }
        )
    print(table(rows))
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    run(main)
