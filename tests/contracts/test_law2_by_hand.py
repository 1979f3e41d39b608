"""Law 2: pruning equals transformers alone on short embeddings and position ids built without vtprune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests.contracts import caches, oracle
from tests.contracts.cases import (
    CACHING,
    EDITING,
    IN_LAYERS,
    IN_TOWER,
    LEAVING,
    MERGING,
    MERGING_INSIDE,
    PIPELINES,
    PRUNING_METHODS,
    SHORTENING,
    TOLERANCE,
    Answer,
    Case,
    answer,
    assert_close,
    by_hand,
    candidate_positions,
    cells,
    depths_of,
    distance,
    handed_over,
    kept_positions,
    kept_tokens,
    placeholders,
    unpruned,
)
from vtprune.errors import UnsupportedCall
from vtprune.report import PruneReport

pytestmark = pytest.mark.law("2 by hand")


@cells(methods=SHORTENING)
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_equals_the_short_prompt(case: Case, positions: str) -> None:
    with case.pruned(positions=positions) as pruner, _rotary_ids(case.model) as seen:
        cached = answer(case.model, case.batch)
        report = pruner.last
        uncached = answer(case.model, case.batch, use_cache=False)
    assert report.positions == positions
    for row, (prompt, inputs) in enumerate(zip(case.prompts, case.rows, strict=True)):
        into = kept_tokens(case, report, row, inputs["input_ids"][0].tolist())
        compact = positions == "compact"
        _agrees(cached, row, *by_hand(case, prompt, into, compact=compact))
        _agrees(uncached, row, *by_hand(case, prompt, into, compact=compact, cached=False))
        before, kept = oracle.merge(case.model, inputs).positions, into.positions
        ids = oracle.compacted(before, kept)[0] if positions == "compact" else before[:, kept]
        assert torch.equal(_real(seen[0], row, len(kept)), ids), "the ids that reach the rotary embedding"


@cells(methods=CACHING)
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_a_cache_of_fewer_tokens_equals_one_rewritten_by_hand(case: Case, positions: str) -> None:
    """Padded rows of several pictures; what is stored of each token is what the report says."""
    with case.pruned(positions=positions) as pruner:
        got = answer(case.model, case.batch)
        report = pruner.last
    assert report.kept == report.tokens, "all of them pass"
    for row, inputs in enumerate(case.rows):
        found = [*candidate_positions(case, report, row, inputs["input_ids"][0].tolist())]
        reference = caches.Reference(case.model, mass=case.settings.get("mass"))
        reference.show([places for _, places in found], case.keep)
        merged = oracle.merge(case.model, inputs)
        _agrees(got, row, *reference.decode(merged, steps=got.logits.shape[1], forbidden=case.forbidden))
        for segment, places in found:
            assert torch.allclose(segment.cached, reference.stored[places])


@cells(methods=CACHING)
def test_without_a_cache_there_is_nothing_to_store_in(case: Case) -> None:
    with case.pruned(), pytest.raises(UnsupportedCall, match="use_cache=True"):
        answer(case.model, case.batch, use_cache=False)
    assert torch.equal(answer(case.model, case.batch).logits, unpruned(case).logits)


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
    assert report.positions == case.positions
    with case.pruned(positions=report.positions):
        asked_for = answer(case.model, case.batch)
    assert torch.equal(by_default.logits, asked_for.logits)


@cells(methods=(*PRUNING_METHODS, *EDITING))
def test_pruning_moves_the_logits_far_more_than_the_tolerance(case: Case) -> None:
    with case.pruned():
        got = answer(case.model, case.batch)
    moved = [distance(got.logits[row], unpruned(case).logits[row]) for row in range(2)]
    of_all = min if case.method != "blindsight" else max  # it leaves rows with one picture as they are
    assert of_all(moved) > 1000 * TOLERANCE


@cells(methods=IN_LAYERS)
def test_one_layer_more_would_show(case: Case) -> None:
    """The comparison with the reference is sensitive to how far tokens go that leave between layers."""
    with case.pruned((case.prompts[0],)) as pruner:
        answer(case.model, case.rows[0])
        report = pruner.last
    kept = kept_tokens(case, report, 0, case.rows[0]["input_ids"][0].tolist())
    further = replace(kept, depths=[min(depth + 1, case.layers) for depth in kept.depths])
    assert further != kept or case.method in LEAVING, "something leaves between layers"
    compact = report.positions == "compact"
    expected, moved = (by_hand(case, case.prompts[0], how, compact=compact, steps=1)[1] for how in (kept, further))
    assert further == kept or distance(moved, expected) > 100 * TOLERANCE


@cells(methods=MERGING_INSIDE)
def test_what_merges_between_layers_would_show(case: Case) -> None:
    """Without the means of the tokens that merged, the reference answers otherwise."""
    with case.pruned((case.prompts[1],)) as pruner:
        answer(case.model, case.rows[1])
        report = pruner.last
    kept = kept_tokens(case, report, 0, case.rows[1]["input_ids"][0].tolist())
    assert kept.merges
    compact = report.positions == "compact"
    means, plain = (
        by_hand(case, case.prompts[1], how, compact=compact, steps=1)[1] for how in (kept, replace(kept, merges=()))
    )
    assert distance(plain, means) > 100 * TOLERANCE


MEANS = ("pool", "quota", "visionzip")
"""Methods whose merged rows are plain means."""
NAMED = (*MEANS, "vflowopt_select", "vflowopt")
"""Methods that give a token to one kept one, which the report names; others share it out."""
SUMS = ("prumerge_plus", "prumerge_plus-adaptive")
"""Methods that add parts of other tokens to a kept one."""
CHANGING = tuple(method for method in (*MERGING, *IN_TOWER) if method not in ("zero_tprune", "mustdrop"))
"""Methods that change rows; in two blocks zero_tprune drops patches only behind the last, and of what mustdrop drops at
this budget no window of a tiny picture comes together."""


@cells(methods=CHANGING)
@torch.no_grad()
def test_a_token_becomes_what_it_swallowed(case: Case) -> None:
    """The reference takes merged rows from vtprune: here the embeddings without it say what they may be."""
    changed = 0
    for prompt, inputs in zip(case.prompts, case.rows, strict=True):
        before = oracle.merge(case.model, inputs).embeds[0]
        with case.pruned((prompt,)) as pruner, handed_over(case.model) as seen:
            case.model(**inputs)
            report = pruner.last
        ids = inputs["input_ids"][0].tolist()
        entered = report if case.method not in IN_LAYERS else _of_the_front(case, pruner, inputs)
        assert kept_positions(case, entered, 0, ids) == kept_positions(case, report, 0, ids)
        swallowed = _swallowed(case, entered, ids)
        for position, after in zip(kept_positions(case, report, 0, ids), seen[0][0], strict=True):
            others = swallowed.get(position, [])
            if not others:
                assert torch.equal(after, before[position])
                continue
            changed += distance(after, before[position]) > 1000 * TOLERANCE
            if case.method in MEANS:
                assert_close(after, before[[position, *others]].mean(dim=0))
            if case.method in SUMS and len(others) < len(after) // 2:
                own, *added = _shares(before[[position, *others]], after)
                assert own == pytest.approx(1, abs=1e-3)
                assert min(added) > -1e-3
    assert changed > 0


def _of_the_front(case: Case, pruner: Any, inputs: dict[str, Tensor]) -> PruneReport:
    """The report where nothing leaves behind the cut in front of the language model, and who swallowed what is told."""
    share = pruner._deep.schedule.solve(case.keep)[0]
    front = replace(PIPELINES[case.method], inside=(), before=1.0)
    with vtprune.pruning(case.model, front, keep=share) as alone:
        case.model(**inputs)
        return alone.last


def _shares(tokens: Tensor, mixture: Tensor) -> list[float]:
    """How much of each of the tokens (N, D) there is in a mixture (D,) of them, for N < D."""
    shares = torch.linalg.lstsq(tokens.T.double(), mixture[:, None].double()).solution[:, 0]
    assert_close(shares @ tokens.double(), mixture.double())
    return shares.tolist()


def _swallowed(case: Case, report: PruneReport, ids: list[int]) -> dict[int, list[int]]:
    """Prompt positions of the tokens that may have gone into each kept one of a single row, by its own."""
    if case.method in IN_TOWER:
        visual = [position for position, token in enumerate(ids) if token in placeholders(case.model)]
        return dict.fromkeys(visual, visual)
    found: dict[int, list[int]] = {}
    for segment, candidates in candidate_positions(case, report, 0, ids):
        for index in (index for index, depth in enumerate(depths_of(segment, case.layers)) if depth):
            into = segment.into.tolist() if case.method in NAMED else [index] * segment.n
            assert into[index] == index
            found[candidates[index]] = [candidates[i] for i in range(segment.n) if into[i] == index and i != index]
    return found
