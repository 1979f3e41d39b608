"""Processes that train together: each takes its rows of every batch, and gradients are summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_WAIT = timedelta(days=7)
"""One stage may take far longer than another on a slow machine."""


@dataclass(frozen=True)
class Worker:
    """One of `world` processes."""

    rank: int
    world: int

    def join(self, meeting: Path) -> None:
        """Meet the others through a file of the run; no port is opened."""
        if self.world > 1:
            dist.init_process_group(
                "gloo",
                init_method=meeting.resolve().as_uri(),
                rank=self.rank,
                world_size=self.world,
                timeout=LONGEST_WAIT,
            )

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier()

    def rows(self, size: int) -> range:
        """This worker's rows of a batch."""
        return range(self.rank * size // self.world, (self.rank + 1) * size // self.world)

    def average(self, weights: Sequence[Tensor]) -> None:
        """Replace the gradients by their mean over all workers; a weight without one counts as zero."""
        if self.world == 1:
            return
        flat = torch.cat([_gradient(weight).flatten() for weight in weights])
        dist.all_reduce(flat)
        for weight, piece in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
            weight.grad = piece.view_as(weight) / self.world

    def alone(self) -> Worker:
        """The same process, working for itself."""
        return Worker(0, 1)


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
