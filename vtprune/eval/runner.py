"""Run a plan over all questions, batch by batch; what was answered before is not asked again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtprune.errors import MissingEvidence, UnsupportedCall, VtpruneError
from vtprune.eval.arms import OWN, REVISION, WHOLE, Step, arm_of, readings
from vtprune.eval.questions import Item, object_tokens
from vtprune.eval.store import Record, Store
from vtprune.eval.subject import Answers, Batch, Subject
from vtprune.seam import find_base

NO_EVIDENCE, NOT_POSSIBLE = "no evidence", "not possible"


@dataclass(kw_only=True)
class Result:
    """A row of the plan over all questions; where it could not be run, `note` says so in two words and `reason` why."""

    method: str
    keep: float | int
    words: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    recall: list[float | None] = field(default_factory=list)
    note: str = ""
    reason: str = ""


def evaluate(
    subject: Subject,
    items: Sequence[Item],
    steps: Sequence[Step],
    *,
    batch: int = 64,
    store: Store | None = None,
    on_step: Callable[[int, int, str], None] | None = None,
) -> list[Result]:
    """Answer every question under every step of the plan.

    Args:
        items: from `draw_items`.
        steps: from `plan`.
        batch: prompts in one call of `generate`.
        store: where answers are kept and found again.
        on_step: called after every batch of a step with how many are done, how many there are, and the method.

    Raises:
        The errors of `wrap` where the unpruned model cannot be run; those of methods and arms become notes.
    """
    find_base(subject.model)
    store = Store(None, {}) if store is None else store
    results = [Result(method=method, keep=keep) for method, keep in steps]
    wanted, total, done = readings(steps, subject.variants), math.ceil(len(items) / batch) * len(steps), 0
    for first in range(0, len(items), batch):
        asked = Batch(subject=subject, items=tuple(items[first : first + batch]), readings=wanted)
        for result in results:
            if not result.note:
                _run(result, asked, first, store)
            done += 1
            if on_step is not None:
                on_step(done, total, result.method)
    return results


def _run(result: Result, asked: Batch, first: int, store: Store) -> None:
    """Add the answers of one batch to a result, or the reason why there are none."""
    recipe = _recipe(result, asked.subject)
    record = store.find(result.method, result.keep, first, recipe)
    if record is None:
        try:
            answers = arm_of(result.method)(asked, result.keep)
            recall = _recall(answers, asked)
        except VtpruneError as error:
            if result.method == "identity":
                raise
            _give_up(result, error)
            return
        record = Record(
            method=result.method,
            keep=result.keep,
            first=first,
            words=answers.words,
            kept=answers.kept,
            recall=recall,
            recipe=recipe,
        )
        store.add(record)
    result.words += record.words
    result.kept += record.kept
    result.recall += record.recall


def _recipe(result: Result, subject: Subject) -> Mapping[str, Any]:
    own = result.method in OWN or result.method in WHOLE
    return {"revision": REVISION} if own else subject.variants.recipe(result.method, result.keep)


def _give_up(result: Result, error: VtpruneError) -> None:
    result.note = NO_EVIDENCE if isinstance(error, MissingEvidence) else NOT_POSSIBLE
    result.reason = str(error)
    for numbers in (result.words, result.kept, result.recall):
        numbers.clear()  # type: ignore[attr-defined]


def _recall(answers: Answers, asked: Batch) -> tuple[float | None, ...]:
    """Share of the object tokens of each picture that were kept."""
    if answers.tokens is None:
        return (None,) * len(answers.words)
    try:
        shown = [object_tokens(item.views, asked.parts) for item in asked.items]
    except UnsupportedCall:
        return (None,) * len(answers.words)
    return tuple(
        round(float(truth[tokens.numpy()].sum() / truth.sum()), 6) if truth.any() else None
        for truth, tokens in zip(shown, answers.tokens, strict=True)
    )
