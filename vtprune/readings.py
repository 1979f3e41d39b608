"""Evidence that is read off the model while it runs: off blocks and projector of the encoder, off decoder layers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from vtprune.errors import InvalidOption


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockAttention:
    """One attention of the encoder: `query` and `key` (B, H, n, d) after norm and RoPE, `scale` on their product.

    Token 0 is a CLS token where `has_cls`, so that n = N + 1 for N patches; n = N elsewhere. `value` is None where
    nobody asked for it. `spans` is as `kernels.attention.attention_to` takes it, where pictures share the sequence.
    """

    query: Tensor
    key: Tensor
    scale: float
    has_cls: bool
    value: Tensor | None = None
    spans: Tensor | None = None


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


class OfAttention:
    """Base of rules on the attention of a block, of any encoder unless they say `needs_cls`.

    `spanning` rules heed the spans of a `BlockAttention` without CLS tokens; others get its pictures one by one.
    """

    of: ClassVar[Literal["attention"]] = "attention"
    needs_cls: ClassVar[bool] = False
    spanning: ClassVar[bool] = False


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
