"""TransPrune: what modules change of tokens is the loop, in models of several families and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts.cases import answer
from tests.contracts.dense import hidden
from tests.fidelity import loops_methods as methods
from tests.fidelity import loops_states as loops
from tests.fidelity.test_combined_scorers import A, B, by_hand
from tests.fidelity.test_published_methods import drawn, every_size, pictures, rows, scores
from tests.models import IMAGE, IMAGE_FAMILIES, ONE_AND_TWO, Prompt
from vtprune.catalog import build
from vtprune.errors import InvalidOption
from vtprune.glances import Change, Transition
from vtprune.stages.scorers import Mixed
from vtprune.stages.states import TokenTransition

DEPTH, SINCE, POINTS = 16, 3, (4, 5, 6)
"""Shares 7, 9 and 12 of 32, 3.5, 4.5 and 6 of 16, are rounded half up; changes count from layer 3 on."""
Place = tuple[Any, int, list[int]]


def model_of(family: str, attention: str = "sdpa") -> nn.Module:
    model = models.build(family, layers=DEPTH)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    return model


def placed(report: Any, ids: Tensor, known: int = 0) -> list[Place]:
    """Of every picture its report, its row and where its tokens are in (B, L); those of earlier turns are `known`."""
    visual = [[place for place in range(known, len(row)) if row[place] == IMAGE] for row in ids.tolist()]
    found = []
    for segment in report.segments:
        places = [visual[segment.row].pop(0) for _ in range(segment.parts[-1].stop)]
        always = {offset for part in segment.parts for offset in part.separators}
        found.append((segment, segment.row, [place for i, place in enumerate(places) if i not in always]))
    return found


def reached(found: list[Place], ids: Tensor, depth: int, earlier: Tensor | None = None) -> Tensor:
    """How many layers each token went through."""
    layers = torch.full(ids.shape, depth)
    if earlier is not None:
        layers[:, : earlier.shape[1]] = earlier
    for segment, row, places in found:
        layers[row, places] = segment.depths
    return layers


@torch.no_grad()
def modules_of(model: nn.Module, told: dict[str, Tensor], reach: Tensor) -> dict[tuple[int, str], list[np.ndarray]]:
    """What attention and MLP of every layer get and give, by transformers alone: (B, L, D) each."""
    found, handles = {}, []

    def catch(key: tuple[int, str]) -> Any:
        def noted(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            outputs = output[0] if isinstance(output, tuple) else output
            found[key] = [inputs.double().numpy(), outputs.double().numpy()]

        return noted

    for number, layer in enumerate(model.model.language_model.layers):
        for name in ("self_attn", "mlp"):
            hook = getattr(layer, name).register_forward_hook(catch((number, name)), with_kwargs=True)
            handles.append(hook)
    with hidden(model, reach):
        model(**told)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def attention_of(
    model: nn.Module, told: dict[str, Tensor], found: list[Place], reach: Tensor, layer: int
) -> np.ndarray:
    """(B, H, L, L) of a layer that what is about to leave is shown to once more; by eager transformers."""
    there = reach.clone()
    for _, row, places in found:
        there[row, places] += reach[row, places] == layer
    with hidden(model, there):
        return model(**told, output_attentions=True).attentions[layer].double().numpy()


def expected_of(family: str, told: dict[str, Tensor], found: list[Place], reach: Tensor, alpha: float) -> list[Any]:
    """For every picture the tokens that go on behind each cut, by the loop."""
    model = model_of(family, "eager")
    modules = modules_of(model, told, reach)
    stays: list[Any] = [[] for _ in found]
    for point in POINTS:
        attention = attention_of(model, told, found, reach, point)
        for picture, (_, row, places) in zip(stays, found, strict=True):
            left = [place for place in places if reach[row, place] >= point]
            change = np.zeros(len(left))
            for layer in range(SINCE, point):
                current = [p for _, own, all_of in found if own == row for p in all_of if reach[row, p] > layer]
                for name in ("self_attn", "mlp"):
                    inputs, outputs = (states[row, current] for states in modules[layer, name])
                    values = dict(zip(current, loops.transition(inputs, outputs), strict=True))
                    change += np.array([values[place] for place in left])
            last = int((told["input_ids"][row] == IMAGE).nonzero().max())
            asked = attention[row][:, last + 1 :][:, :, left].mean(axis=(0, 1))
            k = sum(int(reach[row, place] > point) for place in left)
            chosen = methods.best(loops.transprune(change, asked, alpha), k)
            picture.append([places.index(left[i]) for i in chosen])
    return stays


def chosen(found: list[Place]) -> list[Any]:
    return [[(s.depths > point).nonzero()[:, 0].tolist() for point in POINTS] for s, _, _ in found]


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_it_is_the_loop_in_a_model(family: str) -> None:
    """At three cuts, of one and two pictures in a batch that is padded; changes of what left count no more."""
    model, told, choices = model_of(family), models.inputs(family, ONE_AND_TWO), []
    for alpha in (0.5, 1.0):
        with torch.no_grad(), vtprune.pruning(model, "transprune", keep=0.5, alpha=alpha) as pruner:
            model(**told)
        found = placed(pruner.last, told["input_ids"])
        reach = reached(found, told["input_ids"], DEPTH)
        assert {int(depth) for depth in reach.unique()} == {*POINTS, DEPTH}
        choices.append(chosen(found))
        assert choices[-1] == expected_of(family, told, found, reach, alpha)
    assert choices[0] != choices[1], "attention takes part"


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_it_is_the_loop_in_a_later_turn(family: str) -> None:
    """The picture of the first turn is cached: it is looked past, and takes no share of the softmax."""
    model = model_of(family)
    first, second = (models.inputs(family, (Prompt(images=((30, 64),), seed=seed),)) for seed in (1, 2))
    with vtprune.pruning(model, "transprune", keep=0.5) as pruner:
        said = answer(model, first, steps=3)
        before = reached(placed(pruner.last, first["input_ids"]), first["input_ids"], DEPTH)
        ids = torch.cat([said.sequences, second["input_ids"]], dim=1)
        given = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer(model, given, steps=1, past_key_values=said.cache)
        found = placed(pruner.last, ids, known=said.sequences.shape[1])
    reach = reached(found, ids, DEPTH, before)
    told = {**given, "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]])}
    assert chosen(found) == expected_of(family, told, found, reach, 0.5)


@pytest.mark.parametrize("seed", range(3))
@every_size
def test_changes_are_the_loop(S: int, grid: tuple[int, int], k: int, seed: int) -> None:
    """Text before and behind the pictures has no change and takes no share; half precision is worked on in full."""
    N = grid[0] * grid[1]
    inputs, outputs = (drawn(S, (1, N + 5), 6, seed + number).bfloat16() for number in (0, 1))
    visual = torch.zeros(S, N + 5, dtype=torch.bool)
    visual[:, 2 : 2 + N] = True
    found = TokenTransition()(Change(inputs=inputs, outputs=outputs, visual=visual))
    assert found.dtype == torch.float32
    for own, x, y in zip(found, inputs.double().numpy(), outputs.double().numpy(), strict=True):
        np.testing.assert_allclose(own[2:-3].numpy(), loops.transition(x[2:-3], y[2:-3]), rtol=1e-4)
        assert own[:2].tolist() == [0, 0] and own[-3:].tolist() == [0, 0, 0]


def test_changes_by_hand() -> None:
    """(1, 0) becomes (0, 2): twice as long, turned by 1. (3, 4) stays, and is turned by 0. The text counts nowhere.

    A token that nothing comes of has no change, and 1 for its turn.
    """
    inputs = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [3.0, 4.0]], [[1.0, 0.0], [3.0, 4.0], [6.0, 8.0]]])
    outputs = torch.tensor([[[-9.0, 9.0], [0.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]]])
    visual = torch.tensor([[False, True, True], [True, True, True]])
    found = TokenTransition()(Change(inputs=inputs, outputs=outputs, visual=visual)).tolist()
    e = math.e
    assert found[0] == pytest.approx([0, 2 * e / (e + 1), 1 / (e + 1)])
    assert found[1] == pytest.approx([0, 1 / (e + 1 + e**2), 0.5 * e**2 / (e + 1 + e**2)])


def test_a_row_without_pictures_has_no_changes() -> None:
    blank = torch.zeros(1, 3, dtype=torch.bool)
    assert TokenTransition()(Change(inputs=torch.ones(1, 3, 2), outputs=torch.ones(1, 3, 2), visual=blank)).sum() == 0


@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.8])
@every_size
def test_every_stage_is_the_loop(S: int, grid: tuple[int, int], k: int, alpha: float) -> None:
    changes, seen = scores(S, grid), scores(S, grid, seed=1) / 50
    pipeline = build("transprune", {"alpha": alpha})
    assert pipeline.needs == {"transition@0.1875+", "text_attention@behind"}
    stack = pictures(drawn(S, grid, 2), grid, **{"transition@0.1875+": changes, "text_attention@behind": seen})
    expected = [methods.best(loops.transprune(*own, alpha), k) for own in rows(changes, seen)]
    for stage in pipeline.inside:
        assert stage.choice.run(stack, k).keep.tolist() == expected


@pytest.mark.parametrize(
    ("changes", "seen", "alpha", "kept"),
    [
        ([1.0, 3.0, 0.0], [0.02, 0.01, 0.05], 0.5, [1]),  # .25, .75, 0 and .25, .125, .625: .5, .875, .625
        ([1.0, 3.0, 0.0], [0.02, 0.01, 0.05], 0.25, [2]),  # .25, .28125, .46875
        ([2.0, 2.0, 4.0], [0.03, 0.03, 0.02], 0.5, [2]),  # .625 of .25, .25, .5 and .375, .375, .25: .75 is most
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], 0.5, [0]),  # nothing is looked at: the first of equals
    ],
)
def test_the_choice_by_hand(changes: list[float], seen: list[float], alpha: float, kept: list[int]) -> None:
    evidence = {"transition@0.1875+": [changes], "text_attention@behind": [seen]}
    stack = pictures(torch.zeros(1, 3, 1), (1, 3), **evidence)
    for stage in build("transprune", {"alpha": alpha}).inside:
        assert stage.choice.run(stack, 1).keep.tolist() == [kept]


def test_shares_of_sums_by_hand() -> None:
    """2, 4, 2 are .25, .5, .25 and 1, 0, 3 are .25, 0, .75: a quarter of the first and the rest of the second."""
    a, b = [2.0, 4.0, 2.0], [1.0, 0.0, 3.0]
    assert by_hand(Mixed(first=A, second=B, weight=0.25, scale="sum"), a, b) == pytest.approx([0.25, 0.125, 0.625])
    ruled_out = by_hand(Mixed(first=A, second=B, scale="sum"), [2.0, -math.inf, 6.0], b)
    assert ruled_out == pytest.approx([0.25, -math.inf, 0.75])
    with pytest.raises(InvalidOption, match="scale='mean'"):
        Mixed(first=A, second=B, scale="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("since", "points", "depth", "layers"),
    [
        (6 / 32, (7, 9, 12), 32, range(6, 12)),
        (6 / 32, (6, 8, 11), 28, range(5, 11)),
        (6 / 32, (9, 11, 15), 40, range(8, 15)),
        (6 / 32, (1, 2), 6, range(2)),
        (0.9, (4, 6), 8, range(3, 6)),
        (0.0, (4, 6), 8, range(6)),
    ],
)
def test_layers_that_count(since: float, points: tuple[int, ...], depth: int, layers: range) -> None:
    """Layers 7 to 12 of 32, as the authors count them; at least the one in front of the first cut."""
    assert Transition(rule=TokenTransition(), since=since).layers(points, depth) == layers


@pytest.mark.parametrize("wrong", [-0.1, 1.5, True, "half", None])
def test_what_is_no_share_of_the_depth(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="since="):
        Transition(rule=TokenTransition(), since=wrong)
