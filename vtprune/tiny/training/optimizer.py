"""Muon for the matrices of the blocks, AdamW for all the rest, under one schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtprune.errors import BackendUnavailable

WARMUP = 40


def check_torch() -> None:
    """Raise `BackendUnavailable` where torch is too old to train with."""
    if not hasattr(torch.optim, "Muon"):
        raise BackendUnavailable(f"training needs torch 2.9 or newer for Muon; here is {torch.__version__}")


class Optimizer:
    """Warm-up, then a cosine down to nearly zero. `matrix_rate` is for Muon, `rate` for AdamW."""

    def __init__(self, modules: list[nn.Module], *, steps: int, matrix_rate: float, rate: float) -> None:
        named = {id(weight): (name, weight) for module in modules for name, weight in module.named_parameters()}
        matrices = [weight for name, weight in named.values() if _is_matrix(name, weight)]
        others = [weight for name, weight in named.values() if not _is_matrix(name, weight)]
        self.weights = [*matrices, *others]
        self._steps = steps
        self._parts = [
            (torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.02, momentum=0.95), matrix_rate),
            (torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)), rate),
        ]

    def step(self, done: int) -> None:
        """Apply and clear the gradients after `done` steps, clipped to a norm of one."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        share = min(1.0, (done + 1) / WARMUP) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * done / self._steps))
        for optimizer, rate in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """All that the two have gathered, by names that `restore` knows."""
        found: dict[str, Tensor] = {}
        for number, (optimizer, _) in enumerate(self._parts):
            for weight, state in optimizer.state_dict()["state"].items():
                found |= {f"{number}.{weight}.{name}": torch.as_tensor(value) for name, value in state.items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        for number, (optimizer, _) in enumerate(self._parts):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                part, weight, name = key.split(".")
                if int(part) == number:
                    state.setdefault(int(weight), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _is_matrix(name: str, weight: Tensor) -> bool:
    """A matrix between hidden states: in a block or in the projector; embeddings and read-outs are none."""
    return weight.ndim == 2 and any(part in name for part in ("layers.", "linear_", "attn.", "mlp."))
