"""One forward of the base model, as the hooks see it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vtprune.cache import CacheState, physical_length
from vtprune.errors import UnsupportedCall
from vtprune.report import Stopwatch
from vtprune.runtime.encoder import Encoded, carried
from vtprune.runtime.shorten import Shortened
from vtprune.types import Modality


@dataclass
class Call:
    """What is known of a forward, from the pre-hook of the base model to its end.

    `prefill` says that nothing was cached before it. `entered` is the state of the cache that may be updated during
    it, `short` the shortened call of the language model.
    """

    ids: Tensor | None
    embeds: Tensor | None
    mask: Any
    encoded: dict[Modality, Encoded]
    prefill: bool
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    entered: CacheState | None = None
    short: Shortened | None = None

    @classmethod
    def begin(cls, given: Mapping[str, Any]) -> Call:
        """Read the arguments of the base model; raises `UnsupportedCall` for features encoded elsewhere."""
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
        words = ids if ids is not None else embeds
        outputs = given.get("mm_encoder_outputs") or {}
        encoded = {kind: carried(kind, output) for kind, output in outputs.items()}
        return cls(
            ids=ids,
            embeds=embeds,
            mask=given.get("attention_mask"),
            encoded={kind: entry for kind, entry in encoded.items() if entry is not None},
            prefill=cache is None or (words is not None and words.shape[1] > 1 and physical_length(cache) == 0),
        )

    def check_no_hidden_pictures(self) -> None:
        """Raise `UnsupportedCall` for embeddings that may hold pictures nobody can see."""
        if self.prefill and self.ids is None:
            raise UnsupportedCall(
                "inputs_embeds without pictures: there is no telling where visual tokens lie. Pass input_ids, or "
                "inputs_embeds with placeholders together with the pixels"
            )

    def end_language_model(self) -> Shortened | None:
        """Close the cache for updates and hand out the shortened call."""
        self.stopwatch.stop("prefill")
        if self.entered is not None:
            self.entered.entered = False
        short, self.short = self.short, None
        return short


def bind(
    signature: inspect.Signature, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name, extra keyword arguments flattened in."""
    if not args:
        return dict(kwargs)
    given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    given.pop("self", None)
    extra = given.pop("kwargs", {})
    return {**given, **extra}
