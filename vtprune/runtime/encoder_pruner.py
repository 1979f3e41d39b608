"""`EncoderPruner`: the hooks on a vision encoder that stands by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from vtprune.adapters.base import Tower
from vtprune.errors import UnsupportedCall
from vtprune.pipeline import Pipeline
from vtprune.runtime.encoder_cut import EncoderCutter, Going
from vtprune.seam import HANDLE, refuse_copy
from vtprune.types import Budget

_WHOLE_MAPS = ("forward_intermediates", "get_intermediate_layers")
"""Methods of encoders that fold what comes out of blocks back into the grid of the picture."""


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedCall("maps of the patches between blocks: they are gone from a pruned encoder; unwrap it first")


@dataclass(frozen=True, kw_only=True, eq=False)
class EncoderReport:
    """One call of an encoder: `counts` are the patches left after each block.

    `keep` (B, K) are ascending numbers of the patches at the end, `into` (B, N) the number of the one that holds each
    patch, -1 where it is lost, `sizes` (B, K) how many each holds. All stay on their device.
    """

    method: str
    counts: tuple[int, ...]
    keep: Tensor
    into: Tensor
    sizes: Tensor

    def summary(self) -> str:
        """One line for people."""
        B, N = self.into.shape
        held = int((self.into >= 0).sum()) - self.keep.numel()
        merged = f", {held} of the others merged into them" if held else ""
        pictures = f"{B} picture{'s' if B > 1 else ''}"
        return f"{self.method}: kept {self.keep.numel()} of {B * N} patches of {pictures}{merged}"


class EncoderPruner:
    """The handle behind `model.vtprune` of an encoder; `last` is the report of the last call."""

    def __init__(self, tower: Tower, *, pipeline: Pipeline, budget: Budget) -> None:
        self.pipeline = pipeline
        self.budget = budget
        self.last: EncoderReport | None = None
        self._tower = tower
        self._model: nn.Module | None = None
        self._cutter: EncoderCutter | None = None
        self._replaced: list[tuple[nn.Module, str, Any]] = []

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    def install(self, model: nn.Module) -> None:
        """Hook the blocks, unless everything is kept, and become the handle of `model`."""
        if not self.budget.keeps_all:
            assert self.pipeline.encoder is not None
            cutter = EncoderCutter(
                self._tower,
                self.pipeline.encoder,
                count=self.budget.resolve,
                active=lambda: True,
                on_done=self._done,
                restore=False,
            )
            cutter.hook()
            self._cutter = cutter
            self._refuse_maps(model)
        model.__dict__[HANDLE] = self
        self._model = model

    def remove(self) -> None:
        """Take every hook and the handle off the model."""
        if self._cutter is not None:
            self._cutter.remove()
        for module, name, before in self._replaced:
            module.__dict__.pop(name)
            module.__dict__.update({} if before is None else {name: before})
        self._replaced.clear()
        if self._model is not None:
            self._model.__dict__.pop(HANDLE, None)

    def _refuse_maps(self, model: nn.Module) -> None:
        """Let every method that folds patches back into the grid of the picture raise."""
        inside = getattr(model, "visual", None)
        for module in (model, inside) if isinstance(inside, nn.Module) else (model,):
            for name in _WHOLE_MAPS:
                if hasattr(module, name):
                    self._replaced.append((module, name, module.__dict__.get(name)))
                    module.__dict__[name] = _refuse

    def _done(self, going: Going) -> None:
        at_end = going.home.clamp(min=0)
        into = going.alive.gather(1, at_end).masked_fill(going.home < 0, -1)
        self.last = EncoderReport(
            method=self.pipeline.name, counts=going.counts, keep=going.alive, into=into, sizes=going.size
        )
