"""What hidden states of the language model say: of a prompt row at a drop point, of tokens on the way to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.glances import Change, RowStates

_TINY = 1e-8


@dataclass(frozen=True)
class TokenTransition:
    """How much longer a module makes a token, times a softmax over the pictures of its prompt of how far it turns it.

    Source: TransPrune, arXiv 2507.20630: |y| / |x| times softmax(1 - cos(x, y)).
    """

    name: ClassVar[str] = "transition"

    def __call__(self, seen: Change) -> Tensor:
        before, after = (states.float().norm(dim=2) for states in (seen.inputs, seen.outputs))
        product = (seen.inputs.float() * seen.outputs.float()).sum(dim=2)
        turn = 1 - product / (before * after).clamp_min(_TINY)
        share = turn.masked_fill(~seen.visual, float("-inf")).softmax(dim=1)
        return (after / before.clamp_min(_TINY) * share).masked_fill(~seen.visual, 0)


@dataclass(frozen=True)
class Turn:
    """1 - cos between what one layer and the next get of the last token: how far it still changes."""

    name: ClassVar[str] = "turn"

    def check(self, *, depth: int, width: int) -> None:
        """It is for any model."""

    def __call__(self, seen: RowStates) -> Tensor:
        now, then = (states[:, -1].float() for states in (seen.entering, seen.earlier))
        return 1 - torch.cosine_similarity(now, then, dim=1, eps=_TINY)
