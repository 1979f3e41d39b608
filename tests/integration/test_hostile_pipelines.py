"""Pipelines and evidence that make no sense are refused when they are made; so are numbers that are none, on the CPU.

Where nothing may wait for the device, such numbers cost no token, and the report raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.integration.common import (
    CACHING,
    FRAMES,
    GIVEN,
    IN_LAYERS,
    LOSSLESS,
    kept_of,
    llava,
    logits,
    reachable,
    room,
)
from tests.models import Prompt
from vtprune import Pick, Pipeline
from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.kernels import host
from vtprune.stages.debiasers import MinMax
from vtprune.stages.diverse import Dispersion
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import MMR, Random, Stride, TopK
from vtprune.types import Ordinal, Part, VisualTokens

NAN, INF = float("nan"), float("inf")
N, K = 16, 5
ONE = (Prompt(images=((32, 32),), seed=2),)
SELECTORS = (TopK(), Stride(), Random(seed=3), Dispersion(reduce="min", first="isolated"), MMR())


@dataclass(frozen=True)
class Says:
    """A scorer that returns what it was made with."""

    scores: tuple[float, ...]
    needs: frozenset[str] = frozenset()

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return torch.tensor([self.scores] * len(tokens.features))


def pick(**options: Any) -> Pick:
    return Pick(**{"name": "pick", "scorer": Constant(), "selector": TopK(), **options})


def test_a_pipeline_without_picks_is_refused() -> None:
    with pytest.raises(InvalidOption, match="pick"):
        Pipeline(name="empty", picks=())
    with pytest.raises(InvalidOption, match="pick"):
        Pipeline.from_dict({"format": 1, "name": "empty", "picks": []}, stages={})


@pytest.mark.parametrize("share", [NAN, INF, 0, 0.0, -0.5, 1.01, True, False, "0.5", None], ids=repr)
def test_a_share_out_of_range_is_refused(share: Any) -> None:
    with pytest.raises(InvalidOption) as refusal:
        pick(share=share)
    assert "share" in str(refusal.value)
    assert str(share) in str(refusal.value)


@pytest.mark.parametrize("share", [1, 1.0, 0.5, 1e-9, np.float64(0.5)], ids=repr)
def test_a_share_in_range_is_taken(share: Any) -> None:
    picks = (pick(share=share, selector=Random()), pick(name="rest"))
    assert chosen(Pipeline(name="two", picks=picks), tokens()).shape == (2, K)


def tokens(features: Tensor | None = None) -> VisualTokens:
    if features is None:
        features = torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0))
    return VisualTokens(
        features=features,
        parts=(Part(start=0, stop=N, kind="image", grid=(4, 4)),),
        ordinals=(Ordinal(segment=0), Ordinal(segment=1)),
    )


def chosen(pipeline: Pipeline, visual: VisualTokens) -> Tensor:
    """What is kept, after checking that it is K distinct tokens in order."""
    keep = pipeline.run(visual, K).keep
    assert keep.shape == (2, K)
    assert (keep.diff(dim=1) > 0).all()
    assert 0 <= keep.min() <= keep.max() < N
    return keep


BAD_SCORES = {
    "one NaN": (NAN, *(0.1 * i for i in range(N - 1))),
    "few finite": (NAN,) * (N - 2) + (1.0, 2.0),
    "all NaN": (NAN,) * N,
    "one infinite": (INF, *(0.1 * i for i in range(N - 1))),
    "all infinite": (INF,) * N,
    "infinite and NaN": (INF, NAN) * (N // 2),
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tensors lay on a device that nothing may wait for."""
    monkeypatch.setattr(host, "holds", lambda tensor: False)


@pytest.mark.parametrize("debiasers", [(), (MinMax(),)], ids=["raw", "stretched"])
@pytest.mark.parametrize("scores", [name for name, values in BAD_SCORES.items() if NAN in values])
def test_scores_that_are_nan_are_an_error_that_names_the_pick(scores: str, debiasers: Any) -> None:
    bad = pick(name="mine", scorer=Says(BAD_SCORES[scores]), debiasers=debiasers)
    with pytest.raises(UnsupportedCall, match=r"scorer.*'mine' returned NaN"):
        Pipeline(name="one", picks=(bad,)).run(tokens(), K)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("debiasers", [(), (MinMax(),)], ids=["raw", "stretched"])
@pytest.mark.parametrize("selector", SELECTORS, ids=lambda stage: type(stage).__name__)
@pytest.mark.parametrize("scores", BAD_SCORES)
def test_scores_that_are_no_numbers_still_give_the_count(scores: str, selector: Any, debiasers: Any) -> None:
    bad = pick(scorer=Says(BAD_SCORES[scores]), debiasers=debiasers, selector=selector)
    chosen(Pipeline(name="one", picks=(bad,)), tokens())
    two = Pipeline(name="two", picks=(pick(selector=Stride(), share=0.4), bad))
    chosen(two, tokens())
    forced = {"protect": torch.tensor([[3], [0]]), "forbid": torch.zeros(2, N, dtype=torch.bool)}
    forced["forbid"][:, 7:12] = True
    visual = VisualTokens(**{**vars(tokens()), "evidence": forced})
    kept = chosen(two, visual)
    assert (kept == forced["protect"]).any(dim=1).all()
    assert not ((kept >= 7) & (kept < 12)).any()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("scores", ["one NaN", "few finite"])
def test_a_score_that_is_no_number_is_the_worst(scores: str) -> None:
    values = torch.tensor(BAD_SCORES[scores])
    kept = chosen(Pipeline(name="one", picks=(pick(scorer=Says(BAD_SCORES[scores])),)), tokens())
    best = set(values.nan_to_num(nan=-1.0).topk(min(K, int(values.isfinite().sum()))).indices.tolist())
    assert best <= set(kept[0].tolist())


def spoiled(*, rows: slice, value: float) -> Tensor:
    features = torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0))
    features[0, rows] = value
    return features


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda stage: type(stage).__name__)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 3e38], ids=str)
@pytest.mark.parametrize("rows", [slice(1), slice(4, 9), slice(None)], ids=["one", "some", "all"])
def test_features_that_are_no_numbers_still_give_the_count(rows: slice, value: float, selector: Any) -> None:
    pipeline = Pipeline(name="one", picks=(pick(selector=selector),))
    kept = chosen(pipeline, tokens(spoiled(rows=rows, value=value)))
    assert torch.equal(kept[1], chosen(pipeline, tokens())[1])


every_method = pytest.mark.parametrize(
    "method", [name for name in vtprune.list_methods() if name not in (*LOSSLESS, *GIVEN)]
)


def with_nan(method: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A wrapped model, and a picture of nothing but NaN."""
    model = vtprune.wrap(llava(**room(method)), method, **{"keep": K, **reachable(method)})
    inputs = models.inputs(model, ONE)
    return model, {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], NAN)}


@every_method
def test_a_picture_of_nothing_but_nan_is_an_error(method: str) -> None:
    model, inputs = with_nan(method)
    with pytest.raises(UnsupportedCall, match=r"hold NaN or infinity.*pixels|returned NaN"):
        logits(model, inputs)
    assert torch.isfinite(logits(model, models.inputs(model, ONE))).all()


@every_method
@pytest.mark.usefixtures("elsewhere")
def test_where_nothing_may_wait_the_report_raises_instead(method: str) -> None:
    model, inputs = with_nan(method)
    with torch.no_grad():
        stored = [layer.keys.shape[-2] for layer in model(**inputs, use_cache=True).past_key_values.layers]
    report, text = model.vtprune.last, inputs["input_ids"].shape[1] - N
    assert report.length_after == (text + N if method in CACHING else stored[-1],)
    if method in IN_LAYERS:
        assert sum(stored) / len(stored) - text <= model.vtprune.budget.keep * N + 0.5
        assert stored[-1] < stored[0]
    elif model.vtprune.pipeline.adaptive:  # the budget is the most
        assert all(text <= count <= text + K for count in stored)
    else:
        assert stored == [text + K] * len(stored)
    for look in (lambda: report.kept, report.summary, report.to_dict, report.check):
        with pytest.raises(UnsupportedCall, match="hold NaN or infinity"):
            look()
    logits(model, models.inputs(model, ONE))
    kept = model.vtprune.last.kept
    if method in CACHING:
        assert (kept, model.vtprune.last.average) == (N, pytest.approx(K))
    else:
        assert kept == K or (method in IN_LAYERS and kept < N)


@pytest.fixture
def model() -> nn.Module:
    return vtprune.wrap(llava(), "vtprune", keep=K)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("given", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_given_scores_that_are_no_numbers_are_refused(model: nn.Module, given: Any, value: float) -> None:
    inputs = models.inputs(model, ONE)
    logits(model, inputs)
    before = kept_of(model.vtprune.last)
    scores = given([value] + [0.1] * 15)
    with pytest.raises(InvalidOption, match="importance"), model.vtprune.using(importance=[scores]):
        pytest.fail("the block must not run")
    logits(model, inputs)
    assert kept_of(model.vtprune.last) == before


def test_given_scores_of_a_users_own_name_are_checked_too() -> None:
    model = vtprune.wrap(models.build("llava_next_video"), FRAMES, keep=0.5)
    with pytest.raises(InvalidOption, match="frames"), model.vtprune.using(frames=[torch.tensor([1.0, NAN, 2.0, 3.0])]):
        pytest.fail("the block must not run")


def kept_in(model: nn.Module) -> list[int]:
    logits(model, models.inputs(model, ONE))
    return kept_of(model.vtprune.last)[0]


def test_a_block_inside_another_adds_to_it(model: nn.Module) -> None:
    free = kept_in(model)
    last, worst = [*[0.0] * 15, -1.0], next(i for i in range(14) if i not in free)
    with model.vtprune.using(protect=[[15]]):
        assert 15 in kept_in(model)
        with model.vtprune.using(importance=[last], forbid=[[worst]]):
            both = kept_in(model)
            assert 15 in both
            assert worst not in both
            with model.vtprune.using(forbid=[[14]]):
                assert 15 in kept_in(model)
        assert 15 in kept_in(model)
    assert kept_in(model) == free


def test_given_scores_of_an_outer_block_count_in_an_inner_one() -> None:
    rising = [float(i) for i in range(N)]
    by_score = vtprune.wrap(llava(), "fastervlm", keep=K)
    with by_score.vtprune.using(importance=[rising]):
        assert kept_in(by_score) == [11, 12, 13, 14, 15]
        with by_score.vtprune.using(protect=[[0]], forbid=[[15]]):
            assert kept_in(by_score) == [0, 11, 12, 13, 14]
        assert kept_in(by_score) == [11, 12, 13, 14, 15]


def test_what_an_inner_block_names_again_takes_the_place_of_the_outer(model: nn.Module) -> None:
    outer, inner = [1, 5, 9, 13, 15], [0, 2, 4, 6, 8]
    with model.vtprune.using(protect=[outer]):
        with model.vtprune.using(protect=[inner]):
            assert kept_in(model) == inner
        assert kept_in(model) == outer


def test_an_inner_block_that_contradicts_the_outer_is_refused_in_the_call(model: nn.Module) -> None:
    with model.vtprune.using(protect=[[3]]):
        with pytest.raises(UnsupportedCall, match="both"), model.vtprune.using(forbid=[[3]]):
            kept_in(model)
        assert 3 in kept_in(model)
