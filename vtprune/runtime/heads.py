"""Masks of heads, as part of a call: which tokens belong to which picture of a prompt with several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from transformers.cache_utils import StaticCache

from vtprune.adapters.base import Host
from vtprune.adapters.decoder import decoder_of
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel
from vtprune.inside.heads import Album, HeadMasker
from vtprune.inside.layers import Passage
from vtprune.pipeline import Pipeline
from vtprune.protocols import HeadWatch, MaskEdit
from vtprune.runtime.calls import Call
from vtprune.runtime.reading import Prompt
from vtprune.runtime.shorten import Cut
from vtprune.runtime.sinks import side_by_side


class Heads:
    """The side of a `Pruner` that masks pictures from each other, head by head, if asked to."""

    def __init__(self, pipeline: Pipeline, inner: Host, lm: Host) -> None:
        edit = pipeline.attention
        self._masker: HeadMasker | None = None
        self._method = pipeline.name
        if edit is None or edit.neutral or edit.of == "weights":
            return
        watch = cast(HeadWatch, edit) if edit.of == "masses" else None
        masks = cast(MaskEdit, edit) if edit.of == "mask" else None
        decoder = decoder_of(inner, lm, glances=watch is not None, edits=True)
        implementation = lm.config._attn_implementation or "eager"
        if implementation.startswith("flash"):
            raise UnsupportedModel(
                f"attn_implementation={implementation!r} takes no masks of heads: load the model with 'sdpa' or 'eager'"
            )
        if masks is not None:
            _check_classes(pipeline.name, masks, len(decoder.layers), int(lm.config.num_attention_heads))
        self._masker = HeadMasker(decoder, masks, watch, implementation)

    def hook(self) -> None:
        """Register the hooks, behind those that cut between layers."""
        if self._masker is not None:
            self._masker.hook()

    def remove(self) -> None:
        """Undo `hook`."""
        if self._masker is not None:
            self._masker.remove()

    def prefill(self, call: Call, given: Mapping[str, Any], cut: Cut | None, passage: Passage | None) -> None:
        """Mask pictures from each other in a call where some prompt has several.

        Raises:
            UnsupportedCall: for a static cache.
        """
        if self._masker is None:
            return
        assert call.prompt is not None
        pictures, sinks = _numbered(call.prompt, begins=call.past == 0)
        if not (pictures > 0).any():
            return
        if isinstance(given.get("past_key_values"), StaticCache):
            raise UnsupportedCall(
                f"method {self._method!r} makes masks of the tokens there are, and a static cache has room for more: "
                "use the dynamic cache (the default of generate)"
            )
        rows, real = side_by_side([(row > 0).nonzero()[0] for row in pictures])
        device = given["inputs_embeds"].device
        numbers, caught, at, filled = (
            torch.from_numpy(own).to(device, non_blocking=True) for own in (pictures, sinks, rows, real)
        )
        if cut is not None:
            numbers = numbers.gather(1, cut.indices).masked_fill(~cut.valid, -1)
            caught, at = caught.gather(1, cut.indices) & cut.valid, cut.slots.gather(1, at)
        walk = None if passage is None else passage.walk
        self._masker.begin(Album(pictures=numbers, sinks=caught, rows=at, real=filled, walk=walk))

    def finish(self, *, done: bool) -> None:
        """Leave later calls alone.

        Raises:
            UnsupportedCall: where compiled code of before passed the hooks by.
        """
        album = None if self._masker is None else self._masker.end()
        if self._masker is None or album is None or not done:
            return
        if len(album.done) < len(self._masker.masked):
            raise UnsupportedCall(
                f"method {self._method!r} changes attention in layers that were compiled before this wrap, and their "
                "code passes it by: call torch.compiler.reset() and compile again"
            )


def _check_classes(method: str, edit: MaskEdit, layers: int, heads: int) -> None:
    if edit.classes is None:
        raise InvalidOption(
            f"method {method!r} needs the class of every head: measure them on prompts with several pictures, with "
            "vtprune.eval.head_classes.measure(model, batches), and give them as classes=..."
        )
    found = sorted({len(layer) for layer in edit.classes})
    if len(edit.classes) != layers or found != [heads]:
        raise InvalidOption(
            f"classes of {len(edit.classes)} layers with {' or '.join(map(str, found))} heads: this model has {layers} "
            f"layers with {heads}"
        )


def _numbered(prompt: Prompt, *, begins: bool) -> tuple[np.ndarray, np.ndarray]:
    """The number (B, L) of the picture that each token belongs to, from 0, and which tokens are sinks: the first one
    among them where the conversation `begins` here.

    In rows of one picture there is nothing to hide: all of them are text there.
    """
    valid = prompt.layout.valid
    numbers = np.full(valid.shape, -1, dtype=np.int64)
    sinks = np.zeros_like(valid)
    of_rows: dict[int, list[Any]] = {}
    for segment in prompt.layout.segments:
        of_rows.setdefault(segment.row, []).append(segment)
    for row, segments in of_rows.items():
        if len(segments) < 2:
            continue
        sinks[row, valid[row].argmax()] = begins
        for number, segment in enumerate(segments):
            numbers[row, segment.positions] = number
            around = np.array([segment.runs[0][0] - 1, segment.runs[-1][1]])
            around = around[(around >= 0) & (around < valid.shape[1])]
            sinks[row, around] = valid[row, around]
    return numbers, sinks & (numbers < 0)
