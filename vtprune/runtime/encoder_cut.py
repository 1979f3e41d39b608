"""Pruning inside a vision encoder: hooks on its blocks make the sequence shorter as it goes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Tower
from vtprune.errors import UnsupportedCall
from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.protocols import EncoderStage
from vtprune.readings import BlockAttention
from vtprune.report import NOT_FINITE
from vtprune.runtime.attending import AttentionTap, EagerForwards
from vtprune.seam import refuse_copy
from vtprune.types import EncoderCut

HOLDERS = "holders"
"""Name of what `Going.steps_to_holders` says."""


class Going:
    """The patches of one call on their way: B rows of N at first, m later.

    `alive` (B, m) are their numbers at first, `home` (B, N) the index into m of the one that holds a patch, -1 where
    it is lost, `size` (B, m) how many each holds.
    """

    def __init__(self, patches: Tensor, counts: tuple[int, ...]) -> None:
        B, N, _ = patches.shape
        self.counts = counts
        self.alive = self.home = torch.arange(N, device=patches.device).expand(B, N)
        self.size = torch.ones(B, N, device=patches.device)
        self.memory: Tensor | None = None

    def advance(self, patches: Tensor, cut: EncoderCut) -> Tensor:
        """Patches (B, m, D) that go on, those that swallow others as means by size; none changes where none is lost."""
        self.memory = None if cut.memory is None else cut.memory.gather(1, cut.keep)
        if cut.keep.shape[1] == patches.shape[1]:
            return patches
        B, m = cut.keep.shape
        into = torch.where(cut.into < 0, m, cut.into)
        size = self.size.new_zeros(B, m + 1).scatter_add_(1, into, self.size)[:, :m]
        weighted = patches.float() * self.size[..., None]
        sums = weighted.new_zeros(B, m + 1, patches.shape[2])
        sums = sums.scatter_add(1, into[..., None].expand_as(weighted), weighted)[:, :m]
        alone = size == self.size.gather(1, cut.keep)
        own = kernels.rows_at(patches, cut.keep)
        gone_on = torch.where(alone[..., None], own, (sums / size[..., None]).to(patches.dtype))
        lost = torch.cat([cut.into, cut.into.new_full((B, 1), -1)], dim=1)
        self.home = lost.gather(1, torch.where(self.home < 0, cut.into.shape[1], self.home))
        self.alive, self.size = self.alive.gather(1, cut.keep), size
        return gone_on

    def restored(self, patches: Tensor) -> Tensor:
        """All N patches (B, N, D) again: each stands where the one stands that holds it, the lost ones are zeros."""
        blank = patches.new_zeros(patches.shape[0], 1, patches.shape[2])
        return kernels.rows_at(torch.cat([patches, blank], dim=1), self.home % (patches.shape[1] + 1))

    def steps_to_holders(self) -> Tensor:
        """(B, N): how many patches further on the one stands that holds a patch; 0 at those that stay or are lost."""
        own = torch.arange(self.home.shape[1], device=self.home.device)
        holder = self.alive.gather(1, self.home.clamp(min=0))
        return (holder - own).masked_fill(self.home < 0, 0).float()

    def survivors(self) -> Tensor:
        """(B, N): 0 where a patch is gone; of the others the one of highest memory has 2, the next a little less.

        Where the stage remembers nothing, the one that holds most comes first: rows that share a budget, as the frames
        of a clip do, then lose alike.
        """
        m = self.alive.shape[1]
        rank = kernels.top_select(self.size if self.memory is None else self.memory.float(), m).argsort(dim=1)
        worth = 2 - rank / m
        return torch.zeros(self.home.shape, device=worth.device).scatter_(1, self.alive, worth)


class _Thread(threading.local):
    """The call of one thread that is under way: the patches, and the attention that was last seen."""

    going: Going | None = None
    seen: BlockAttention | None = None


class EncoderCutter:
    """The hooks of one stage on one tower.

    `count(N)` is how many patches of a row stay. With `restore` the sequence has its full length again behind the block
    that makes the features, so that nothing after it notices. `on_done` gets the patches of every call at that block.
    """

    def __init__(
        self,
        tower: Tower,
        stage: EncoderStage,
        *,
        count: Callable[[int], int],
        active: Callable[[], bool],
        on_done: Callable[[Going], None],
        restore: bool,
    ) -> None:
        self._stage = stage
        self._blocks = tower.blocks[: tower.features + 1]
        self._has_cls = int(tower.has_cls)
        self._count = count
        self._active = active
        self._on_done = on_done
        self._restore = restore
        self._handles: list[RemovableHandle] = []
        self._eager = EagerForwards()
        self._thread = _Thread()

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    def hook(self) -> None:
        """Register the hooks."""
        handles = self._handles
        for number, probe in enumerate(self._blocks):
            self._eager.keep(probe.block)
            handles += AttentionTap(probe, self._attended, self._active, values=True).hook()
            passed = functools.partial(self._passed, number)
            handles.append(probe.block.register_forward_hook(passed, prepend=True))

    def remove(self) -> None:
        """Undo `hook`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._eager.restore()

    def _attended(self, seen: BlockAttention) -> None:
        self._thread.seen = seen

    @torch.compiler.disable
    def _passed(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._active():
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        shorter = self._shorten(number, hidden)
        return (shorter, *output[1:]) if isinstance(output, tuple) else shorter

    def _shorten(self, number: int, hidden: Tensor) -> Tensor:
        front, patches = hidden[:, : self._has_cls], hidden[:, self._has_cls :]
        if number == 0:
            n = patches.shape[1]
            counts = self._stage.counts(n, min(n, self._count(n)), len(self._blocks))
            self._thread.going = Going(patches, counts)
        going, seen = self._thread.going, self._thread.seen
        if going is None or seen is None:
            raise UnsupportedCall("a block of the encoder ran again by itself: no gradient checkpointing while pruned")
        if number == len(self._blocks) - 1 and host.holds(hidden):
            _check_finite(hidden)
        with torch.no_grad(), kernels.exact(hidden.device):
            cut = self._stage(seen, patches, going.counts[number], going.memory)
        patches = going.advance(patches, cut)
        self._thread.seen = None
        if number == len(self._blocks) - 1:
            self._thread.going = None
            self._on_done(going)
            patches = going.restored(patches) if self._restore else patches
        return torch.cat([front, patches], dim=1)


def _check_finite(hidden: Tensor) -> None:
    """Raise `UnsupportedCall` for NaN or infinity; for host memory, where looking waits for nothing."""
    if not torch.stack(hidden.detach().aminmax()).isfinite().all():
        raise UnsupportedCall(NOT_FINITE.format("patches"))
