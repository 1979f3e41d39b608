"""Selection allocates at most two copies of the tokens in fp32, and one N x N similarity where it needs one."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fidelity.test_methods import tokens
from vtprune.catalog import build
from vtprune.kernels import reference as kernels


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages born inside, as long as they live; remembers the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def know(self, tensor: torch.Tensor) -> None:
        """Leave out a tensor that was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def test_the_counter_counts() -> None:
    with LiveBytes() as count:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
    assert count.peak == 8000
    assert third.shape == (1000,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [16, 144])
@pytest.mark.parametrize("method", ["fastervlm", "vtprune", "divprune", "random", "uniform"])
def test_selection_stays_within_its_memory(method: str, k: int, dtype: torch.dtype) -> None:
    N, D = 576, 512
    embeds = torch.randn(1, N + 60, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    at = torch.arange(20, 20 + N)[None]
    importance = torch.rand(1, N)
    with LiveBytes() as count:
        count.know(embeds)
        stack = tokens(kernels.take_rows(embeds, at), importance)
        build(method).run(stack, k)
    similarity = N * N * 4 if method == "divprune" or (method == "vtprune" and k == 144) else 0
    small = 64 * N * 8
    assert count.peak <= 2 * N * D * 4 + similarity + small
