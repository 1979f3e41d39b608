"""Hooks that tell attention sinks in decoder layers, and change the attention of text to them.

Whatever attention the model runs goes on running. For a few rows at a time the weights are computed once more, and what
changes in them is brought into the output of the attention before it is projected.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.decoder import Decoder
from vtprune.cache import SinkState
from vtprune.glances import SinkRule
from vtprune.inside.hooks import Hooks, Thread, allowed_by, hidden_of, tables_at
from vtprune.inside.walk import Walk
from vtprune.kernels import attention as attentions
from vtprune.kernels import reference as kernels
from vtprune.protocols import WeightEdit

FIRST = 2
"""The first layer whose attention is changed: what enters the layers before has no massive activations yet."""
_ROWS = 64
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass
class Scene:
    """One call of the language model, as the layers that look for sinks see it.

    Of the K tokens that enter, `visual` (B, K) belong to pictures and `told` (B, K) are real and were not written by
    the model. `rows` (B, R) is where the text is whose attention may change, `real` (B, R) False at what only fills up;
    `edits` says that there is any. Sinks are looked for where `looks`; a word that is decoded is none. `known` is what
    the cache knows, `walk` what is cut between layers, `changed` the layers whose attention was.
    """

    visual: Tensor
    told: Tensor
    rows: Tensor
    real: Tensor
    looks: bool
    edits: bool
    known: SinkState
    walk: Walk | None = None
    marks: dict[int, Tensor] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    massive: dict[tuple[int, str], Tensor] = field(init=False)
    _now: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.massive = dict(self.known.massive)

    @property
    def now(self) -> tuple[Tensor, Tensor, Tensor]:
        """`visual`, `told` and `rows` of the sequence as it is, behind the cuts so far."""
        walk = self.walk
        cuts = 0 if walk is None else len(walk.slots)
        if cuts not in self._now:
            visual, told, rows = self.visual, self.told, self.rows
            if walk is not None and cuts:
                visual, told = (own.gather(1, walk.index) & walk.valid for own in (visual, told))
                rows = functools.reduce(lambda places, slots: slots.gather(1, places), walk.slots, rows)
            self._now[cuts] = (visual, told, rows)
        return self._now[cuts]

    def marks_of(self, number: int, keys: int) -> Tensor:
        """Marks (B, 2, keys) of a layer that has so many keys, those of this call as far as there are any."""
        found = self.marks.get(number, self.known.marks.get(number))
        if found is None:
            found = self.visual.new_zeros(len(self.visual), 2, 0)
        return nn.functional.pad(found, (0, keys - found.shape[2]))


class _Thread(Thread):
    """The scene of a call, and what the attention of a layer was given."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.given: dict[str, Any] = {}

    def clear(self) -> None:
        self.held.clear()
        self.given.clear()


class SinkFinder(Hooks[Scene]):
    """The hooks that look for sinks: `edit` changes attention, `drops` are rules whose channels are needed in front of
    layers."""

    _thread: _Thread

    def __init__(self, decoder: Decoder, edit: WeightEdit | None, drops: Mapping[int, Iterable[SinkRule]]) -> None:
        super().__init__(decoder, _Thread())
        self._edit = edit
        self.edited = range(FIRST, len(decoder.layers) - 1) if edit is not None else range(0)
        self._rules = {number: list(rules) for number, rules in drops.items()}
        if edit is not None:
            for number in self.edited:
                self._rules.setdefault(number, []).append(edit.sinks)

    def hook(self) -> None:
        """Register the hooks; channels are looked for in front of a cut, sinks behind it."""
        for number in self._rules:
            self.note(number)
            choose = functools.partial(self._choose, number)
            layer = self._decoder.layers[number]
            self._handles.append(layer.register_forward_pre_hook(choose, prepend=True, with_kwargs=True))
        for number in self.edited:
            self._hook_attention(number)

    def _hook_attention(self, number: int) -> None:
        attention = self._decoder.attention(number)
        self.note(number, "self_attn", *(f"self_attn.{name}" for name in (*_PROJECTIONS, "o_proj")))
        find, attend, change = (functools.partial(step, number) for step in (self._find, self._attend, self._change))
        self._handles += [
            self._decoder.layers[number].register_forward_pre_hook(find, with_kwargs=True),
            attention.register_forward_pre_hook(attend, with_kwargs=True),
            attention.o_proj.register_forward_pre_hook(change),
        ]
        for name in _PROJECTIONS:
            hold = functools.partial(self._hold, name)
            self._handles.append(getattr(attention, name).register_forward_hook(hold))

    @torch.compiler.disable
    @torch.no_grad()
    def _choose(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Which channels tell sinks in front of a layer, where that is not known of the conversation."""
        scene = self._thread.call
        if scene is None or not scene.looks:
            return
        hidden = hidden_of(args, kwargs)
        first = scene.now[1].int().argmax(dim=1, keepdim=True)
        for rule in self._rules[number]:
            if (number, rule.name) not in scene.massive:
                scene.massive[number, rule.name] = rule.massive(kernels.rows_at(hidden, first)[:, 0])

    @torch.compiler.disable
    @torch.no_grad()
    def _find(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Which of the tokens that enter a layer are sinks; a cache remembers it."""
        scene = self._thread.call
        if scene is None or not scene.looks:
            return
        assert self._edit is not None
        rule, hidden, cache = self._edit.sinks, hidden_of(args, kwargs), kwargs.get("past_key_values")
        visual, told, _ = scene.now
        sinks = rule(hidden, scene.massive[number, rule.name]) & told
        stored = 0 if cache is None or number >= len(cache.layers) else cache.layers[number].get_seq_length()
        before = scene.marks_of(number, stored)
        scene.marks[number] = torch.cat([before, torch.stack([visual, sinks], dim=1)], dim=2)

    @torch.compiler.disable
    def _attend(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        scene = self._thread.call
        if scene is None or not scene.edits:
            return
        self._thread.clear()
        self._thread.given.update(kwargs)

    @torch.compiler.disable
    def _hold(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        """Hold queries of the rows that may change, keys and values where no cache does."""
        scene = self._thread.call
        if scene is None or not self._thread.given:
            return  # nothing is edited, or a glance calls the projection by itself
        if name == "q_proj":
            self._thread.held[name] = kernels.rows_at(output, scene.now[2])
        elif self._thread.given.get("past_key_values") is None:
            self._thread.held[name] = output

    @torch.compiler.disable
    def _change(self, number: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The output (B, K, H d) of the attention with what changes in it, row by row."""
        scene = self._thread.call
        if scene is None or not scene.edits:
            return None
        output, rows = args[0], scene.now[2]
        B, K, _ = output.shape
        scene.changed.add(number)
        with kernels.exact(output.device):
            changes = torch.cat(list(self._changes(number, scene, rows, K)), dim=2) * scene.real[:, None, :, None]
        at = rows + torch.arange(0, B * K, K, device=rows.device)[:, None]
        flat = changes.transpose(1, 2).reshape(at.numel(), -1).to(output.dtype)
        self._thread.clear()
        return (output.reshape(B * K, -1).index_add(0, at.flatten(), flat).view(output.shape), *args[1:])

    def _changes(self, number: int, scene: Scene, rows: Tensor, K: int) -> Iterator[Tensor]:
        """What changes in the output of some rows after the other, (B, H, rows, d) each."""
        edit, decoder, given, held = self._edit, self._decoder, self._thread.given, self._thread.held
        assert edit is not None
        rotary, cache = given["position_embeddings"], given.get("past_key_values")
        if cache is None:
            keys = decoder.keys(number, held["k_proj"], *rotary)
            values = decoder.values(number, held["v_proj"])
        else:
            keys, values = cache.layers[number].keys, cache.layers[number].values
        visual, sinks = scene.marks_of(number, keys.shape[2]).unbind(dim=1)
        queries = decoder.queries(number, held["q_proj"], *tables_at(rotary, rows))
        for start in range(0, rows.shape[1], _ROWS):
            tile = slice(start, start + _ROWS)
            allowed = allowed_by(given.get("attention_mask"), rows[:, tile], K, keys.shape[2])
            scale = decoder.attention(number).scaling
            weights = attentions.rows_attention(queries[:, :, tile], keys, allowed, scale=scale)
            yield attentions.weighted_values(edit(weights, visual, sinks) - weights, values)
