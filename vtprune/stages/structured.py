"""Selectors that follow the grid, groups or a partition of the tokens; ties go to the lower index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune._checks import check_positive, check_whole
from vtprune.kernels import reference as kernels
from vtprune.kernels import thinning
from vtprune.stages.allocation import best_of_groups, group_sizes, largest_remainder
from vtprune.stages.pieces import Pieces, neighbours
from vtprune.stages.vectors import FEATURES, needed_for, vectors_of
from vtprune.types import VisualTokens


@dataclass(frozen=True)
class WholeRows:
    """Whole rows of the grid, those of the highest mean score: the row strategy of FoPru, arXiv 2411.14164.

    Where `k` is no multiple of the width, the next best row gives its best tokens. The mean of a row leaves out what
    may not be picked. With several parts all their rows compete.
    """

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        N = scores.shape[1]
        rows = Pieces.of([part.grid[1] for part in tokens.parts for _ in range(part.grid[0])], scores.device)
        barred = scores == float("-inf")
        count = rows.split(~barred).sum(dim=2).clamp_min(1)
        mean = rows.split(scores.masked_fill(barred, 0)).sum(dim=2) / count
        row_place = thinning.places_in(kernels.top_select(mean, rows.count))[:, rows.owner]
        place = thinning.places_in(kernels.top_select(scores, N))
        return _earliest(row_place * N + place, barred, k)


@dataclass(frozen=True)
class AnchorsAndNeighbours:
    """The highest scores, each with the four tokens around it: the anchors of HiPrune, arXiv 2508.00553.

    Anchor after anchor, with its neighbours by score, until there are `k`. Neighbours never lie across a border of the
    grid (in the authors' code they do).
    """

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        N = scores.shape[1]
        place = thinning.places_in(kernels.top_select(scores, N))
        arrival = place[:, neighbours([part.grid for part in tokens.parts], scores.device)].amin(dim=2)
        return _earliest(arrival * N + place, scores == float("-inf"), k)


@dataclass(frozen=True, kw_only=True)
class ResidualDrop:
    """What is left of a list by descending score when near-duplicates go: VisPruner, arXiv 2412.01818.

    A round holds every second token of the list against the others and drops the `step` most similar to one of them;
    see `thinning.drop_redundant`. Lists of odd length work (in the authors' code they raise).
    """

    step: int = 8
    vectors: str = FEATURES

    def __post_init__(self) -> None:
        check_whole("step", self.step, least=1)

    @property
    def needs(self) -> frozenset[str]:
        return needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        similarity = kernels.cosine_similarity(kernels.unit_rows(vectors_of(tokens, self.vectors)))
        length = scores.shape[1] - (0 if taken is None else taken.shape[1])
        order = kernels.top_select(scores, length)
        count = (scores != float("-inf")).sum(dim=1, keepdim=True)
        return thinning.drop_redundant(similarity, order, count, k, step=self.step)


@dataclass(frozen=True, kw_only=True)
class Pivots:
    """The `count` highest scores, and for each in turn the tokens least similar to it: DART, arXiv 2502.11494.

    Every pivot brings an equal number, the last the rest.
    """

    count: int = 8
    vectors: str = FEATURES

    def __post_init__(self) -> None:
        check_whole("count", self.count, least=1)

    @property
    def needs(self) -> frozenset[str]:
        return needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        units = kernels.unit_rows(vectors_of(tokens, self.vectors))
        pivots = kernels.top_select(scores, min(k, self.count))
        similarity = kernels.rows_at(units, pivots) @ units.transpose(1, 2)
        barred = (scores == float("-inf")).scatter(1, pivots, True)
        chosen, left = [pivots], k - pivots.shape[1]
        each = -(-left // self.count)
        for row in similarity.unbind(1):
            chosen.append(kernels.top_select((-row).masked_fill(barred, float("-inf")), min(each, left)))
            barred = barred.scatter(1, chosen[-1], True)
            left -= chosen[-1].shape[1]
        return torch.cat(chosen, dim=1)


@dataclass(frozen=True, kw_only=True)
class ChunkQuota:
    """The highest scores of each of `chunks` stretches of the raster order: HoloV, arXiv 2510.02912.

    Budgets are in proportion to the mean over a chunk of score + `diversity` x variance of similarity to the others of
    the chunk, brought to the scale of the scores. The scale is that of the whole picture: the authors take that of each
    chunk, where the variance has no effect on the mean. What exceeds a chunk goes to the others (the authors fill up
    with zeros).
    """

    chunks: int = 16
    diversity: float = 0.09

    def __post_init__(self) -> None:
        check_whole("chunks", self.chunks, least=1)
        check_positive("diversity", self.diversity, zero=True)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        S, N = scores.shape
        count = min(self.chunks, N)
        pieces = Pieces.of([N // count + (number < N % count) for number in range(count)], scores.device)
        available = scores != float("-inf")
        worth = scores.masked_fill(~available, 0)
        variance = _local_variance(kernels.unit_rows(tokens.features), available, pieces)
        scale = worth.abs().sum(dim=1, keepdim=True) / variance.sum(dim=1, keepdim=True).clamp_min(1e-12)
        sizes = pieces.split(available).sum(dim=2)
        mass = pieces.split(worth + self.diversity * scale * variance).sum(dim=2)
        quotas = largest_remainder(mass / sizes.clamp_min(1), k, sizes)
        return best_of_groups(scores, pieces.owner.expand(S, N), quotas, k)


@dataclass(frozen=True, kw_only=True)
class GroupSuppress:
    """Non-maximum suppression inside groups of one principal component each: PruneSID, arXiv 2603.09480.

    A token belongs to the component (of `groups`, by default `k // 4`) it weighs most in. Inside a group a token goes
    behind where it is more similar to a better one than `18 k / N` times the mean of the picture (`k / 32` for 576
    tokens). Every group gets one token, the rest in proportion to survivors, up to a bound that gives way where it
    must. The components are exact (the authors' are randomised), and what rounding leaves goes by largest remainder.
    """

    groups: int | None = None
    vectors: str = FEATURES

    def __post_init__(self) -> None:
        check_whole("groups", 1 if self.groups is None else self.groups, least=1)

    @property
    def needs(self) -> frozenset[str]:
        return needed_for(self.vectors)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        N = scores.shape[1]
        vectors = vectors_of(tokens, self.vectors)
        G = min(max(k // 4, 1) if self.groups is None else self.groups, k, N)
        groups = _principal_groups(vectors, G)
        available = scores != float("-inf")
        conflicts = self._conflicts(vectors, groups, available, k)
        if taken is not None:
            before = torch.zeros_like(available).scatter(1, taken, True)
            conflicts &= ~(before[:, :, None] & before[:, None])
            scores = scores.masked_fill(before, float("inf"))
        order = kernels.top_select(scores, N)
        survives = available & thinning.suppress(conflicts, order)
        quotas = _bounded_quotas(group_sizes(groups, available, G), group_sizes(groups, survives, G), k)
        behind = -(thinning.places_in(order) + N * ~survives).float()
        return best_of_groups(behind.masked_fill(~available, float("-inf")), groups, quotas, k)

    @staticmethod
    def _conflicts(vectors: Tensor, groups: Tensor, available: Tensor, k: int) -> Tensor:
        """(S, N, N) bool: tokens of one group that are too similar to both stay in front."""
        similarity = kernels.cosine_similarity(kernels.unit_rows(vectors))
        similarity.diagonal(dim1=1, dim2=2).fill_(0)
        pairs = available[:, :, None] & available[:, None]
        count = available.sum(dim=1)
        mean = (similarity * pairs).sum(dim=(1, 2)) / (count * (count - 1)).clamp_min(1)
        limit = 18 * k / similarity.shape[1] * mean
        conflicts = (similarity > limit[:, None, None]) & (groups[:, :, None] == groups[:, None])
        conflicts.diagonal(dim1=1, dim2=2).fill_(False)
        return conflicts


def _earliest(key: Tensor, barred: Tensor, k: int) -> Tensor:
    """The `k` lowest of distinct whole numbers (S, N) that are not barred (S, N)."""
    return key.masked_fill(barred, torch.iinfo(key.dtype).max).sort(dim=1, stable=True).indices[:, :k]


def _principal_groups(vectors: Tensor, count: int) -> Tensor:
    """The component (S, N) of the `count` first that weighs most in each token; channels are the samples.

    On a GPU the eigenvalue solver waits for the device.
    """
    samples = torch.sigmoid(vectors.float().nan_to_num(nan=0.0))
    samples = samples - samples.mean(dim=2, keepdim=True)
    loadings = torch.linalg.eigh(samples @ samples.transpose(1, 2)).eigenvectors
    return loadings[:, :, -count:].flip(2).abs().argmax(dim=2)


def _bounded_quotas(sizes: Tensor, survivors: Tensor, k: int) -> Tensor:
    """Budgets (S, G) of groups with so many tokens and survivors (S, G)."""
    quotas = sizes.clamp(max=1)
    bound = survivors.clamp(max=5 * -(-k // 64)).maximum(quotas)
    quotas = quotas + largest_remainder(survivors, k - quotas.sum(dim=1, keepdim=True), bound - quotas)
    return quotas + largest_remainder(survivors, k - quotas.sum(dim=1, keepdim=True), sizes - quotas)


def _local_variance(units: Tensor, available: Tensor, pieces: Pieces) -> Tensor:
    """Variance (S, N) of the cosine similarity of each token to the others of its piece, its own counting as 0."""
    blocks = pieces.split(units * available[:, :, None])
    similarity = blocks @ blocks.transpose(2, 3)
    similarity.diagonal(dim1=2, dim2=3).fill_(0)
    inside = pieces.split(available)
    others = (inside.sum(dim=2) - 1).clamp_min(1)[:, :, None]
    centred = similarity - similarity.sum(dim=3, keepdim=True) / others[..., None]
    variance = (centred.square() * inside[:, :, None]).sum(dim=3) / others * inside
    return pieces.join(variance)
