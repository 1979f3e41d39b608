"""Hooks on the projections of one attention, that hand over queries and keys as the attention uses them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Probe
from vtprune.errors import UnsupportedCall
from vtprune.readings import BlockAttention
from vtprune.seam import refuse_copy


class EagerForwards:
    """Modules kept eager inside a model that is compiled later: compiled code would pass their hooks by."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, Any, Any]] = []

    def keep(self, module: nn.Module) -> None:
        """Run the forward of `module` as it is from now on."""
        own = module.__dict__
        eager = torch.compiler.disable(module.forward)
        self._replaced.append((module, own.get("forward"), eager))
        own["forward"] = eager

    def restore(self) -> None:
        """Undo `keep`, where nobody has changed the forward since."""
        for module, before, eager in self._replaced:
            if module.__dict__.get("forward") is eager:
                module.__dict__.pop("forward")
                module.__dict__.update({} if before is None else {"forward": before})
        self._replaced.clear()


class _Under(threading.local):
    """The attention call of one thread that is under way."""

    def __init__(self) -> None:
        self.projections: dict[str, Tensor] = {}
        self.call: dict[str, Any] = {}


class AttentionTap:
    """Calls `on_attention` after every call of the attention of `probe`, while `active` says so."""

    def __init__(
        self,
        probe: Probe,
        on_attention: Callable[[BlockAttention], None],
        active: Callable[[], bool],
        *,
        values: bool = False,
    ) -> None:
        self._probe = probe
        self._on_attention = on_attention
        self._active = active
        self._values = values
        self._thread = _Under()
        apart = (probe.query, probe.key, *((probe.value,) if values else ()))
        names = () if probe.joint else (probe.fused,) if probe.fused else apart
        self._projections = {name: probe.attention.get_submodule(name) for name in names}

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    def hook(self) -> list[RemovableHandle]:
        """Register the hooks."""
        attention = self._probe.attention
        handles = [attention.register_forward_pre_hook(self._before, with_kwargs=True)]
        for name, module in self._projections.items():
            handles.append(module.register_forward_hook(functools.partial(self._projected, name)))
        return [*handles, attention.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._active():
            return
        for name, hooked in self._projections.items():
            if module.get_submodule(name) is not hooked:
                raise UnsupportedCall(
                    f"{name} of the vision encoder was replaced after wrap (by an adapter, say), so its attention "
                    "cannot be read: unwrap, change the model, then wrap it again"
                )
        self._thread.projections.clear()
        self._thread.call = dict(kwargs)
        if self._probe.joint is not None:
            with torch.no_grad():
                self._thread.projections["joint"] = self._probe.joint(module, args, kwargs)

    def _projected(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._active():
            self._thread.projections[name] = output.detach()

    @torch.no_grad()
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._active():
            return
        probe, projections = self._probe, self._thread.projections
        query, key, value = _split_heads(probe, projections, self._values)
        if probe.normalise is not None:
            query, key = probe.normalise(query, key)
        if probe.rotate is not None:
            query, key = probe.rotate(query, key, self._thread.call)
        dtype = next(iter(projections.values())).dtype
        seen = BlockAttention(
            query=query.to(dtype), key=key.to(dtype), value=value, scale=probe.scale, has_cls=probe.has_cls
        )
        projections.clear()
        self._thread.call.clear()
        self._on_attention(seen)


def _split_heads(probe: Probe, projections: dict[str, Tensor], values: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and, where asked for, values, (B, H, N, d)."""
    if probe.fused or probe.joint:
        (joint,) = projections.values()
        joint = joint.view(*joint.shape[:-1], 3, probe.heads, -1)
        parts = [joint[..., number, :, :] for number in range(3 if values else 2)]
    else:
        parts = [projection.unflatten(-1, (probe.heads, -1)) for projection in projections.values()]
    stacked = [(part[None] if part.ndim == 3 else part).transpose(1, 2) for part in parts]
    return stacked[0], stacked[1], stacked[2] if values else None
