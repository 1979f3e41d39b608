"""VAR: who is a sink and what becomes of its attention, against loops and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.contracts.sinks import Edit, massive_channels, peak, redistributed
from tests.fidelity.test_published_methods import drawn, pictures
from vtprune.catalog import build
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.stages.sinks import MassiveActivations, Redistribute, WithoutMassive

SHAPES = [(1, 1, 1, 3), (2, 4, 5, 13), (3, 2, 7, 40)]
"""Prompts, heads, rows and keys."""
EDITS = [Edit(), Edit(share=0.0, most=1.0, least=0.0), Edit(share=0.9, most=0.3, least=0.5), Edit(most=0.0)]


def maps(B: int, H: int, R: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of which some is hidden, which keys are pictures and which are sinks."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, H, R, n, generator=generator)
    hidden = torch.rand(B, 1, R, n, generator=generator) < 0.2
    hidden[..., 0] = False
    weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=3)
    visual, sinks = torch.rand(2, B, n, generator=generator) < torch.tensor([0.5, 0.3])[:, None, None]
    return weights, visual, sinks


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_redistribution_is_the_loop(shape: tuple[int, int, int, int], edit: Edit) -> None:
    stage = Redistribute(share=edit.share, most=edit.most, least=edit.least)
    changed = 0
    for seed in range(4):
        weights, visual, sinks = maps(*shape, seed)
        got = stage(weights, visual, sinks)
        for b, h, r in np.ndindex(*shape[:3]):
            row = weights[b, h, r].double().numpy()
            expected = redistributed(row, visual[b].numpy(), sinks[b].numpy(), edit)
            if expected is None:
                assert torch.equal(got[b, h, r], weights[b, h, r])
            else:
                np.testing.assert_allclose(got[b, h, r].numpy(), expected, atol=1e-6)
            changed += expected is not None
        np.testing.assert_allclose(got.sum(dim=3).numpy(), 1, atol=1e-5)
    assert changed or shape == SHAPES[0]


ROW, VISUAL, SINKS = [0.4, 0.1, 0.2, 0.2, 0.1], [0, 1, 1, 1, 0], [1, 1, 0, 0, 0]
"""A sink of text, one of the picture, two other tokens of the picture, a word."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # sinks lose 0.4 of 0.5, so 0.2; each of the two other tokens gets half of that
        ({}, [0.24, 0.06, 0.3, 0.3, 0.1]),
        ({"share": 0.0}, [0.0, 0.0, 0.45, 0.45, 0.1]),
        # the picture has 0.5 of the attention, a fifth of that its sink
        ({"least": 0.5}, [0.24, 0.06, 0.3, 0.3, 0.1]),
        ({"least": 0.51}, ROW),
        ({"most": 0.2}, [0.24, 0.06, 0.3, 0.3, 0.1]),
        ({"most": 0.19}, ROW),
        ({"share": 1.0}, ROW),
    ],
)
def test_redistribution_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    # doubles: 0.1 / 0.5 is not above 0.2
    weights = torch.tensor(ROW, dtype=torch.double).view(1, 1, 1, 5)
    kinds = (torch.tensor([kind]).bool() for kind in (VISUAL, SINKS))
    np.testing.assert_allclose(Redistribute(**options)(weights, *kinds)[0, 0, 0].numpy(), expected, atol=1e-7)


def test_a_picture_of_nothing_but_sinks_has_no_one_to_give_to() -> None:
    weights, visual = torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 1, 3), torch.tensor([[False, True, True]])
    got = Redistribute(most=1.0)(weights, visual, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(got, weights)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert torch.equal(Redistribute(least=0.0)(weights, nothing, ~nothing), weights)


def test_gradients_of_rows_that_stay_are_finite() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 1, 3).requires_grad_()
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    Redistribute(least=0.0)(weights, nothing, ~nothing).sum().backward()
    assert weights.grad is not None and torch.isfinite(weights.grad).all()


@pytest.mark.parametrize("threshold", [1.5, 3.0, 20.0])
@pytest.mark.parametrize("channels", [None, (2,), (7, 0, 30)])
def test_sinks_are_those_of_the_loop(channels: tuple[int, ...] | None, threshold: float) -> None:
    hidden = torch.randn(3, 9, 600, generator=torch.Generator().manual_seed(1))
    hidden[0, :2, 2], hidden[1, 0, 30], hidden[1, 4, 30], hidden[2, 5, 7] = 40.0, -90.0, 60.0, 70.0
    hidden = hidden * torch.tensor([1.0, 3.0, 0.1]).view(3, 1, 1)
    rule = MassiveActivations(threshold=threshold, channels=channels)
    massive = rule.massive(hidden[:, 0])
    states = hidden.double().numpy()
    found = [list(channels or massive_channels(own[0], threshold)) for own in states]
    assert [sorted(row) for row in found] == [row.nonzero()[:, 0].tolist() for row in massive]
    expected = [[peak(token, own) > threshold for token in row] for row, own in zip(states, found, strict=True)]
    assert rule(hidden, massive).tolist() == expected


def test_sinks_by_hand() -> None:
    """Of (30, 40, 0, 0) the root mean square is 25, so that 1.2 and 1.6 are left; the median of its channels is 0."""
    hidden = torch.tensor([[[30.0, 40.0, 0.0, 0.0], [3.0, 0.0, 3.0, 0.0], [1.0, -5.0, 1.0, 1.0]]])
    rule = MassiveActivations(threshold=1.3)
    assert rule.massive(hidden[:, 0]).tolist() == [[False, True, False, False]]
    assert rule(hidden, rule.massive(hidden[:, 0])).tolist() == [[True, False, True]]
    first = MassiveActivations(threshold=1.3, channels=(0, 2))
    assert first(hidden, first.massive(hidden[:, 0])).tolist() == [[False, True, False]]
    level = torch.tensor([[1.0, 1.0, 1.0, 3.0]])
    assert not MassiveActivations(threshold=1.3).massive(level).any(), "above the threshold, not above ten medians"


def test_without_massive_by_hand() -> None:
    stack = pictures(drawn(2, (1, 3), 4), (1, 3))
    stage = WithoutMassive()
    worth = torch.tensor([[0.5, 0.75, 0.25], [-2.0, float("-inf"), 3.0]])
    with pytest.raises(MissingEvidence, match="massive_activations"):
        stage(stack, worth)
    (need,) = stage.needs
    stack.evidence[need.name] = torch.tensor([[False, True, False], [False, False, True]])  # type: ignore[index]
    assert stage(stack, worth).tolist() == [[0.5, 0.0, 0.25], [-2.0, float("-inf"), -2.0]]


def test_names_tell_rules_apart() -> None:
    names = [MassiveActivations(**own).name for own in ({}, {"threshold": 3.5}, {"channels": (1,)}, {"channels": (2,)})]
    assert len(set(names)) == 4


def test_the_method_has_the_parameters_of_its_authors() -> None:
    edit = build("attention_sink", {"channels": (1415, 2533)}).attention
    sinks = MassiveActivations(threshold=20.0, channels=(1415, 2533))
    assert edit == Redistribute(share=0.6, most=0.5, least=0.2, sinks=sinks)


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"channels": ()}, {"channels": (1.5,)}, {"channels": (-1,)}, {"channels": 3}]
)
def test_rules_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        MassiveActivations(**options)
