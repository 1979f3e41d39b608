"""Law 3: a batch equals its rows alone, logits, tokens and what was kept; no row sees its batch-mates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contracts.cases import (
    CACHING,
    EXACT_METHODS,
    FILTERING,
    IN_LAYERS,
    PRUNING_METHODS,
    TOLERANCE,
    Case,
    answer,
    assert_close,
    by_hand,
    cells,
    choices,
    distance,
    handed_over,
    kept_tokens,
    unpruned,
)
from tests.models import PAD, Prompt

pytestmark = pytest.mark.law("3 batch")

GRIDS = (
    Prompt(images=((30, 64),), seed=21),
    Prompt(images=((60, 64), (30, 92), (92, 20)), text_after=6, seed=22),
    Prompt(images=((30, 92), (30, 64)), text_before=7, seed=23),
)
MIXED = (Prompt(text_before=9, seed=31), *GRIDS[:2], Prompt(text_before=2, seed=32))
MIXED_CLIPS = (
    Prompt(text_before=9, seed=41),
    Prompt(clips=((32, 32, 4),), seed=42),
    Prompt(images=((30, 64),), clips=((32, 32, 4), (32, 32, 4)), text_after=6, seed=43),
    Prompt(images=((60, 64), (30, 92)), seed=44),
)


def check_rows(case: Case, prompts: tuple[Prompt, ...], **options: object) -> None:
    """Batch and rows alone, under one wrap."""
    batch = case.inputs(prompts)
    with case.pruned(prompts, **options) as pruner:
        with handed_over(case.model) as to_all:
            together = answer(case.model, batch)
        report = pruner.last
        for row, prompt in enumerate(prompts):
            with case.using(pruner, (prompt,)), handed_over(case.model) as to_one:
                alone = answer(case.model, case.inputs((prompt,)))
            assert choices(pruner.last, 0) == choices(report, row)
            assert len(choices(report, row)) == len(prompt.images) + len(prompt.clips)
            assert pruner.last.length_after == (report.length_after[row],)
            assert_close(to_all[0][row, -to_one[0].shape[1] :], to_one[0][0])
            assert_close(together.logits[row], alone.logits[0])
            assert torch.equal(together.tokens[row], alone.tokens[0])


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_different_numbers_of_pictures_and_crop_grids(case: Case, positions: str) -> None:
    check_rows(case, GRIDS if case.kind == "image" else case.prompts, positions=positions)


@cells()
def test_with_rows_of_text_alone_and_of_both_kinds(case: Case) -> None:
    check_rows(case, MIXED if case.kind == "image" else MIXED_CLIPS)


@pytest.mark.kinds
@cells()
def test_with_a_number_of_tokens_for_a_budget(case: Case) -> None:
    if case.keep == 1.0:
        check_rows(case, case.prompts, keep=1.0)
    else:
        check_rows(case, case.prompts, keep=case.few)


@pytest.mark.kinds
@cells()
@pytest.mark.parametrize("per", ["part", "prompt"])
def test_with_budgets_per_part_and_per_prompt(case: Case, per: str) -> None:
    check_rows(case, case.prompts, per=per)


@cells(methods=[method for method in PRUNING_METHODS if method not in CACHING])
def test_ragged_counts_in_a_batch_without_padding(case: Case) -> None:
    prompts = _of_equal_length(case)
    batch = case.inputs(prompts)
    assert batch["attention_mask"].all()
    with case.pruned(prompts, keep=case.few) as pruner:
        got = answer(case.model, batch)
        report = pruner.last
    assert report.length_before[0] == report.length_before[1]
    assert report.length_after[0] != report.length_after[1]
    for row, prompt in enumerate(prompts):
        kept = kept_tokens(case, report, row, case.inputs((prompt,))["input_ids"][0].tolist())
        tokens, logits = by_hand(case, prompt, kept, compact=report.positions == "compact", keep=case.few)
        assert_close(got.logits[row], logits)
        assert got.tokens[row].tolist() == tokens


def _of_equal_length(case: Case) -> tuple[Prompt, ...]:
    """The prompts of the case, the shorter one with more words at its end."""
    lengths = [inputs["input_ids"].shape[1] for inputs in case.rows]
    missing = [max(lengths) - length for length in lengths]
    return tuple(replace(p, text_after=p.text_after + n) for p, n in zip(case.prompts, missing, strict=True))


@cells()
@torch.no_grad()
def test_right_padding_in_a_plain_forward(case: Case) -> None:
    batch, padding = _right_padded(case.batch)
    assert any(padding)
    with case.pruned() as pruner:
        together = case.model(**batch).logits
        report = pruner.last
        for row, prompt in enumerate(case.prompts):
            with case.using(pruner, (prompt,)):
                alone = case.model(**case.inputs((prompt,))).logits[0]
            assert choices(pruner.last, 0) == choices(report, row)
            assert_close(together[row, : len(alone)], alone)


@pytest.mark.kinds
@cells()
@torch.no_grad()
def test_left_padding_in_a_plain_forward(case: Case) -> None:
    with case.pruned() as pruner:
        together = case.model(**case.batch).logits
        for row, prompt in enumerate(case.prompts):
            with case.using(pruner, (prompt,)):
                alone = case.model(**case.inputs((prompt,))).logits[0]
            assert_close(together[row, -len(alone) :], alone)


def _right_padded(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
    """The batch with the padding of every row at its end, and how much it is."""
    padding = (batch["input_ids"] == PAD).sum(dim=1).tolist()
    moved = dict(batch)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in batch:
            moved[name] = torch.stack([row.roll(-pad) for row, pad in zip(batch[name], padding, strict=True)])
    return moved, padding


@cells(methods=[method for method in (*EXACT_METHODS, *IN_LAYERS) if method not in FILTERING])
def test_another_choice_would_show(case: Case) -> None:
    """The comparison of logits above is sensitive to one token more, or one layer where whole layers count."""
    with case.pruned(keep=case.few):
        few = answer(case.model, case.batch, steps=1)
    with case.pruned(keep=case.more):
        more = answer(case.model, case.batch, steps=1)
    assert distance(more.logits, few.logits) > 100 * TOLERANCE
    assert distance(few.logits, unpruned(case).logits[:, :1]) > 1000 * TOLERANCE
