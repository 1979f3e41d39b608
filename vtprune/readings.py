"""Evidence that is read off the model while it runs: off blocks and projector of the encoder, off decoder layers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

from torch import Tensor, nn

from vtprune.errors import InvalidOption


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockAttention:
    """One attention of the encoder: `query` and `key` (B, H, n, d) after norm and RoPE, `scale` on their product.

    Token 0 is a CLS token where `has_cls`, so that n = N + 1 for N patches; n = N elsewhere. `value` is None where
    nobody asked for it.
    """

    query: Tensor
    key: Tensor
    scale: float
    has_cls: bool
    value: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """What the projector gets, `inputs` (B, N, C), and the projector itself.

    A projector that merges patches makes of N rows only N / m, each of m neighbours.
    """

    inputs: Tensor
    projector: nn.Module


class Rule(Protocol):
    """What is read: `of` a `BlockAttention` or a `Projection` it makes (B, N), or (B, N, C), CLS token left out.

    What is read of the `"cut"` is the score of patches that stay where the encoder itself is pruned.
    `name` is that of the evidence; `needs_cls` says that only an encoder with a CLS token has it.
    """

    @property
    def name(self) -> str: ...
    @property
    def of(self) -> Literal["attention", "projector", "cut"]: ...
    @property
    def needs_cls(self) -> bool: ...
    def __call__(self, seen: Any) -> Tensor: ...


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

    One that also has `divides`, and that is True, gets `RowAttention.decay`.
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


class OfAttention:
    """Base of rules on the attention of a block, of any encoder unless they say `needs_cls`."""

    of: ClassVar[Literal["attention"]] = "attention"
    needs_cls: ClassVar[bool] = False


class OfProjector:
    """Base of rules on what the projector gets."""

    of: ClassVar[Literal["projector"]] = "projector"
    needs_cls: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One piece of evidence: a rule, and the block it is applied to.

    By default that is the block that makes the features. `at` names another one by its share of the depth of the
    encoder, 0 the first and 1 the last; `since` takes the sum over all blocks from that share of the depth up to the
    one that makes the features.

    Raises:
        InvalidOption: for both, one out of range, or either with a rule that reads the projector.
    """

    rule: Rule
    at: float | None = None
    since: float | None = None

    def __post_init__(self) -> None:
        for name, share in (("at", self.at), ("since", self.since)):
            if share is not None and (isinstance(share, bool) or not 0 <= share <= 1):
                raise InvalidOption(f"{name}={share!r} of reading {self.rule.name!r}: expected a share of the depth")
        if self.at is not None and self.since is not None:
            raise InvalidOption(f"reading {self.rule.name!r}: give `at` or `since`, not both")
        if self.rule.of != "attention" and (self.at, self.since) != (None, None):
            raise InvalidOption(f"reading {self.rule.name!r} is not taken from a block: it has no `at` and no `since`")

    @property
    def name(self) -> str:
        """What the evidence is called in `VisualTokens.evidence` and `using(...)`."""
        return self.rule.name + self._parameters + self._place

    def source(self, has_cls: bool) -> str:
        """What it is called in reports: of "importance" which of the two it was."""
        if self.rule.name != "importance":
            return self.name
        return ("cls_attention" if has_cls else "received_attention") + self._place

    @property
    def _parameters(self) -> str:
        rule: Any = self.rule
        values = (f"{field.name}={getattr(rule, field.name):g}" for field in fields(rule))
        return f"({', '.join(values)})" if fields(rule) else ""

    @property
    def _place(self) -> str:
        if self.at is not None:
            return f"@{self.at:g}"
        return "" if self.since is None else f"@{self.since:g}+"

    def blocks(self, count: int, features: int) -> range:
        """Numbers of the blocks it is taken from, out of `count`, of which `features` makes the features."""
        if self.since is not None:
            return range(min(features, int(self.since * count)), features + 1)
        block = features if self.at is None else min(count - 1, int(self.at * count))
        return range(block, block + 1)


Need = str | Reading | Glance | StateGlance | Transition | SinkReading
"""What a stage reads: evidence by its name, or how it is taken."""
