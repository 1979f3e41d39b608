"""Debiasers: scores in, scores out, a known bias or scale removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.types import VisualTokens


@dataclass(frozen=True)
class MinMax:
    """Stretch the scores of each segment to [0, 1]; equal scores become 0. Never looks at batch-mates."""

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        low = scores.amin(dim=1, keepdim=True)
        high = scores.amax(dim=1, keepdim=True)
        span = high - low
        return torch.where(span > 0, (scores - low) / span, 0.0)
