"""The published methods as their papers write them: one picture, plain Python loops, composed of loop forms.

Imports nothing of vtprune. Budgets of picks round half up, which the methods list as a deviation. What is returned is
ascending; methods that merge return their rows as well.
"""

from __future__ import annotations

import math

import numpy as np

from tests.fidelity import loops_selectors as selectors
from tests.fidelity import loops_stages as stages
from tests.fidelity.loops import uniform

Merged = tuple[list[int], np.ndarray]


def best(scores: np.ndarray, k: int) -> list[int]:
    """The k highest scores, ascending."""
    return sorted(selectors.descending(scores)[:k])


def rounded(share: float, k: int) -> int:
    """A share of a budget, half up."""
    return math.floor(share * k + 0.5)


def among(rest: list[int], chosen: list[int]) -> list[int]:
    """Places in `rest` as tokens of the picture."""
    return [rest[i] for i in chosen]


def left_by(taken: list[int], n: int) -> list[int]:
    """All tokens but the taken ones."""
    return [i for i in range(n) if i not in taken]


def vtc_cls(maps: list[np.ndarray], has_cls: bool, k: int) -> list[int]:
    """arXiv 2412.05819: the best of the sum over layers of CLS attention."""
    return best(sum(stages.importance(weights, has_cls) for weights in maps), k)


def fopru_rank(weights: np.ndarray, has_cls: bool, k: int) -> list[int]:
    """arXiv 2411.14164, token by token."""
    return best(stages.more_varied(weights, has_cls), k)


def fopru_row(weights: np.ndarray, has_cls: bool, k: int, width: int) -> list[int]:
    """arXiv 2411.14164, row by row."""
    return selectors.whole_rows(stages.more_varied(weights, has_cls), k, width)


def text_dominance(importance: np.ndarray, k: int) -> list[int]:
    """arXiv 2508.10552: what reaches the lowest threshold that no more than k tokens reach."""
    threshold = min(t for t in importance if sum(a >= t for a in importance) <= k)
    return [i for i, a in enumerate(importance) if a >= threshold]


def visionzip(features: np.ndarray, keys: np.ndarray, importance: np.ndarray, k: int, contextual: float) -> Merged:
    """arXiv 2412.04467: dominant tokens, and evenly spaced ones of the rest that take the others in."""
    dominant = best(importance, min(k, rounded(1 - contextual, k)))
    rest = left_by(dominant, len(features))
    targets = among(rest, uniform(len(rest), k - len(dominant)))
    kept = sorted(dominant + targets)
    return kept, stages.into_nearest(features, keys, kept, targets)


def vispruner(encoder_features: np.ndarray, importance: np.ndarray, k: int, important: float) -> list[int]:
    """arXiv 2412.01818 v2: important tokens, then what the redundant leave of the rest, eight a round."""
    first = best(importance, min(k, rounded(important, k)))
    if len(first) == k:
        return first
    rest = left_by(first, len(importance))
    return sorted(
        first + among(rest, selectors.residual_drop(encoder_features[rest], importance[rest], k - len(first), 8))
    )


def cdpruner(features: np.ndarray, relevance: np.ndarray, k: int) -> list[int]:
    """arXiv 2506.10967: the DPP conditioned on relevance, stretched to [0, 1]."""
    span = relevance.max() - relevance.min()
    return selectors.dpp(features, (relevance - relevance.min()) / span if span > 0 else np.ones_like(relevance), k)


def likeliest(features: np.ndarray, start: int, k: int) -> list[int]:
    """The same without relevance, from a given token on: all single tokens are equally likely."""
    similarity = selectors.cosines(features)
    chosen = [start]
    while len(chosen) < k:
        rest = left_by(chosen, len(features))
        chosen.append(selectors.best({i: np.linalg.det(similarity[np.ix_([*chosen, i], [*chosen, i])]) for i in rest}))
    return sorted(chosen)


def prunesid(encoder_features: np.ndarray, importance: np.ndarray, k: int) -> list[int]:
    """arXiv 2603.09480: a group for every four tokens of the budget."""
    return selectors.prunesid(encoder_features, importance, k, max(k // 4, 1))


def dart(features: np.ndarray, keys: np.ndarray, k: int, pivots: int) -> list[int]:
    """arXiv 2502.11494: pivots are the largest keys by the sum of absolute values; tokens are compared by features."""
    return selectors.dart(features, np.array([sum(abs(value) for value in key) for key in keys]), k, pivots)


def hiprune(middle: np.ndarray, deep: np.ndarray, k: int, grid: tuple[int, int], anchors: float) -> list[int]:
    """arXiv 2508.00553: anchors of a middle layer and their neighbours, then the best of a deep one."""
    first = selectors.anchors(middle, rounded(anchors, k), *grid)
    rest = left_by(first, len(deep))
    return sorted(first + among(rest, best(deep[rest], k - len(first))))


def vflowopt(features: np.ndarray, scores: np.ndarray, k: int, grid: tuple[int, int], recycled: float) -> Merged:
    """arXiv 2508.05211, stage 0: the best tokens, and the rest of every cell as a mean by score, at the best of it.

    The authors' count falls short where the best left nothing of a cell. Here, as the method says, another cell then
    keeps a second token, and the first of the two stands for what is dropped.
    """
    top = best(scores, min(k, rounded(1 - recycled, k)))
    count = k - len(top)
    if count == 0:
        return top, features[top]
    owner = stages.cells(*grid, count)
    homes = [[i for i in left_by(top, len(scores)) if owner[i] == cell] for cell in range(count)]
    quotas = selectors.largest_remainder([1.0] * count, count, [len(home) for home in homes])
    recycle = [among(home, best(scores[home], quota)) for home, quota in zip(homes, quotas, strict=True)]
    kept = sorted(top + [i for cell in recycle for i in cell])
    return kept, stages.into_cell(features, owner, kept, [cell[0] for cell in recycle if cell], scores)


def prumerge_plus(features: np.ndarray, keys: np.ndarray, attention: np.ndarray, k: int, outliers: float) -> Merged:
    """arXiv 2403.15388: high attention and an even stride of the rest, 32 neighbours added to each."""
    top = best(attention, min(k, rounded(outliers, k)))
    rest = left_by(top, len(features))
    kept = sorted(top + among(rest, uniform(len(rest), k - len(top))))
    return kept, stages.neighbour_sum(features, keys, kept, attention, 32)


def adaptive_budget(attention: np.ndarray, k: int, outliers: float) -> int:
    """So many tokens that the outliers of the picture are the share meant for them, at most k."""
    return min(k, rounded(1 / outliers, stages.outliers(attention)))


def pool(features: np.ndarray, k: int, grid: tuple[int, int]) -> Merged:
    """The mean of every cell, at the token nearest to its middle, the upper left one of several."""
    owner = stages.cells(*grid, k)
    kept = []
    for cell in range(k):
        inside = [divmod(i, grid[1]) for i in range(len(owner)) if owner[i] == cell]
        row, column = ((min(axis) + max(axis)) // 2 for axis in zip(*inside))
        kept.append(row * grid[1] + column)
    return sorted(kept), stages.into_cell(features, owner, sorted(kept), kept, np.ones(len(features)))
