"""Methods for clips as plain loops, from their papers; nothing of vtprune is imported."""

from __future__ import annotations

import math

import numpy as np


def shares(
    scores: list[float], sizes: list[int], k: int, power: float, *, floor: int = 0, cap: float = 1.0
) -> list[int]:
    """arXiv 2503.08689 with whole sums: a floor each, then by weight times size up to the caps, then beyond them."""
    weights = [max(score, 0.0) ** power for score in scores]
    weights = weights if any(weights) else [1.0] * len(sizes)
    weights = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    floor = min(floor, k // len(sizes))
    given = [min(floor, size) for size in sizes]
    caps = [max(own, math.floor(cap * size + 0.5)) for own, size in zip(given, sizes, strict=True)]
    for most in (caps, sizes):
        given = poured(weights, given, most, min(k, sum(sizes)))
    return given


def poured(weights: list[float], given: list[int], most: list[int], k: int) -> list[int]:
    """More for each by weight; whoever would exceed its most gets that, and the others share what is left anew.

    Rounded down, then one each by the largest remainder, in rounds.
    """
    room, left, exact = [m - g for m, g in zip(most, given, strict=True)], k - sum(given), [0.0] * len(given)
    open_ones = [i for i, weight in enumerate(weights) if weight > 0]
    rest = float(min(left, sum(room[i] for i in open_ones)))
    while open_ones:
        mass = sum(weights[i] for i in open_ones)
        over = [i for i in open_ones if rest * weights[i] / mass >= room[i]]
        for i in over or open_ones:
            exact[i] = room[i] if over else rest * weights[i] / mass
        rest -= sum(exact[i] for i in over)
        open_ones = [i for i in open_ones if i not in over] if over else []
    more = [min(math.floor(own + 1e-9), m) for own, m in zip(exact, room, strict=True)]
    order = sorted(range(len(given)), key=lambda i: (round(math.floor(exact[i] + 1e-9) - exact[i], 6), i))
    while sum(more) < min(left, sum(room)):
        for i in order:
            if more[i] < room[i] and sum(more) < left:
                more[i] += 1
    return [g + m for g, m in zip(given, more, strict=True)]


def novelty(features: np.ndarray, frames: int) -> list[float]:
    """1 - cosine to the same cell of the frame before, in the first frame to the mean of its unit vectors."""
    units = [row / max(float(np.linalg.norm(row)), 1e-12) for row in features]
    size = len(units) // frames
    mean = sum(units[:size]) / size
    mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return [1 - float(own @ (mean if i < size else units[i - size])) for i, own in enumerate(units)]
