"""Debiasers: scores in, scores out, a known bias or scale removed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtprune.types import VisualTokens


@dataclass(frozen=True)
class MinMax:
    """Stretch the scores of each segment to [0, 1]; equal scores become 0. Never looks at batch-mates."""

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        low, high = scores.aminmax(dim=1, keepdim=True)
        return ((scores - low) / (high - low)).nan_to_num(nan=0.0)
