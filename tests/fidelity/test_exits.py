"""DyVTE: the layer in front of which a picture leaves is that of the loop, by every rule and by a gate."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts.dense import hidden
from tests.fidelity import loops_states as loops
from tests.fidelity.test_published_methods import pictures
from tests.fidelity.test_transitions import Place, placed, reached
from tests.models import IMAGE, ONE_AND_TWO, Prompt
from vtprune.catalog import build
from vtprune.glances import RowStates
from vtprune.stages.networks import ExitGate
from vtprune.stages.states import Turn

DEPTH, WIDTH, FIRST, LAST = 8, 64, 2, 7
FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl")
PROMPTS = (*ONE_AND_TWO, Prompt(images=((32, 32),), text_before=6, text_after=3, seed=5))
families = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str, attention: str = "sdpa") -> nn.Module:
    model = models.build(family, layers=DEPTH)
    model.set_attn_implementation(attention)
    return model


def gates(path: Path, depth: int = DEPTH, width: int = WIDTH, hidden: int = 24, seed: int = 0) -> str:
    """A file with random gates."""
    generator = torch.Generator().manual_seed(seed)
    held = {}
    for number in range(depth):
        held[f"layers.{number}.0.weight"] = torch.randn(hidden, 2 * width, generator=generator) / 8
        held[f"layers.{number}.2.weight"] = torch.randn(2, hidden, generator=generator)
    save_file(held, path)
    return str(path)


def dyvte(family: str, told: dict[str, Tensor], **options: Any) -> tuple[list[Place], Tensor]:
    """The pictures of a prefill and how far each token went; where each left is a single number."""
    model = model_of(family)
    with torch.no_grad(), vtprune.pruning(model, "dyvte", keep=0.95, **options) as pruner:
        model(**told)
    found = placed(pruner.last, told["input_ids"])
    assert all(len(segment.depths.unique()) == 1 for segment, _, _ in found)
    return found, reached(found, told["input_ids"], DEPTH)


def exits(found: list[Place]) -> list[int]:
    return [int(segment.depths[0]) for segment, _, _ in found]


@torch.no_grad()
def states_of(family: str, told: dict[str, Tensor], reach: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What every layer gets, (B, L, D), and its attention (B, H, L, L), by transformers that hide what has left."""
    model, entering, handles = model_of(family, "eager"), [], []

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        entering.append((args[0] if args else kwargs["hidden_states"]).double().numpy())

    for layer in model.model.language_model.layers:
        handles.append(layer.register_forward_pre_hook(catch, with_kwargs=True))
    with hidden(model, reach):
        attentions = model(**told, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return entering, [attention.double().numpy() for attention in attentions]


Values = list[dict[int, float]]


def masses_of(family: str, told: dict[str, Tensor], found: list[Place], reach: Tensor, every: int = 1) -> Values:
    """What the last token pays to every picture in front of each check, as far as the picture goes."""
    _, attentions = states_of(family, told, reach)
    return [
        {
            layer: float(attentions[layer - 1][row][:, -1][:, places].mean(axis=0).sum())
            for layer in range(FIRST, min(DEPTH - 1, int(reach[row, places[0]])) + 1, every)
        }
        for _, row, places in found
    ]


def turns_of(family: str, told: dict[str, Tensor], found: list[Place], reach: Tensor) -> Values:
    """How far the last token of the prompt of every picture turns from layer to layer."""
    entering, _ = states_of(family, told, reach)
    return [
        {layer: loops.turn(entering[layer - 1][row], entering[layer][row]) for layer in range(FIRST, DEPTH)}
        for _, row, _ in found
    ]


def thresholds(values: Values, patience: int) -> dict[float, set[int]]:
    """Some under which pictures would leave at layers where they do not under the others, and these layers."""
    every = sorted(value for own in values for value in own.values())
    found: dict[float, set[int]] = {}
    for below in [(low + high) / 2 for low, high in itertools.pairwise(every)]:
        layers = {loops.leaves(own, below, patience, LAST) for own in values}
        if not layers <= set().union(*found.values()):
            found[below] = layers
    return found


@families
@pytest.mark.parametrize("patience", [1, 2])
def test_by_attention_every_picture_leaves_by_itself(family: str, patience: int) -> None:
    """The last token pays less than the threshold to it, over heads, in so many layers in front of where it leaves."""
    told, seen = models.inputs(family, PROMPTS), set()
    for below in thresholds(masses_of(family, told, *dyvte(family, told, below=0.0)), patience):
        found, reach = dyvte(family, told, below=below, patience=patience)
        values = masses_of(family, told, found, reach)
        assert exits(found) == [loops.leaves(own, below, patience, LAST) for own in values]
        seen |= set(exits(found))
    assert len(seen) >= 3, "pictures leave at several layers"


@families
@pytest.mark.parametrize("patience", [1, 2])
def test_where_the_last_token_settles_all_of_a_prompt_leaves(family: str, patience: int) -> None:
    told, seen = models.inputs(family, PROMPTS), set()
    for below in thresholds(turns_of(family, told, *dyvte(family, told, below=0.0)), patience):
        found, reach = dyvte(family, told, rule="stable", below=below, patience=patience)
        values = turns_of(family, told, found, reach)
        assert exits(found) == [loops.leaves(own, below, patience, LAST) for own in values]
        seen |= set(exits(found))
    assert len(seen) >= 3, "prompts lose their pictures at several layers"


@families
def test_by_a_gate_all_of_a_prompt_leaves(family: str, tmp_path: Path) -> None:
    """It sees the text behind the last picture as it is behind each layer; one check will do."""
    told, seen = models.inputs(family, PROMPTS), set()
    for seed in range(6):
        path = gates(tmp_path / f"{seed}.safetensors", seed=seed)
        weights = ExitGate(path=path)._gates
        found, reach = dyvte(family, told, gate=path, first=1 / 8, patience=3)
        entering, _ = states_of(family, told, reach)
        rows = {}
        for row in range(len(PROMPTS)):
            text = int((told["input_ids"][row] == IMAGE).nonzero().max()) + 1
            margins = {}
            for layer in range(1, DEPTH):
                first, second = (weight.double().numpy() for weight in weights[layer - 1])
                margins[layer] = loops.margin(entering[layer][row][text:], first, second)
            rows[row] = loops.leaves(margins, 0.0, 1, LAST)
        assert exits(found) == [rows[row] for _, row, _ in found]
        seen |= set(rows.values())
    assert len(seen) >= 3, "prompts lose their pictures at several layers"


@pytest.mark.parametrize("every", [2, 3])
def test_checks_are_some_layers_apart(every: int) -> None:
    """Two of them in a row, of layers 2, 4, 6 or 2, 5: in between nobody asks."""
    told = models.inputs("llava", PROMPTS)
    for below in (0.2, 0.35, 0.5):
        found, reach = dyvte("llava", told, below=below, every=every)
        values = masses_of("llava", told, found, reach, every)
        assert exits(found) == [loops.leaves(own, below, 2, LAST) for own in values]


def test_by_hand_of_attention() -> None:
    """Shares of .03 and .03 are more than .05, .02 and .02 are less; the mean of either is less."""
    stack = pictures(torch.zeros(2, 2, 1), (1, 2), last_attention=[[0.03, 0.03], [0.02, 0.02]])
    (stage,) = build("dyvte").inside
    assert stage.choice.count(stack, 2).tolist() == [2, 0]
    (stage,) = build("dyvte", {"rule": "stable"}).inside
    stack = pictures(torch.zeros(2, 2, 1), (1, 2), last_turn=[[0.06, 0.06], [0.04, 0.04]])
    assert stage.choice.count(stack, 2).tolist() == [2, 0]


def test_by_hand_of_a_turn() -> None:
    """By 90 degrees, by none, by 60; only the last row counts, and its length does not."""
    earlier = torch.tensor([[[5.0, 5.0], [1.0, 0.0]], [[5.0, 5.0], [3.0, 4.0]], [[5.0, 5.0], [1.0, 0.0]]])
    entering = torch.tensor([[[1.0, 0.0], [0.0, 7.0]], [[1.0, 0.0], [6.0, 8.0]], [[1.0, 0.0], [2.0, 2 * 3**0.5]]])
    seen = RowStates(entering=entering, earlier=earlier, real=torch.ones(3, 2, dtype=torch.bool), number=0)
    assert Turn()(seen).tolist() == pytest.approx([1, 0, 0.5], abs=1e-6)


def test_by_hand_of_a_gate(tmp_path: Path) -> None:
    """Of words 1 and 3 and the last 2, the first layer makes 2 + 2 and 2 x 2 - 2, and GELU 3.9999 and 1.9545 of that.

    Staying gets the one, leaving 3 times the other. A word that only fills up changes nothing; where the last token is
    alone, 2 and -2 are left of the sums, and GELU makes 1.9545 and -.0455 of them.
    """
    path = str(tmp_path / "gate.safetensors")
    first, second = torch.tensor([[1.0, 1.0], [2.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    save_file({"layers.0.0.weight": first, "layers.0.2.weight": second}, path)
    entering = torch.tensor([[[9.0], [1.0], [3.0], [2.0]], [[9.0], [1.0], [3.0], [2.0]]])
    real = torch.tensor([[False, True, True, True], [False, False, False, True]])
    found = ExitGate(path=path)(RowStates(entering=entering, earlier=entering, real=real, number=0))
    assert found.tolist() == pytest.approx([3.9999 - 3 * 1.9545, 1.9545 + 3 * 0.0455], abs=1e-3)
    for text, own in (([[1.0], [3.0], [2.0]], found[0]), ([[2.0]], found[1])):
        assert loops.margin(np.array(text), first.numpy(), second.numpy()) == pytest.approx(float(own), abs=1e-5)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_leaving_by_hand(patience: int) -> None:
    found = dict(zip(range(2, 9), [0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1], strict=True))
    assert loops.leaves(found, 0.5, patience, 9) == {1: 3, 2: 6, 3: 7}[patience]
    assert loops.leaves(found, 0.5, 5, 9) == 9
    assert loops.leaves(found, 0.5, patience, 3) == 3


def test_every_combination_can_be_built() -> None:
    for rule, patience, every in itertools.product(("mass", "stable"), (1, 3), (1, 2)):
        (stage,) = build("dyvte", {"rule": rule, "patience": patience, "every": every}).inside
        assert (stage.keep, stage.patience, stage.every) == (None, patience, every)
