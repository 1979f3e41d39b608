"""Encoders that take all pictures as one sequence: scores and choices of a picture are its own, and so is the cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from tests import models
from tests.contracts.cases import choices, model_of
from tests.models import Prompt
from vtprune import Pick, Pipeline, PruneReport
from vtprune.runtime import encoded
from vtprune.stages.scorers import Importance
from vtprune.stages.selectors import TopK
from vtprune.types import VisualTokens

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT = Prompt(text_before=9, seed=31)
MIXED = (
    Prompt(images=((32, 64),), clips=((32, 32, 4), (32, 32, 4)), seed=33),
    TEXT,
    Prompt(images=((64, 64), (32, 32)), clips=((32, 48, 4),), seed=34, text_after=7),
    Prompt(clips=((32, 32, 8),), seed=35),
)
LARGE = (
    Prompt(images=((184, 184),), seed=1),
    Prompt(images=((192, 200), (64, 64)), seed=2),
    Prompt(images=((32, 40),), seed=3),
    Prompt(images=((184, 184),), seed=4),
)


@dataclass(frozen=True)
class Noted:
    """`Importance`, noting down what it read: (tokens,) of each picture."""

    seen: list[Tensor] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"importance"})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        scores = Importance()(tokens)
        self.seen.extend(scores)
        return scores


@torch.no_grad()
def report_of(model: nn.Module, prompts: tuple[Prompt, ...], method: str | Pipeline, **options: Any) -> PruneReport:
    with vtprune.pruning(model, method, **options) as pruner:
        model(**models.inputs(model, prompts))
        return pruner.last


@pytest.mark.parametrize("per", ["image", "part", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_images_and_clips_are_pruned_alike_alone_and_in_a_batch(family: str, per: Any) -> None:
    model = model_of(family)
    together = report_of(model, MIXED, "vtprune", keep=0.3, per=per)
    for row, prompt in enumerate(MIXED):
        alone = [] if prompt is TEXT else choices(report_of(model, (prompt,), "vtprune", keep=0.3, per=per), 0)
        assert choices(together, row) == alone
    assert together.kept < together.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_large_pictures_are_pruned_alike_alone_and_in_a_batch(family: str) -> None:
    model = model_of(family)
    together = report_of(model, LARGE, "vtprune", keep=0.25)
    assert together.segments[0].n > 500
    for row, prompt in enumerate(LARGE):
        assert choices(together, row) == choices(report_of(model, (prompt,), "vtprune", keep=0.25), 0)


def importance(model: nn.Module, prompts: tuple[Prompt, ...]) -> dict[int, Tensor]:
    """Scores by the number of tokens, which tells the pictures apart."""
    scorer = Noted()
    report_of(model, prompts, Pipeline(name="noted", picks=(Pick(name="top", scorer=scorer, selector=TopK()),)))
    assert len({len(scores) for scores in scorer.seen}) == len(scorer.seen)
    return {len(scores): scores for scores in scorer.seen}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_picture_do_not_depend_on_batch_mates(family: str) -> None:
    """Received attention is a mean over the queries of the picture (of a frame), whatever else is in the call."""
    model = model_of(family)
    together = importance(model, LARGE[:3])
    apart: dict[int, Tensor] = {}
    for prompt in LARGE[:3]:
        apart |= importance(model, (prompt,))
    assert together.keys() == apart.keys()
    for tokens, scores in together.items():
        torch.testing.assert_close(scores, apart[tokens], rtol=1e-4, atol=1e-7)
        assert scores.mean() == pytest.approx(1 / (4 * tokens), rel=1e-3)
        assert scores.std() > 0


class Peak(TorchDispatchMode):
    """Elements of the largest tensor that was made, and of all attention maps together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        if "softmax" in str(func):
            self.attention += sum(t.numel() for t in made)
        return out


@contextmanager
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Score the whole call as one picture, as if the lengths were not known."""
    apart = encoded.by_segment
    with monkeypatch.context() as patch:
        patch.setattr(encoded, "by_segment", lambda rule, seen, lengths: apart(rule, seen, (sum(lengths),)))
        yield


FRAMES, SIDE = 16, 48


def probe_cost(family: str) -> tuple[Peak, int]:
    """What a prefill with one clip makes, and the elements of the attention of its frames to themselves."""
    model = model_of(family)
    inputs = models.inputs(model, (Prompt(clips=((SIDE, SIDE, FRAMES),), seed=1),), "video")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    assert (t, h * w) == (FRAMES // models.TEMPORAL, 144)
    with vtprune.pruning(model, "fastervlm", keep=0.25), torch.no_grad(), Peak() as peak:
        model(**inputs)
    return peak, t * (h * w) ** 2 * model.config.vision_config.num_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_of_a_clip_is_not_quadratic_in_its_frames(family: str) -> None:
    peak, frames_to_themselves = probe_cost(family)
    assert 0 < peak.attention <= frames_to_themselves
    assert peak.largest <= frames_to_themselves


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_of_a_quadratic_probe_would_be_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_at_a_time(monkeypatch):
        peak, frames_to_themselves = probe_cost(family)
    assert peak.attention > 4 * frames_to_themselves
    assert peak.largest > frames_to_themselves
