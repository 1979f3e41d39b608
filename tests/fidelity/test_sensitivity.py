"""Sensitivity of the projector: by probes against a loop, in closed form against autograd, and read off real models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.integration.common import kept_of, write
from tests.models import Prompt
from vtprune import Pick, Pipeline
from vtprune.adapters import family_of
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.readings import Projection
from vtprune.stages.scorers import Read
from vtprune.stages.selectors import TopK
from vtprune.stages.sensitivity import JacobianSensitivity, ProbedSensitivity

FAMILIES = ("llava", "video_llava", "qwen2_5_vl", "internvl")
TWO = (Prompt(images=((30, 64), (60, 64)), seed=2),)


class Two(nn.Module):
    """A projector as LLaVA has it."""

    def __init__(self, act: nn.Module, *, wide: int = 6, hidden: int = 20, out: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.linear_1, self.act = nn.Linear(wide, hidden, bias=bias), act
        self.linear_2 = nn.Linear(hidden, out, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class Merging(nn.Module):
    """One that makes a token of four neighbours, as that of Qwen does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(24, 16)

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(features).view(-1, 24)))


def projectors() -> list[nn.Module]:
    torch.manual_seed(0)
    made = [Two(nn.GELU()), Two(nn.Tanh(), bias=False), nn.Linear(6, 9), Merging()]
    for module in made:
        models.randomise(module)
    return made


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(seed))


def directions(rule: ProbedSensitivity, wide: int) -> Tensor:
    drawn = torch.randn(rule.probes, wide, generator=torch.Generator().manual_seed(rule.seed)).double()
    return torch.stack([row / math.sqrt(sum(float(entry) ** 2 for entry in row)) for row in drawn])


@torch.no_grad()
def by_probes(rule: ProbedSensitivity, projector: nn.Module, given: Tensor) -> Tensor:
    """One length for every row that comes out, (rows,): a step ahead against a step back, averaged over directions."""
    twin, given = copy.deepcopy(projector).double(), given.double()
    changes = [
        (twin(given + rule.step * direction) - twin(given - rule.step * direction)).flatten(0, -2).norm(dim=1)
        for direction in directions(rule, given.shape[-1])
    ]
    return sum(changes) / (2 * rule.step * rule.probes)


def jacobians(projector: nn.Module, given: Tensor) -> list[Tensor]:
    """Of every token of (B, N, C), in double precision."""
    twin = copy.deepcopy(projector).double()
    return [torch.autograd.functional.jacobian(twin, token) for token in given.double().flatten(0, 1)]


@pytest.mark.parametrize("projector", projectors(), ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("rule", [ProbedSensitivity(probes=5), ProbedSensitivity(probes=1, step=0.5, seed=3)])
def test_probes_are_the_loop(projector: nn.Module, rule: ProbedSensitivity) -> None:
    """Tokens that the projector merges share what is found."""
    expected = by_probes(rule, projector, inputs())
    found = rule(Projection(inputs=inputs(), projector=projector))
    assert found.shape == (2, 8)
    torch.testing.assert_close(
        found.flatten().double(), expected.repeat_interleave(16 // len(expected)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("act", [nn.GELU(), nn.Tanh(), nn.SiLU(), nn.ReLU(), nn.Identity()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_the_norm_of_the_jacobian(act: nn.Module, bias: bool) -> None:
    projector = Two(act, bias=bias)
    models.randomise(projector)
    expected = torch.stack([own.norm() / math.sqrt(6) for own in jacobians(projector, inputs())]).view(2, 8)
    found = JacobianSensitivity()(Projection(inputs=inputs(), projector=projector)).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_by_hand() -> None:
    """(3, 4) to length 5 in every direction: 5 by probes and in closed form, 0 where the activation is cut off.

    Of the two directions of a plane one is lost: |3 cos| by probes, 3 / sqrt(2) in the mean square.
    """
    one = Two(nn.ReLU(), wide=1, hidden=1, out=2, bias=False)
    one.linear_1.weight.data, one.linear_2.weight.data = torch.tensor([[1.0]]), torch.tensor([[3.0], [4.0]])
    seen = Projection(inputs=torch.tensor([[[2.0], [-2.0]]]), projector=one)
    for rule in (ProbedSensitivity(), JacobianSensitivity()):
        assert rule(seen)[0].tolist() == pytest.approx([5.0, 0.0], abs=1e-3)
    lost = Two(nn.Identity(), wide=2, hidden=1, out=1, bias=False)
    lost.linear_1.weight.data, lost.linear_2.weight.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]])
    seen = Projection(inputs=torch.zeros(1, 1, 2), projector=lost)
    ((across, _),) = directions(ProbedSensitivity(probes=1), 2).tolist()
    assert ProbedSensitivity(probes=1)(seen).item() == pytest.approx(3 * abs(across), abs=1e-4)
    assert JacobianSensitivity()(seen).item() == pytest.approx(3 / math.sqrt(2))


def test_many_probes_come_near_the_closed_form() -> None:
    """Wide features leave little between a mean of lengths and the root of a mean of squares."""
    torch.manual_seed(0)
    projector = Two(nn.GELU(), wide=32, hidden=64, out=48)
    models.randomise(projector)
    given = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2)) * 2
    seen = Projection(inputs=given, projector=projector)
    exact = JacobianSensitivity()(seen)
    gaps = [(ProbedSensitivity(probes=probes)(seen) / exact - 1).abs().max().item() for probes in (1, 16, 2048)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.02


def test_the_same_seed_gives_the_same() -> None:
    seen = Projection(inputs=inputs(), projector=projectors()[0])
    again = Projection(inputs=inputs(), projector=projectors()[0])
    torch.manual_seed(7)
    assert torch.equal(ProbedSensitivity(probes=3)(seen), ProbedSensitivity(probes=3)(again))
    assert not torch.allclose(ProbedSensitivity(probes=3)(seen), ProbedSensitivity(probes=3, seed=1)(seen))


def test_half_precision_is_probed_in_full() -> None:
    """A step of .01 is lost in the rounding of bfloat16 around 100."""
    projector = Two(nn.GELU()).bfloat16()
    given = (inputs() + 100).bfloat16()
    expected = by_probes(ProbedSensitivity(probes=4), projector, given)
    found = ProbedSensitivity(probes=4)(Projection(inputs=given, projector=projector))
    torch.testing.assert_close(found.flatten().double(), expected, atol=1e-2, rtol=1e-2)
    assert next(projector.parameters()).dtype == torch.bfloat16


def test_a_projector_of_another_form_has_no_closed_form() -> None:
    """Nor has one with a norm in front of the two linears, as that of InternVL."""
    normed = Two(nn.GELU())
    normed.layer_norm = nn.LayerNorm(6)
    for projector in (nn.Linear(6, 9), Merging(), normed):
        with pytest.raises(MissingEvidence, match="take probes"):
            JacobianSensitivity()(Projection(inputs=inputs(), projector=projector))


@pytest.mark.parametrize("wrong", [{"probes": 0}, {"step": 0.0}, {"step": -1.0}])
def test_parameters_are_checked(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match=next(iter(wrong))):
        ProbedSensitivity(**wrong)


def tapped(model: Any, row: dict[str, Tensor], rule: ProbedSensitivity) -> Tensor:
    """Sensitivity of all tokens in the order of the prompt: it travels in channel 0 of what the projector gives."""
    projector = family_of(model.model.config).tower(model.model, "image").projector
    twin = copy.deepcopy(projector)

    def carry(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        lengths = by_probes(rule, twin, args[0] if args[0].ndim == 3 else args[0][None])
        return torch.cat([lengths.to(output.dtype).view(*output.shape[:-1], 1), output[..., 1:]], dim=-1)

    handle = projector.register_forward_hook(carry)
    names = ("pixel_values", "pixel_values_images", "image_grid_thw")
    try:
        with torch.no_grad():
            pooled = model.model.get_image_features(**{name: row[name] for name in names if name in row}).pooler_output
    finally:
        handle.remove()
    return torch.cat([entry.reshape(-1, entry.shape[-1])[:, 0] for entry in pooled])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_gets_the_sensitivity_of_its_patches(name: str) -> None:
    """Also where patches are merged, and where windows change their order on the way."""
    model, rule = models.build(name), ProbedSensitivity(probes=3, step=0.1)
    row = models.inputs(model, TWO)
    lengths = tapped(model, row, rule)
    pick = Pick(name="sensitive", scorer=Read(rule=rule), selector=TopK())
    with vtprune.pruning(model, Pipeline(name="top", picks=(pick,)), keep=0.5) as pruner:
        write(model, row)
        segments = pruner.last.segments
    for segment, own in zip(segments, lengths.split([segment.n for segment in segments]), strict=True):
        assert segment.keep.tolist() == sorted(own.argsort(descending=True)[: segment.k].tolist())


@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl", "internvl"))
def test_zoo_prune_keeps_the_right_count_and_listens_once(name: str) -> None:
    """Two passes of the projector for each probe, one for the tokens: probes are not probed."""
    model, calls = models.build(name), []
    row = models.inputs(model, TWO)
    projector = family_of(model.model.config).tower(model.model, "image").projector
    handle = projector.register_forward_hook(lambda *_: calls.append(1))
    with vtprune.pruning(model, "zoo_prune", keep=0.3, probes=4) as pruner:
        write(model, row)
        assert [segment.k for segment in pruner.last.segments] == [
            math.floor(0.3 * segment.n + 0.5) for segment in pruner.last.segments
        ]
        assert len(calls) == 1 + 2 * 4
        first = kept_of(pruner.last)
        write(model, row)
        assert kept_of(pruner.last) == first
    handle.remove()
    write(model, row)
    assert len(calls) == 2 * (1 + 2 * 4)


def test_zoo_prune_in_closed_form_is_refused_where_there_is_none() -> None:
    """At the first call, since the projector tells."""
    for name, works in (("llava", True), ("internvl", False), ("qwen2_5_vl", False)):
        model = models.build(name)
        row = models.inputs(model, TWO)
        with vtprune.pruning(model, "zoo_prune", keep=0.3, closed_form=True) as pruner:
            if works:
                write(model, row)
                assert pruner.last.kept == round(0.3 * 16) * 2
                continue
            with pytest.raises(MissingEvidence, match="take probes"):
                write(model, row)
