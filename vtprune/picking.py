"""Picks, each a scorer, debiasers and a selector, one after the other on equal pictures: tokens in, choice out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtprune._checks import check_returned
from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.protocols import Debiaser, Merger, Scorer, Selector
from vtprune.types import Groups, Merged, Selection, VisualTokens

_INF = float("inf")


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One stage of selection: it takes `share` of the budget, the last pick takes what is left."""

    name: str
    scorer: Scorer
    selector: Selector
    debiasers: tuple[Debiaser, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise InvalidOption(f"share={self.share!r} of pick {self.name!r}: expected a number in (0, 1]")
        if not callable(self.scorer) or isinstance(self.scorer, type) or not hasattr(self.scorer, "needs"):
            raise InvalidOption(f"scorer of pick {self.name!r}: expected a callable with a `needs` property")
        if isinstance(self.scorer.needs, str):
            raise InvalidOption(f"scorer of pick {self.name!r}: `needs` is a set of names, got {self.scorer.needs!r}")
        if not callable(self.selector) or isinstance(self.selector, type):
            raise InvalidOption(f"selector of pick {self.name!r}: expected a callable, got {self.selector!r}")


def choose(picks: Sequence[Pick], tokens: VisualTokens, k: int) -> Selection:
    """Choose `k` of the `N` tokens of every row, pick after pick, each of what the earlier ones left.

    `tokens.evidence` may hold `protect` (S, m) indices, which are taken first (m <= k, marked -1 in `taken`), and
    `forbid` (S, N) bool, which are never taken.

    Raises:
        UnsupportedCall: where a stage returns a wrong number of tokens, or on the CPU NaN, which counts as 0 elsewhere.
    """
    S = tokens.features.shape[0]
    chosen: list[Tensor] = []
    stage: list[Tensor] = []
    protect = tokens.evidence.get("protect")
    if protect is not None:
        chosen.append(protect)
        stage.append(torch.full_like(protect, -1))
    left = k - sum(indices.shape[1] for indices in chosen)
    counts: list[int] = []
    seen: list[Tensor | None] = [None] * len(picks)
    for number, pick in enumerate(picks):
        last = number == len(picks) - 1
        count = left if last else min(left, int(pick.share * k + 0.5))
        left -= count
        counts.append(count)
        if count == 0:
            continue
        taken = kernels.joined(chosen, dim=1) if chosen else None
        scores = _scores(pick, tokens, taken)
        picked = pick.selector(tokens, scores, count, taken)
        check_returned(f"the selector of pick {pick.name!r}", picked, (S, count), torch.long)
        chosen.append(picked)
        stage.append(torch.full_like(picked, number))
        seen[number] = scores
    if not chosen:
        empty = torch.empty(S, 0, dtype=torch.long, device=tokens.features.device)
        return Selection(keep=empty, taken=empty, counts=tuple(counts), scores=tuple(seen))
    keep, order = kernels.joined(chosen, dim=1).sort(dim=1)
    taken = kernels.joined(stage, dim=1).gather(1, order)
    return Selection(keep=keep, taken=taken, counts=tuple(counts), scores=tuple(seen))


def merged(merger: Merger, tokens: VisualTokens, selection: Selection) -> Merged:
    """What a merger makes of the kept tokens."""
    found = mixed(merger(tokens, selection), tokens.features, selection)
    return replace(found, rows=found.rows.to(tokens.features.dtype))


def mixed(mixture: Groups | Tensor, features: Tensor, selection: Selection) -> Merged:
    """What becomes of kept tokens where rows of `features` (S, N, D) mix as a merger says; rows in fp32.

    Raises:
        UnsupportedCall: where the merger returned something else.
    """
    S, N = features.shape[:2]
    keep = selection.keep
    K = keep.shape[1]
    own = torch.arange(K, device=keep.device).expand_as(keep)
    if not isinstance(mixture, Groups):
        check_returned("the merger", mixture, (S, K, N))
        share, into = mixture.max(dim=1)
        rows = mixture @ features.float().nan_to_num(nan=0.0)
        return Merged(rows=rows, into=into.masked_fill(share <= 0, -1).scatter(1, keep, own))
    check_returned("the merger", mixture.into, (S, N), torch.long)
    check_returned("the merger", mixture.weights, (S, N))
    if host.holds(keep) and not host.is_within(mixture.into, -1, K):
        raise UnsupportedCall(f"the merger names groups beyond those of {K} kept tokens: expected -1 to {K - 1}")
    into = mixture.into.scatter(1, keep, own)
    weights = mixture.weights.clamp(min=0)
    most = weights.new_zeros(S, K + 1).scatter_reduce(1, into.masked_fill(into < 0, K), weights, "amax")
    idle = (weights == 0) & (most.gather(1, into.clamp(min=0)) > 0)
    rows = kernels.merge_rows(features, into, weights, K)
    if mixture.stays:
        rows = torch.lerp(rows, kernels.rows_at(features, keep).float().nan_to_num(nan=0.0), mixture.stays)
    return Merged(rows=rows, into=into.masked_fill(idle, -1).scatter(1, keep, own))


def _scores(pick: Pick, tokens: VisualTokens, taken: Tensor | None) -> Tensor:
    """What the selector of a pick sees, (S, N): -inf at what is taken or forbidden."""
    scores = pick.scorer(tokens)
    for debiaser in pick.debiasers:
        scores = debiaser(tokens, _checked(f"the scorer of pick {pick.name!r}", scores, tokens))
    scores = _checked(f"the scorer or a debiaser of pick {pick.name!r}", scores, tokens)
    forbidden = tokens.evidence.get("forbid")
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, float("-inf"))
    return scores if taken is None else scores.scatter(1, taken, float("-inf"))


def _checked(who: str, scores: Tensor, tokens: VisualTokens) -> Tensor:
    """Scores (S, N) without NaN: in host memory they raise, elsewhere they count as 0, since nothing may wait."""
    check_returned(who, scores, tokens.features.shape[:2])
    if not host.holds(scores):
        return scores.nan_to_num(nan=0.0, posinf=_INF, neginf=-_INF)
    if host.has_nan(scores):
        raise UnsupportedCall(f"{who} returned NaN: expected numbers, or -inf at tokens that must not be picked")
    return scores
