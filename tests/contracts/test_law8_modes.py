"""Law 8: beams, several answers, seeded sampling, static and absent caches equal transformers on the short prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from tests.contracts import caches, oracle
from tests.contracts.cases import (
    CACHING,
    EDITING,
    IN_LAYERS,
    SHORTENING,
    STEPS,
    TRIMMING,
    Answer,
    Case,
    answer,
    assert_close,
    by_hand,
    candidate_positions,
    cells,
    choices,
    edits_alone,
    kept_tokens,
    whole,
)
from vtprune.errors import UnsupportedCall

pytestmark = pytest.mark.law("8 modes")

MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "several-samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "sampled-beams": {"do_sample": True, "num_beams": 2},
}
"""Modes that transformers run from `inputs_embeds` as well, so that they have an exact reference."""


def wrapped(case: Case, positions: str, **mode: Any) -> tuple[Answer, Any]:
    """Answers of the wrapped model to the left-padded batch, and the report."""
    with case.pruned(positions=positions) as pruner:
        torch.manual_seed(7)
        return answer(case.model, case.batch, steps=4, **mode), pruner.last


def shortened(case: Case, report: Any) -> tuple[list[oracle.Merged], list[list[int]], list[Any], list[list[int]]]:
    """Both rows as the report says they were shortened; of each how many layers its tokens go through, what merges, and
    how many layers store its tokens."""
    repeats = len(report.length_after) // len(case.prompts)
    shorts, depths, merges, stored = [], [], [], []
    for row, (prompt, inputs) in enumerate(zip(case.prompts, case.rows, strict=True)):
        assert all(choices(report, row * repeats + beam) == choices(report, row * repeats) for beam in range(repeats))
        kept = kept_tokens(case, report, row * repeats, inputs["input_ids"][0].tolist())
        prompted = whole(case, prompt, kept.positions)
        shorts.append(oracle.shorten(prompted, kept.positions, compact=report.positions == "compact"))
        depths.append(kept.depths)
        merges.append(kept.merges)
        stored.append(kept.stored)
    return shorts, depths, merges, stored


@cells(methods=SHORTENING)
@pytest.mark.parametrize("mode", MODES)
def test_equals_transformers_on_the_short_prompt(case: Case, mode: str) -> None:
    """With the positions whose continuation transformers can count: compact on one dimension, kept on (t, h, w)."""
    got, report = wrapped(case, "auto", **MODES[mode])
    edits = [edits_alone(case, prompt) for prompt in case.prompts]
    shortly = shortened(case, report)
    torch.manual_seed(7)
    expected = oracle.generate(case.model, *shortly, edits, max_new_tokens=4, **MODES[mode])
    assert len(got.tokens) == len(case.prompts) * MODES[mode].get("num_return_sequences", 1)
    assert torch.equal(got.tokens, expected)


def reference_of(case: Case, report: Any, row: int, inputs: dict[str, Tensor]) -> caches.Reference:
    """Of a method that cuts caches alone, for one row."""
    found = candidate_positions(case, report, row, inputs["input_ids"][0].tolist())
    reference = caches.Reference(case.model, mass=case.settings.get("mass"))
    reference.show([places for _, places in found], case.keep)
    return reference


@cells(methods=CACHING)
@pytest.mark.parametrize("mode", MODES)
def test_equals_transformers_on_a_cache_rewritten_by_hand(case: Case, mode: str) -> None:
    """Row after row, without padding."""
    for prompt, inputs in zip(case.prompts, case.rows, strict=True):
        with case.pruned((prompt,)) as pruner:
            torch.manual_seed(7)
            got, report = answer(case.model, inputs, steps=4, **MODES[mode]), pruner.last
        prompted = oracle.merge(case.model, inputs)
        everything = [[case.layers] * prompted.embeds.shape[1]]
        torch.manual_seed(7)
        with reference_of(case, report, 0, inputs).hooked():
            expected = oracle.generate(
                case.model, [prompted], everything, [()], everything, [None], max_new_tokens=4, **MODES[mode]
            )
        assert torch.equal(got.tokens, expected)


@cells(methods=[method for method in SHORTENING if method not in TRIMMING])
@pytest.mark.parametrize(("mode", "positions"), [("beams", "compact"), ("several-samples", "keep")])
def test_without_a_cache(case: Case, mode: str, positions: str) -> None:
    positions = positions if case.honours(positions) else "keep"
    cached, _ = wrapped(case, positions, **MODES[mode])
    uncached, report = wrapped(case, positions, use_cache=False, **MODES[mode])
    assert uncached.cache is None
    assert report.length_before[0] > report.length_after[0] or case.keep == 1.0
    assert torch.equal(uncached.sequences, cached.sequences)


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_a_static_cache(case: Case, positions: str, refuses: Callable[..., Any]) -> None:
    if case.method in (*IN_LAYERS, *CACHING, *EDITING):
        expected, _ = wrapped(case, positions)
        with refuses(UnsupportedCall, "static cache"):
            wrapped(case, positions, cache_implementation="static")
        assert torch.equal(wrapped(case, positions)[0].logits, expected.logits)
        return
    static, report = wrapped(case, positions, cache_implementation="static")
    assert isinstance(static.cache, StaticCache)
    for row, (prompt, inputs) in enumerate(zip(case.prompts, case.rows, strict=True)):
        kept = kept_tokens(case, report, row, inputs["input_ids"][0].tolist())
        tokens, logits = by_hand(case, prompt, kept, compact=positions == "compact", steps=4)
        assert_close(static.logits[row], logits)
        assert static.tokens[row].tolist() == tokens
    beams, _ = wrapped(case, positions, cache_implementation="static", **MODES["beams"])
    dynamic, _ = wrapped(case, positions, **MODES["beams"])
    assert torch.equal(beams.sequences, dynamic.sequences)


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
@torch.no_grad()
def test_a_loop_written_by_hand_without_position_ids(case: Case, positions: str) -> None:
    for prompt, inputs in zip(case.prompts, case.rows, strict=True):
        with case.pruned((prompt,), positions=positions) as pruner:
            out = case.model(**inputs, use_cache=True)
            logits = [out.logits[0, -1]]
            for _ in range(STEPS - 1):
                word = _allowed(case, logits[-1]).argmax().view(1, 1)
                out = case.model(input_ids=word, past_key_values=out.past_key_values)
                logits.append(out.logits[0, -1])
            report = pruner.last
        if case.method in CACHING:
            reference, merged = reference_of(case, report, 0, inputs), oracle.merge(case.model, inputs)
            _, expected = reference.decode(merged, steps=STEPS, forbidden=case.forbidden)
        else:
            kept = kept_tokens(case, report, 0, inputs["input_ids"][0].tolist())
            _, expected = by_hand(case, prompt, kept, compact=positions == "compact")
        assert_close(torch.stack(logits), expected)


CHOICES: dict[str, tuple[Any, list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
}
"""What transformers do to the rows of a cache, and which rows are there afterwards."""


@cells()
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_rows_of_the_cache_may_be_chosen_anew(case: Case, choice: str) -> None:
    """The rows differ in padding and, compacted, in what they vacated: all that has to move with them."""
    change, rows = CHOICES[choice]
    words = _next_words(case)
    chosen = {name: values[..., rows, :] for name, values in words.items()}
    with case.pruned(positions="compact" if case.honours("compact") else "keep"):
        first, second = (answer(case.model, case.batch, steps=1).cache for _ in range(2))
        expected = case.model(**words, past_key_values=first).logits
        change(second)
        got = case.model(**chosen, past_key_values=second).logits
    assert_close(got, expected[rows])


def _next_words(case: Case) -> dict[str, Tensor]:
    """The call for one more word of both rows; its ids go on from those of the whole prompt."""
    ids = torch.stack([oracle.merge(case.model, inputs).positions[:, -1:] + 1 for inputs in case.rows], dim=1)
    return {
        "input_ids": torch.tensor([[7], [9]]),
        "attention_mask": torch.nn.functional.pad(case.batch["attention_mask"], (0, 1), value=1),
        "position_ids": ids if case.mrope else ids[0],
    }


def _allowed(case: Case, logits: Tensor) -> Tensor:
    allowed = logits.clone()
    allowed[case.forbidden] = float("-inf")
    return allowed


@cells()
def test_the_modes_differ_from_greedy(case: Case) -> None:
    """An option that is ignored would show."""
    greedy, _ = wrapped(case, "auto")
    for mode in MODES.values():
        assert not torch.equal(wrapped(case, "auto", **mode)[0].sequences, greedy.sequences)
