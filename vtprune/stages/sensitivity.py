"""Rules that ask how strongly the projector answers to a small change of what it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from vtprune._checks import check_positive, check_whole
from vtprune.errors import MissingEvidence
from vtprune.readings import OfProjector, Projection


@dataclass(frozen=True, kw_only=True)
class ProbedSensitivity(OfProjector):
    """Mean length of the change over a step of length `step`, in both of each of `probes` random directions.

    The directions are a function of the seed, the same for all tokens; the projector runs in fp32, where steps are not
    lost in rounding. Patches that the projector merges are moved together. Source: ZOO-Prune, arXiv 2509.24837.
    """

    probes: int = 64
    step: float = 0.01
    seed: int = 0
    name: ClassVar[str] = "probed_sensitivity"

    def __post_init__(self) -> None:
        check_whole("probes", self.probes, least=1)
        check_positive("step", self.step)
        check_whole("seed", self.seed)

    def __call__(self, seen: Projection) -> Tensor:
        inputs = seen.inputs.float()
        B, N, C = inputs.shape
        generator = torch.Generator().manual_seed(self.seed)
        directions = nn.functional.normalize(torch.randn(self.probes, C, generator=generator), dim=1)
        weights = {name: tensor.float() for name, tensor in seen.projector.state_dict().items()}
        total = inputs.new_zeros(())
        for direction in (self.step * directions).to(inputs.device, non_blocking=True):
            ahead, back = (functional_call(seen.projector, weights, inputs + way * direction) for way in (1, -1))
            total = total + (ahead - back).norm(dim=-1)
        rows = (total / (2 * self.step * self.probes)).reshape(B, -1)
        return rows.repeat_interleave(N // rows.shape[1], dim=1)


@dataclass(frozen=True)
class JacobianSensitivity(OfProjector):
    """Root mean square of that change in the limit of small steps, over all directions: the norm of the Jacobian.

    In closed form, for a projector of two linears with an activation between them: with a_i its slope at the i-th
    hidden unit, the squared norm is the sum of a_i a_j G_ij H_ij, where G and H are the Gram matrices of the columns of
    the second weight and of the rows of the first. Ours; the paper estimates it by probes.
    """

    name: ClassVar[str] = "sensitivity"

    def __call__(self, seen: Projection) -> Tensor:
        projector: Any = seen.projector
        if {name for name, _ in projector.named_children()} != {"linear_1", "act", "linear_2"}:
            raise MissingEvidence(
                f"the slope of a {type(projector).__name__} is not known in closed form: take probes of it"
            )
        first, second = projector.linear_1.weight.float(), projector.linear_2.weight.float()
        bias = projector.linear_1.bias
        hidden = nn.functional.linear(seen.inputs.float(), first, None if bias is None else bias.float())
        slope = jvp(projector.act, (hidden,), (torch.ones_like(hidden),))[1]
        squared = ((slope @ ((second.T @ second) * (first @ first.T))) * slope).sum(dim=-1)
        return (squared.clamp(min=0) / first.shape[1]).sqrt()
