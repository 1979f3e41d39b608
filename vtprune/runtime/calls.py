"""One forward of the base model, as the hooks see it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vtprune.cache import CacheState, physical_length, state_of
from vtprune.errors import MissingEvidence, UnsupportedCall
from vtprune.kernels import backends
from vtprune.kernels.backends import Use
from vtprune.masks import first_square
from vtprune.protocols import Allowance, EncoderStage
from vtprune.report import Stopwatch
from vtprune.runtime.encoded import Encoded, carried
from vtprune.runtime.encoder import PIXELS
from vtprune.runtime.reading import Prompt
from vtprune.runtime.shorten import Shortened
from vtprune.types import Modality


@dataclass
class Call:
    """What is known of a forward, from the pre-hook of the base model to its end.

    `expected` names the kinds whose pixels it brings, `prefill` says that nothing was cached before it, `past` how
    much, `state` how it was pruned. `prompt` is its visual side, once every expected kind is encoded, `short` the
    shortened call of the language model, `pending` what its report needs where that has to wait for what layers cut.
    `fresh` is the state of a cache that had none, of a call that cut nothing; `use` which backend kernels ran on,
    `outer` what was in force around the call.
    """

    ids: Tensor | None
    embeds: Tensor | None
    mask: Any
    encoded: dict[Modality, Encoded]
    expected: frozenset[Modality]
    prefill: bool
    past: int
    state: CacheState | None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    prompt: Prompt | None = None
    short: Shortened | None = None
    pending: tuple[Tensor, Any] | None = None
    fresh: CacheState | None = None
    use: Use = field(default_factory=Use)
    outer: Use | None = None

    @classmethod
    def begin(cls, given: Mapping[str, Any], owner: str, backend: str) -> Call:
        """Read the arguments of the base model; kernels will run on `backend`.

        Raises:
            UnsupportedCall: for features encoded elsewhere, a cache that a pruner other than `owner` made, or a 4-D
                mask on a pruned cache.
        """
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
        words = ids if ids is not None else embeds
        many = words is not None and words.shape[1] > 1
        past = physical_length(cache) if many else 0
        state = state_of(cache, owner)
        if many and state is not None and first_square(given.get("attention_mask")) is not None:
            raise UnsupportedCall(
                "a 4-D mask on a cache that was pruned: its columns count tokens that are not stored any more. Pass "
                "the 2-D mask of all tokens, or start with a fresh cache"
            )
        outputs = given.get("mm_encoder_outputs") or {}
        encoded = {kind: carried(kind, output) for kind, output in outputs.items()}
        return cls(
            ids=ids,
            embeds=embeds,
            mask=given.get("attention_mask"),
            encoded={kind: entry for kind, entry in encoded.items() if entry is not None},
            expected=frozenset(
                kind for kind, names in PIXELS.items() if any(given.get(name) is not None for name in names)
            ),
            prefill=cache is None or (many and past == 0),
            past=past,
            state=state,
            use=Use(backend),
        )

    def put_in_force(self, cut_short: Call | None) -> Call:
        """The call itself, once kernels run as it says; an earlier one that Ctrl-C `cut_short` is in force no more."""
        self.outer = backends.put_in_force(self.use)
        if cut_short is not None and self.outer is cut_short.use:
            self.outer = cut_short.outer
        return self

    @property
    def complete(self) -> bool:
        """Whether every picture of the call is encoded, and there is one."""
        return bool(self.encoded) and self.expected <= self.encoded.keys()

    def check_cut(self, cut: tuple[EncoderStage, Allowance] | None) -> None:
        """Raise `MissingEvidence` for features that were not pruned inside the encoder as this method does it."""
        for kind, entry in self.encoded.items():
            if entry.cut != cut:
                done = "not pruned inside the encoder" if entry.cut is None else "pruned otherwise inside the encoder"
                raise MissingEvidence(
                    f"the {kind} features of this call were {done}: encode them while the model is wrapped with this "
                    "method and budget, or pass the pixels"
                )

    def check_no_hidden_pictures(self) -> None:
        """Raise `UnsupportedCall` where there may be pictures that nobody has seen."""
        unseen = self.expected - self.encoded.keys()
        if unseen:
            raise UnsupportedCall(
                f"{' and '.join(sorted(unseen))} pixels were given, but not encoded by the get_*_features of this base "
                "model: there is no telling which tokens are visual, so this model cannot be pruned"
            )
        if self.prefill and self.ids is None:
            raise UnsupportedCall(
                "inputs_embeds without pictures: there is no telling where visual tokens lie. Pass input_ids, or "
                "inputs_embeds with placeholders together with the pixels"
            )

    def enter_language_model(self, embeds: Tensor) -> None:
        """Open the cache for updates."""
        if self.state is not None:
            self.state.entered = True
        if self.prefill or self.prompt is not None:
            self.stopwatch.start("prefill", like=embeds)

    def leave_language_model(self) -> tuple[Shortened | None, CacheState | None]:
        """Close the cache for updates; the shortened call, and the state of a cache that gets a new one."""
        self.stopwatch.stop("prefill")
        if self.state is not None:
            self.state.entered = False
        short, self.short = self.short, None
        return short, self.fresh if short is None else short.state


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


def with_positions(
    args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a rotary embedding with other position ids, passed as they were."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": positions}
    return (args[0], positions, *args[2:]), kwargs
