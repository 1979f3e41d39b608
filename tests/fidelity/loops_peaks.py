"""Clustering by density peaks as its papers write it: one picture, plain Python loops, double precision.

Imports nothing of vtprune.
"""

from __future__ import annotations

import math

import numpy as np

from tests.fidelity import loops_selectors as selectors


def members(scores: np.ndarray, k: int, share: float) -> list[int]:
    """The best of what may be chosen, ascending: a share of it and one more, at least k."""
    free = [i for i in selectors.descending(scores) if scores[i] > -math.inf]
    return sorted(free[: max(k, int(share * len(free)) + 1)])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Euclidean, divided by the root of the width."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) / math.sqrt(len(a))


def centres(features: np.ndarray, among: list[int], k: int) -> list[int]:
    """Dense tokens far from denser ones, ascending."""
    away = {(i, j): distance(features[i], features[j]) for i in among for j in among}
    density = {i: math.exp(-sum(sorted(away[i, j] ** 2 for j in among)[:k]) / k) for i in among}
    apart = {}
    for i in among:
        denser = [away[i, j] for j in among if density[j] > density[i]]
        apart[i] = min(denser) if denser else max(away.values())
    return sorted(sorted(among, key=lambda i: (-density[i] * apart[i], i))[:k])


def clusters(features: np.ndarray, among: list[int], heads: list[int]) -> dict[int, list[int]]:
    """Every token at the nearest centre, the first among equals; a centre at itself."""
    found: dict[int, list[int]] = {head: [] for head in heads}
    for i in among:
        near = i if i in heads else min(heads, key=lambda head: (distance(features[i], features[head]), head))
        found[near].append(i)
    return found


def sparsevlm(
    features: np.ndarray, scores: np.ndarray, k: int, rated: int, share: float = 0.3
) -> tuple[list[int], np.ndarray, list[int]]:
    """arXiv 2410.04417: what is kept, what it becomes, and who holds every token, -1 where it is lost."""
    first = selectors.descending(scores)[:rated]
    rest = np.array([-math.inf if i in first else a for i, a in enumerate(scores)])
    found: dict[int, list[int]] = {i: [i] for i in first}
    if k > rated:
        among = members(rest, k - rated, share)
        found |= clusters(features, among, centres(features, among, k - rated))
    into = [-1] * len(scores)
    for head, own in found.items():
        for i in own:
            into[i] = head
    kept = sorted(found)
    return kept, np.array([sum(features[i] for i in found[head]) / len(found[head]) for head in kept]), into
