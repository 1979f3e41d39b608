"""Attention sinks, as part of a call: what the hooks that look for them need, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from vtprune import masks
from vtprune.adapters.base import Host
from vtprune.adapters.decoder import decoder_of
from vtprune.cache import CacheState, SinkState, is_prunable, physical_length
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel
from vtprune.glances import SinkRule
from vtprune.inside.layers import Passage
from vtprune.inside.sinks import FIRST, Scene, SinkFinder
from vtprune.pipeline import Pipeline
from vtprune.protocols import WeightEdit
from vtprune.runtime.calls import Call
from vtprune.runtime.reading import Prompt
from vtprune.runtime.shorten import Cut
from vtprune.schedule import AnySchedule

_NOTHING = SinkState(marks={}, massive={}, covered=0, pictures=False)


class Sinks:
    """The side of a `Pruner` that looks for attention sinks and changes attention to them, if asked to."""

    def __init__(self, pipeline: Pipeline, schedule: AnySchedule | None, inner: Host, lm: Host, owner: str) -> None:
        edit = weight_edit_of(pipeline)
        rules = [] if schedule is None else [reading.rule for reading in pipeline.sinks.values()]
        self._finder: SinkFinder | None = None
        self._method = pipeline.name
        self._owner = owner
        if edit is None and not rules:
            return
        decoder = decoder_of(inner, lm, glances=edit is not None, edits=edit is not None)
        self._layers = decoder.layers
        self._finder = SinkFinder(decoder, edit, dict.fromkeys(() if schedule is None else schedule.layers, rules))
        self._edits = len(self._finder.edited) > 0
        if edit is not None and not self._edits:
            raise UnsupportedModel(
                f"{type(lm).__name__} has {len(decoder.layers)} layers, and attention is changed from layer {FIRST} on "
                "but for the last one"
            )
        for rule in rules if edit is None else (*rules, edit.sinks):
            _check_channels(rule, lm)

    def hook(self) -> None:
        """Register the hooks, behind those that cut between layers."""
        if self._finder is not None:
            self._finder.hook()

    def remove(self) -> None:
        """Undo `hook`."""
        if self._finder is not None:
            self._finder.remove()

    def prefill(self, call: Call, given: Mapping[str, Any], cut: Cut | None, passage: Passage | None) -> None:
        """Look for sinks in a call with pictures, which was shortened by `cut` and is cut on in a `passage`.

        Raises:
            UnsupportedCall: for a static cache, or where layers run once more in the backward pass.
        """
        if self._finder is None:
            return
        self._check(given.get("past_key_values"))
        assert call.prompt is not None
        device = given["inputs_embeds"].device
        visual, told, rows, real = (
            torch.from_numpy(own).to(device, non_blocking=True) for own in _laid_out(call.prompt)
        )
        if cut is not None:
            visual, told = (own.gather(1, cut.indices) & cut.valid for own in (visual, told))
            rows = cut.slots.gather(1, rows)
        elif call.state is None:
            pictures = torch.from_numpy(call.prompt.pictures).to(device, non_blocking=True)
            call.fresh = self._state(given, pictures)
        scene = Scene(
            visual=visual,
            told=told,
            rows=rows,
            real=real,
            looks=True,
            edits=self._edits and rows.shape[1] > 0,
            known=_known(call.state, pictures=True),
            walk=None if passage is None else passage.walk,
        )
        if passage is not None:
            passage.massive = scene.massive
        self._finder.begin(scene)

    def resume(self, call: Call, given: Mapping[str, Any]) -> None:
        """Look for sinks in a call without pictures, and change attention where there were some before."""
        if self._finder is None:
            return
        embeds, cache = given["inputs_embeds"], given.get("past_key_values")
        B, K = embeds.shape[:2]
        state = call.state
        known = _known(state, pictures=False)
        if K == 1 and not (self._edits and known.pictures):
            return
        if state is None and (given.get("use_cache") is False or not _remembers(cache)):
            return
        self._check(cache)
        if state is None:
            call.fresh = self._state(given, torch.zeros(B, dtype=torch.long, device=embeds.device))
        visual = torch.zeros(B, K, dtype=torch.bool, device=embeds.device)
        valid = None if K == 1 else masks.valid_tokens(given.get("attention_mask"), B, K, physical_length(cache))
        self._finder.begin(
            Scene(
                visual=visual,
                told=~visual if valid is None else valid.to(embeds.device),
                rows=torch.arange(K, device=embeds.device).expand(B, K),
                real=~visual,
                looks=K > 1,
                edits=self._edits and known.pictures,
                known=known,
            )
        )

    def finish(self, state: CacheState | None, *, done: bool) -> None:
        """Let `state` learn which tokens are sinks; not where the call raised.

        Raises:
            UnsupportedCall: where compiled code of before passed the hooks by.
        """
        if self._finder is None:
            return
        scene = self._finder.end()
        if scene is None or not done:
            return
        if scene.edits and len(scene.changed) < len(self._finder.edited):
            raise UnsupportedCall(
                f"method {self._method!r} changes attention in layers that were compiled before this wrap, and their "
                "code passes it by: call torch.compiler.reset() and compile again"
            )
        if state is None or not scene.looks:
            return
        state.sinks = SinkState(
            marks=scene.marks, massive=scene.massive, covered=state.stored, pictures=scene.known.pictures
        )

    def _check(self, cache: Any) -> None:
        if isinstance(cache, StaticCache):
            raise UnsupportedCall(
                f"method {self._method!r} remembers which cached tokens are sinks, which a static cache has no room "
                "for: use the dynamic cache (the default of generate)"
            )
        if self._edits and any(
            layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self._layers
        ):
            raise UnsupportedCall(
                f"method {self._method!r} changes attention, and with gradient checkpointing layers run a second time "
                "without it: call model.gradient_checkpointing_disable()"
            )

    def _state(self, given: Mapping[str, Any], pictures: Tensor) -> CacheState:
        """That of a cache that nothing was cut from, with the tokens of this call."""
        embeds, mask = given["inputs_embeds"], given.get("attention_mask")
        B, K = embeds.shape[:2]
        past = physical_length(given.get("past_key_values"))
        valid = torch.ones(B, past + K, dtype=torch.bool, device=embeds.device)
        if torch.is_tensor(mask) and mask.ndim == 2 and mask.shape[1] == past + K:
            valid = mask.bool()
        elif past == 0:
            own = masks.valid_tokens(mask, B, K, past)
            valid = valid if own is None else own
        return CacheState.whole(self._owner, valid, pictures, padded=mask is not None)


def weight_edit_of(pipeline: Pipeline) -> WeightEdit | None:
    """The stage of a pipeline that changes attention weights, None where none does."""
    edit = pipeline.attention
    return None if edit is None or edit.neutral or edit.of != "weights" else cast(WeightEdit, edit)


def _check_channels(rule: SinkRule, lm: Host) -> None:
    width = int(lm.config.hidden_size)
    wrong = [channel for channel in getattr(rule, "channels", None) or () if channel >= width]
    if wrong:
        raise InvalidOption(f"channels={wrong}: {type(lm).__name__} has channels 0 to {width - 1}")


def _remembers(cache: Any) -> bool:
    return is_prunable(cache) and not isinstance(cache, StaticCache)


def _known(state: CacheState | None, *, pictures: bool) -> SinkState:
    """What the cache knows; `pictures` says that this call brings some."""
    found = _NOTHING if state is None or state.sinks is None else state.sinks
    if not pictures or found.pictures:
        return found
    return SinkState(marks=found.marks, massive=found.massive, covered=found.covered, pictures=True)


def _laid_out(prompt: Prompt) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`visual`, `told`, `rows` and `real` of a `Scene`, before any cut; separators belong to their pictures."""
    layout = prompt.layout
    visual = np.zeros_like(layout.valid)
    for segment in layout.segments:
        visual[segment.row, segment.positions] = True
    text = layout.valid & ~visual
    for row, own in enumerate(visual):
        if not prompt.seen[row]:
            text[row, : own.argmax() if own.any() else len(own)] = False
    told = layout.valid & (np.arange(layout.length) < prompt.asked)
    return (visual, told, *side_by_side([row.nonzero()[0] for row in text]))


def side_by_side(found: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Places (B, R) of rows that differ in their number, filled up on the left, and which are real."""
    width = max(map(len, found))
    places = np.array([np.pad(own, (width - len(own), 0)) for own in found])
    return places, np.array([np.arange(width) >= width - len(own) for own in found])
