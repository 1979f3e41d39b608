"""A scorer whose weights come from a file: the same numbers as a torch network, and no other file is taken."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vtprune
from tests import models
from tests.fidelity import loops
from tests.fidelity.test_methods import tokens
from tests.integration.common import ONE, kept_of, write
from tests.models import randomise
from vtprune import Pipeline
from vtprune.catalog import build
from vtprune.errors import InvalidOption
from vtprune.stages import STAGES
from vtprune.stages.networks import TrainedScorer

WIDTH = 64
"""Of the language model of the tiny families."""


def network(*widths: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(len(widths))
    layers = [nn.Linear(one, two, bias=bias) for one, two in itertools.pairwise(widths)]
    made = nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])
    randomise(made)
    return made


def stored(path: Path, made: nn.Sequential, dtype: torch.dtype = torch.float32) -> str:
    """The file that holds the linears of a network, numbered without what is between them."""
    linears = [layer for layer in made if isinstance(layer, nn.Linear)]
    states = [(number, *entry) for number, layer in enumerate(linears) for entry in layer.state_dict().items()]
    save_file({f"{number}.{name}": tensor.to(dtype) for number, name, tensor in states}, path)
    return str(path)


def features(width: int = WIDTH) -> Tensor:
    return torch.randn(2, 9, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("widths", [(WIDTH, 1), (WIDTH, 16, 1), (WIDTH, 32, 8, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_the_network(tmp_path: Path, widths: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    """Weights in half precision are used as what they are, features are taken to fp32."""
    made = network(*widths, bias=bias).to(dtype).float()
    scorer = TrainedScorer(path=stored(tmp_path / "scorer.safetensors", made, dtype))
    with torch.no_grad():
        expected = made(features())[..., 0]
    torch.testing.assert_close(scorer(tokens(features())), expected)
    assert scorer(tokens(features().bfloat16())).dtype == torch.float32


def test_by_hand(tmp_path: Path) -> None:
    """2 x 1 - 3 x 2 + 0.5 = -3.5; a second layer gets GELU(3) = 3 x 0.99865."""
    path = str(tmp_path / "scorer.safetensors")
    save_file({"0.weight": torch.tensor([[2.0, -3.0]]), "0.bias": torch.tensor([0.5])}, path)
    stack = tokens(torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]))
    assert TrainedScorer(path=path)(stack).tolist() == [[-3.5, 0.5]]
    save_file({"0.weight": torch.tensor([[3.0, 0.0]]), "1.weight": torch.tensor([[2.0]])}, path)
    assert TrainedScorer(path=path)(stack)[0].tolist() == pytest.approx([6 * 0.99865, 0.0], abs=1e-4)


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    """By a scorer that is made afterwards; one that was made before stays what it was, also without the file."""
    path = tmp_path / "scorer.safetensors"
    first = TrainedScorer(path=stored(path, network(WIDTH, 1)))
    before = first(tokens(features()))
    second = TrainedScorer(path=stored(path, network(WIDTH, 8, 1)))
    assert first == second
    assert not torch.allclose(second(tokens(features())), before)
    path.unlink()
    assert torch.equal(first(tokens(features())), before)


def linear(out: int, wide: int, *, bias: int | None = None) -> dict[str, Tensor]:
    return {"weight": torch.ones(out, wide), **({} if bias is None else {"bias": torch.ones(bias)})}


def named(*layers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{number}.{name}": tensor for number, layer in enumerate(layers) for name, tensor in layer.items()}


BAD = {
    "widths": (named(linear(8, 4), linear(1, 7)), "do not fit"),
    "not_scalar": (named(linear(8, 4), linear(2, 8)), "gives 2 numbers"),
    "empty": ({}, "expected 0.weight"),
    "other_names": ({"layers.0.weight": torch.ones(1, 4)}, "expected 0.weight"),
    "a_gap": ({"0.weight": torch.ones(3, 4), "2.weight": torch.ones(1, 3)}, "expected 0.weight"),
    "only_biases": ({"0.bias": torch.ones(1)}, "expected 0.weight"),
    "a_bias_too_many": ({**named(linear(1, 4)), "1.bias": torch.ones(1)}, "expected 0.weight"),
    "a_vector": ({"0.weight": torch.ones(4)}, "do not fit"),
    "a_picture": ({"0.weight": torch.ones(1, 4, 1)}, "do not fit"),
    "a_vector_first": ({"0.weight": torch.ones(4), "1.weight": torch.ones(1, 4)}, "do not fit"),
    "wide_bias": (named(linear(8, 4, bias=7), linear(1, 8)), "biases"),
    "matrix_bias": ({"0.weight": torch.ones(1, 4), "0.bias": torch.ones(1, 1)}, "biases"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_holds_no_such_network_is_refused(tmp_path: Path, name: str) -> None:
    held, message = BAD[name]
    path = tmp_path / "scorer.safetensors"
    save_file(held, path)
    for make in (TrainedScorer, lambda path: build("idpruner", {"scorer": path})):
        with pytest.raises(InvalidOption, match=message):
            make(path=str(path))


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 9, b"\x80\x04pickle"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "scorer.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidOption, match="cannot read the scorer"):
        TrainedScorer(path=str(path))
    with pytest.raises(InvalidOption, match="cannot read the scorer"):
        TrainedScorer(path=str(tmp_path))


def test_features_of_another_width_are_refused(tmp_path: Path) -> None:
    scorer = TrainedScorer(path=stored(tmp_path / "scorer.safetensors", network(32, 8, 1)))
    with pytest.raises(InvalidOption, match="of width 32, these have 64"):
        scorer(tokens(features()))


def test_idpruner_chooses_by_it(tmp_path: Path) -> None:
    """The importance of the loop is what the network says of the projected tokens."""
    made, model = network(WIDTH, 16, 1), models.build("llava")
    path = tmp_path / "scorer.safetensors"
    stored(path, made)
    row = models.inputs(model, ONE)
    with torch.no_grad():
        (own,) = model.model.get_image_features(row["pixel_values"]).pooler_output
        worth = made(own)[:, 0]
    expected = loops.mmr(worth.double().numpy(), own.double().numpy(), 5, 0.7)
    with vtprune.pruning(model, "idpruner", keep=5, scorer=path, lam=0.7) as pruner:
        write(model, row)
        assert kept_of(pruner.last) == [expected]
        assert pruner.last.importance is None
    assert not build("idpruner", {"scorer": str(path)}).needs
    assert expect_other(model, row) != [expected], "by attention it is another set"


def expect_other(model: nn.Module, row: dict[str, Any]) -> list[list[int]]:
    with vtprune.pruning(model, "idpruner", keep=5, lam=0.7) as pruner:
        write(model, row)
        return kept_of(pruner.last)


def test_a_pipeline_with_it_is_stored_and_restored(tmp_path: Path) -> None:
    path = stored(tmp_path / "scorer.safetensors", network(WIDTH, 16, 1))
    pipeline = build("idpruner", {"scorer": path})
    pipeline.run(tokens(features()), 3)
    described = json.loads(json.dumps(pipeline.to_dict()))
    assert described["picks"][0]["scorer"] == {"stage": "TrainedScorer", "path": path}
    again = Pipeline.from_dict(described, stages=STAGES)
    assert again == pipeline
    assert torch.equal(again.run(tokens(features()), 3).keep, pipeline.run(tokens(features()), 3).keep)
    Path(path).unlink()
    with pytest.raises(InvalidOption, match="cannot read the scorer"):
        Pipeline.from_dict(described, stages=STAGES)
