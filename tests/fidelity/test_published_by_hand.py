"""The published methods on pictures small enough to work out by hand, two cases each at least."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fidelity.test_methods import at_angles
from tests.fidelity.test_published_methods import kept, pictures
from tests.fidelity.test_rules import of_maps
from vtprune.catalog import build
from vtprune.stages.rules import ClsRow, MoreVaried, SinkRows
from vtprune.types import VisualTokens


def picture(grid: tuple[int, int], features: torch.Tensor | None = None, **evidence: Any) -> VisualTokens:
    """One picture, with the features 10, 20, 30 and so on where none are given; scores come as lists."""
    N = grid[0] * grid[1]
    if features is None:
        features = torch.arange(10.0, 10.0 * N + 1, 10.0)[None, :, None]
    return pictures(features, grid, **{name: [x] if isinstance(x, list) else x for name, x in evidence.items()})


def keeps(method: str, stack: VisualTokens, k: int, **parameters: Any) -> list[int]:
    return kept(method, stack, k, **parameters)[0]


def becomes(method: str, stack: VisualTokens, k: int, **parameters: Any) -> dict[int, float]:
    """What every kept token is after merging, a feature of a single number."""
    pipeline = build(method, parameters)
    selection = pipeline.run(stack, k)
    merged = pipeline.merge(stack, selection)
    assert merged is not None
    return dict(zip(selection.keep[0].tolist(), merged.rows[0, :, 0].tolist(), strict=True))


def test_vtc_cls_by_hand() -> None:
    """Layers give .5, .1, .3 and .1, .3, .4, in all .6, .4, .7. The last alone would prefer the second to the first."""
    even = [0.25] * 4
    layers = [of_maps([[0.1, 0.5, 0.1, 0.3], even, even, even], has_cls=True)]
    layers += [of_maps([[0.2, 0.1, 0.3, 0.4], even, even, even], has_cls=True)]
    stack = picture((1, 3), **{"importance@0.667+": sum(ClsRow()(layer) for layer in layers)})
    assert keeps("vtc_cls", stack, 1) == [2]
    assert keeps("vtc_cls", stack, 2) == [0, 2]


def test_fopru_by_hand() -> None:
    """Four patches pay .1, .8, .6 and .4 of their attention to patches, evenly, so that all get the same.

    The best two are the second and third; the rows have .9 and 1. Where all pay .8, as .1, .4, .2 and .1, what they get
    decides: the second and third again, but rows of .5 and .3.
    """
    cls = [0.2] * 5
    pays = [[1 - paid, *[paid / 4] * 4] for paid in (0.1, 0.8, 0.6, 0.4)]
    stack = picture((2, 2), patch_attention=MoreVaried()(of_maps([cls, *pays], has_cls=True)))
    assert keeps("fopru_rank", stack, 2) == [1, 2]
    assert keeps("fopru_row", stack, 2) == [2, 3]
    assert keeps("fopru_row", stack, 3) == [1, 2, 3]
    stack = picture(
        (2, 2), patch_attention=MoreVaried()(of_maps([cls, *[[0.2, 0.1, 0.4, 0.2, 0.1]] * 4], has_cls=True))
    )
    assert keeps("fopru_rank", stack, 2) == [1, 2]
    assert keeps("fopru_row", stack, 2) == [0, 1]
    assert keeps("fopru_row", stack, 1) == [1]


def test_text_dominance_by_hand() -> None:
    """Of .1, .4, .3, .2 two reach .3. Of .3, .3, .2, .3 three reach .3, and the first two of them stay."""
    assert keeps("text_dominance", picture((2, 2), importance=[0.1, 0.4, 0.3, 0.2]), 2) == [1, 2]
    assert keeps("text_dominance", picture((2, 2), importance=[0.3, 0.3, 0.2, 0.3]), 2) == [0, 1]


def test_visionzip_by_hand() -> None:
    """One dominant token, 3; of 0, 1, 2, 4, 5 the middle one takes the others in: 10 + 20 + 30 + 50 + 60 over 5.

    With 0 and 5 dominant, of 1 to 4 the targets are 2 and 4. The key of 1 is near that of 4, that of 3 near that of 2.
    """
    stack = picture((2, 3), importance=[0.1, 0.2, 0.1, 0.9, 0.1, 0.1], keys=at_angles(0, 0, 0, 0, 0, 0))
    assert becomes("visionzip", stack, 2, contextual=0.5) == pytest.approx({2: 34, 3: 40})
    stack = picture((2, 3), importance=[0.9, 0.2, 0.1, 0.1, 0.1, 0.8], keys=at_angles(0, 80, 10, 20, 90, 0))
    assert becomes("visionzip", stack, 4, contextual=0.5) == pytest.approx({0: 10, 2: 35, 4: 35, 5: 60})
    assert becomes("visionzip", stack, 2, contextual=0.0) == pytest.approx({0: 10, 5: 60})


def test_visionzip_shares_its_budget_as_published() -> None:
    """Of 192, 128 and 64 tokens 162, 108 and 54 are dominant."""
    stack = picture((24, 24), importance=torch.rand(1, 576), keys=torch.rand(1, 576, 3))
    pipeline = build("visionzip")
    assert [pipeline.run(stack, k).counts for k in (192, 128, 64)] == [(162, 30), (108, 20), (54, 10)]


def test_vispruner_by_hand() -> None:
    """Four of six: 0 and 1 are important. 2 and 4 are held against 3 and 5, and both go.

    Of five three are important; of 3, 4, 5 at 0, 10 and 90 degrees 3 and 5 are held against 4, and 3 goes.
    """
    stack = picture((2, 3), importance=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], encoder_features=at_angles(0, 0, 0, 0, 10, 90))
    assert keeps("vispruner", stack, 4) == [0, 1, 3, 5]
    assert keeps("vispruner", stack, 5) == [0, 1, 2, 4, 5]
    assert keeps("vispruner", stack, 4, important=1.0) == [0, 1, 2, 3]


def test_cdpruner_by_hand() -> None:
    """Tokens at 0, 30, 90 and 45 degrees, cosines to the question of 0, 0, .6, 1: relevance is 1, 1, .4, 0.

    After the first the volumes are sin² 30 = .25, .16 and 0. With .4 for .6 the third has .36. With the other sign
    relevance is 0, 0, .6, 1: the last comes first, and of the others the third has sin² 45 x .36.
    """
    angles = at_angles(0, 30, 90, 45)
    stack = picture((2, 2), angles, relevance=[0.0, 0.0, 0.6, 1.0])
    assert keeps("cdpruner", stack, 2) == [0, 1]
    assert keeps("cdpruner", picture((2, 2), angles, relevance=[0.0, 0.0, 0.4, 1.0]), 2) == [0, 2]
    assert keeps("cdpruner", stack, 2, sign=1) == [2, 3]
    assert keeps("cdpruner", picture((2, 2), angles, importance=[1.0, 1.0, 0.4, 0.0]), 2, evidence="importance") == [
        0,
        1,
    ]


def test_cdpruner_without_relevance_by_hand() -> None:
    """At 0, 180 and 90 degrees the last stands upright on the first; at 0, 0, 90 as well."""
    assert keeps("cdpruner", picture((1, 3), at_angles(0, 180, 90)), 2, evidence="none") == [0, 2]
    assert keeps("cdpruner", picture((1, 3), at_angles(0, 0, 90)), 2, evidence="none") == [0, 2]


def test_a_dpp_without_relevance_starts_at_the_first_token() -> None:
    features = torch.randn(4, 63, 16, generator=torch.Generator().manual_seed(0))
    assert kept("cdpruner", pictures(features, (7, 9)), 1, evidence="none") == [[0]] * 4


def test_todre_by_hand() -> None:
    """At 0, 10, 100, 180 degrees from the second on: the last, and then by sum the first (2.02 to 1.83), by the nearest
    the third (.83 to .02). From the third on the cosines are -.17, 0 and .17: the first.
    """
    angles = at_angles(0, 10, 100, 180)
    stack = picture((2, 2), angles, importance=[0.1, 0.9, 0.1, 0.1])
    assert keeps("todre_select", stack, 2) == [1, 3]
    assert keeps("todre_select", stack, 3) == [0, 1, 3]
    assert keeps("todre_select", stack, 3, spread="min") == [1, 2, 3]
    assert keeps("todre_select", picture((2, 2), angles, importance=[0.1, 0.1, 0.9, 0.1]), 2) == [0, 2]


def sinks(scores: Any, threshold: float = 34.76) -> dict[str, Any]:
    """Evidence under the name that holds its threshold."""
    return {f"sink_attention(threshold={threshold:g})": scores}


def test_vflowopt_by_hand() -> None:
    """Scores .1, .2, .3, .4, 0, .6 of 2 x 3. Of two the best is 5, and 3 stands for the rest, weighted 1 : 2 : 3 : 4.

    Of four 3 and 5 are best; in the cell of columns 0 and 1 the token 1 stands for 0 and 1, (10 + 2 x 20) / 3, and in
    column 2 only 2 is left. Where nothing is left there, 3 and 1 stay of the other cell, and 1 stands for what goes.
    """
    stack = picture((2, 3), **sinks([0.1, 0.2, 0.3, 0.4, 0.0, 0.6]))
    assert becomes("vflowopt_select", stack, 2, recycled=0.5) == pytest.approx({3: 30, 5: 60})
    assert becomes("vflowopt_select", stack, 4, recycled=0.5) == pytest.approx({1: 50 / 3, 2: 30, 3: 40, 5: 60})
    stack = picture((2, 3), **sinks([0.1, 0.2, 0.5, 0.3, 0.0, 0.6]))
    assert becomes("vflowopt_select", stack, 4, recycled=0.5) == pytest.approx({1: 50 / 3, 2: 30, 3: 40, 5: 60})


def test_vflowopt_from_its_attention_by_hand() -> None:
    """All attend to the first of three patches, which attends to the last: that is the one to keep."""
    seen = of_maps([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1]], has_cls=False)
    for threshold in (1.2, 34.76):
        stack = picture((1, 3), **sinks(SinkRows(threshold=threshold)(seen), threshold))
        assert keeps("vflowopt_select", stack, 1, threshold=threshold) == [2]
    stack = picture((1, 3), **sinks(SinkRows(threshold=0.1)(seen), 0.1))
    assert keeps("vflowopt_select", stack, 1, threshold=0.1) == [0], "all are sinks"


def test_prunesid_by_hand() -> None:
    """u, u, -u and v, v in one group, with a mean similarity of 0: .9, .3 and .1 survive, then comes the .5."""
    u, v = torch.tensor([2.0, 2.0, -2.0, -2.0]), torch.tensor([2.0, -2.0, 2.0, -2.0])
    inner = torch.stack([u, u, -u, v, v])[None]
    stack = picture((1, 5), importance=[0.5, 0.9, 0.1, 0.3, 0.2], encoder_features=inner)
    assert keeps("prunesid", stack, 2) == [1, 3]
    assert keeps("prunesid", stack, 3) == [1, 2, 3]
    assert keeps("prunesid", stack, 4) == [0, 1, 2, 3]


def test_prunesid_groups_by_hand() -> None:
    """For eight tokens there are two components, u and v; nothing repeats itself more than 18 x 8 / 9 of the mean.

    Six and three survivors: one token each, and of the other six a bound of five in a group lets four go to the first.
    """
    u, v = torch.tensor([2.0, 2.0, -2.0, -2.0]), torch.tensor([2.0, -2.0, 2.0, -2.0])
    inner = torch.stack([u] * 6 + [v] * 3)[None]
    stack = picture((3, 3), importance=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], encoder_features=inner)
    assert keeps("prunesid", stack, 8) == [0, 1, 2, 3, 4, 6, 7, 8]


def test_holov_by_hand() -> None:
    """Means of .2 and .6 share four places as 1 and 3. With equal scores the half that has variety gets more."""
    plain = torch.ones(1, 6, 2)
    stack = picture((2, 3), plain, importance=[0.1, 0.2, 0.3, 0.2, 0.6, 1.0])
    assert keeps("holov", stack, 4, chunks=2, diversity=0.0) == [2, 3, 4, 5]
    stack = picture((2, 2), at_angles(0, 90, 0, 0), importance=[1.0] * 4)
    assert keeps("holov", stack, 3, chunks=2, diversity=0.0) == [0, 1, 2]
    assert keeps("holov", stack, 3, chunks=2, diversity=0.5) == [0, 2, 3]


def test_prumerge_plus_by_hand() -> None:
    """Attention .2, .1, .1, .1, .1, .4: all tokens weighted are 2 + 2 + 3 + 4 + 5 + 24 = 40; a kept one gets that on
    top, less its own share. Attention twice as high weighs the same.
    """
    for times in (1, 2):
        attention = [times * a for a in (0.2, 0.1, 0.1, 0.1, 0.1, 0.4)]
        stack = picture((2, 3), keys=at_angles(0, 0, 0, 0, 0, 0), **{"importance@1": attention})
        assert becomes("prumerge_plus", stack, 1, outliers=1.0) == pytest.approx({5: 60 + 40 - 24})
        expected = {0: 10 + 40 - 2, 2: 30 + 40 - 3, 4: 50 + 40 - 5, 5: 76}
        assert becomes("prumerge_plus", stack, 4) == pytest.approx(expected)


def test_prumerge_plus_leaves_the_farthest_out() -> None:
    """Of 34 tokens 33 are neighbours, one too many: the one whose key points elsewhere is not added."""
    keys = at_angles(*[0.0] * 33, 90.0)
    stack = pictures(torch.eye(34)[None], (2, 17), keys=keys, **{"importance@1": [[2.0] + [1.0] * 33]})
    pipeline = build("prumerge_plus", {"outliers": 1.0})
    merged = pipeline.merge(stack, pipeline.run(stack, 1))
    assert merged is not None
    assert merged.rows[0, 0].tolist() == pytest.approx([1.0] + [1 / 35] * 32 + [0.0])


def test_adaptive_prumerge_plus_by_hand() -> None:
    """Two of nine stick out, each worth four tokens: eight, at most the budget. Where none does, nothing is found."""
    stack = picture((3, 3), **{"importance@1": [0.1] * 7 + [0.9, 0.8]})
    pipeline = build("prumerge_plus", {"adaptive": True})
    assert [pipeline.count(stack, k).tolist() for k in (9, 8, 5)] == [[8], [8], [5]]
    assert pipeline.count(picture((3, 3), **{"importance@1": [0.1] * 9}), 5).tolist() == [0]


def test_dart_by_hand() -> None:
    """Keys 3, -3 and -5, 0 are 6 and 5 long by the sum of absolute values (by squares it is the other way round).

    The pivot at 0 degrees takes those at 170 and 90; two pivots at 0 and 90 take those at 170 and 280.
    """
    keys = torch.tensor([[[3.0, -3.0], [-5.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    stack = picture((1, 5), at_angles(0, 90, 10, 170, 280), keys=keys)
    assert keeps("dart", stack, 1) == [0]
    assert keeps("dart", stack, 3, pivots=1) == [0, 1, 3]
    assert keeps("dart", stack, 4, pivots=2) == [0, 1, 3, 4]


def test_hiprune_by_hand() -> None:
    """The middle layer looks at the centre of 3 x 3, then at its neighbours 7 and 5; the deep one at 0, 2 and 6.

    Half of six are the centre and those two; a tenth is the centre alone, and the deep layer adds 1 and 3 as well.
    """
    middle = [0.0, 0.1, 0.8, 0.1, 0.9, 0.4, 0.0, 0.5, 0.0]
    deep = [0.9, 0.1, 0.8, 0.1, 1.0, 0.1, 0.7, 0.1, 0.1]
    stack = picture((3, 3), importance=deep, **{"importance@0.375": middle})
    assert keeps("hiprune", stack, 6, anchors=0.5) == [0, 2, 4, 5, 6, 7]
    assert keeps("hiprune", stack, 6) == [0, 1, 2, 3, 4, 6]


def test_scope_by_hand() -> None:
    """Three tokens at 0 degrees and one at 90: one of the three covers 3, the other 1, times its importance of 4."""
    stack = picture((2, 2), at_angles(0, 0, 0, 90), importance=[1.0, 1.0, 1.0, 4.0])
    assert keeps("scope", stack, 1) == [3]
    assert keeps("scope", stack, 2) == [0, 3]
    assert keeps("scope", stack, 1, alpha=0.5) == [0]
    assert keeps("scope", stack, 1, alpha=0.0) == [0]


def test_pool_by_hand() -> None:
    """Two cells of 2 x 3 are the first two columns and the last; of 3 x 2 the first row and the others; or all."""
    assert becomes("pool", picture((2, 3)), 2) == pytest.approx({0: (10 + 20 + 40 + 50) / 4, 2: (30 + 60) / 2})
    assert becomes("pool", picture((3, 2)), 2) == pytest.approx({0: 15, 2: 45})
    assert becomes("pool", picture((3, 3)), 1) == pytest.approx({4: 50})
    assert becomes("pool", picture((1, 3)), 3) == pytest.approx({0: 10, 1: 20, 2: 30})
