"""Scores of frames in a table: methods that share tokens among frames have a number about clips, a reason elsewhere."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vtprune
from tests.eval.common import batch_of, llava
from vtprune import _console
from vtprune.catalog import build
from vtprune.cli import main
from vtprune.errors import MissingEvidence, UnsupportedCall
from vtprune.eval import questions
from vtprune.eval.runner import NOT_POSSIBLE, evaluate
from vtprune.eval.store import Store
from vtprune.eval.subject import Subject
from vtprune.tiny.clips import FRAMES
from vtprune.video.relevance import per_part, score_frames

ITEMS = questions.draw_items("dev", 5, 1, "video")[:3]
CELLS = 64
STEPS = [("identity", 1.0), ("quota", 0.11)]


@functools.cache
def tiny() -> tuple[Any, Any]:
    return vtprune.load_tiny("llava_next_video")


class Scores:
    """The same scores for all clips, and what they were asked about."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = torch.tensor(scores)
        self.asked: list[tuple[Sequence[Image.Image], str]] = []

    def __call__(self, pictures: Sequence[Image.Image], question: str) -> Tensor:
        self.asked.append((pictures, question))
        return self.scores


def subject(frames: Any) -> Subject:
    model, processor = tiny()
    return Subject(model=model, processor=processor, frames=frames)


def test_tokens_go_where_the_scores_are() -> None:
    scores = Scores([0.0, 0, 0, 0, 0, 1.0, 0, 0])
    answers = batch_of(subject(scores), ITEMS).answer(build("quota", {"within": "prune"}), 0.11)
    assert answers.kept == (56.0,) * len(ITEMS)
    assert all({index // CELLS for index in kept.tolist()} == {5} for kept in answers.tokens)
    assert [question for _, question in scores.asked] == [item.question.text for item in ITEMS]
    for item, (pictures, _) in zip(ITEMS, scores.asked):
        assert [np.array(picture).tolist() for picture in pictures] == [view.pixels.tolist() for view in item.views]


def test_a_batch_is_scored_once_and_only_for_who_asks() -> None:
    scores = Scores([1.0] * FRAMES)
    batch = batch_of(subject(scores), ITEMS)
    batch.answer("uniform", 0.11)
    assert scores.asked == []
    batch.answer("quota", 0.11)
    batch.answer("quota", 0.25)
    assert len(scores.asked) == len(ITEMS)


def test_without_scores_the_evidence_is_missing() -> None:
    with pytest.raises(MissingEvidence, match="this method reads 'frames'"):
        batch_of(subject(None), ITEMS).answer("quota", 0.11)


def test_scores_that_do_not_fit_or_cannot_be_made_are_a_reason() -> None:
    (_, quota) = evaluate(subject(Scores([1.0, 2.0, 3.0])), ITEMS, STEPS)
    assert quota.note == NOT_POSSIBLE and "got 3 scores" in quota.reason

    def refuse(pictures: Any, question: str) -> Tensor:
        raise UnsupportedCall("no such frames")

    (_, quota) = evaluate(subject(refuse), ITEMS, STEPS)
    assert (quota.note, quota.reason, quota.words) == (NOT_POSSIBLE, "no such frames", [])


def test_stored_answers_need_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first, again = Scores([1.0, *[0.0] * 7]), Scores([1.0, *[0.0] * 7])
    whole = evaluate(subject(first), ITEMS, STEPS, batch=2, store=Store(path, {}))
    assert len(first.asked) == len(ITEMS)
    assert evaluate(subject(again), ITEMS, STEPS, batch=2, store=Store(path, {})) == whole
    assert again.asked == []


def rows(path: Path, *arguments: str) -> dict[str, dict[str, str]]:
    command = ["eval", "--split", "dev", "--samples", "1", "--methods", "quota", "--keep", "0.11"]
    assert main([*command, *arguments, "--csv", str(path)]) == 0
    with path.open(encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file) if row["kind"] == "all"}


def test_the_table_has_a_number_about_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers as with scores made by hand."""
    items = ITEMS[:2]
    monkeypatch.setattr(_console, "load_model", lambda source, device: tiny())
    monkeypatch.setattr(questions, "draw_items", lambda *_: items)
    found = rows(tmp_path / "clips.csv", "--about", "clips", "--model", "tiny:llava_next_video")
    assert found["quota"]["note"] == "" and found["quota"]["kept"] == "56"
    scored = [
        per_part(
            score_frames(*tiny(), [Image.fromarray(view.pixels) for view in item.views], item.question.text), tiny()[0]
        )
        for item in items
    ]
    batch = batch_of(subject(None), items)
    words = batch.answer("quota", 0.11, evidence={"frames": scored}).words
    right = [word == item.question.answer for word, item in zip(words, items)]
    assert float(found["quota"]["accuracy"]) == pytest.approx(np.mean(right), abs=1e-4)


def test_the_table_has_a_reason_about_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_console, "load_model", lambda source, device: (llava().model, llava().processor))
    found = rows(tmp_path / "scenes.csv")
    assert (found["quota"]["about"], found["quota"]["note"], found["quota"]["kept"]) == ("scenes", "no evidence", "")
    assert "this method reads 'frames'" in found["quota"]["reason"]
