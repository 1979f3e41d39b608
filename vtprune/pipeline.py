"""A method is a value: a `Pipeline` of picks, each a scorer, debiasers and a selector. Tokens in, decision out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtprune._checks import check_returned, check_share, check_whole
from vtprune._needs import Reads
from vtprune._storing import from_plain, to_plain
from vtprune.errors import InvalidOption
from vtprune.glances import Glance, Need
from vtprune.picking import Pick, choose, merged
from vtprune.protocols import AttentionEdit, Counter, EncoderStage, FrameBudget, Merger
from vtprune.readings import Reading
from vtprune.types import Merged, Selection, VisualTokens

FORMAT = 1
_WHOLE = ("merger", "counter", "frames", "encoder", "attention", "cache")
"""Stages of a pipeline that belong to none of its picks."""
_DEEP = ("inside", "before", "trims")
"""What a pipeline has where it cuts between decoder layers."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Reads):
    """A method: its picks run one after the other, each on what the earlier ones left.

    A `merger` gives dropped tokens a place in kept ones. A `counter` makes the method adaptive: the budget is only the
    most that stays, and one more wait for the device tells how much it is.
    `frames` shares the budget of a clip, or of a picture of several parts, among them, and each is pruned by itself,
    after one more wait too. `encoder` prunes inside the vision encoder already; the picks then take what it left.
    `inside` are cuts between decoder layers; with them the budget is the average over all layers, `before` is the share
    published for what the picks leave, and picks may be missing. With `trims`, layers between these cuts lose from
    their caches what later ones dropped, once the prefill is over. `cache` leaves all tokens to all layers, and stores
    fewer of them.
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
    trims: bool = False
    cache: CacheStage | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.picks, tuple) or not all(isinstance(pick, Pick) for pick in self.picks):
            raise InvalidOption(f"picks of pipeline {self.name!r}: expected a tuple of Pick, got {self.picks!r}")
        if self.trims and not self.inside:
            raise InvalidOption(f"pipeline {self.name!r} trims caches of layers between cuts, and has none")
        if self.cache is not None and (self.picks or self.inside or any(getattr(self, name) for name in _WHOLE[:-1])):
            raise InvalidOption(f"pipeline {self.name!r} cuts the cache, and no other stage goes with that")
        if self.trims and self.attention is not None:
            raise InvalidOption(f"pipeline {self.name!r} changes attention to cached tokens, and trims the cache")
        if not self.picks and not self.inside and self.cache is None and self.attention is None:
            raise InvalidOption(f"pipeline {self.name!r} has no picks: it would keep nothing")
        if not isinstance(self.inside, tuple) or not all(isinstance(stage, LayerStage) for stage in self.inside):
            raise InvalidOption(
                f"inside of pipeline {self.name!r}: expected a tuple of LayerStage, got {self.inside!r}"
            )
        check_share("before", self.before, above=0)
        if self.inside and (self.counter is not None or self.frames is not None):
            raise InvalidOption(
                f"pipeline {self.name!r} cuts between decoder layers: no counter and no budget of frames goes with that"
            )
        if (self.before < 1) != bool(self.picks and self.inside):
            raise InvalidOption(
                f"before={self.before!r} of pipeline {self.name!r}: picks and cuts between layers share it"
            )
        if any(stage.keep is None for stage in self.inside) and (self.picks or len(self.inside) > 1):
            raise InvalidOption(
                f"pipeline {self.name!r}: a stage with keep=None has the budget for itself, it is the only one"
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
        """Its picks, those of the cuts between decoder layers and those of the cache."""
        deep = (*self.inside, *(() if self.cache is None else (self.cache,)))
        return (*self.picks, *(pick for stage in deep for pick in stage.picks))

    @cached_property
    def drops(self) -> bool:
        """Whether it drops tokens; what does not takes no other budget than 1.0."""
        return bool(self.picks or self.inside or self.cache) and self.name != "identity"

    @cached_property
    def adaptive(self) -> bool:
        """Whether what pictures hold decides how many tokens stay; the budget is the most then."""
        return any(stage.counter is not None for stage in (self, *self.inside, self.cache) if stage is not None)

    @cached_property
    def merges(self) -> bool:
        """Whether dropped tokens may live on in kept ones."""
        return any((self.encoder, self.merger, *(stage.merger for stage in self.inside)))

    @cached_property
    def survivors(self) -> str | None:
        """Name of the evidence of what an `encoder` stage left, None without one."""
        return next((name for name, reading in self.readings.items() if reading.rule.of == "cut"), None)

    @cached_property
    def wanted(self) -> frozenset[Need]:
        """What the stages say they need; only scorers must say so."""
        stages: list[Any] = [self.merger, self.counter, self.frames]
        for pick in self.picks:
            stages += [pick.scorer, *pick.debiasers, pick.selector]
        deep = (stage.choice.wanted for stage in (*self.inside, self.cache) if stage is not None)
        return frozenset().union(*(getattr(stage, "needs", ()) for stage in stages), *deep)

    def run(self, tokens: VisualTokens, k: int) -> Selection:
        """Choose `k` of the `N` tokens of every row: see `choose`."""
        return choose(self.picks, tokens, k)

    def merge(self, tokens: VisualTokens, selection: Selection) -> Merged | None:
        """What the kept tokens become; None without a merger."""
        return None if self.merger is None else merged(self.merger, tokens, selection)

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
        known = {**stages, "Pick": Pick, "LayerStage": LayerStage, "CacheStage": CacheStage}
        found = {name: from_plain(data[name], known) for name in ("picks", *_WHOLE, *_DEEP) if name in data}
        return cls(name=data["name"], **found)


@dataclass(frozen=True, kw_only=True)
class LayerStage:
    """A cut between decoder layers: in front of layer `at` (its number, or its share of the depth).

    `keep` is the share of the tokens at first that stays behind it as the method was published, 0 where all leave;
    other budgets change all shares of a schedule together, see `Schedule`. With None there is a cut in front of every
    layer from `at` on: `counter` is asked at each, or at each `every` of them, whether tokens leave, and none stays
    behind the layers that the budget pays for, see `ExitSchedule`.
    Where `counter` must say so `patience` times in a row, the most that it granted stays. `picks`, `merger` and
    `counter` are those of a `Pipeline`; they see hidden states for features, and `evidence["origin"]` (S, n) says which
    of the tokens at first each is, whose `parts` they get.
    """

    at: float | int
    keep: float | None
    picks: tuple[Pick, ...]
    merger: Merger | None = None
    counter: Counter | None = None
    patience: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not isinstance(self.at, (int, float)) or not self.at >= 0:
            raise InvalidOption(f"at={self.at!r} of a stage: expected the number of a layer, or a share of the depth")
        if isinstance(self.at, float) and not self.at < 1:
            raise InvalidOption(f"at={self.at!r} of a stage: a share of the depth lies in [0, 1)")
        check_whole("patience", self.patience, least=1)
        check_whole("every", self.every, least=1)
        if self.keep is not None:
            check_share("keep", self.keep)
        if self.keep is not None and self.every != 1:
            raise InvalidOption(f"every={self.every!r} of a stage with keep={self.keep!r}: it goes with keep=None")
        if any(glance.rows in ("sampled", "all") for glance in self.choice.glances.values()):
            raise InvalidOption(f"a stage in front of layer {self.at}: only stages of the cache look from such rows")

    @cached_property
    def choice(self) -> Pipeline:
        """The stages as a pipeline of their own."""
        return Pipeline(name=f"in front of layer {self.at}", picks=self.picks, merger=self.merger, counter=self.counter)


@dataclass(frozen=True, kw_only=True)
class CacheStage:
    """What of the pictures stays in the KV cache of a prefill, chosen in every decoder layer by itself.

    All tokens pass through all layers, and the budget is the share that stays in the caches. `picks`, `merger` and
    `counter` are those of a `Pipeline`; they see the keys of a layer for features, and what it attends to for evidence.
    Where `heads` choose by themselves a picture is shown once for each head of keys. Where attention is `sparse`, what
    is not chosen takes no part in it in the prefill either: it is neither seen, nor given anything.
    """

    picks: tuple[Pick, ...]
    merger: Merger | None = None
    counter: Counter | None = None
    heads: bool = False
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.heads and (self.sparse or self.counter is not None):
            raise InvalidOption(
                "a stage of the cache: heads that choose by themselves all keep as many, and all attend"
            )
        if self.merger is not None and not self.heads:
            raise InvalidOption("a stage of the cache: keys are merged head by head, so heads have to choose as well")
        if any(not isinstance(need, Glance) for need in self.choice.wanted):
            raise InvalidOption("a stage of the cache goes by what its layer attends to, not by the encoder")
        for glance in self.choice.glances.values():
            if glance.whole:
                raise InvalidOption(
                    f"a stage of the cache goes by {glance.rule.name!r} of rows='all', which are looked from in "
                    "blocks: expected a rule that is a mean over rows and says so (by_rows=True), as MeanAttention; "
                    "take one, or rows='sampled'"
                )

    @cached_property
    def choice(self) -> Pipeline:
        """The stages as a pipeline of their own."""
        return Pipeline(name="cache", picks=self.picks, merger=self.merger, counter=self.counter)


def _reads_the_cut(pick: Pick) -> bool:
    return any(isinstance(need, Reading) and need.rule.of == "cut" for need in pick.scorer.needs)
