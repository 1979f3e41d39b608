"""ZOO-Prune and IDPruner as wholes: against a loop of all steps of the one, and both worked by hand.

The loop uses nothing of vtprune.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vtprune
from tests import models
from tests.fidelity.test_methods import at_angles
from tests.fidelity.test_published_by_hand import keeps, picture
from tests.fidelity.test_published_methods import drawn, every_size, kept, pictures, rows, scores
from tests.fidelity.test_sensitivity import by_probes, jacobians
from tests.integration.common import kept_of, write
from tests.models import Prompt
from vtprune.catalog import build
from vtprune.stages.sensitivity import JacobianSensitivity, ProbedSensitivity

both_ways = pytest.mark.parametrize("closed_form", [False, True], ids=["probes", "closed_form"])


def distance(a: list[float], b: list[float]) -> float:
    """1 less the cosine."""
    product = sum(x * y for x, y in zip(a, b))
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return 1 - (product / lengths if lengths > 0 else 0.0)


def zoo(sensitivity: np.ndarray, features: np.ndarray, k: int) -> list[int]:
    """arXiv 2509.24837 on one picture: from the most sensitive token on, the one with the best product joins."""
    low, high = min(sensitivity), max(sensitivity)
    worth = [(own - low) / (high - low) if high > low else 1.0 for own in sensitivity.tolist()]
    vectors = features.tolist()
    chosen = [worth.index(max(worth))]
    while len(chosen) < k:
        best, best_product = -1, -1.0
        for i, own in enumerate(worth):
            product = own * min(distance(vectors[i], vectors[c]) for c in chosen)
            if i not in chosen and product > best_product:
                best, best_product = i, product
        chosen.append(best)
    return sorted(chosen)


def sensitive(values: Any, *, closed_form: bool) -> dict[str, Any]:
    """Evidence under the name by which the method reads it."""
    (name,) = build("zoo_prune", {"closed_form": closed_form}).readings
    return {name: values}


@both_ways
@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["wide", "narrow"])
@every_size
def test_zoo_prune_is_the_loop(S: int, grid: tuple[int, int], k: int, spread: float, closed_form: bool) -> None:
    """Also where sensitivities lie close to each other and far from 0, so that it matters whether they are scaled."""
    features, sensitivity = drawn(S, grid, 3), 1 + spread * scores(S, grid)
    expected = [zoo(*own, k) for own in rows(sensitivity, features)]
    stack = pictures(features, grid, **sensitive(sensitivity, closed_form=closed_form))
    assert kept("zoo_prune", stack, k, closed_form=closed_form) == expected


@both_ways
def test_zoo_prune_by_hand(closed_form: bool) -> None:
    """10, 9, 8, 6 are 1, .75, .5, 0 of the way, at 0, 30, 90, 180 degrees: after the first .75 x .13, .5 x 1, 0 x 2.

    Unscaled the last would win, 6 x 2 to 8 x 1; by sensitivity alone the second. Then .75 x .13 is more than 0 x 1.
    """
    given = sensitive([10.0, 9.0, 8.0, 6.0], closed_form=closed_form)
    stack = picture((2, 2), at_angles(0, 30, 90, 180), **given)
    assert keeps("zoo_prune", stack, 1, closed_form=closed_form) == [0]
    assert keeps("zoo_prune", stack, 2, closed_form=closed_form) == [0, 2]
    assert keeps("zoo_prune", stack, 3, closed_form=closed_form) == [0, 1, 2]


@both_ways
def test_zoo_prune_starts_at_the_most_sensitive_by_hand(closed_form: bool) -> None:
    """The third of 3, 4, 5, 4.5, 3.5, at 60 degrees: then 0, .5 x .5, 1, .75 x .013 and .25 x 1.5.

    The last is it, at 180; after it the second has .25 still, the fourth .01, the first nothing.
    """
    given = sensitive([3.0, 4.0, 5.0, 4.5, 3.5], closed_form=closed_form)
    stack = picture((1, 5), at_angles(0, 0, 60, 50, 180), **given)
    assert keeps("zoo_prune", stack, 1, closed_form=closed_form) == [2]
    assert keeps("zoo_prune", stack, 2, closed_form=closed_form) == [2, 4]
    assert keeps("zoo_prune", stack, 3, closed_form=closed_form) == [1, 2, 4]
    assert keeps("zoo_prune", stack, 4, closed_form=closed_form) == [1, 2, 3, 4]


@both_ways
def test_where_all_are_equally_sensitive_distance_decides(closed_form: bool) -> None:
    """From the first on, at 0, 10, 90, 180 degrees: the farthest, then the one between them."""
    stack = picture((2, 2), at_angles(0, 10, 90, 180), **sensitive([7.0] * 4, closed_form=closed_form))
    assert keeps("zoo_prune", stack, 2, closed_form=closed_form) == [0, 3]
    assert keeps("zoo_prune", stack, 3, closed_form=closed_form) == [0, 2, 3]


@both_ways
def test_sensitivity_is_scaled_for_each_picture(closed_form: bool) -> None:
    """The second picture is the first one, less sensitive by far."""
    angles, given = at_angles(0, 30, 90, 180), torch.tensor([10.0, 9.0, 8.0, 6.0])
    values = torch.stack([1000 * given, given / 1000 + 5])
    stack = pictures(angles.expand(2, -1, -1), (2, 2), **sensitive(values, closed_form=closed_form))
    assert kept("zoo_prune", stack, 2, closed_form=closed_form) == [[0, 2]] * 2


@pytest.mark.parametrize("closed_form", [False, True])
def test_zoo_prune_of_a_model_is_the_loop(closed_form: bool) -> None:
    """Sensitivity of its projector by the loops of the rules, distances of what the projector gives."""
    model, rule = models.build("llava"), ProbedSensitivity(probes=3, step=0.1)
    row, given = models.inputs(model, (Prompt(images=((32, 32),), seed=2),)), []
    projector = model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        (features,) = model.model.get_image_features(row["pixel_values"]).pooler_output
    handle.remove()
    lengths = torch.stack([own.norm() for own in jacobians(projector, given[0])]) if closed_form else None
    lengths = by_probes(rule, projector, given[0]) if lengths is None else lengths
    expected = [zoo(lengths.numpy(), features.double().numpy(), k) for k in (2, 5, 11)]
    for k, own in zip((2, 5, 11), expected):
        with vtprune.pruning(model, "zoo_prune", keep=k, probes=3, step=0.1, closed_form=closed_form) as pruner:
            write(model, row)
            assert kept_of(pruner.last) == [own]


def test_zoo_prune_reads_what_it_was_told_to() -> None:
    """64 probes of length .01 as published; `closed_form` needs none."""

    def rules(**parameters: Any) -> list[Any]:
        return [reading.rule for reading in build("zoo_prune", parameters).readings.values()]

    assert rules() == [ProbedSensitivity(probes=64, step=0.01, seed=0)]
    assert rules(probes=3, step=0.5, seed=7) == [ProbedSensitivity(probes=3, step=0.5, seed=7)]
    assert rules(closed_form=True) == [JacobianSensitivity()]


def test_idpruner_of_given_scores_by_hand() -> None:
    """2, 12, 10, 7 are 0, 1, .8, .5 of the way, at 180, 0, 30, 90 degrees: after the second 0 + .5, .4 - .43, .25 - 0.

    Unscaled the third would win, 5 - .43 to 1 + .5. With lam .9 it does: 0 + .1, .72 - .09, .45 - 0.
    """
    stack = picture((2, 2), at_angles(180, 0, 30, 90), scores=[2.0, 12.0, 10.0, 7.0])
    assert keeps("idpruner", stack, 1, importance="given") == [1]
    assert keeps("idpruner", stack, 2, importance="given") == [0, 1]
    assert keeps("idpruner", stack, 3, importance="given") == [0, 1, 3]
    assert keeps("idpruner", stack, 2, importance="given", lam=0.9) == [1, 2]
    assert keeps("idpruner", stack, 3, importance="given", lam=0.9) == [1, 2, 3]


def test_idpruner_of_given_scores_from_the_middle_by_hand() -> None:
    """-1, 3, 1 are 0, 1, .5 of the way; at 90, 0, 20 degrees 0 - 0 is more than .25 - .47.

    With lam .8 it is less than .4 - .19. Other evidence of the same picture does not count.
    """
    stack = picture((1, 3), at_angles(90, 0, 20), scores=[-1.0, 3.0, 1.0], importance=[9.0, 0.0, 0.0])
    assert keeps("idpruner", stack, 1, importance="given") == [1]
    assert keeps("idpruner", stack, 2, importance="given") == [0, 1]
    assert keeps("idpruner", stack, 2, importance="given", lam=0.8) == [1, 2]
    assert keeps("idpruner", stack, 1) == [0]


def test_idpruner_of_a_trained_scorer_by_hand(tmp_path: Path) -> None:
    """3 x - y + .5 gives 12.5, 9.5, 5.5, -1.5: 1, .79, .5, 0 of the way, along x, x, -y and y.

    After the first .39 - .5, .25 - 0, 0 - 0; then 0 - 0 is more than the copy has. With lam .9 the copy has .71 - .1,
    the third .45.
    """
    path = tmp_path / "scorer.safetensors"
    save_file({"0.weight": torch.tensor([[3.0, -1.0]]), "0.bias": torch.tensor([0.5])}, path)
    features = torch.tensor([[[4.0, 0.0], [3.0, 0.0], [0.0, -5.0], [0.0, 2.0]]])
    stack = picture((2, 2), features, importance=[0.0, 0.0, 0.0, 1.0], scores=[0.0, 0.0, 1.0, 0.0])
    for more in ({}, {"importance": "given"}):
        assert keeps("idpruner", stack, 1, scorer=path, **more) == [0]
        assert keeps("idpruner", stack, 2, scorer=path, **more) == [0, 2]
        assert keeps("idpruner", stack, 3, scorer=path, **more) == [0, 2, 3]
        assert keeps("idpruner", stack, 2, scorer=path, lam=0.9, **more) == [0, 1]


def test_idpruner_of_a_deeper_scorer_by_hand(tmp_path: Path) -> None:
    """GELU(2 x) - GELU(2 y), about 2 x or -2 y: 6, -4, 2 and -8 of 6 to -8, at 0, 90, 0 and 90 degrees.

    After the first .14 - 0, .36 - .5, 0 - 0: the second; without similarity the third.
    """
    path = tmp_path / "scorer.safetensors"
    save_file({"0.weight": 2 * torch.eye(2), "1.weight": torch.tensor([[1.0, -1.0]])}, path)
    stack = picture((2, 2), torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 4.0]]]))
    assert keeps("idpruner", stack, 2, scorer=path) == [0, 1]
    assert keeps("idpruner", stack, 2, scorer=path, lam=1.0) == [0, 2]
    assert keeps("idpruner", stack, 3, scorer=path, lam=1.0) == [0, 1, 2]
