"""Every published method against its loop form, at several sizes; where it merges, its rows as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.fidelity import loops_methods as loops
from tests.fidelity import loops_stages as stages
from tests.fidelity.loops import mmr
from vtprune.catalog import build
from vtprune.readings import BlockAttention
from vtprune.stages.rules import ClsOrReceived, MoreVaried, SinkRows
from vtprune.types import Ordinal, Part, VisualTokens

SIZES = [
    (1, (1, 1), 1),
    (2, (2, 3), 1),
    (2, (2, 3), 6),
    (3, (5, 3), 4),
    (2, (1, 13), 7),
    (2, (7, 6), 42),
    (2, (7, 9), 20),
    (1, (9, 11), 64),
]
"""Pictures, grid, and how many tokens to keep."""

every_size = pytest.mark.parametrize(("S", "grid", "k"), SIZES)
with_and_without_cls = pytest.mark.parametrize("has_cls", [True, False])


def pictures(features: Any, grid: tuple[int, int], **evidence: Any) -> VisualTokens:
    """A stack of pictures as a stage sees it; evidence by name, `importance_at_0_38` for `importance@0.375`."""
    S, N, _ = features.shape
    return VisualTokens(
        features=features,
        parts=(Part(start=0, stop=N, kind="image", grid=grid),),
        ordinals=tuple(Ordinal(segment=number) for number in range(S)),
        evidence={name: torch.as_tensor(value) for name, value in evidence.items()},
    )


def drawn(S: int, grid: tuple[int, int], D: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(S, grid[0] * grid[1], D, generator=torch.Generator().manual_seed(100 * S + D + seed))


def scores(S: int, grid: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Positive and without ties, as attention is."""
    return drawn(S, grid, 1, seed)[..., 0].exp()


def attention(S: int, grid: tuple[int, int], has_cls: bool, seed: int = 0) -> BlockAttention:
    """Queries and keys of a block of two heads."""
    n = grid[0] * grid[1] + has_cls
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, S, 2, n, 4, generator=generator, dtype=torch.float64) * 1.5
    return BlockAttention(query=query, key=key, scale=0.5, has_cls=has_cls)


def maps(seen: BlockAttention) -> list[np.ndarray]:
    """The whole map (H, n, n) of every picture."""
    return [stages.attention_map(q, k, seen.scale) for q, k in zip(seen.query.numpy(), seen.key.numpy(), strict=True)]


def rows(*stacks: torch.Tensor) -> list[tuple[np.ndarray, ...]]:
    """Picture by picture, in double precision."""
    return list(zip(*(stack.double().numpy() for stack in stacks), strict=True))


def kept(method: str, stack: VisualTokens, k: int, **parameters: Any) -> list[list[int]]:
    return build(method, parameters).run(stack, k).keep.tolist()


def merges_as(expected: list[loops.Merged], method: str, stack: VisualTokens, k: int, **parameters: Any) -> None:
    """Kept tokens are equal, merged rows within 1e-5."""
    pipeline = build(method, parameters)
    selection = pipeline.run(stack, k)
    assert selection.keep.tolist() == [kept for kept, _ in expected]
    merged = pipeline.merge(stack, selection)
    assert merged is not None
    for row, (_, own) in zip(merged.rows, expected, strict=True):
        np.testing.assert_allclose(row.double().numpy(), own, atol=1e-5, rtol=0)


@with_and_without_cls
@every_size
def test_vtc_cls_is_the_loop(S: int, grid: tuple[int, int], k: int, has_cls: bool) -> None:
    layers = [attention(S, grid, has_cls, seed) for seed in range(7)]
    total = sum(ClsOrReceived()(layer) for layer in layers)
    expected = [loops.vtc_cls(list(own), has_cls, k) for own in zip(*(maps(layer) for layer in layers), strict=True)]
    assert kept("vtc_cls", pictures(drawn(S, grid, 2), grid, **{"importance@0.667+": total}), k) == expected


@pytest.mark.parametrize(("since", "first"), [(2 / 3, 16), (0.0, 0), (1.0, 22)])
def test_vtc_cls_reads_the_layers_of_the_paper(since: float, first: int) -> None:
    """Layers 16 to 22 of 24, `attentions[16:-1]` where the last but one makes the features."""
    (reading,) = build("vtc_cls", {"since": since}).readings.values()
    assert list(reading.blocks(24, 22)) == list(range(24))[first:-1]


@pytest.mark.parametrize(
    ("method", "block"), [("hiprune", 9), ("prumerge_plus", 23), ("fopru_rank", 22), ("vflowopt_select", 22)]
)
def test_other_methods_read_the_layer_of_the_paper(method: str, block: int) -> None:
    """Of 24, the last but one making the features. What is called "importance" or "keys" is always read there."""
    (reading,) = build(method).readings.values()
    assert list(reading.blocks(24, 22)) == [block]


@with_and_without_cls
@every_size
def test_fopru_is_the_loop(S: int, grid: tuple[int, int], k: int, has_cls: bool) -> None:
    seen = attention(S, grid, has_cls)
    stack = pictures(drawn(S, grid, 2), grid, patch_attention=MoreVaried()(seen))
    assert kept("fopru_rank", stack, k) == [loops.fopru_rank(own, has_cls, k) for own in maps(seen)]
    assert kept("fopru_row", stack, k) == [loops.fopru_row(own, has_cls, k, grid[1]) for own in maps(seen)]


@every_size
def test_text_dominance_is_the_loop(S: int, grid: tuple[int, int], k: int) -> None:
    importance = scores(S, grid)
    stack = pictures(drawn(S, grid, 2), grid, importance=importance)
    assert kept("text_dominance", stack, k) == [loops.text_dominance(*own, k) for own in rows(importance)]


@pytest.mark.parametrize("contextual", [0.15625, 0.0, 0.5])
@every_size
def test_visionzip_is_the_loop(S: int, grid: tuple[int, int], k: int, contextual: float) -> None:
    features, keys, importance = drawn(S, grid, 8), drawn(S, grid, 5), scores(S, grid)
    expected = [loops.visionzip(*own, k, contextual) for own in rows(features, keys, importance)]
    stack = pictures(features, grid, keys=keys, importance=importance)
    merges_as(expected, "visionzip", stack, k, contextual=contextual)


@pytest.mark.parametrize("important", [0.5, 0.75, 1.0])
@every_size
def test_vispruner_is_the_loop(S: int, grid: tuple[int, int], k: int, important: float) -> None:
    inner, importance = drawn(S, grid, 8), scores(S, grid)
    expected = [loops.vispruner(*own, k, important) for own in rows(inner, importance)]
    stack = pictures(drawn(S, grid, 3), grid, encoder_features=inner, importance=importance)
    assert kept("vispruner", stack, k, important=important) == expected


@pytest.mark.parametrize(("evidence", "sign"), [("relevance", -1), ("relevance", 1), ("importance", 1)])
@every_size
def test_cdpruner_is_the_loop(S: int, grid: tuple[int, int], k: int, evidence: str, sign: int) -> None:
    """Cosines to the question change their sign where tokens unlike it are the relevant ones, as in CLIP."""
    features, given = drawn(S, grid, 128), scores(S, grid).tanh()
    expected = [loops.cdpruner(x, sign * own, k) for x, own in rows(features, given)]
    parameters = {"evidence": evidence} | ({"sign": sign} if evidence == "relevance" else {})
    assert kept("cdpruner", pictures(features, grid, **{evidence: given}), k, **parameters) == expected


@every_size
def test_cdpruner_without_relevance_is_the_loop(S: int, grid: tuple[int, int], k: int) -> None:
    """All single tokens are equally likely, so the loop starts where the method does."""
    features = drawn(S, grid, 128)
    stack = pictures(features, grid)
    starts = [row[0] for row in kept("cdpruner", stack, 1, evidence="none")]
    expected = [loops.likeliest(x, start, k) for (x,), start in zip(rows(features), starts, strict=True)]
    assert kept("cdpruner", stack, k, evidence="none") == expected


@pytest.mark.parametrize("spread", ["sum", "min"])
@every_size
def test_todre_select_is_the_loop(S: int, grid: tuple[int, int], k: int, spread: str) -> None:
    features, importance = drawn(S, grid, 8), scores(S, grid)
    expected = [loops.selectors.dispersion(*own, k, reduce=spread, first="score") for own in rows(features, importance)]
    assert kept("todre_select", pictures(features, grid, importance=importance), k, spread=spread) == expected


@pytest.mark.parametrize(("threshold", "recycled"), [(34.76, 0.016), (1.1, 0.2), (1.5, 0.5), (1.1, 0.0)])
@every_size
def test_vflowopt_is_the_loop(S: int, grid: tuple[int, int], k: int, threshold: float, recycled: float) -> None:
    features, seen = drawn(S, grid, 8), attention(S, grid, False)
    expected = [
        loops.vflowopt(x, stages.sink_rows(own, False, threshold), k, grid, recycled)
        for (x,), own in zip(rows(features), maps(seen), strict=True)
    ]
    name = f"sink_attention(threshold={threshold:g})"
    stack = pictures(features, grid, **{name: SinkRows(threshold=threshold)(seen)})
    merges_as(expected, "vflowopt_select", stack, k, threshold=threshold, recycled=recycled)


@every_size
def test_prunesid_is_the_loop(S: int, grid: tuple[int, int], k: int) -> None:
    """Signs of components do not count, nor whether they come from an eigenvalue or a singular value solver."""
    inner, importance = drawn(S, grid, 128), scores(S, grid)
    expected = [loops.prunesid(*own, k) for own in rows(inner, importance)]
    stack = pictures(drawn(S, grid, 3), grid, encoder_features=inner, importance=importance)
    assert kept("prunesid", stack, k) == expected


@pytest.mark.parametrize(("chunks", "diversity"), [(16, 0.09), (3, 2.0), (1, 0.0)])
@every_size
def test_holov_is_the_loop(S: int, grid: tuple[int, int], k: int, chunks: int, diversity: float) -> None:
    features, importance = drawn(S, grid, 4), scores(S, grid)
    expected = [loops.selectors.holov(*own, k, chunks, diversity) for own in rows(features, importance)]
    stack = pictures(features, grid, importance=importance)
    assert kept("holov", stack, k, chunks=chunks, diversity=diversity) == expected


@pytest.mark.parametrize("outliers", [0.25, 0.6, 1.0])
@every_size
def test_prumerge_plus_is_the_loop(S: int, grid: tuple[int, int], k: int, outliers: float) -> None:
    features, keys, seen = drawn(S, grid, 8), drawn(S, grid, 5), scores(S, grid)
    expected = [loops.prumerge_plus(*own, k, outliers) for own in rows(features, keys, seen)]
    stack = pictures(features, grid, keys=keys, **{"importance@1": seen})
    merges_as(expected, "prumerge_plus", stack, k, outliers=outliers)


@pytest.mark.parametrize("outliers", [0.25, 0.4, 1.0])
@every_size
def test_adaptive_prumerge_plus_counts_as_the_loop(S: int, grid: tuple[int, int], k: int, outliers: float) -> None:
    seen = scores(S, grid, seed=5) ** 2
    stack = pictures(drawn(S, grid, 8), grid, **{"importance@1": seen})
    expected = [loops.adaptive_budget(own, k, outliers) for (own,) in rows(seen)]
    assert build("prumerge_plus", {"adaptive": True, "outliers": outliers}).count(stack, k).tolist() == expected


@pytest.mark.parametrize("pivots", [8, 3, 1])
@every_size
def test_dart_is_the_loop(S: int, grid: tuple[int, int], k: int, pivots: int) -> None:
    features, keys = drawn(S, grid, 8), drawn(S, grid, 6)
    expected = [loops.dart(*own, k, pivots) for own in rows(features, keys)]
    assert kept("dart", pictures(features, grid, keys=keys), k, pivots=pivots) == expected


@pytest.mark.parametrize("anchors", [0.1, 0.5, 1.0])
@every_size
def test_hiprune_is_the_loop(S: int, grid: tuple[int, int], k: int, anchors: float) -> None:
    middle, deep = scores(S, grid), scores(S, grid, seed=1)
    expected = [loops.hiprune(*own, k, grid, anchors) for own in rows(middle, deep)]
    stack = pictures(drawn(S, grid, 3), grid, importance=deep, **{"importance@0.375": middle})
    assert kept("hiprune", stack, k, anchors=anchors) == expected


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.5])
@every_size
def test_scope_is_the_loop(S: int, grid: tuple[int, int], k: int, alpha: float) -> None:
    features, importance = drawn(S, grid, 8), scores(S, grid)
    expected = [loops.selectors.scope(*own, k, alpha=alpha) for own in rows(features, importance)]
    assert kept("scope", pictures(features, grid, importance=importance), k, alpha=alpha) == expected


@every_size
def test_pool_is_the_loop(S: int, grid: tuple[int, int], k: int) -> None:
    features = drawn(S, grid, 8)
    merges_as([loops.pool(*own, k, grid) for own in rows(features)], "pool", pictures(features, grid), k)


@every_size
def test_idpruner_is_the_loop(S: int, grid: tuple[int, int], k: int) -> None:
    """Plain MMR, of importance or of scores from outside."""
    features, worth = drawn(S, grid, 3), scores(S, grid)
    expected = [mmr(own, x, k, 0.3) for x, own in zip(features.numpy(), worth.numpy(), strict=True)]
    assert kept("idpruner", pictures(features, grid, importance=worth), k, lam=0.3) == expected
    assert kept("idpruner", pictures(features, grid, scores=worth), k, lam=0.3, importance="given") == expected
