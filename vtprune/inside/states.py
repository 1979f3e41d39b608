"""Reading hidden states: of the rows in front of drop points, and what modules of layers make of tokens on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune._needs import Reads
from vtprune.adapters.decoder import Decoder
from vtprune.glances import Change, RowStates, Transition
from vtprune.inside.hooks import hidden_of
from vtprune.inside.walk import Walk
from vtprune.kernels import reference as kernels


class StateTap:
    """Hooks of one pipeline on one decoder, beside those that cut; what they find stays with the walk under way."""

    def __init__(
        self, decoder: Decoder, reads: Reads, layers: tuple[int, ...], walk: Callable[[], Walk | None]
    ) -> None:
        self._decoder = decoder
        self._layers = layers
        self._states = reads.states
        self._transitions = reads.transitions
        self._walk = walk

    def hook(self, note: Callable[..., None]) -> list[RemovableHandle]:
        """Register the hooks, behind those that cut: layers are seen as they run; `note` is told what they lie on."""
        handles = []
        for number in {layer - 1 for layer in self._layers} if self._states else ():
            note(number)
            layer = self._decoder.layers[number]
            handles.append(layer.register_forward_pre_hook(self._entered, with_kwargs=True))
        depth = len(self._decoder.layers)
        for name, transition in self._transitions.items():
            changed = functools.partial(self._changed, name, transition)
            for number in transition.layers(self._layers, depth):
                note(number, "self_attn", "mlp")
                for module in self._decoder.modules(number):
                    handles.append(module.register_forward_hook(changed, with_kwargs=True))
        return handles

    @torch.no_grad()
    def sensed(self, number: int, walk: Walk, hidden: Tensor) -> dict[str, Tensor]:
        """What glances at states say of the tokens of hidden states (B, K, D) in front of layer `number`: (B, K)."""
        found = {}
        for name, glance in self._states.items():
            assert walk.entered is not None
            real = walk.entry.real_of(glance.rows)
            count = real.shape[1]
            seen = RowStates(
                entering=kernels.rows_at(hidden, walk.rows[:, -count:]),
                earlier=walk.entered[:, -count:],
                real=real,
                number=number - 1,
            )
            with kernels.exact(hidden.device):
                found[name] = glance.rule(seen)[:, None].expand(hidden.shape[:2])
        return found

    @torch.compiler.disable
    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the rows of text in front of the layer before a drop point."""
        walk = self._walk()
        if walk is not None:
            walk.entered = kernels.rows_at(hidden_of(args, kwargs).detach(), walk.rows)

    @torch.compiler.disable
    @torch.no_grad()
    def _changed(
        self, name: str, transition: Transition, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Add what a module made of tokens; its tensors are read where they are, and nothing of them is held."""
        walk = self._walk()
        if walk is None:
            return
        inputs = hidden_of(args, kwargs)
        outputs = output[0] if isinstance(output, tuple) else output
        with kernels.exact(inputs.device):
            walk.add(name, transition.rule(Change(inputs=inputs, outputs=outputs, visual=walk.visual)))
