"""Hooks on the blocks and the projector of a vision encoder: what the readings of a method take from them."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Probe, Tower
from vtprune.errors import UnsupportedCall
from vtprune.kernels import reference as kernels
from vtprune.readings import BlockAttention, Projection, Reading, Rule
from vtprune.runtime.encoded import Blocks, Pending
from vtprune.seam import refuse_copy


class _Recording(threading.local):
    """What one thread is encoding: by reading and block what was taken so far (None: nothing is under way).

    `probing`: a rule is running the projector, which is not to be listened to.
    """

    taken: dict[tuple[str, int], list[Tensor | Pending]] | None = None
    probing = False

    def __init__(self) -> None:
        self.projections: dict[str, Tensor] = {}
        self.call: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A block to be read: its number, its probe, and the rules of the readings that ask for it, by their names."""

    number: int
    probe: Probe
    rules: Mapping[str, Rule]


class Listener:
    """The hooks; `begin` and `end` enclose one call of the encoder."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._forwards: list[tuple[nn.Module, Any, Any]] = []
        self._thread = _Recording()

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    @property
    def recording(self) -> bool:
        """Whether this thread is between `begin` and `end`."""
        return self._thread.taken is not None

    def begin(self) -> None:
        """Take what comes from now on."""
        self._thread.taken = {}

    def end(self) -> dict[str, Blocks]:
        """What was taken, by reading: one entry for each block, crops of several calls of the encoder together."""
        found: dict[str, list[Tensor | Pending]] = defaultdict(list)
        for (name, _), parts in sorted((self._thread.taken or {}).items(), key=lambda item: item[0]):
            ready = [part for part in parts if isinstance(part, Tensor)]
            found[name].append(torch.cat(ready) if ready else parts[0])
        self._thread.taken = None
        self._thread.projections.clear()
        self._thread.call.clear()
        return {name: tuple(blocks) for name, blocks in found.items()}

    def hook(self, towers: list[Tower], readings: Mapping[str, Reading]) -> None:
        """Hook the blocks that readings ask for, once each, and the projector where one reads it."""
        at_projector = {name: reading.rule for name, reading in readings.items() if reading.rule.of == "projector"}
        hooked: set[nn.Module] = set()
        for tower in towers:
            for block in _blocks(tower, readings):
                if block.probe.attention not in hooked:
                    hooked.add(block.probe.attention)
                    self._hook_block(block)
            if at_projector and tower.projector is not None and tower.projector not in hooked:
                hooked.add(tower.projector)
                self._hook_projector(tower.projector, at_projector)

    def remove(self) -> None:
        """Undo `hook`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, before, eager in self._forwards:
            if module.__dict__.get("forward") is eager:
                module.__dict__.pop("forward")
                module.__dict__.update({} if before is None else {"forward": before})
        self._forwards.clear()

    def _keep_eager(self, module: nn.Module) -> None:
        """Keep a module eager inside a model that is compiled later: compiled code would pass its hooks by."""
        own = module.__dict__
        eager = torch.compiler.disable(module.forward)
        self._forwards.append((module, own.get("forward"), eager))
        own["forward"] = eager

    def _hook_block(self, block: _Block) -> None:
        probe = block.probe
        self._keep_eager(probe.attention)
        names = (probe.fused,) if probe.fused else (probe.query, probe.key)
        projections = {name: probe.attention.get_submodule(name) for name in names}
        before = functools.partial(self._before, projections)
        self._handles.append(probe.attention.register_forward_pre_hook(before, with_kwargs=True))
        for name, module in projections.items():
            self._handles.append(module.register_forward_hook(functools.partial(self._projected, name)))
        self._handles.append(probe.attention.register_forward_hook(functools.partial(self._attended, block)))

    def _hook_projector(self, projector: nn.Module, rules: Mapping[str, Rule]) -> None:
        self._keep_eager(projector)
        self._handles.append(projector.register_forward_pre_hook(functools.partial(self._given, rules)))

    def _before(
        self, projections: dict[str, nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.recording:
            return
        for name, hooked in projections.items():
            if module.get_submodule(name) is not hooked:
                raise UnsupportedCall(
                    f"{name} of the vision encoder was replaced after wrap (by an adapter, say), so its attention "
                    "cannot be read: unwrap, change the model, then wrap it again"
                )
        self._thread.call = dict(kwargs)

    def _projected(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.recording:
            self._thread.projections[name] = output.detach()

    @torch.no_grad()
    def _attended(self, block: _Block, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.recording:
            return
        probe, projections = block.probe, self._thread.projections
        query, key = _split_heads(probe, projections)
        if probe.normalise is not None:
            query, key = probe.normalise(query, key)
        if probe.rotate is not None:
            query, key = probe.rotate(query, key, self._thread.call)
        if probe.segments is not None:
            dtype = next(iter(projections.values())).dtype
            query, key = query.to(dtype), key.to(dtype)
        seen = BlockAttention(query=query, key=key, scale=probe.scale, has_cls=probe.has_cls)
        for name, rule in block.rules.items():
            if probe.segments is not None:
                self._take(name, block.number, Pending(rule=rule, attention=seen, segments=probe.segments))
                continue
            with kernels.exact(query.device):
                self._take(name, block.number, rule(seen))
        projections.clear()
        self._thread.call.clear()

    @torch.no_grad()
    def _given(self, rules: Mapping[str, Rule], module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.recording or self._thread.probing:
            return
        inputs = args[0].detach()
        seen = Projection(inputs=inputs if inputs.ndim == 3 else inputs[None], projector=module)
        self._thread.probing = True
        try:
            for name, rule in rules.items():
                with kernels.exact(inputs.device):
                    self._take(name, 0, rule(seen))
        finally:
            self._thread.probing = False

    def _take(self, name: str, block: int, value: Tensor | Pending) -> None:
        assert self._thread.taken is not None
        self._thread.taken.setdefault((name, block), []).append(value)


def _blocks(tower: Tower, readings: Mapping[str, Reading]) -> list[_Block]:
    """The blocks that readings ask for, each with what is asked; those that see windows only are passed by."""
    wanted: dict[int, dict[str, Rule]] = defaultdict(dict)
    for name, reading in readings.items():
        if reading.rule.of == "attention" and tower.has_cls >= reading.rule.needs_cls:
            for number in reading.blocks(len(tower.blocks), tower.features):
                wanted[tower.seeing_whole(number)][name] = reading.rule
    return [_Block(number=number, probe=tower.blocks[number], rules=rules) for number, rules in wanted.items()]


def _split_heads(probe: Probe, projections: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if probe.fused:
        joint = projections[probe.fused]
        joint = joint.view(*joint.shape[:-1], 3, probe.heads, -1)
        query, key = joint[..., 0, :, :], joint[..., 1, :, :]
    else:
        query, key = (projections[name].unflatten(-1, (probe.heads, -1)) for name in (probe.query, probe.key))
    if query.ndim == 3:
        query, key = query[None], key[None]
    return query.transpose(1, 2), key.transpose(1, 2)
