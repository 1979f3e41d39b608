"""Pipelines as values: staged picks, protected and forbidden tokens, storage as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.fidelity.test_methods import tokens
from vtprune import Pick, Pipeline
from vtprune.catalog import build, list_methods
from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.stages import STAGES
from vtprune.stages.diverse import Dispersion
from vtprune.stages.scorers import Constant, Importance
from vtprune.stages.selectors import MMR, Random, Stride, TopK
from vtprune.types import VisualTokens

SELECTORS = [TopK(), Stride(), Random(), Dispersion(reduce="min", first="isolated"), MMR()]


def staged(first: object, second: object, share: float = 0.5) -> Pipeline:
    return Pipeline(
        name="staged",
        picks=(
            Pick(name="a", scorer=Importance(), selector=first, share=share),
            Pick(name="b", scorer=Importance(), selector=second),
        ),
    )


def stack(S: int = 3, N: int = 17, **evidence: Tensor) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    plain = tokens(torch.randn(S, N, 5, generator=generator), torch.rand(S, N, generator=generator))
    return VisualTokens(
        features=plain.features, parts=plain.parts, ordinals=plain.ordinals, evidence={**plain.evidence, **evidence}
    )


def evidence_for(pipeline: Pipeline, S: int = 3, N: int = 17) -> dict[str, Tensor]:
    """Something for all that it reads: numbers for some names, vectors for others."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"keys": (S, N, 4), "encoder_features": (S, N, 6)}
    return {name: torch.rand(shapes.get(name, (S, N)), generator=generator) for name in sorted(pipeline.needs)}


@pytest.mark.parametrize("first", SELECTORS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("second", SELECTORS, ids=lambda s: type(s).__name__)
def test_the_second_pick_takes_from_what_the_first_left(first: object, second: object) -> None:
    alone = Pipeline(name="alone", picks=(Pick(name="a", scorer=Importance(), selector=first),)).run(stack(), 4)
    selection = staged(first, second).run(stack(), 8)
    assert selection.keep.shape == (3, 8)
    for row, taken, before in zip(selection.keep.tolist(), selection.taken.tolist(), alone.keep.tolist(), strict=True):
        assert row == sorted(set(row))
        assert [i for i, stage in zip(row, taken, strict=True) if stage == 0] == before
        assert taken.count(1) == 4


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: type(s).__name__)
def test_protected_tokens_stay_and_forbidden_ones_go(selector: object) -> None:
    protect = torch.tensor([[0, 16], [3, 4], [7, 9]])
    forbid = torch.zeros(3, 17, dtype=torch.bool)
    forbid[:, 10:14] = True
    pipeline = Pipeline(name="p", picks=(Pick(name="a", scorer=Importance(), selector=selector),))
    selection = pipeline.run(stack(protect=protect, forbid=forbid), 13)
    for row, taken, forced in zip(selection.keep.tolist(), selection.taken.tolist(), protect.tolist(), strict=True):
        assert row == [i for i in range(17) if i not in range(10, 14)]
        assert [i for i, stage in zip(row, taken, strict=True) if stage == -1] == forced


def test_budgets_of_one_and_none() -> None:
    for k in (0, 1, 2):
        assert staged(TopK(), Dispersion(reduce="min", first="isolated")).run(stack(), k).keep.shape == (3, k)


def test_a_choice_does_not_depend_on_batch_mates() -> None:
    for name in list_methods():
        whole = stack(S=4, **evidence_for(build(name), S=4))
        together = build(name).run(whole, 6).keep
        for row in range(4):
            alone = VisualTokens(
                features=whole.features[row : row + 1],
                parts=whole.parts,
                ordinals=whole.ordinals[row : row + 1],
                evidence={name: given[row : row + 1] for name, given in whole.evidence.items()},
            )
            assert torch.equal(build(name).run(alone, 6).keep[0], together[row]), name


@pytest.mark.parametrize("name", list_methods())
def test_every_method_survives_json(name: str) -> None:
    pipeline = build(name)
    again = Pipeline.from_dict(json.loads(json.dumps(pipeline.to_dict())), stages=STAGES)
    assert again == pipeline
    given = stack(**evidence_for(pipeline))
    assert torch.equal(again.run(given, 5).keep, pipeline.run(given, 5).keep)


def test_unknown_formats_and_stages_are_refused() -> None:
    data = build("divprune").to_dict()
    with pytest.raises(InvalidOption, match="format"):
        Pipeline.from_dict({**data, "format": 99}, stages=STAGES)
    with pytest.raises(InvalidOption, match="Dispersion"):
        Pipeline.from_dict(data, stages={"Constant": Constant})


@dataclass(frozen=True)
class TooFew:
    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        return scores.argsort(dim=1)[:, : k - 1]


def test_a_selector_that_returns_too_few_is_refused() -> None:
    with pytest.raises(UnsupportedCall, match="expected"):
        Pipeline(name="p", picks=(Pick(name="few", scorer=Constant(), selector=TooFew()),)).run(stack(), 4)
