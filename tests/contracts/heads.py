"""Pictures masked from each other head by head, in the reference: masks made token by token.

Nothing of vtprune is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Classes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Pictures:
    """Of the tokens of one unpadded prompt: the number of the picture of each, -1 for text and for pictures that are
    alone in their turn; which are sinks; and the turn in which they were told."""

    numbers: list[int]
    sinks: list[bool]
    turns: list[int]

    def padded(self, pad: int) -> Pictures:
        """With padding on the left."""
        return Pictures([-1] * pad + self.numbers, [False] * pad + self.sinks, [0] * pad + self.turns)

    def sees(self, query: int, key: int, name: str) -> bool:
        """Whether a token sees one that is not after it, in heads of a class."""
        own, other = self.numbers[query], self.numbers[key]
        if own < 0 or name == "dense" or query == key or self.turns[key] < self.turns[query]:
            return True
        if self.sinks[key]:
            return "sink" in name
        return other < 0 or (other == own and "intra" in name)


def pictures_of(visual: Sequence[bool], turns: Sequence[tuple[int, int, Sequence[int]]]) -> Pictures:
    """Of a conversation.

    Args:
        visual: which tokens belong to pictures, separators too.
        turns: for every turn where it begins and ends, and of how many tokens each of its pictures is.
    """
    numbers, sinks, turn_of = [-1] * len(visual), [False] * len(visual), [0] * len(visual)
    for turn, (start, stop, lengths) in enumerate(turns):
        turn_of[start:stop] = [turn] * (stop - start)
        places = [place for place in range(start, stop) if visual[place]]
        assert len(places) == sum(lengths)
        if len(lengths) < 2:
            continue
        if start == 0:
            sinks[0] = True
        for number, length in enumerate(lengths):
            own, places = places[:length], places[length:]
            for place in own:
                numbers[place] = number
            for place in (own[0] - 1, own[-1] + 1):
                if start <= place < stop and not visual[place]:
                    sinks[place] = True
    return Pictures(numbers, sinks, turn_of)


@contextmanager
def masked(model: nn.Module, rows: Sequence[Pictures], classes: Classes) -> Iterator[list[int]]:
    """In calls inside the block with all tokens of the prompts, pictures are hidden from each other.

    Args:
        rows: of the tokens of the first call, for every row (which repeats for beams); later ones are text.
    """
    hidden: list[int] = []
    handles = []
    for number, layer in enumerate(model.model.language_model.layers):
        mask = functools.partial(_mask, rows, classes[number], hidden)
        handles.append(layer.register_forward_pre_hook(mask, with_kwargs=True))
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()


def _mask(
    rows: Sequence[Pictures],
    classes: tuple[str, ...],
    hidden: list[int],
    module: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    B, n = states.shape[:2]
    known = len(rows[0].numbers)
    if n < known:
        return None
    shown = torch.stack([_shown(row, classes, known) for row in rows]).repeat_interleave(B // len(rows), dim=0)
    shown = nn.functional.pad(shown, (0, n - known, 0, n - known), value=True)
    given = kwargs.get("attention_mask")
    given = torch.ones(n, n, dtype=torch.bool).tril() if given is None else given
    hidden.append(int((~shown & (given if given.dtype == torch.bool else given >= 0)).sum()))
    floats = given.dtype != torch.bool
    changed = given.masked_fill(~shown, torch.finfo(given.dtype).min) if floats else given & shown
    return args, {**kwargs, "attention_mask": changed}


@functools.cache
def _of(numbers: tuple[int, ...], sinks: tuple[bool, ...], turns: tuple[int, ...], name: str) -> Tensor:
    row = Pictures(list(numbers), list(sinks), list(turns))
    length = len(numbers)
    return torch.tensor(
        [[key > query or row.sees(query, key, name) for key in range(length)] for query in range(length)]
    )


def _shown(row: Pictures, classes: tuple[str, ...], length: int) -> Tensor:
    """(H, n, n), True where nothing is hidden on top of what the model hides."""
    key = (tuple(row.numbers), tuple(row.sinks), tuple(row.turns))
    return torch.stack([_of(*key, name) for name in classes])
