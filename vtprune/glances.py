"""Evidence that is read off the language model while it runs: attention of a few rows, hidden states, and changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from vtprune.errors import InvalidOption
from vtprune.readings import Reading


@dataclass(frozen=True, kw_only=True, eq=False)
class RowAttention:
    """What some rows of a decoder layer attend to: `weights` (B, H, R, n), a softmax over all keys a row may see.

    `real` (B, R) is False at rows that only fill up; `own` (B, R) says which of the n keys are those of the rows,
    `visual` (B, n) which belong to pictures of this prompt. `decay` (B, R, n), None where the rule `divides` nothing,
    is what the rotary embedding leaves of the product of two vectors of ones at the places of row and key: 1 at the
    same place, perhaps below 0 far away, and 1 for keys that an earlier turn left in the cache.
    """

    weights: Tensor
    real: Tensor
    own: Tensor
    visual: Tensor
    decay: Tensor | None = None

    def of_groups(self, groups: int) -> RowAttention:
        """The same of every group of heads by itself: B * `groups` prompts, each of H / `groups` heads."""
        if groups == 1:
            return self
        return RowAttention(
            weights=self.weights.unflatten(1, (groups, -1)).flatten(0, 1),
            real=self.real.repeat_interleave(groups, dim=0),
            own=self.own.repeat_interleave(groups, dim=0),
            visual=self.visual.repeat_interleave(groups, dim=0),
            decay=None if self.decay is None else self.decay.repeat_interleave(groups, dim=0),
        )


Rows = Literal["last", "text", "raters", "sampled", "all"]


class RowRule(Protocol):
    """Makes one number per key (B, n) of a `RowAttention`; `name` is that of the evidence.

    One that also has `divides`, and that is True, gets `RowAttention.decay`. One that also has `by_rows`, and that is
    True, is a mean over real rows, so that it may be taken of blocks of them: only such a rule looks from all rows.
    """

    @property
    def name(self) -> str: ...
    def __call__(self, seen: RowAttention) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Glance:
    """Evidence that is read off the language model at a drop point: a rule on the attention of a few rows.

    `rows` are the `"last"` token of the prompt, all `"text"` behind its last picture, or the `"raters"` of that text:
    the words whose embeddings are nearer to the pictures than those of the average word. `at` is the layer `"before"`
    the drop point, whose own queries and keys are taken as it runs, or the one `"behind"` it, for which those of the
    rows and all keys are computed once more. What stays in a cache may also go by rows that are `"sampled"`, the last
    ones of the prompt and as many evenly apart, or by `"all"`; it is always the attention of the layer itself.
    """

    rule: RowRule
    rows: Rows = "text"
    at: Literal["before", "behind"] = "before"

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows):
            raise InvalidOption(f"rows={self.rows!r} of a glance: expected one of {', '.join(get_args(Rows))}")
        if self.at not in ("before", "behind"):
            raise InvalidOption(f"at={self.at!r} of a glance: expected 'before' or 'behind'")

    @property
    def name(self) -> str:
        """What the evidence is called."""
        return f"{self.rows}_{self.rule.name}" + ("" if self.at == "before" else "@behind")

    @property
    def divides(self) -> bool:
        """Whether the rule wants to know the decay of the rotary embedding."""
        return bool(getattr(self.rule, "divides", False))

    @property
    def whole(self) -> bool:
        """Whether its rows must be looked from at once, though they may be too many for that."""
        return self.rows == "all" and not getattr(self.rule, "by_rows", False)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowStates:
    """Hidden states of some rows at a drop point, (B, R, D): `entering` is what the layer behind it is about to get,
    `earlier` what layer `number`, the one in front of it, got. `real` (B, R) is False at rows that only fill up, the
    last row is the last token of the prompt.
    """

    entering: Tensor
    earlier: Tensor
    real: Tensor
    number: int


class StateRule(Protocol):
    """Makes one number per prompt row (B,) of `RowStates`; `name` is that of the evidence.

    `check` raises `InvalidOption` where it was made for another model than one of `depth` layers of this `width`.
    """

    @property
    def name(self) -> str: ...
    def check(self, *, depth: int, width: int) -> None: ...
    def __call__(self, seen: RowStates) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class StateGlance:
    """Evidence that is read off the language model at a drop point: a rule on the hidden states of a few rows.

    `rows` are the `"last"` token of the prompt, or all `"text"` behind its last picture. All tokens of a prompt row
    have the same number.
    """

    rule: StateRule
    rows: Literal["last", "text"] = "last"

    def __post_init__(self) -> None:
        if self.rows not in ("last", "text"):
            raise InvalidOption(f"rows={self.rows!r} of a glance at states: expected 'last' or 'text'")

    @property
    def name(self) -> str:
        """What the evidence is called."""
        return f"{self.rows}_{self.rule.name}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What an attention or an MLP of a decoder layer makes of tokens: `inputs` (B, K, D), behind the norm, and
    `outputs` (B, K, D), before they are added to the residual stream. `visual` (B, K) is True at tokens of pictures.
    """

    inputs: Tensor
    outputs: Tensor
    visual: Tensor


class ChangeRule(Protocol):
    """Makes one number per token (B, K) of a `Change`; `name` is that of the evidence."""

    @property
    def name(self) -> str: ...
    def __call__(self, seen: Change) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Transition:
    """Evidence that is read off the language model on the way to a drop point: a rule on what its modules change.

    It is the sum over attention and MLP of all decoder layers from the share `since` of the depth up to the drop point;
    the layer in front of the first drop point is always among them.
    """

    rule: ChangeRule
    since: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.since, bool) or not isinstance(self.since, (int, float)) or not 0 <= self.since <= 1:
            raise InvalidOption(f"since={self.since!r} of a transition: expected a share of the depth")

    @property
    def name(self) -> str:
        """What the evidence is called."""
        return f"{self.rule.name}@{self.since:g}+"

    def layers(self, points: tuple[int, ...], depth: int) -> range:
        """Numbers of the layers that count up to the last of the drop points, out of `depth`."""
        return range(min(int(self.since * depth + 0.5), points[0] - 1), points[-1])


class SinkRule(Protocol):
    """Tells attention sinks by hidden states that enter a decoder layer.

    `massive` says which channels (B, D) count, from the first token (B, D) of every prompt; the call which of tokens
    (B, n, D) are sinks, (B, n) bool. `name` is that of the evidence.
    """

    @property
    def name(self) -> str: ...
    def massive(self, first: Tensor) -> Tensor: ...
    def __call__(self, hidden: Tensor, massive: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SinkReading:
    """Evidence that is read off hidden states at a drop point: which tokens are sinks, (B, n) bool."""

    rule: SinkRule

    @property
    def name(self) -> str:
        """What the evidence is called."""
        return self.rule.name


Need = str | Reading | Glance | StateGlance | Transition | SinkReading
"""What a stage reads: evidence by its name, or how it is taken."""
