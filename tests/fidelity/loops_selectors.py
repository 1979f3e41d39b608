"""The selection rules as their papers write them: one picture, plain Python loops, double precision.

Imports nothing of vtprune. Features are (N, D), scores (N,); what is returned is ascending.
"""

from __future__ import annotations

import math

import numpy as np


def cosines(features: np.ndarray) -> np.ndarray:
    """Cosine similarity (N, N); 0 where a row is zero."""
    n = len(features)
    table = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            norms = np.linalg.norm(features[i]) * np.linalg.norm(features[j])
            table[i, j] = features[i] @ features[j] / norms if norms > 0 else 0.0
    return table


def descending(scores: np.ndarray) -> list[int]:
    """Indices by descending score, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def best(worth: dict[int, float]) -> int:
    """The key of the highest value, the lowest key among equals."""
    return min(worth, key=lambda i: (-worth[i], i))


def most_isolated(similarity: np.ndarray) -> int:
    """The token whose nearest other token is farthest."""
    n = len(similarity)
    return best({i: min((1 - similarity[i, j] for j in range(n) if j != i), default=0.0) for i in range(n)})


def dispersion(features: np.ndarray, scores: np.ndarray, k: int, *, reduce: str, first: str) -> list[int]:
    """arXiv 2505.18757: k-center or max-sum dispersion."""
    similarity = cosines(features)
    chosen = [descending(scores)[0] if first == "score" else most_isolated(similarity)]
    gather = {"min": min, "sum": sum}[reduce]
    while len(chosen) < k:
        rest = [i for i in range(len(features)) if i not in chosen]
        chosen.append(best({i: gather([1 - similarity[i, c] for c in chosen]) for i in rest}))
    return sorted(chosen)


def zoo(features: np.ndarray, scores: np.ndarray, k: int, *, first: str = "score") -> list[int]:
    """arXiv 2509.24837: sensitivity times distance to the nearest chosen token."""
    similarity = cosines(features)
    weight = np.ones(len(scores)) if scores.min() == scores.max() else scores
    chosen = [descending(weight)[0] if first == "score" else most_isolated(similarity)]
    while len(chosen) < k:
        rest = [i for i in range(len(features)) if i not in chosen]
        chosen.append(best({i: weight[i] * min(1 - similarity[i, c] for c in chosen) for i in rest}))
    return sorted(chosen)


def dpp(features: np.ndarray, scores: np.ndarray, k: int) -> list[int]:
    """arXiv 2506.10967: the largest determinant, one by one; what adds no volume goes by relevance."""
    kernel = scores[:, None] * cosines(features) * scores[None]
    chosen: list[int] = []
    while len(chosen) < k:
        rest = [i for i in range(len(features)) if i not in chosen]
        volume = {}
        for i in rest:
            across = kernel[chosen, i]
            volume[i] = kernel[i, i] - across @ np.linalg.solve(kernel[np.ix_(chosen, chosen)], across)
        if max(volume.values()) <= 1e-10:
            return sorted(chosen + sorted(rest, key=lambda i: (-scores[i], i))[: k - len(chosen)])
        chosen.append(best(volume))
    return sorted(chosen)


def scope(features: np.ndarray, scores: np.ndarray, k: int, *, alpha: float) -> list[int]:
    """arXiv 2510.24214: salience times gain in coverage."""
    similarity = cosines(features)
    n = len(features)
    covered = [0.0] * n
    chosen: list[int] = []
    while len(chosen) < k:
        gain = {
            j: scores[j] ** alpha * sum(max(0.0, similarity[i, j] - covered[i]) for i in range(n))
            for j in range(n)
            if j not in chosen
        }
        chosen.append(best(gain))
        covered = [max(covered[i], similarity[i, chosen[-1]]) for i in range(n)]
    return sorted(chosen)


def whole_rows(scores: np.ndarray, k: int, width: int) -> list[int]:
    """arXiv 2411.14164: whole rows by their mean, the last one in part."""
    rows = [range(start, start + width) for start in range(0, len(scores), width)]
    order = sorted(range(len(rows)), key=lambda r: (-np.mean([scores[i] for i in rows[r]]), r))
    chosen = [i for r in order for i in sorted(rows[r], key=lambda i: (-scores[i], i))]
    return sorted(chosen[:k])


def residual_drop(features: np.ndarray, scores: np.ndarray, k: int, step: int) -> list[int]:
    """arXiv 2412.01818: drop the most redundant of every second token, round after round."""
    similarity = cosines(features)
    left = descending(scores)
    while len(left) > k:
        ours, theirs = left[0::2], left[1::2]
        drops = min(step, len(left) - k, math.ceil(len(left) / 2))
        nearest = [max(similarity[a, b] for b in theirs) for a in ours]
        ranked = sorted(range(len(ours)), key=lambda p: (-nearest[p], -p))
        left = [ours[p] for p in ranked[drops:]] + theirs
    return sorted(left)


def largest_remainder(weights: list[float], total: int, cap: list[int]) -> list[int]:
    """Round down, then one each by descending remainder among those with room, until nothing or no room is left."""
    mass = sum(weights)
    exact = [w / mass * total if mass > 0 else total / len(weights) for w in weights]
    given = [min(math.floor(q), c) for q, c in zip(exact, cap, strict=True)]
    order = sorted(range(len(exact)), key=lambda g: (math.floor(exact[g]) - exact[g], g))
    while sum(given) < min(total, sum(cap)):
        for g in order:
            if given[g] < cap[g] and sum(given) < total:
                given[g] += 1
    return given


def holov(features: np.ndarray, scores: np.ndarray, k: int, chunks: int, diversity: float) -> list[int]:
    """arXiv 2510.02912: budgets of chunks by score and local variance (in the picture's scale), best in each."""
    n = len(scores)
    count = min(chunks, n)
    pieces, start = [], 0
    for number in range(count):
        stop = start + n // count + (number < n % count)
        pieces.append(list(range(start, stop)))
        start = stop
    similarity = cosines(features)
    variance = np.zeros(n)
    for piece in pieces:
        for j in piece:
            others = [similarity[i, j] if i != j else 0.0 for i in piece]
            if len(piece) > 1:
                mean = sum(others) / (len(piece) - 1)
                variance[j] = sum((value - mean) ** 2 for value in others) / (len(piece) - 1)
    scale = np.abs(scores).mean() / variance.mean() if variance.mean() > 0 else 0.0
    worth = [float(np.mean([scores[i] + diversity * scale * variance[i] for i in piece])) for piece in pieces]
    quotas = largest_remainder(worth, k, [len(piece) for piece in pieces])
    return sorted(
        i
        for piece, quota in zip(pieces, quotas, strict=True)
        for i in sorted(piece, key=lambda i: (-scores[i], i))[:quota]
    )


def prunesid(features: np.ndarray, scores: np.ndarray, k: int, groups: int) -> list[int]:
    """arXiv 2603.09480: suppression inside principal components, budgets by survivors."""
    n = len(scores)
    samples = (1 / (1 + np.exp(-features))).T
    loadings = np.linalg.svd(samples - samples.mean(axis=0), full_matrices=False)[2]
    owner = [int(np.argmax(np.abs(loadings[:groups, j]))) for j in range(n)]
    similarity = cosines(features)
    pairs = [similarity[i, j] for i in range(n) for j in range(n) if i != j]
    limit = 18 * k / n * (sum(pairs) / len(pairs) if pairs else 0.0)
    survivors: list[list[int]] = [[] for _ in range(groups)]
    behind: list[list[int]] = [[] for _ in range(groups)]
    for i in descending(scores):
        kept = survivors[owner[i]]
        (kept if all(similarity[i, j] <= limit for j in kept) else behind[owner[i]]).append(i)
    alive, sizes = [len(s) for s in survivors], [owner.count(g) for g in range(groups)]
    quotas = [min(1, size) for size in sizes]
    bounds = [max(q, min(5 * math.ceil(k / 64), a)) for q, a in zip(quotas, alive, strict=True)]
    for limits in (bounds, sizes):
        more = largest_remainder(alive, k - sum(quotas), [c - q for c, q in zip(limits, quotas, strict=True)])
        quotas = [q + m for q, m in zip(quotas, more, strict=True)]
    return sorted(i for g in range(groups) for i in (survivors[g] + behind[g])[: quotas[g]])


def dart(features: np.ndarray, scores: np.ndarray, k: int, count: int) -> list[int]:
    """arXiv 2502.11494: pivots, and for each in turn what is least similar to it."""
    similarity = cosines(features)
    pivots = descending(scores)[: min(k, count)]
    each = math.ceil((k - len(pivots)) / len(pivots))
    chosen = list(pivots)
    for pivot in pivots:
        rest = sorted((i for i in range(len(scores)) if i not in chosen), key=lambda i: (similarity[pivot, i], i))
        chosen += rest[: min(each, k - len(chosen))]
    return sorted(chosen)


def anchors(scores: np.ndarray, k: int, height: int, width: int) -> list[int]:
    """arXiv 2508.00553: anchor after anchor with the four tokens around it, best first, until there are k."""
    chosen: list[int] = []
    for anchor in descending(scores):
        row, column = divmod(anchor, width)
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        inside = [r * width + c for r, c in around if 0 <= r < height and 0 <= c < width]
        for i in [anchor, *sorted(inside, key=lambda i: (-scores[i], i))]:
            if i not in chosen and len(chosen) < k:
                chosen.append(i)
    return sorted(chosen)
