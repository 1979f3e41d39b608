"""Attention sinks told by massive activations: scores without them, and their attention given to other tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune._checks import check_positive, check_share, check_whole
from vtprune.errors import InvalidOption
from vtprune.glances import SinkReading
from vtprune.stages.vectors import evidence_of
from vtprune.types import VisualTokens

_TINY, _SMALLEST = 1e-6, 1e-30
_ABOVE_MEDIAN = 10.0


@dataclass(frozen=True, kw_only=True)
class MassiveActivations:
    """Tokens with a massive activation: VAR, arXiv 2503.03321.

    Hidden states are divided by their root mean square, the gain of the norm left out. A token is a sink where any
    massive channel is more than `threshold` away from 0.

    Args:
        threshold: from which an activation is massive.
        channels: the massive ones, where they are known. Where not, they are those of the first token of the
            conversation, in the layer that is looked at: above the threshold, and above ten times the median channel.
    """

    threshold: float = 20.0
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        if self.channels is None:
            return
        if not isinstance(self.channels, tuple) or not self.channels:
            raise InvalidOption(f"channels={self.channels!r}: expected a tuple of numbers of channels, or None")
        for channel in self.channels:
            check_whole("channels", channel, least=0)

    @property
    def name(self) -> str:
        """What the evidence is called."""
        among = "" if self.channels is None else f", channels={self.channels}"
        return f"massive_activations(threshold={self.threshold:g}{among})"

    def massive(self, first: Tensor) -> Tensor:
        """Which channels (B, D) are massive, from the first token (B, D) of every prompt."""
        if self.channels is None:
            size = _scaled(first).abs()
            median = size.median(dim=1, keepdim=True).values
            return (size > self.threshold) & (size > _ABOVE_MEDIAN * median)
        known = torch.zeros(first.shape[1], dtype=torch.bool)
        known[list(self.channels)] = True
        return known.to(first.device, non_blocking=True).expand(first.shape)

    def __call__(self, hidden: Tensor, massive: Tensor) -> Tensor:
        """Which of the tokens (B, n, D) are sinks, (B, n), where channels (B, D) are massive."""
        sizes = _scaled(hidden).abs_()
        return sizes.masked_fill_(~massive[:, None], 0).amax(dim=2) > self.threshold


@dataclass(frozen=True, kw_only=True)
class WithoutMassive:
    """Take the score from tokens with massive activations, at cuts between decoder layers: VAR, arXiv 2503.03321.

    They get 0, or the lowest score of the picture where that is less: they go first.
    """

    rule: MassiveActivations = MassiveActivations()

    @property
    def needs(self) -> frozenset[SinkReading]:
        return frozenset({SinkReading(rule=self.rule)})

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        lowest = scores.masked_fill(scores.isinf(), 0).amin(dim=1, keepdim=True).clamp(max=0)
        return torch.where(evidence_of(tokens, self.rule.name), lowest, scores)


@dataclass(frozen=True, kw_only=True)
class Redistribute:
    """Attention of sinks given to the picture by the heads that look at it: VAR, arXiv 2503.03321.

    A row of a head looks at pictures where it pays them `least` of its attention, and of that no more than `most` to
    sinks. There the attention of all sinks is multiplied by `share`, and what they lose goes to the tokens of pictures
    that are none, in proportion to what they have.

    Args:
        share: what sinks keep of their attention; at 1 nothing changes.
        most: the largest share of sinks in the attention to pictures, of heads that are changed.
        least: the least attention to pictures, of heads that are changed.
        sinks: how they are told.
    """

    name: ClassVar[str] = "attention of sinks redistributed"
    of: ClassVar[Literal["weights"]] = "weights"
    share: float = 0.6
    most: float = 0.5
    least: float = 0.2
    sinks: MassiveActivations = MassiveActivations()

    def __post_init__(self) -> None:
        for name in ("share", "most", "least"):
            check_share(name, getattr(self, name))

    @property
    def neutral(self) -> bool:
        """Whether nothing changes."""
        return self.share == 1

    def __call__(self, weights: Tensor, visual: Tensor, sinks: Tensor) -> Tensor:
        kinds = torch.stack([visual & sinks, visual & ~sinks, sinks], dim=2).to(weights.dtype)[:, None]
        stuck, seen, caught = (weights @ kinds).split(1, dim=3)
        looks = (stuck + seen >= self.least) & (stuck <= self.most * (stuck + seen)) & (seen > 0)
        gain = ((1 - self.share) * caught / seen.clamp_min(_SMALLEST)).masked_fill(~looks, 0)
        return weights * (1 + gain * kinds[..., 1, None].mT - (1 - self.share) * looks * kinds[..., 2, None].mT)


def _scaled(hidden: Tensor) -> Tensor:
    """Hidden states (..., D) in fp32 of root mean square 1."""
    wide = hidden.float()
    return wide * wide.pow(2).mean(dim=-1, keepdim=True).add_(_TINY).rsqrt_()
