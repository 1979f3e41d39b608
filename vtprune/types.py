"""The nouns every room shares; all of them are frozen values.

Shape letters: `B` prompts, `L` prompt length, `S` segments of equal parts, `N` visual tokens of a segment,
`K` kept ones, `D` width, `H` heads, `T` frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Literal

import numpy as np
from torch import Tensor

from vtprune.errors import InvalidOption

Modality = Literal["image", "video"]
PartKind = Literal["image", "thumbnail", "crop", "tile", "frame"]
Per = Literal["image", "part", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece a segment is packed from: a whole picture, the thumbnail, the crops, a tile or a frame.

    `start`, `stop` and `separators` count from the beginning of the segment. Tokens that are not separators form the
    grid `(h, w)` in raster order. Separators (newline, CLS and the like) are always kept and counted apart.

    Where crops were stitched into the grid, `crops` are the rows and the columns that they begin and end at: of two
    beside each other ((0, 24), (0, 24, 48)).
    """

    start: int
    stop: int
    kind: PartKind
    grid: tuple[int, int]
    separators: tuple[int, ...] = ()
    crops: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def __post_init__(self) -> None:
        tokens = self.stop - self.start - len(self.separators)
        assert tokens == self.grid[0] * self.grid[1], (self, "the grid must cover every token but the separators")

    @property
    def tokens(self) -> int:
        """Number of tokens that may be pruned."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def candidates(self) -> np.ndarray:
        """Offsets within the segment of the tokens that may be pruned, ascending."""
        offsets = np.arange(self.start, self.stop)
        return np.setdiff1d(offsets, self.separators, assume_unique=True) if self.separators else offsets


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One picture or clip in one prompt. A clip may lie in several `runs` of placeholders `[start, stop)`.

    `entries` are the entries of the encoder output it was made of.
    """

    row: int
    entries: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    kind: Modality
    parts: tuple[Part, ...]

    @cached_property
    def positions(self) -> np.ndarray:
        """Prompt positions of all its tokens, separators included."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.runs])

    @cached_property
    def candidates(self) -> np.ndarray:
        """Prompt positions of the tokens that may be pruned."""
        if self.separators == 0:
            return self.positions
        return self.positions[np.concatenate([part.candidates for part in self.parts])]

    @property
    def tokens(self) -> int:
        """Number of tokens that may be pruned."""
        return sum(part.tokens for part in self.parts)

    @property
    def separators(self) -> int:
        """Number of tokens that are always kept."""
        return sum(len(part.separators) for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the visual tokens of a call lie, on the host.

    `valid` (B, L) is False at padding; `beams` neighbouring rows belong to one prompt.
    """

    segments: tuple[Segment, ...]
    valid: np.ndarray
    beams: int = 1

    @property
    def length(self) -> int:
        """Prompt length `L`, padding included."""
        return self.valid.shape[1]

    @cached_property
    def row_lengths(self) -> tuple[int, ...]:
        """Real tokens per row, padding left out."""
        return tuple(int(np.count_nonzero(row)) for row in self.valid)


@dataclass(frozen=True, kw_only=True)
class Ordinal:
    """Which picture of the conversation (counted from 0) and which part of it a row of `VisualTokens` is."""

    segment: int
    part: int = 0


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """All that a stage before the LLM may see. Rows have equal `N` and equal `parts`.

    `features` (S, N, D) are the projected tokens, separators left out, perhaps in the memory of the prompt itself: they
    are there to be read. Tensors of `evidence` are (S, N), or (S, N, C) where a token has several numbers.
    """

    features: Tensor
    parts: tuple[Part, ...]
    ordinals: tuple[Ordinal, ...]
    evidence: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A decision: `keep` (S, K) ascending indices into `N`; `taken` (S, K) says which pick took each of them.

    `counts` is how many each pick took, known from shapes. `scores` (S, N) are what the selector of each pick saw, None
    of a pick that took nothing.
    """

    keep: Tensor
    taken: Tensor
    counts: tuple[int, ...]
    scores: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which of K kept tokens each of N joins: `into` (S, N) index into K, -1 where it is lost; kept ones join theirs.

    A kept token moves to the mean of its group, weighted with `weights` (S, N), nothing where negative; where those add
    up to nothing all count alike. It keeps the share `stays` of itself.
    """

    into: Tensor
    weights: Tensor
    stays: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What kept tokens became: `rows` (S, K, D) in their order, `into` (S, N) the index into K of the kept token that
    swallowed a token most of all, its own at a kept one, -1 where it is lost."""

    rows: Tensor
    into: Tensor


@dataclass(frozen=True, kw_only=True)
class EncoderCut:
    """What stays of n patches at the output of a block of the encoder.

    `keep` (B, m) ascending indices; `into` (B, n) the index into m of the patch that swallows a dropped one, -1 where
    it is lost; `memory` (B, n), what the stage wants to see again at the next block, of those that stay.
    """

    keep: Tensor
    into: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many tokens survive. `keep` is a share in (0, 1] (float) or a number (int >= 1), `per` what it applies to.

    Raises:
        InvalidOption: for a `keep`, `per` or `floor` out of range.
    """

    keep: float | int
    per: Per = "image"
    floor: int = 1

    def __post_init__(self) -> None:
        if self.per not in ("image", "part", "prompt"):
            raise InvalidOption(f"per={self.per!r}: expected 'image', 'part' or 'prompt'")
        if not isinstance(self.floor, int) or isinstance(self.floor, bool) or self.floor < 0:
            raise InvalidOption(f"floor={self.floor!r}: expected a whole number of tokens, 0 or more")
        keep = self.keep
        if isinstance(keep, Integral) and not isinstance(keep, bool):
            keep = int(keep)
        elif isinstance(keep, Real) and not isinstance(keep, bool):
            keep = float(keep)
        object.__setattr__(self, "keep", keep)
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise InvalidOption(
                f"keep={keep!r}: expected a share in (0, 1] as a float, or a number of tokens as an int"
            )
        if isinstance(keep, int) and keep < 1:
            raise InvalidOption(
                f"keep={keep}: expected at least 1 token; a share is written as a float, for example 0.25"
            )
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise InvalidOption(f"keep={keep}: expected a share in (0, 1]; a number of tokens is written as an int")

    @property
    def keeps_all(self) -> bool:
        """True where the budget is the neutral share 1.0."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def resolve(self, n: int) -> int:
        """Number kept of `n` tokens: the only place that rounds (half up)."""
        wanted = self.keep if isinstance(self.keep, int) else math.floor(self.keep * n + 0.5)
        return min(n, max(self.floor, wanted))

    def at_least(self, n: int) -> int:
        """As many of `n` tokens as this budget can leave of them where they are a part of a picture."""
        return self.resolve(n) if isinstance(self.keep, int) else min(n, max(self.floor, math.ceil(self.keep * n)))
