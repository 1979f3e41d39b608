"""Greedy selection step by step, the way published implementations go about it: what kernels are held against.

One picture after the other; a table of all its similarities in the dtype of the features; in every step a few small
operators, and the choice read back to the host. Written from the formulas of the papers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pick = Callable[[Tensor], int]
"""The index of the best of some scores."""


def best_of(scores: Tensor) -> int:
    """The first of the highest; waits for the device."""
    return int(scores.argmax().item())


def similarity_of(picture: Tensor) -> Tensor:
    """Cosine similarity (N, N) of the tokens (N, D) of a picture."""
    units = picture / picture.norm(dim=-1, keepdim=True)
    return units @ units.T


def mmr(features: Tensor, relevance: Tensor, k: int, *, lam: float = 0.5, pick: Pick = best_of) -> Tensor:
    """Maximal marginal relevance, as in IDPruner (arXiv 2602.13315)."""

    def one(picture: Tensor, scores: Tensor) -> list[int]:
        similarity = similarity_of(picture)
        highest, barred = torch.full_like(scores, -2.0), torch.zeros_like(scores)
        chosen = [pick(scores)]
        while len(chosen) < k:
            barred[chosen[-1]] = float("-inf")
            highest = torch.maximum(highest, similarity[chosen[-1]])
            chosen.append(pick(lam * scores - (1 - lam) * highest + barred))
        return chosen

    return _each(one, features, relevance)


def k_center(features: Tensor, relevance: Tensor, k: int, *, pick: Pick = best_of) -> Tensor:
    """The largest distance to the nearest of the chosen ones, as in DivPrune (arXiv 2503.02175): all are looked at."""

    def one(picture: Tensor, scores: Tensor) -> list[int]:
        distance = 1 - similarity_of(picture)
        chosen = [pick(distance.topk(2, dim=0, largest=False).values[1])]
        while len(chosen) < k:
            columns = distance.index_select(1, torch.tensor(chosen, device=distance.device))
            chosen.append(pick(columns.amin(dim=1)))
        return chosen

    return _each(one, features, relevance)


def max_sum(features: Tensor, relevance: Tensor, k: int, *, pick: Pick = best_of) -> Tensor:
    """The smallest similarity to all chosen ones together, as in ToDRE (arXiv 2505.18757)."""

    def one(picture: Tensor, scores: Tensor) -> list[int]:
        similarity = similarity_of(picture)
        chosen = [pick(scores)]
        total = torch.zeros_like(similarity[0])
        while len(chosen) < k:
            total = total + similarity[chosen[-1]]
            total[chosen[-1]] = float("inf")
            chosen.append(pick(-total))
        return chosen

    return _each(one, features, relevance)


def product(features: Tensor, relevance: Tensor, k: int, *, pick: Pick = best_of) -> Tensor:
    """Score times distance to the nearest of the chosen ones, as in ZOO-Prune (arXiv 2509.24837)."""

    def one(picture: Tensor, scores: Tensor) -> list[int]:
        distance = 1 - similarity_of(picture)
        barred = torch.zeros_like(scores)
        chosen = [pick(scores)]
        nearest = distance[chosen[-1]]
        while len(chosen) < k:
            barred[chosen[-1]] = float("-inf")
            chosen.append(pick(scores * nearest + barred))
            nearest = torch.minimum(nearest, distance[chosen[-1]])
        return chosen

    return _each(one, features, relevance)


def dpp(features: Tensor, relevance: Tensor, k: int, *, pick: Pick = best_of) -> Tensor:
    """Greedy MAP of a determinantal point process in fp32, as in CDPruner (arXiv 2506.10967)."""

    def one(picture: Tensor, scores: Tensor) -> list[int]:
        kernel = scores[:, None] * similarity_of(picture.float()) * scores
        left = kernel.diagonal().clone()
        factor = kernel.new_zeros(k, len(kernel))
        chosen: list[int] = []
        for step in range(k):
            index = pick(left)
            row = kernel[index] - factor[:step, index] @ factor[:step]
            factor[step] = row / left[index].sqrt()
            left = left - factor[step] ** 2
            left[index] = float("-inf")
            chosen.append(index)
        return chosen

    return _each(one, features, relevance)


def facility(features: Tensor, relevance: Tensor, k: int, *, pick: Pick = best_of) -> Tensor:
    """Salience times gain in coverage, as in SCOPE (arXiv 2510.24214)."""

    def one(picture: Tensor, scores: Tensor) -> list[int]:
        similarity = similarity_of(picture)
        covered, barred = torch.zeros_like(similarity[0]), torch.zeros_like(scores)
        chosen: list[int] = []
        while len(chosen) < k:
            gain = (similarity - covered).clamp(min=0).sum(dim=1)
            chosen.append(pick(scores * gain + barred))
            barred[chosen[-1]] = float("-inf")
            covered = torch.maximum(covered, similarity[chosen[-1]])
        return chosen

    return _each(one, features, relevance)


def _each(one: Callable[[Tensor, Tensor], list[int]], features: Tensor, relevance: Tensor) -> Tensor:
    """Indices (S, k) of all pictures (S, N, D) with their scores (S, N)."""
    chosen = [one(picture, scores) for picture, scores in zip(features, relevance, strict=True)]
    return torch.tensor(chosen, device=features.device)
