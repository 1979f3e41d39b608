"""Run a plan over all questions, batch by batch; what was answered before is not asked again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedCall, VtpruneError
from vtprune.eval.arms import OWN, REVISION, WHOLE, Arm, Step, arm_of, readings
from vtprune.eval.controls import Control, controlled, controls
from vtprune.eval.questions import Item, object_tokens
from vtprune.eval.store import Record, Store
from vtprune.eval.subject import Answers, Batch, Subject
from vtprune.seam import find_base

NO_EVIDENCE, NOT_POSSIBLE = "no evidence", "not possible"
OUT_OF_REACH = f"{NOT_POSSIBLE}, reaches"
"""Goes on with the lowest and the highest average over layers there is."""


@dataclass(kw_only=True)
class Result:
    """A row of the plan over all questions; where it could not be run, `note` says so in few words and `reason` why.

    `control` names the row of chance at the cuts of a method that cuts between layers.
    """

    method: str
    keep: float | int
    words: list[str] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    recall: list[float | None] = field(default_factory=list)
    control: str = ""
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
    """Answer every question under every step of the plan, and by chance at the cuts of its methods between layers.

    Chance at averages that those cuts do not reach has no row: that of the method says so.

    Args:
        items: from `draw_items`.
        steps: from `plan`.
        batch: prompts in one call of `generate`.
        store: where answers are kept and found again.
        on_step: called after every batch of a step with how many are done, how many there are, and the method.

    Raises:
        The errors of `wrap` where the unpruned model cannot be run; those of methods and arms become notes.
    """
    store = Store(None, {}) if store is None else store
    known = controls(find_base(subject.model), [method for method, _ in steps])
    arms = {control.name: control for control in known.values()}
    results = [
        Result(method=method, keep=keep, control=known[method].name if method in known else "")
        for method, keep in controlled(steps, known)
    ]
    wanted = readings(steps, subject.variants)
    total, done = math.ceil(len(items) / batch) * len(results), 0
    for first in range(0, len(items), batch):
        asked = Batch(subject=subject, items=tuple(items[first : first + batch]), readings=wanted)
        for result in results:
            if not result.note:
                control = known.get(result.method) or arms.get(result.method)
                _run(result, asked, first, store, control)
            done += 1
            if on_step is not None:
                on_step(done, total, result.method)
    return [result for result in results if result.method not in arms or not result.note.startswith(OUT_OF_REACH)]


def _run(result: Result, asked: Batch, first: int, store: Store, control: Control | None) -> None:
    """Add the answers of one batch to a result, or the reason why there are none; a control is its own."""
    own = control if control is not None and control.name == result.method else None
    recipe = _recipe(result, asked.subject, own)
    record = store.find(result.method, result.keep, first, recipe)
    if record is None:
        try:
            arm: Arm = own or arm_of(result.method)
            answers = arm(asked, result.keep)
            recall = _recall(answers, asked)
        except VtpruneError as error:
            if result.method == "identity":
                raise
            _give_up(result, error, asked, control)
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


def _recipe(result: Result, subject: Subject, control: Control | None) -> Mapping[str, Any]:
    if control is not None:
        return {"revision": REVISION, "pipeline": control.pipeline.to_dict()}
    own = result.method in OWN or result.method in WHOLE
    return {"revision": REVISION} if own else subject.variants.recipe(result.method, result.keep)


def _give_up(result: Result, error: VtpruneError, asked: Batch, control: Control | None) -> None:
    result.note = NO_EVIDENCE if isinstance(error, MissingEvidence) else NOT_POSSIBLE
    if control is not None and isinstance(error, InvalidOption) and not control.reaches(result.keep, asked.n):
        result.note = f"{OUT_OF_REACH} {control.reach}"
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
