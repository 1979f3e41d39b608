"""Runs: batches, rows without a number, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionModel

from tests.eval.common import llava
from vtprune.adapters import family_of
from vtprune.adapters.base import no_tower
from vtprune.errors import InvalidOption, UnsupportedModel
from vtprune.eval.arms import plan
from vtprune.eval.questions import draw_items, object_tokens
from vtprune.eval.runner import Result, evaluate
from vtprune.eval.store import Store, fingerprint
from vtprune.eval.subject import Subject
from vtprune.types import Part

ITEMS = draw_items("test", 0, 3)
STEPS = plan(["divprune", "fastervlm"], [0.5, 3])
SETTINGS = {"seed": 0, "weights": "abc"}


def run(store: Store | None = None, batch: int = 9, **options: Any) -> list[Result]:
    return evaluate(llava(), ITEMS, STEPS, batch=batch, store=store, **options)


def test_every_row_has_an_answer_to_every_question() -> None:
    seen: list[tuple[int, int, str]] = []
    results = run(on_step=lambda *step: seen.append(step))
    assert [(result.method, result.keep) for result in results] == list(STEPS)
    assert all(len(result.words) == len(result.kept) == len(result.recall) == len(ITEMS) for result in results)
    assert [done for done, *_ in seen] == list(range(1, 3 * len(STEPS) + 1))
    assert {total for _, total, _ in seen} == {3 * len(STEPS)}


def test_recall_is_the_share_of_object_tokens() -> None:
    results = {(result.method, result.keep): result for result in run()}
    assert set(results["identity", 1.0].recall) == {1.0}
    assert set(results["pool", 0.5].recall) == {None} == set(results["blind", 1.0].recall)
    part = Part(start=0, stop=16, kind="image", grid=(4, 4))
    shown = [object_tokens(item.views, [part]).sum() for item in ITEMS]
    best = [round(float(min(3, count) / count), 6) for count in shown]
    assert all(got <= most for got, most in zip(results["oracle", 3].recall, best))
    assert sum(results["oracle", 3].recall) > sum(results["random", 3].recall)
    assert set(results["oracle", 3].kept) == {3}


def test_a_method_without_evidence_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.api.family_of", lambda config: dataclasses.replace(family_of(config), tower=no_tower))
    results = {(result.method, result.keep): result for result in run()}
    for keep in (0.5, 3):
        row = results["fastervlm", keep]
        assert (row.note, row.words, row.kept) == ("no evidence", [], [])
        assert "needs 'importance'" in row.reason
        assert results["divprune", keep].words and not results["divprune", keep].note


def test_an_arm_that_cannot_be_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower that cannot interpolate its position embeddings."""
    original = CLIPVisionModel.forward

    def fixed(self: Any, pixel_values: Any, **options: Any) -> Any:
        return original(self, pixel_values, **options)

    monkeypatch.setattr(CLIPVisionModel, "forward", fixed)
    results = {(result.method, result.keep): result for result in run()}
    assert (results["downsample", 3].note, results["downsample", 3].words) == ("not possible", [])
    assert "one size only" in results["downsample", 3].reason
    assert results["pool", 3].words and results["identity", 1.0].words


def test_a_model_that_cannot_be_pruned_is_an_error() -> None:
    subject = Subject(model=llava().model.lm_head, processor=llava().processor)
    with pytest.raises(UnsupportedModel):
        evaluate(subject, ITEMS[:1], STEPS)


class _Interrupted(BaseException):
    pass


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(Store(tmp_path / "whole.jsonl", SETTINGS))
    path = tmp_path / "torn.jsonl"

    def stop(done: int, *_: object) -> None:
        if done == len(STEPS) + 5:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        run(Store(path, SETTINGS), on_step=stop)
    assert len(path.read_text().splitlines()) == 1 + len(STEPS) + 5
    with path.open("a") as file:
        file.write('{"method": "random", "keep": 0.')
    asked: list[str] = []
    original = Subject.answer
    monkeypatch.setattr(Subject, "answer", lambda *a, **k: asked.append(a[2]) or original(*a, **k))
    assert run(Store(path, SETTINGS)) == whole
    # Once more the whole tokens of the batch that was under way, for its layout.
    assert len(asked) == 2 * len(STEPS) - 5 + 1
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    asked.clear()
    assert run(Store(path, SETTINGS)) == whole
    assert asked == []


def test_methods_and_budgets_may_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    evaluate(llava(), ITEMS, plan(["divprune"], [0.5]), batch=9, store=Store(path, SETTINGS))
    lines = path.read_text()
    assert run(Store(path, SETTINGS)) == run()
    assert path.read_text().startswith(lines)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace('"seed": 0', '"seed": 7'), "seed: 7 there, 0 now.*delete it, or name another"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "another format"),
        (lambda text: text.replace('"first"', '"fist"', 1), "line 2 of .* is damaged"),
        (lambda text: text.replace('"name": "divprune"', '"name": "old"'), "another version of 'divprune'"),
        (lambda text: "method,keep\n" + text, "holds no answers of an evaluation"),
        (lambda text: "some notes", "holds no answers of an evaluation"),
    ],
)
def test_answers_of_other_settings_are_refused(tmp_path: Path, change: Any, says: str) -> None:
    path = tmp_path / "answers.jsonl"
    evaluate(llava(), ITEMS[:2], plan(["divprune"], [0.5]), store=Store(path, SETTINGS))
    before = change(path.read_text())
    path.write_text(before)
    with pytest.raises(InvalidOption, match=says):
        evaluate(llava(), ITEMS[:2], plan(["divprune"], [0.5]), store=Store(path, SETTINGS))
    assert path.read_text() == before


def test_the_file_begins_with_its_settings(tmp_path: Path) -> None:
    Store(tmp_path / "answers.jsonl", SETTINGS)
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == {"format": 1, "settings": SETTINGS}


def test_the_fingerprint_follows_every_weight() -> None:
    model = llava().model
    before = fingerprint(model)
    assert fingerprint(model) == before
    bias = model.model.multi_modal_projector.linear_1.bias.data
    kept = bias[0].clone()
    bias[0] += 1e-3
    assert fingerprint(model) != before
    bias[0] = kept
    assert fingerprint(model) == before
