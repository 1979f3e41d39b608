"""What the readings of a method take from a vision encoder, and what a stage inside of it leaves."""

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
from vtprune.kernels import reference as kernels
from vtprune.readings import BlockAttention, Projection, Reading, Rule
from vtprune.runtime.attending import AttentionTap, EagerForwards
from vtprune.runtime.encoded import Blocks, Pending
from vtprune.seam import refuse_copy


class _Recording(threading.local):
    """What one thread is encoding: by reading and block what was taken so far (None: nothing is under way).

    `probing`: a rule is running the projector, which is not to be listened to.
    """

    taken: dict[tuple[str, int], list[Tensor | Pending]] | None = None
    probing = False


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
        self._eager = EagerForwards()
        self._thread = _Recording()

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

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
        return {name: tuple(blocks) for name, blocks in found.items()}

    def take(self, name: str, value: Tensor | Pending, *, block: int = 0) -> None:
        """Note what was read of a block."""
        assert self._thread.taken is not None
        self._thread.taken.setdefault((name, block), []).append(value)

    def hook(self, towers: list[Tower], readings: Mapping[str, Reading]) -> None:
        """Hook the blocks that readings ask for, once each, and the projector where one reads it."""
        at_projector = {name: reading.rule for name, reading in readings.items() if reading.rule.of == "projector"}
        hooked: set[nn.Module] = set()
        for tower in towers:
            for block in _blocks(tower, readings):
                if block.probe.attention not in hooked:
                    hooked.add(block.probe.attention)
                    self._eager.keep(block.probe.attention)
                    attended = functools.partial(self._attended, block)
                    self._handles += AttentionTap(block.probe, attended, self.recording).hook()
            if at_projector and tower.projector is not None and tower.projector not in hooked:
                hooked.add(tower.projector)
                self._eager.keep(tower.projector)
                given = functools.partial(self._given, at_projector)
                self._handles.append(tower.projector.register_forward_pre_hook(given))

    def remove(self) -> None:
        """Undo `hook`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._eager.restore()

    def _attended(self, block: _Block, seen: BlockAttention) -> None:
        for name, rule in block.rules.items():
            if block.probe.segments is not None:
                self.take(name, Pending(rule=rule, attention=seen, segments=block.probe.segments), block=block.number)
                continue
            with kernels.exact(seen.query.device):
                self.take(name, rule(seen), block=block.number)

    @torch.no_grad()
    def _given(self, rules: Mapping[str, Rule], module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.recording() or self._thread.probing:
            return
        inputs = args[0].detach()
        seen = Projection(inputs=inputs if inputs.ndim == 3 else inputs[None], projector=module)
        self._thread.probing = True
        try:
            for name, rule in rules.items():
                with kernels.exact(inputs.device):
                    self.take(name, rule(seen))
        finally:
            self._thread.probing = False


def _blocks(tower: Tower, readings: Mapping[str, Reading]) -> list[_Block]:
    """The blocks that readings ask for, each with what is asked; those that see windows only are passed by."""
    wanted: dict[int, dict[str, Rule]] = defaultdict(dict)
    for name, reading in readings.items():
        if reading.rule.of == "attention" and tower.has_cls >= reading.rule.needs_cls:
            for number in reading.blocks(len(tower.blocks), tower.features):
                wanted[tower.seeing_whole(number)][name] = reading.rule
    return [_Block(number=number, probe=tower.blocks[number], rules=rules) for number, rules in wanted.items()]
