"""Where the visual tokens of a call lie, read once all its pictures are encoded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from vtprune import masks
from vtprune.adapters.base import Family, placeholder_id
from vtprune.runtime.calls import Call
from vtprune.runtime.reading import placeholders_in, read_prompt
from vtprune.types import Modality


class PromptReader:
    """Lays out the prompts of one model."""

    def __init__(self, inner: nn.Module, family: Family, kinds: Iterable[Modality]) -> None:
        self._inner = inner
        self._family = family
        self._tokens = {kind: placeholder_id(inner.config, kind) for kind in kinds}

    def read(self, call: Call) -> None:
        """Lay the pictures out as soon as all of them are encoded, before transformers merge them into the prompt."""
        words = call.ids if call.ids is not None else call.embeds
        if not call.complete or words is None:
            return
        with call.stopwatch.measure("layout", like=words):
            call.prompt = read_prompt(
                ids=call.ids if call.ids is not None else self._ids_of(words),
                valid=masks.valid_tokens(call.mask, words.shape[0], words.shape[1], call.past),
                seen=None if call.state is None else call.state.pictures,
                encoded=call.encoded,
                tokens=self._tokens,
                family=self._family,
                inner=self._inner,
            )

    def _ids_of(self, embeds: Tensor) -> Tensor:
        lookup = self._inner.get_input_embeddings()  # type: ignore[operator]
        return placeholders_in(embeds, lookup, [token for token in self._tokens.values() if token is not None])
