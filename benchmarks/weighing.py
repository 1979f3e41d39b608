"""Bytes that tensors hold while a block runs, and while a part of it does."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Bytes(TorchDispatchMode):
    """Bytes in use over those in front of the block: `highest` is their peak.

    On a GPU the allocator tells. Elsewhere storages count that come out of an operator and did not go in, as long as
    they live; workspaces inside of operators are not seen.
    `begin` and `end` are hooks for modules, around a part of the block: `begun` is in use in front of it, `most` in it.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.begun = self.most = self.highest = 0
        self._cuda = device == "cuda"
        self._born: set[int] = set()
        self._base = self._live = self._peak = 0

    def __enter__(self) -> Bytes:
        if self._cuda:
            self._base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._look()

    def begin(self, *_: Any) -> None:
        """The part begins."""
        self._look()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._peak = self._live
        self.begun = torch.cuda.memory_allocated() - self._base if self._cuda else self._live

    def end(self, *_: Any) -> None:
        """The part ends."""
        self.most = self._look()

    def _look(self) -> int:
        peak = torch.cuda.max_memory_allocated() - self._base if self._cuda else self._peak
        self.highest = max(self.highest, peak)
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._cuda:
            return result
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._born:
                self._born.add(key)
                self._live += size
                self._peak = max(self._peak, self._live)
                weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._born.discard(key)
        self._live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
