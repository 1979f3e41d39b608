"""Scorers: how much each token is worth, (S, N) in fp32, higher is better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import MissingEvidence
from vtprune.types import VisualTokens


@dataclass(frozen=True)
class Constant:
    """No preference."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, tokens: VisualTokens) -> Tensor:
        S, N, _ = tokens.features.shape
        return torch.zeros(S, N, device=tokens.features.device)


@dataclass(frozen=True)
class Importance:
    """Attention of the vision encoder: the CLS row, or received attention on encoders without a CLS token."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"importance"})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        if "importance" not in tokens.evidence:
            raise MissingEvidence("this method needs encoder attention, and none was recorded for these tokens")
        return tokens.evidence["importance"].float()
