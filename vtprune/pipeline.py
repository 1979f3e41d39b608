"""A method is a value: a `Pipeline` of picks, each a scorer, debiasers and a selector. Tokens in, decision out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtprune._checks import check_returned, check_share
from vtprune._storing import from_plain, to_plain
from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.protocols import AttentionEdit, Counter, Debiaser, EncoderStage, FrameBudget, Merger, Scorer, Selector
from vtprune.readings import Glance, Reading, SinkReading
from vtprune.types import Merged, Selection, VisualTokens

FORMAT = 1
_INF = float("inf")
_WHOLE = ("merger", "counter", "frames", "encoder", "attention")
"""Stages of a pipeline that belong to none of its picks."""
_DEEP = ("inside", "before")
"""What a pipeline has where it cuts between decoder layers."""


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


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A method: its picks run one after the other, each on what the earlier ones left.

    A `merger` gives dropped tokens a place in kept ones. A `counter` makes the method adaptive: the budget is only the
    most that stays, and one more wait for the device tells how much it is.
    `frames` shares the budget of a clip, or of a picture of several parts, among them, and each is pruned by itself,
    after one more wait too. `encoder` prunes inside the vision encoder already; the picks then take what it left.
    `inside` are cuts between decoder layers; with them the budget is the average over all layers, `before` is the share
    published for what the picks leave, and picks may be missing.
    `attention` changes attention inside the language model, at any budget; with nothing beside it all tokens stay.
    A pipeline compares, prints and stores as a value: see `to_dict` and `from_dict`.
    """

    name: str
    picks: tuple[Pick, ...]
    merger: Merger | None = None
    counter: Counter | None = None
    frames: FrameBudget | None = None
    encoder: EncoderStage | None = None
    attention: AttentionEdit | None = None
    inside: tuple[LayerStage, ...] = ()
    before: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.picks, tuple) or not all(isinstance(pick, Pick) for pick in self.picks):
            raise InvalidOption(f"picks of pipeline {self.name!r}: expected a tuple of Pick, got {self.picks!r}")
        if not self.picks and not self.inside and self.attention is None:
            raise InvalidOption(f"pipeline {self.name!r} has no picks: it would keep nothing")
        if not isinstance(self.inside, tuple) or not all(isinstance(stage, LayerStage) for stage in self.inside):
            raise InvalidOption(
                f"inside of pipeline {self.name!r}: expected a tuple of LayerStage, got {self.inside!r}"
            )
        check_share("before", self.before, above=0)
        if self.inside and (self.counter is not None or self.frames is not None or self.encoder is not None):
            raise InvalidOption(
                f"pipeline {self.name!r} cuts between decoder layers: counters, budgets of frames and cuts inside the "
                "encoder do not go with that"
            )
        if (self.before < 1) != bool(self.picks and self.inside):
            raise InvalidOption(
                f"before={self.before!r} of pipeline {self.name!r}: picks and cuts between layers share it"
            )
        later = (self.merger, self.counter, self.frames)
        if self.encoder is not None and (any(later) or not all(map(_reads_the_cut, self.picks))):
            raise InvalidOption(
                f"pipeline {self.name!r} prunes inside the encoder: every pick must score by what survives there, and "
                "mergers, counters and budgets of frames come too late"
            )
        if self.counter is not None and self.frames is not None:
            raise InvalidOption(f"pipeline {self.name!r}: a counter and budgets of frames do not go together")

    @cached_property
    def all_picks(self) -> tuple[Pick, ...]:
        """Its picks, and those of the cuts between decoder layers."""
        return (*self.picks, *(pick for stage in self.inside for pick in stage.picks))

    @cached_property
    def drops(self) -> bool:
        """Whether it drops tokens; what does not takes no other budget than 1.0."""
        return bool(self.picks or self.inside) and self.name != "identity"

    @cached_property
    def adaptive(self) -> bool:
        """Whether what pictures hold decides how many tokens stay; the budget is the most then."""
        return self.counter is not None or any(stage.counter is not None for stage in self.inside)

    @cached_property
    def needs(self) -> frozenset[str]:
        """Names of the evidence its stages read."""
        return frozenset(need if isinstance(need, str) else need.name for need in self._wanted)

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """How to take evidence from the vision encoder, by name; what is not there comes from elsewhere."""
        return {need.name: need for need in self._wanted if isinstance(need, Reading)}

    @cached_property
    def glances(self) -> dict[str, Glance]:
        """How to take evidence from attention of the language model at drop points, by name."""
        return {need.name: need for need in self._wanted if isinstance(need, Glance)}

    @cached_property
    def sinks(self) -> dict[str, SinkReading]:
        """How to tell sinks by hidden states at drop points, by name."""
        return {need.name: need for need in self._wanted if isinstance(need, SinkReading)}

    @cached_property
    def asked(self) -> frozenset[str]:
        """Names of the evidence that is not taken from the language model."""
        return self.needs - self.glances.keys() - self.sinks.keys()

    @cached_property
    def survivors(self) -> str | None:
        """Name of the evidence of what an `encoder` stage left, None without one."""
        return next((name for name, reading in self.readings.items() if reading.rule.of == "cut"), None)

    @cached_property
    def _wanted(self) -> frozenset[str | Reading | Glance | SinkReading]:
        """What the stages need; only scorers must say so."""
        stages: list[Any] = [self.merger, self.counter, self.frames]
        for pick in self.picks:
            stages += [pick.scorer, *pick.debiasers, pick.selector]
        deep = (stage.choice._wanted for stage in self.inside)
        return frozenset().union(*(getattr(stage, "needs", ()) for stage in stages), *deep)

    def run(self, tokens: VisualTokens, k: int) -> Selection:
        """Choose `k` of the `N` tokens of every row.

        `tokens.evidence` may hold `protect` (S, m) indices, which are taken first (m <= k, marked -1 in `taken`), and
        `forbid` (S, N) bool, which are never taken.

        Raises:
            UnsupportedCall: where a stage returns a wrong number of tokens, or on the CPU NaN, which counts as 0
                elsewhere.
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
        for number, pick in enumerate(self.picks):
            last = number == len(self.picks) - 1
            count = left if last else min(left, int(pick.share * k + 0.5))
            left -= count
            counts.append(count)
            if count == 0:
                continue
            taken = kernels.joined(chosen, dim=1) if chosen else None
            picked = self._pick(pick, tokens, count, taken)
            check_returned(f"the selector of pick {pick.name!r}", picked, (S, count), torch.long)
            chosen.append(picked)
            stage.append(torch.full_like(picked, number))
        if not chosen:
            empty = torch.empty(S, 0, dtype=torch.long, device=tokens.features.device)
            return Selection(keep=empty, taken=empty, counts=tuple(counts))
        keep, order = kernels.joined(chosen, dim=1).sort(dim=1)
        return Selection(keep=keep, taken=kernels.joined(stage, dim=1).gather(1, order), counts=tuple(counts))

    def _pick(self, pick: Pick, tokens: VisualTokens, count: int, taken: Tensor | None) -> Tensor:
        scores = pick.scorer(tokens)
        for debiaser in pick.debiasers:
            scores = debiaser(tokens, _checked(f"the scorer of pick {pick.name!r}", scores, tokens))
        scores = _checked(f"the scorer or a debiaser of pick {pick.name!r}", scores, tokens)
        forbidden = tokens.evidence.get("forbid")
        if forbidden is not None:
            scores = scores.masked_fill(forbidden, float("-inf"))
        if taken is not None:
            scores = scores.scatter(1, taken, float("-inf"))
        return pick.selector(tokens, scores, count, taken)

    def merge(self, tokens: VisualTokens, selection: Selection) -> Merged | None:
        """What the kept tokens become; None without a merger."""
        if self.merger is None:
            return None
        weights = self.merger(tokens, selection)
        S, N = tokens.features.shape[:2]
        check_returned("the merger", weights, (S, selection.keep.shape[1], N))
        share, into = weights.max(dim=1)
        own = torch.arange(weights.shape[1], device=into.device).expand_as(selection.keep)
        finite = tokens.features.float().nan_to_num(nan=0.0)
        return Merged(
            rows=(weights @ finite).to(tokens.features.dtype),
            into=into.masked_fill(share <= 0, -1).scatter(1, selection.keep, own),
        )

    def count(self, tokens: VisualTokens, k: int) -> Tensor:
        """How many tokens (S,) stay where the method is adaptive, at most `k`."""
        assert self.counter is not None
        counts = self.counter(tokens, k)
        check_returned("the counter", counts, tokens.features.shape[:1], torch.long)
        return counts.clamp(max=k)

    def share(self, tokens: VisualTokens, k: int) -> Tensor:
        """How many tokens (S, T) stay of every part, `k` together."""
        assert self.frames is not None
        counts = self.frames(tokens, k)
        check_returned("the budget of frames", counts, (tokens.features.shape[0], len(tokens.parts)), torch.long)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description with everything needed to rebuild it."""
        stages = {name: getattr(self, name) for name in _WHOLE if getattr(self, name) is not None}
        deep = {name: getattr(self, name) for name in _DEEP} if self.inside else {}
        described = {name: to_plain(stage) for name, stage in {"picks": self.picks, **stages, **deep}.items()}
        return {"format": FORMAT, "name": self.name, **described}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, stages: Mapping[str, type]) -> Pipeline:
        """Rebuild a pipeline; `stages` maps class names to the classes that may appear in it.

        Raises:
            InvalidOption: for another format version or an unknown stage.
        """
        if data.get("format") != FORMAT:
            raise InvalidOption(f"pipeline format {data.get('format')!r}: this version reads format {FORMAT}")
        if not {"name", "picks"} <= data.keys():
            raise InvalidOption(f"a stored pipeline needs 'name' and 'picks', this one has {', '.join(data)}")
        known = {**stages, "Pick": Pick, "LayerStage": LayerStage}
        found = {name: from_plain(data[name], known) for name in ("picks", *_WHOLE, *_DEEP) if name in data}
        return cls(name=data["name"], **found)


@dataclass(frozen=True, kw_only=True)
class LayerStage:
    """A cut between decoder layers: in front of layer `at` (its number, or its share of the depth).

    `keep` is the share of the tokens at first that stays behind it as the method was published, 0 where all leave;
    other budgets change all shares of a schedule together, see `Schedule`. `picks`, `merger` and `counter` are those of
    a `Pipeline`; they see hidden states for features, and `evidence["origin"]` (S, n) says which of the tokens at first
    each is, whose `parts` they get.
    """

    at: float | int
    keep: float
    picks: tuple[Pick, ...]
    merger: Merger | None = None
    counter: Counter | None = None

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not isinstance(self.at, (int, float)) or not self.at >= 0:
            raise InvalidOption(f"at={self.at!r} of a stage: expected the number of a layer, or a share of the depth")
        if isinstance(self.at, float) and not self.at < 1:
            raise InvalidOption(f"at={self.at!r} of a stage: a share of the depth lies in [0, 1)")
        check_share("keep", self.keep)
        _ = self.choice

    @cached_property
    def choice(self) -> Pipeline:
        """The stages as a pipeline of their own."""
        return Pipeline(name=f"in front of layer {self.at}", picks=self.picks, merger=self.merger, counter=self.counter)


def _reads_the_cut(pick: Pick) -> bool:
    return any(isinstance(need, Reading) and need.rule.of == "cut" for need in pick.scorer.needs)


def _checked(who: str, scores: Tensor, tokens: VisualTokens) -> Tensor:
    """Scores (S, N) without NaN: in host memory they raise, elsewhere they count as 0, since nothing may wait."""
    check_returned(who, scores, tokens.features.shape[:2])
    if not host.holds(scores):
        return scores.nan_to_num(nan=0.0, posinf=_INF, neginf=-_INF)
    if host.has_nan(scores):
        raise UnsupportedCall(f"{who} returned NaN: expected numbers, or -inf at tokens that must not be picked")
    return scores
