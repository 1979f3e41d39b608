"""Hooks on decoder layers: what all classes that register some have in common, and how they read arguments."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.decoder import Decoder
from vtprune.errors import UnsupportedCall
from vtprune.kernels import reference as kernels
from vtprune.seam import refuse_copy

CallT = TypeVar("CallT")


class Thread(threading.local):
    """What one thread is doing: the call of the language model under way, None between calls."""

    call: Any = None

    def clear(self) -> None:
        """Forget what belongs to a layer of the call."""


class Hooks(Generic[CallT]):
    """Hooks of one pipeline on one decoder; `begin` and `end` enclose a call of the language model.

    Subclasses register theirs in `hook`, and `note` what these lie on: what takes the place of a module after wrap has
    none of them.
    """

    def __init__(self, decoder: Decoder, thread: Thread) -> None:
        self._decoder = decoder
        self._thread = thread
        self._handles: list[RemovableHandle] = []
        self._modules: dict[tuple[int, str], object] = {}

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, call: CallT) -> None:
        """Do their work in the call that comes now.

        Raises:
            UnsupportedCall: where what hooks lie on was replaced after wrap.
        """
        self.check()
        self._thread.call = call

    def end(self) -> CallT | None:
        """Leave the call alone that comes next; returns what there was."""
        call: CallT | None = self._thread.call
        self._thread.call = None
        self._thread.clear()
        return call

    def note(self, number: int, *names: str) -> None:
        """Remember modules of a layer, and the layer itself, as they are at wrap."""
        for name in ("", *names):
            self._modules[number, name] = self._now(number, name)

    def check(self) -> None:
        """Raise `UnsupportedCall` where another module stands in the place of one of them; a compiled one may."""
        for (number, name), module in self._modules.items():
            if self._now(number, name) is not module:
                what = f"{name.rpartition('.')[2]} of a decoder layer" if name else f"decoder layer {number}"
                raise UnsupportedCall(
                    f"{what} was replaced after wrap (by an adapter, say), and with it went hooks of this method: "
                    "unwrap, change the model, then wrap it again"
                )

    def _now(self, number: int, name: str) -> object:
        found: object = self._decoder.layers[number]
        if not name and self._decoder.listed is not None:
            found = self._decoder.listed[number] if number < len(self._decoder.listed) else None
        for part in name.split(".") if name else ():
            found = getattr(found, part, None)
        return getattr(found, "_orig_mod", found)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Hidden states (B, K, D) among the arguments of a layer or a module of it."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other hidden states, passed as they were."""
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def tables_at(rotary: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, R, d) at places (B, R) of those (B or 1, K, d) of all tokens."""
    cos, sin = (kernels.rows_at(table.expand(len(places), -1, -1), places) for table in rotary)
    return cos, sin


def allowed_by(mask: Any, rows: Tensor, K: int, keys: int) -> Tensor:
    """(B, R, keys) bool: what the mask that a layer was given, of any form, lets rows of its K tokens see."""
    if torch.is_tensor(mask) and mask.ndim == 4:
        own = mask.expand(len(rows), *mask.shape[1:])[:, 0, :, :keys]
        own = own.gather(1, rows[..., None].expand(-1, -1, keys))
        return own if own.dtype == torch.bool else own >= 0
    causal = torch.arange(keys, device=rows.device) <= rows[..., None] + (keys - K)
    return causal & mask[:, None].bool() if torch.is_tensor(mask) else causal
