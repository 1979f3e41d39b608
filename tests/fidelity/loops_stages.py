"""What rules, mergers, counters and debiasers do, as the papers write it: one picture, plain loops, double precision.

Imports nothing of vtprune. Maps are (H, n, n), features (N, D), scores (N,); a CLS token comes first in a map.
"""

from __future__ import annotations

import math

import numpy as np

from tests.fidelity.loops import cosine


def attention_map(query: np.ndarray, key: np.ndarray, scale: float) -> np.ndarray:
    """(H, n, d) queries and keys -> (H, n, n): each query spreads 1 over all keys."""
    heads, n, _ = query.shape
    weights = np.zeros((heads, n, n))
    for h in range(heads):
        for i in range(n):
            raised = [math.exp(float(query[h, i] @ key[h, j]) * scale) for j in range(n)]
            weights[h, i] = [value / sum(raised) for value in raised]
    return weights


def cls_row(weights: np.ndarray) -> np.ndarray:
    """arXiv 2412.01818: what the CLS token pays to every patch, averaged over heads."""
    heads, n, _ = weights.shape
    return np.array([sum(weights[h, 0, j] for h in range(heads)) / heads for j in range(1, n)])


def received(weights: np.ndarray, has_cls: bool) -> np.ndarray:
    """What every patch gets, averaged over heads and over all queries."""
    heads, n, _ = weights.shape
    got = [sum(weights[h, i, j] for h in range(heads) for i in range(n)) / (heads * n) for j in range(n)]
    return np.array(got[int(has_cls) :])


def importance(weights: np.ndarray, has_cls: bool) -> np.ndarray:
    """The CLS row, or what is received where there is none."""
    return cls_row(weights) if has_cls else received(weights, has_cls)


def patch_block(weights: np.ndarray, has_cls: bool) -> np.ndarray:
    """(N, N) head mean of the attention among patches: the row and the column of the CLS token removed."""
    return weights.mean(axis=0)[int(has_cls) :, int(has_cls) :]


def more_varied(weights: np.ndarray, has_cls: bool) -> np.ndarray:
    """arXiv 2411.14164: column mean or row mean of the patch block, the one of larger variance."""
    block = patch_block(weights, has_cls)
    n = len(block)
    columns = np.array([sum(block[i, j] for i in range(n)) / n for j in range(n)])
    rows = np.array([sum(block[i, j] for j in range(n)) / n for i in range(n)])
    return rows if np.var(rows) > np.var(columns) + 1e-15 else columns


def sink_rows(weights: np.ndarray, has_cls: bool, threshold: float) -> np.ndarray:
    """arXiv 2508.05211: what patches pay that get more than `threshold` times the mean, or the top one; mean."""
    got = received(weights, has_cls)
    sinks = [i for i in range(len(got)) if got[i] > threshold * got.mean()] or [int(np.argmax(got))]
    block = patch_block(weights, has_cls)
    return np.array([sum(block[i, j] for i in sinks) / len(sinks) for j in range(len(got))])


def page_rank(weights: np.ndarray, has_cls: bool, steps: int) -> np.ndarray:
    """arXiv 2305.17328: every head hands weights on, s <- A^T s from 1/n; heads by root mean square."""
    heads, n, _ = weights.shape
    squares = np.zeros(n)
    for h in range(heads):
        votes = [1 / n] * n
        for _ in range(steps):
            votes = [sum(weights[h, i, j] * votes[i] for i in range(n)) for j in range(n)]
        squares += np.square(votes)
    return np.sqrt(squares / heads)[int(has_cls) :]


def cells(height: int, width: int, count: int) -> list[int]:
    """The cell of every token of a grid: bands of equal height, each cut into equally wide cells, nearly square."""
    bands = round(math.sqrt(count * height / width))
    bands = min(height, count, max(bands, math.ceil(count / width)))
    first = [band * count // bands for band in range(bands + 1)]
    owner = []
    for row in range(height):
        band = max(b for b in range(bands) if b * height // bands <= row)
        owner += [first[band] + column * (first[band + 1] - first[band]) // width for column in range(width)]
    return owner


def into_nearest(features: np.ndarray, vectors: np.ndarray, kept: list[int], targets: list[int]) -> np.ndarray:
    """arXiv 2412.04467, inclusive: a dropped token joins the target most similar by `vectors`; rows are means."""
    members = {i: [i] for i in kept}
    for i in range(len(features)):
        if i not in members and targets:
            members[max(targets, key=lambda t: (cosine(vectors[i], vectors[t]), -t))].append(i)
    return np.array([np.mean([features[i] for i in members[t]], axis=0) for t in kept])


def into_cell(
    features: np.ndarray, owner: list[int], kept: list[int], heads: list[int], worth: np.ndarray
) -> np.ndarray:
    """arXiv 2508.05211: the mean of a cell by worth stands at its head; other kept tokens stay as they are."""
    rows = []
    for i in kept:
        inside = [j for j in range(len(features)) if owner[j] == owner[i] and j not in kept] if i in heads else []
        members = [i, *inside]
        mass = sum(worth[j] for j in members)
        share = {j: worth[j] / mass if mass > 0 else 1 / len(members) for j in members}
        rows.append(sum(share[j] * features[j] for j in members))
    return np.array(rows)


def neighbour_sum(
    features: np.ndarray, vectors: np.ndarray, kept: list[int], worth: np.ndarray, count: int
) -> np.ndarray:
    """arXiv 2403.15388: x_i + sum of a_j x_j over the `count` tokens most similar to i, kept ones among them."""
    share = worth / worth.sum()
    rows = []
    for i in kept:
        others = sorted((j for j in range(len(features)) if j != i), key=lambda j: (-cosine(vectors[i], vectors[j]), j))
        rows.append(features[i] + sum((share[j] * features[j] for j in others[:count]), np.zeros(features.shape[1])))
    return np.array(rows)


def quartile(scores: np.ndarray, share: float) -> float:
    """Between the two values around its place in ascending order, in proportion."""
    ordered, place = sorted(scores), share * (len(scores) - 1)
    low = math.floor(place)
    high = min(low + 1, len(scores) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def outliers(scores: np.ndarray) -> int:
    """arXiv 2403.15388: how many lie above the third quartile by more than 1.5 interquartile ranges."""
    low, high = quartile(scores, 0.25), quartile(scores, 0.75)
    return sum(score > high + 1.5 * (high - low) for score in scores)


def mass(scores: np.ndarray, share: float) -> int:
    """The fewest of the highest scores that hold `share` of the sum."""
    held, count = 0.0, 0
    for score in sorted(scores, reverse=True):
        if held >= share * sum(scores):
            break
        held, count = held + score, count + 1
    return count


def middle(scores: np.ndarray) -> float:
    """The median, of an even number the lower of the two."""
    return sorted(scores)[(len(scores) - 1) // 2]


def far_above(scores: np.ndarray, limit: float) -> list[bool]:
    """Which lie more than `limit` median absolute deviations above the median; none where that deviation is 0."""
    spread = middle(np.array([abs(score - middle(scores)) for score in scores]))
    return [spread > 0 and score > middle(scores) + limit * spread for score in scores]


def without_trend(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """Score - row mean - column mean + 2 x mean of all; along a single row or column nothing is taken."""
    grid = scores.reshape(height, width)
    if min(height, width) == 1:
        return scores
    flat = [
        [grid[r, c] - grid[r].mean() - grid[:, c].mean() + 2 * grid.mean() for c in range(width)] for r in range(height)
    ]
    return np.array(flat).ravel()


def padding_bars(features: np.ndarray, height: int, width: int, alike: float) -> set[int]:
    """Tokens of rows or columns, from an edge on, that all resemble the first or last token; one alone is no bar."""
    grid = np.arange(height * width).reshape(height, width)
    bars: set[int] = set()
    for corner in (features[0], features[-1]):
        for lines in (grid, grid.T):
            if lines.shape[1] == 1:
                continue
            for order in (list(lines), list(lines)[::-1]):
                for line in order:
                    if not all(cosine(features[i], corner) >= alike for i in line):
                        break
                    bars.update(int(i) for i in line)
    return bars if len(bars) < height * width else set()
