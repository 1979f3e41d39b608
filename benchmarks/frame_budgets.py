"""Budgets of frames by the question: are a clip's tokens better shared out by the question than equally?

  python benchmarks/frame_budgets.py --csv benchmarks/results/frame_budgets.csv
  python benchmarks/frame_budgets.py --split dev --samples 6           a first look

The protocol was written down before any result of `quota` or `temporal` on clips of the split test was seen (those of
older methods, pooling among them, stood in docs/accuracy-llava_next_video.md already):

- Clips 0 to 149 of the split test with at most 8 questions each, the bundled tiny LLaVA-NeXT-Video, 0.11 of the tokens
  (56 of 512) in every arm. A run in which an arm keeps any other number ends with an error.
- Three arms of `quota`, within="pool" and within="prune": scores of frames by the question, asked of the same model
  without pruning (`score_frames`, by="yes"); scores without text (by="change"); and equal scores, with the same pooling
  or picking in every frame. The same model is asked once more for every frame: that time is not counted here.
- Beside them random (drawn anew for every clip), uniform, pool, temporal and the house default.
- An answer is right where its greedy first word is that of the truth, over questions of all kinds alike.
- Of every arm: accuracy, and for budgets by scores the difference to equal scores with the same `within`, paired by
  question, with 95 % bootstrap intervals over clips. A budget is called better only where the interval is above 0.

One tiny model of drawn clips, in which most things are seen in one or two of eight frames: no claim about others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from recording import append_rows, csv_path, machine, run
from rich.console import Console
from rich.progress import track

from vtprune import load_tiny
from vtprune._torchvision import heal
from vtprune.catalog import build
from vtprune.errors import VtpruneError
from vtprune.eval.arms import arm_of
from vtprune.eval.intervals import Resamples
from vtprune.eval.questions import SPLITS, Item, draw_items, judged
from vtprune.eval.subject import Answers, Batch, Subject
from vtprune.runtime.evidence import readings_of
from vtprune.video.relevance import per_part, score_frames

MODEL, KEEP, CLIPS = "llava_next_video", 0.11, 150
BATCH = 64
EQUAL = "equal"


@dataclass(frozen=True)
class Arm:
    """A method by its name, and of `quota` what frames are scored by and how each is brought to its count."""

    method: str
    by: str = ""
    within: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.method, self.within, self.by)))


ARMS = (
    *(Arm("quota", by, within) for within in ("pool", "prune") for by in ("yes", "change", EQUAL)),
    *(Arm(name) for name in ("random", "uniform", "pool", "temporal", "vtprune")),
)


def right_answers(subject: Subject, items: Sequence[Item]) -> dict[Arm, np.ndarray]:
    """Whether each question is answered rightly, (questions,), under every arm."""
    found: dict[Arm, list[bool]] = {}
    readings = readings_of(build("vtprune"))
    terminal = Console(stderr=True)
    starts = range(0, len(items), BATCH)
    hidden = not terminal.is_terminal
    for first in track(starts, f"batches of {BATCH} questions", console=terminal, disable=hidden, transient=True):
        batch = Batch(subject=subject, items=tuple(items[first : first + BATCH]), readings=readings)
        wanted = [judged(item.question.answer) for item in batch.items]
        scores = {by: [scored(subject, item, by) for item in batch.items] for by in {arm.by for arm in ARMS} - {""}}
        for arm in ARMS:
            answers = checked(arm, answered(batch, arm, scores), batch.count(KEEP))
            marks = [word == answer for word, answer in zip(answers.words, wanted, strict=True)]
            found.setdefault(arm, []).extend(marks)
    return {arm: np.array(marks, dtype=float) for arm, marks in found.items()}


def scored(subject: Subject, item: Item, by: str) -> torch.Tensor:
    """Scores of the parts of a clip."""
    pictures = [Image.fromarray(view.pixels) for view in item.views]
    if by == EQUAL:
        return per_part(torch.ones(len(pictures)), subject.model)
    return per_part(score_frames(subject.model, subject.processor, pictures, item.question.text, by=by), subject.model)


def answered(batch: Batch, arm: Arm, scores: dict[str, list[torch.Tensor]]) -> Answers:
    """The answers of an arm to a batch; those without scores are the ones of `vtprune eval`."""
    if not arm.by:
        return arm_of(arm.method)(batch, KEEP)
    return batch.answer(build(arm.method, {"within": arm.within}), KEEP, evidence={"frames": scores[arm.by]})


def checked(arm: Arm, answers: Answers, tokens: int) -> Answers:
    """The answers, or an error where they are from more or fewer tokens than those of other arms."""
    if set(answers.kept) != {tokens}:
        kept = ", ".join(f"{count:g}" for count in sorted(set(answers.kept)))
        raise VtpruneError(
            f"{arm.name} kept {kept} tokens of a clip, expected {tokens} as every arm: nothing is compared"
        )
    return answers


def rows_of(right: dict[Arm, np.ndarray], items: Sequence[Item], split: str) -> list[dict]:
    """A row for every arm, with intervals over clips; the difference is that to equal scores."""
    resamples = Resamples([item.number for item in items], seed=0)
    every = np.ones(len(items), dtype=bool)
    about = {"model": MODEL, "split": split, "keep": KEEP, "clips": items[-1].number + 1, "questions": len(items)}
    told = {name: value for name, value in machine("cpu").items() if name != "clock"}
    rows = []
    for arm, marks in right.items():
        low, high = resamples.interval(marks, every)
        row = {**about, "arm": arm.name, "accuracy": marks.mean(), "low": low, "high": high}
        row |= dict.fromkeys(("minus_equal", "minus_equal_low", "minus_equal_high"))
        if arm.by and arm.by != EQUAL:
            apart = marks - right[Arm(arm.method, EQUAL, arm.within)]
            low, high = resamples.interval(apart, every, least=-1.0)
            row |= {"minus_equal": apart.mean(), "minus_equal_low": low, "minus_equal_high": high}
        rounded = {name: round(float(value), 4) if isinstance(value, float) else value for name, value in row.items()}
        rows.append({**rounded, **told})
    return rows


def table(rows: Sequence[dict]) -> str:
    """A Markdown table: accuracy and the difference to equal scores, in percent."""
    lines = ["| arm | right % | minus equal scores |", "|---|---|---|"]
    for row in rows:
        cells = [f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]", ""]
        if row["minus_equal"] is not None:
            gap, low, high = (100 * row[f"minus_equal{end}"] for end in ("", "_low", "_high"))
            cells[1] = f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=tuple(SPLITS), default="test", help="which clips (default: test)")
    parser.add_argument("--samples", type=int, default=CLIPS, help=f"number of clips (default: {CLIPS})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--csv", type=csv_path, help="where the rows go")
    options = parser.parse_args()
    heal()
    torch.set_num_threads(options.threads)
    items = draw_items(options.split, 0, options.samples, "video")
    model, processor = load_tiny(MODEL)
    rows = rows_of(right_answers(Subject(model=model, processor=processor), items), items, options.split)
    print(table(rows))
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    run(main)
