"""Tokens spread evenly over the places of a picture that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtprune.kernels import greedy
from vtprune.types import Part, VisualTokens

_BETWEEN_PARTS = 1e3


@dataclass(frozen=True)
class SpatialSpread:
    """Tokens far apart on the grid, each as far as can be from those chosen before, from the highest score on.

    Rows and columns of a grid are a token apart, parts are far from each other. Works on what cuts have left as well.
    Source: the spatially augmented pruning of ATP-LLaVA, arXiv 2412.00447.
    """

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        device = scores.device
        places = torch.from_numpy(coordinates_of(tokens.parts)).to(device, non_blocking=True)
        origin = tokens.evidence.get("origin")
        own = places.expand(len(scores), -1, -1) if origin is None else places[origin]
        return greedy.pairwise_select(
            torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist"),
            scores.float(),
            k,
            taken=taken,
            available=scores != float("-inf"),
        )


def coordinates_of(parts: Sequence[Part]) -> np.ndarray:
    """Row, column and part (N, 3) of every token."""
    found = []
    for number, part in enumerate(parts):
        rows, columns = np.indices(part.grid).reshape(2, -1)
        found.append(np.stack([rows, columns, np.full(part.tokens, _BETWEEN_PARTS * number)], axis=1))
    return np.concatenate(found).astype(np.float32)
