"""NaN and infinity, wherever they come from, are errors that name their source; numbers that are only large are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import vtprune
from tests import models
from tests.integration import test_encoders_alone as alone
from tests.integration.common import CACHING, GIVEN, LOSSLESS, kept_of, llava, logits
from tests.models import Prompt
from vtprune import Pick, Pipeline
from vtprune.catalog import build
from vtprune.errors import UnsupportedCall
from vtprune.stages.budgets import Proportional
from vtprune.stages.counters import Above, AllOrNone, Mass, Outliers
from vtprune.stages.mergers import IntoCell, NeighbourSum
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import TopK
from vtprune.types import Ordinal, Part, VisualTokens

NAN, INF = float("nan"), float("inf")
N, K = 16, 5
ONE = (Prompt(images=((32, 32),), seed=2),)
CLIP = (Prompt(clips=((32, 32, 4),), seed=3),)
BY_THE_CLS_ROW = ("fastervlm", "vtprune", "hiprune", "visionzip", "vispruner", "scope", "vtc_cls")
WITHOUT_QUESTIONS = [name for name in vtprune.list_methods() if name not in (*LOSSLESS, *GIVEN)]
REFUSED = "of the .* hold NaN or infinity"


def spoiling(module: nn.Module, place: tuple[Any, ...], value: float) -> RemovableHandle:
    """What `module` gives has `value` at one place, or at some, during the block."""

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[place] = value
        return changed

    return module.register_forward_hook(spoil)


def query_of(model: Any, block: int) -> nn.Module:
    """The projection to queries in a block of the tower, of three; the second makes the features."""
    return model.model.vision_tower.encoder.layers[block].self_attn.q_proj


def features_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.model.get_image_features(models.inputs(model, ONE)["pixel_values"]).pooler_output[0]


@pytest.mark.parametrize("method", BY_THE_CLS_ROW)
def test_nan_in_the_attention_of_the_cls_token_alone_names_the_evidence(method: str) -> None:
    """A query of that token is used for nothing but its own row, and that token is no feature."""
    model = llava()
    with spoiling(query_of(model, 1), (0, 0, 0), NAN):
        assert torch.isfinite(features_of(model)).all()
        refused = pytest.raises(UnsupportedCall, match=rf"^importance(@[\d.+]+)? {REFUSED}")
        with vtprune.pruning(model, method, keep=K), refused:
            logits(model, models.inputs(model, ONE))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_nan_in_a_block_behind_the_features_names_the_evidence(value: float) -> None:
    """It counts where that block is read, and where CLS attends; the row of a patch is not read there."""
    model = llava()
    row = models.inputs(model, ONE)
    before = logits(model, row)
    for method, token in (("prumerge_plus", 0), ("prumerge_plus", 3), ("fastervlm", 0)):
        with spoiling(query_of(model, 2), (0, token, 0), value), vtprune.pruning(model, method, keep=K) as pruner:
            if (method, token) == ("prumerge_plus", 0):
                with pytest.raises(UnsupportedCall, match=rf"^importance@1 {REFUSED}"):
                    logits(model, row)
                continue
            logits(model, row)
            assert pruner.last.kept == K
    with spoiling(query_of(model, 2), (0, 0, 0), value):
        assert torch.equal(logits(model, row), before)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("method", ["divprune", "fastervlm", "pool", "random"])
def test_one_number_of_one_token_is_enough(method: str, value: float) -> None:
    model = llava()
    row, projector = models.inputs(model, ONE), model.model.multi_modal_projector
    with vtprune.pruning(model, method, keep=K):
        with spoiling(projector, (0, 3, 7), value), pytest.raises(UnsupportedCall, match=rf"^features {REFUSED}"):
            logits(model, row)
        assert torch.isfinite(logits(model, row)).all()


@pytest.mark.parametrize("method", [name for name in WITHOUT_QUESTIONS if not build(name).inside])
@pytest.mark.parametrize("value", [1e37, -1e37], ids=str)
def test_large_numbers_are_numbers(method: str, value: float) -> None:
    """One token, whose sum is beyond fp32, and all of them."""
    model = llava()
    row = models.inputs(model, ONE)
    for place in ((0, 3), (0,)):
        with spoiling(model.model.multi_modal_projector, place, value):
            assert not torch.isfinite(features_of(model).sum())
            with vtprune.pruning(model, method, keep=K) as pruner:
                logits(model, row)
                if method in CACHING:
                    assert (pruner.last.kept, pruner.last.average) == (N, pytest.approx(K))
                else:
                    assert pruner.last.kept == K


def test_large_scores_are_numbers() -> None:
    model = vtprune.wrap(llava(), "fastervlm", keep=K)
    scores = torch.full((N,), 1e38)
    scores[[2, 3, 5, 7, 11]] = 3e38
    with model.vtprune.using(importance=[scores]):
        logits(model, models.inputs(model, ONE))
        assert kept_of(model.vtprune.last) == [[2, 3, 5, 7, 11]]


@dataclass(frozen=True)
class Bad:
    """A scorer with a NaN, or what else is said, at one token of the first picture."""

    token: int = 4
    value: float = NAN
    needs: frozenset[str] = frozenset()

    def __call__(self, tokens: VisualTokens) -> Tensor:
        scores = torch.rand(tokens.features.shape[:2], generator=torch.Generator().manual_seed(0))
        scores[0, self.token] = self.value
        return scores


def plain(**stages: Any) -> Pipeline:
    return Pipeline(name="mine", picks=(Pick(name="first", scorer=Constant(), selector=TopK()),), **stages)


STAGES: dict[str, Callable[[Bad], Pipeline]] = {
    "neighbours": lambda bad: plain(merger=NeighbourSum(weights=bad)),
    "cells": lambda bad: plain(merger=IntoCell(weights=bad)),
    "outliers": lambda bad: plain(counter=Outliers(scorer=bad)),
    "mass": lambda bad: plain(counter=Mass(scorer=bad)),
    "above": lambda bad: plain(counter=Above(scorer=bad)),
    "all_or_none": lambda bad: plain(counter=AllOrNone(scorer=bad)),
    "frames": lambda bad: plain(frames=Proportional(scorer=bad)),
}


def applied(pipeline: Pipeline) -> Any:
    """The stage that belongs to no pick, on two pictures of two frames."""
    parts = tuple(Part(start=8 * i, stop=8 * i + 8, kind="frame", grid=(2, 4)) for i in range(2))
    features = torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0))
    visual = VisualTokens(features=features, parts=parts, ordinals=(Ordinal(segment=0), Ordinal(segment=1)))
    if pipeline.merger is not None:
        return pipeline.merge(visual, pipeline.run(visual, K))
    return pipeline.count(visual, K) if pipeline.counter is not None else pipeline.share(visual, K)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("token", [0, 4, 15], ids=["kept", "in_the_middle", "last"])
def test_a_scorer_of_a_user_that_returns_nan_is_an_error_in_every_stage(name: str, token: int) -> None:
    with pytest.raises(UnsupportedCall, match="NaN"):
        applied(STAGES[name](Bad(token=token)))
    assert applied(STAGES[name](Bad(token=token, value=0.5))) is not None


@pytest.mark.parametrize("name", STAGES)
def test_in_a_call_of_a_model_as_well(name: str) -> None:
    model = models.build("llava_next_video") if name == "frames" else llava()
    row = models.inputs(model, CLIP, "video") if name == "frames" else models.inputs(model, ONE)
    before = logits(model, row)
    with vtprune.pruning(model, STAGES[name](Bad()), keep=K), pytest.raises(UnsupportedCall, match="NaN"):
        logits(model, row)
    assert torch.equal(logits(model, row), before)


@alone.every_case
def test_an_encoder_by_itself_refuses_a_picture_with_nan(name: str, method: str) -> None:
    """One pixel of one of two pictures; the next call is as if nothing had been."""
    model, bad = alone.shared(name), alone.pixels()
    bad[1, 0, 9, 9] = NAN
    with vtprune.pruning(model, method, keep=0.3) as pruner:
        expected, kept = alone.seen(model, alone.pixels()), pruner.last.keep.tolist()
        with pytest.raises(UnsupportedCall, match="hold NaN or infinity"):
            alone.seen(model, bad)
        assert torch.equal(alone.seen(model, alone.pixels()), expected)
        assert pruner.last.keep.tolist() == kept


@pytest.mark.parametrize("evidence", ["none", "importance"])
def test_cdpruner_without_a_question_refuses_a_picture_of_nan(evidence: str) -> None:
    model = vtprune.wrap(llava(), "cdpruner", keep=K, evidence=evidence)
    row = models.inputs(model, ONE)
    with pytest.raises(UnsupportedCall, match=r"hold NaN or infinity.*pixels"):
        logits(model, {**row, "pixel_values": torch.full_like(row["pixel_values"], NAN)})
    logits(model, row)
    assert model.vtprune.last.kept == K
