"""Law 2: pruning equals transformers alone on short embeddings and position ids built without vtprune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.contracts import oracle
from tests.contracts.cases import (
    PRUNING_METHODS,
    TOLERANCE,
    Answer,
    Case,
    answer,
    assert_close,
    by_hand,
    cells,
    distance,
    kept_positions,
    unpruned,
)

pytestmark = pytest.mark.law("2 by hand")


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_equals_the_short_prompt(case: Case, positions: str) -> None:
    with case.pruned(positions=positions) as pruner, _rotary_ids(case.model) as seen:
        cached = answer(case.model, case.batch)
        report = pruner.last
        uncached = answer(case.model, case.batch, use_cache=False)
    assert report.positions == positions
    for row, inputs in enumerate(case.rows):
        kept = kept_positions(case, report, row, inputs["input_ids"][0].tolist())
        tokens, logits = by_hand(case, inputs, kept, compact=positions == "compact")
        _agrees(cached, row, tokens, logits)
        _agrees(uncached, row, tokens, logits)
        prompt = oracle.merge(case.model, inputs)
        ids = oracle.compacted(prompt.positions, kept)[0] if positions == "compact" else prompt.positions[:, kept]
        assert torch.equal(_real(seen[0], row, len(kept)), ids), "the ids that reach the rotary embedding"


def _agrees(got: Answer, row: int, tokens: list[int], logits: Tensor) -> None:
    assert_close(got.logits[row], logits)
    assert got.tokens[row].tolist() == tokens


@contextmanager
def _rotary_ids(model: nn.Module) -> Iterator[list[Tensor]]:
    """Position ids of every call of the rotary embedding, after vtprune had its say."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    handle = model.model.language_model.rotary_emb.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _real(ids: Tensor, row: int, length: int) -> Tensor:
    """Ids (1 or 3, length) of a row without its left padding; (t, h, w) ids may come with a leading text row."""
    rows = ids[None] if ids.ndim == 2 else ids[-3:]
    return rows[:, row % rows.shape[1], -length:]


@cells()
def test_auto_compacts_one_dimensional_ids_and_keeps_mrope_ids(case: Case) -> None:
    with case.pruned() as pruner:
        by_default = answer(case.model, case.batch)
        report = pruner.last
    assert report.positions == ("keep" if case.mrope else "compact")
    with case.pruned(positions=report.positions):
        asked_for = answer(case.model, case.batch)
    assert torch.equal(by_default.logits, asked_for.logits)


@cells(methods=PRUNING_METHODS)
def test_pruning_moves_the_logits_far_more_than_the_tolerance(case: Case) -> None:
    with case.pruned():
        got = answer(case.model, case.batch)
    moved = [distance(got.logits[row], unpruned(case.family, case.kind).logits[row]) for row in range(2)]
    assert min(moved) > 1000 * TOLERANCE
