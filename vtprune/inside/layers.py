"""The hooks on decoder layers: cut in a prefill, mend masks in every call after it."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import masks
from vtprune._needs import Reads
from vtprune.adapters.decoder import Decoder
from vtprune.inside.glances import look, named
from vtprune.inside.hooks import Hooks, Thread, hidden_of, tables_at, with_hidden
from vtprune.inside.states import StateTap
from vtprune.inside.walk import Walk
from vtprune.kernels import reference as kernels


@dataclass
class Passage:
    """One call of the language model.

    `walk` cuts in a prefill and is None later. `cached` counts, for every drop point, the tokens cached behind it.
    Where any of them is padding, `known` says per drop point which are real, (B, cached), and `known_first` in front
    of the first; in a call that cuts nothing `known` covers its own tokens too.
    `padded` says that an earlier cut left padding behind a drop point. `massive` (B, D) are channels that tell sinks,
    by layer and rule.
    """

    walk: Walk | None
    cached: tuple[int, ...]
    known: tuple[Tensor, ...] | None = None
    known_first: Tensor | None = None
    padded: bool = False
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[tuple[int, bool], Any] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    massive: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def nothing_to_mend(self) -> bool:
        """Whether this call cuts nothing and nothing cached is padding."""
        return self.walk is None and self.known is None

    def real(self, behind: int) -> Tensor | None:
        """(B, keys), which keys a layer behind drop point `behind` has are real; None where all are."""
        own = None if self.known is None else self.known[behind]
        walk = self.walk
        if walk is None or (own is None and not walk.padded):
            return own
        past = walk.valid.new_ones(len(walk.valid), self.cached[behind]) if own is None else own
        return torch.cat([past, walk.valid], dim=1)

    def alike(self, behind: int) -> int:
        """The first drop point behind which the same tokens lie as behind this one, so that one mask will do."""
        while behind and self._same(behind - 1, behind):
            behind -= 1
        return behind

    def _same(self, one: int, other: int) -> bool:
        """Whether the same was cached behind two drop points, and no token left at the later one."""
        cached = self.cached[one] == self.cached[other] and (self.known is None or self.known[one] is self.known[other])
        return cached and (self.walk is None or self.walk.stored[one] is self.walk.stored[other])

    def cut(self, value: Any) -> Any:
        """An argument of a layer: of one number or row per token of the sequence at entry, what is left of it."""
        walk = self.walk
        assert walk is not None
        if not torch.is_tensor(value) or value.shape[:2] != walk.entry.valid.shape or not walk.slots:
            return value
        return kernels.rows_at(value, walk.index)

    def tables(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, K, d) of the tokens that are left, from those `given` for all; gathered once a cut."""
        walk = self.walk
        assert walk is not None
        if not walk.slots:
            return given
        if len(walk.slots) not in self.rotary:
            self.rotary[len(walk.slots)] = tables_at(given, walk.index)
        return self.rotary[len(walk.slots)]


class _Thread(Thread):
    """The passage under way, and what the projections before a drop point gave."""

    attending = False
    caches = False

    def __init__(self) -> None:
        self.projected: dict[str, Tensor] = {}

    def clear(self) -> None:
        self.projected.clear()
        self.attending = False


class LayerCutter(Hooks[Passage]):
    """The hooks that cut in front of `layers`, and mend masks behind them in every later call."""

    _thread: _Thread

    def __init__(self, decoder: Decoder, reads: Reads, layers: tuple[int, ...], implementation: str) -> None:
        super().__init__(decoder, _Thread())
        self.layers = layers
        self._before = named(reads.glances, "before")
        self._behind = named(reads.glances, "behind")
        self._sinks = reads.sinks
        self._implementation = implementation
        self._states = StateTap(decoder, reads, layers, self._walk)

    @property
    def points(self) -> int:
        """How many drop points there are."""
        return len(self.layers)

    def hook(self) -> None:
        """Register the hooks."""
        for number in range(self.layers[0], len(self._decoder.layers)):
            self.note(number)
            enter = functools.partial(self._enter, number)
            self._handles.append(self._decoder.layers[number].register_forward_pre_hook(enter, with_kwargs=True))
        for number in {layer - 1 for layer in self.layers} if self._before else ():
            attention = self._decoder.attention(number)
            self.note(number, "self_attn", "self_attn.q_proj", "self_attn.k_proj")
            for name in ("q_proj", "k_proj"):
                note = functools.partial(self._projected, name)
                self._handles.append(getattr(attention, name).register_forward_hook(note))
            self._handles.append(attention.register_forward_pre_hook(self._attending, with_kwargs=True))
            attended = functools.partial(self._attended, number)
            self._handles.append(attention.register_forward_hook(attended, with_kwargs=True))
        self._handles += self._states.hook(self.note)

    def begin(self, call: Passage) -> None:
        """Cut, or mend masks alone, in the call that comes now.

        Raises:
            UnsupportedCall: where tokens are to be cut and what hooks lie on was replaced after wrap.
        """
        if call.walk is not None:
            self.check()
        self._thread.call = call

    @property
    def passage(self) -> Passage | None:
        """The call under way."""
        found: Passage | None = self._thread.call
        return found

    def _walk(self) -> Walk | None:
        return None if self.passage is None else self.passage.walk

    @torch.compiler.disable
    def _attending(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._thread.attending = True
        self._thread.caches = kwargs.get("past_key_values") is not None

    @torch.compiler.disable
    def _projected(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        """Hold queries of the rows that are looked at, and keys where no cache does."""
        walk = self._walk() if self._thread.attending else None  # else a glance calls the projection by itself
        if walk is not None and name == "q_proj":
            self._thread.projected[name] = kernels.rows_at(output.detach(), walk.rows)
        elif walk is not None and not self._thread.caches:
            self._thread.projected[name] = output.detach()

    @torch.compiler.disable
    def _attended(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Glances at the layer before a drop point: its own queries, and keys as the cache has them now."""
        passage, self._thread.attending = self.passage, False
        if passage is None or passage.walk is None or not passage.walk.due(number + 1) or not passage.walk.asks:
            return
        rotary, cache = kwargs["position_embeddings"], kwargs.get("past_key_values")
        projected = self._thread.projected
        keys = self._decoder.keys(number, projected["k_proj"], *rotary) if cache is None else cache.layers[number].keys
        for name, glance in self._before.items():
            passage.seen[name] = look(
                glance,
                passage.walk,
                decoder=self._decoder,
                layer=number,
                queries=projected["q_proj"],
                keys=keys,
                rotary=rotary,
                mask=kwargs.get("attention_mask"),
                past_valid=passage.known_first if passage.walk.cuts == 0 else _of(passage, passage.walk.cuts - 1),
            )
        projected.clear()

    @torch.compiler.disable
    def _enter(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        passage, hidden = self.passage, hidden_of(args, kwargs)
        if passage is None:
            return None
        if passage.nothing_to_mend and kwargs.get("attention_mask") is None and hidden.shape[1] == 1:
            return None
        if passage.walk is not None:
            hidden = self._pass(number, passage, passage.walk, hidden, kwargs)
        changed = dict(kwargs)
        if passage.walk is not None:
            changed = {name: passage.cut(value) for name, value in changed.items()}
            changed["position_embeddings"] = passage.tables(kwargs["position_embeddings"])
        changed |= {"position_ids": None, "attention_mask": self._mask(number, passage, hidden, kwargs)}
        return with_hidden(args, changed, hidden)

    def _pass(self, number: int, passage: Passage, walk: Walk, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states as layer `number` gets them, cut where a drop point lies in front of it."""
        if not walk.due(number):
            return hidden
        if walk.asks:
            for name, glance in self._behind.items():
                passage.seen[name] = self._ahead(number, passage, walk, hidden, kwargs, glance)
            passage.seen |= self._states.sensed(number, walk, hidden)
            for name, reading in self._sinks.items():
                passage.seen[name] = reading.rule(hidden.detach(), passage.massive[number, name])
        shorter = walk.cut(hidden, passage.seen)
        passage.seen.clear()
        return shorter

    @torch.no_grad()
    def _ahead(self, number: int, passage: Passage, walk: Walk, hidden: Tensor, kwargs: Any, glance: Any) -> Tensor:
        """A glance with queries and keys of layer `number` on what it would get if nothing were cut."""
        layer, attention = self._decoder.layers[number], self._decoder.attention(number)
        normed: Tensor = layer.input_layernorm(hidden)  # type: ignore[operator]
        rotary = passage.tables(kwargs["position_embeddings"])
        keys = self._decoder.keys(number, attention.k_proj(normed), *rotary)
        cache = kwargs.get("past_key_values")
        return look(
            glance,
            walk,
            decoder=self._decoder,
            layer=number,
            queries=attention.q_proj(kernels.rows_at(normed, walk.rows)),
            keys=torch.cat([cache.layers[number].keys, keys], dim=2) if passage.cached[walk.cuts] else keys,
            rotary=rotary,
            mask=None,
            past_valid=_of(passage, walk.cuts),
        )

    def _mask(self, number: int, passage: Passage, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """The mask of a layer behind a drop point, made once for all layers up to the next one."""
        given = kwargs.get("attention_mask")
        behind = passage.alike(bisect_right(self.layers, number) - 1)
        place = (behind, torch.is_tensor(given))
        if place not in passage.masks:
            passage.masks[place] = self._made(behind, passage, hidden, given)
        return passage.masks[place]

    def _made(self, behind: int, passage: Passage, hidden: Tensor, given: Any) -> Any:
        walk, queries, cached = passage.walk, hidden.shape[1], passage.cached[behind]
        if walk is not None and cached == 0 and torch.is_tensor(given) and given.ndim == 4:
            return masks.cut_square(given, walk.index, walk.valid, 0, walk.entry.valid.shape[1])
        return masks.over_keys(
            passage.real(behind),
            queries=queries,
            keys=cached + queries,
            like=hidden,
            implementation=self._implementation,
        )


def _of(passage: Passage, behind: int) -> Tensor | None:
    return None if passage.known is None else passage.known[behind]
