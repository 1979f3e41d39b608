"""What is new in a frame: text-free scores of tokens by the frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.kernels import reference as kernels
from vtprune.stages.vectors import FEATURES, needed_for, vectors_of
from vtprune.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Novelty:
    """How little a token is like the same cell of the part before it: 1 - cosine, in [0, 2].

    Where there is no part of the same grid before it, as of the first frame of a clip or of a picture, it is compared
    with the mean direction of its own part.
    """

    vectors: str = FEATURES

    @property
    def needs(self) -> frozenset[str]:
        return needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens) -> Tensor:
        units = kernels.unit_rows(vectors_of(tokens, self.vectors))
        pieces = units.split([part.tokens for part in tokens.parts], dim=1)
        grids = [part.grid for part in tokens.parts]
        expected = [
            pieces[i - 1] if i and grids[i - 1] == grids[i] else kernels.unit_rows(own.mean(dim=1, keepdim=True))
            for i, own in enumerate(pieces)
        ]
        return torch.cat([1 - (own * like).sum(dim=2) for own, like in zip(pieces, expected, strict=True)], dim=1)
