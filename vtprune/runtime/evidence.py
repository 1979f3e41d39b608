"""Evidence that the user gives for one call with `using(...)`: scores, and tokens to force in or out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.pipeline import Pipeline
from vtprune.readings import Reading
from vtprune.runtime.units import Unit
from vtprune.stages.rules import NAMED_RULES
from vtprune.types import Layout, Segment

_FORCED = ("protect", "forbid")


def readings_of(pipeline: Pipeline) -> dict[str, Reading]:
    """What a method takes from the vision encoder, by the names of the evidence."""
    named = {name: Reading(rule=NAMED_RULES[name]) for name in pipeline.needs & NAMED_RULES.keys()}
    return {**named, **pipeline.readings}


@dataclass(frozen=True, kw_only=True)
class Given:
    """Evidence from the user: for each name and prompt row one tensor per picture of the row, None where it has none.

    `protect` and `forbid` hold token indices (separators left out of the count); everything else holds scores, one
    per token or one per part, which its tokens share.
    """

    values: Mapping[str, tuple[tuple[Tensor | None, ...], ...]]

    @classmethod
    def check(cls, values: Mapping[str, Sequence[Any]], reads: frozenset[str], outer: Given | None = None) -> Given:
        """Refuse names the method does not read, rows that differ in number, and what is no number; add to `outer`."""
        for name, rows in values.items():
            if name not in reads and name not in _FORCED:
                known = ", ".join(sorted(reads | set(_FORCED)))
                raise InvalidOption(f"using({name}=...): this method does not read {name!r}; it takes {known}")
            if not isinstance(rows, (list, tuple)):
                raise InvalidOption(f"using({name}=...): expected a list with one entry per prompt row")
        parsed = {name: tuple(_pictures(name, row) for row in rows) for name, rows in values.items()}
        everything = {**({} if outer is None else outer.values), **parsed}
        if len({len(rows) for rows in everything.values()}) > 1:
            raise InvalidOption("using(...): every list needs one entry per prompt row, these differ in length")
        return cls(values=everything)

    def per_segment(self, name: str, layout: Layout) -> list[Tensor | None]:
        """The entry of every segment of `layout`, beams repeated; None where the user gave None."""
        rows, prompts = self.values[name], len(layout.valid) // layout.beams
        if len(rows) != prompts:
            raise UnsupportedCall(f"using({name}=...) has {len(rows)} rows, the call has {prompts} prompts")
        found: list[Tensor | None] = []
        for row in range(len(layout.valid)):
            count = sum(segment.row == row for segment in layout.segments)
            pictures = rows[row // layout.beams]
            if pictures != (None,) and len(pictures) != count:
                raise UnsupportedCall(
                    f"using({name}=...) names {len(pictures)} pictures in entry {row // layout.beams}, the prompt has "
                    f"{count}"
                )
            found += pictures if len(pictures) == count else (None,) * count
        return found

    def scores(self, name: str, layout: Layout, device: torch.device) -> list[Tensor]:
        """Scores per token of every segment."""
        found = self.per_segment(name, layout)
        return [
            self._spread(name, s, v).to(device, non_blocking=True) for s, v in zip(layout.segments, found, strict=True)
        ]

    @staticmethod
    def _spread(name: str, segment: Segment, value: Tensor | None) -> Tensor:
        if value is not None and value.shape == (segment.tokens,):
            return value.float()
        if value is not None and value.shape == (len(segment.parts),):
            return torch.cat([own.expand(part.tokens) for own, part in zip(value.float(), segment.parts, strict=True)])
        got = "nothing" if value is None else f"{len(value)} scores"
        raise UnsupportedCall(
            f"using({name}=...): got {got} for the {segment.kind} of prompt row {segment.row}: expected one score for "
            f"each of its {segment.tokens} tokens, or one for each of its parts ({len(segment.parts)})"
        )

    def indices(self, name: str, layout: Layout) -> list[tuple[int, ...]]:
        """Sorted token indices of every segment; empty where none were given."""
        if name not in self.values:
            return [()] * len(layout.segments)
        found = []
        for segment, value in zip(layout.segments, self.per_segment(name, layout), strict=True):
            chosen = () if value is None else tuple(sorted(set(value.tolist())))
            if chosen and not 0 <= chosen[0] <= chosen[-1] < segment.tokens:
                raise UnsupportedCall(f"using({name}=...): indices must lie in [0, {segment.tokens}), got {chosen[-1]}")
            found.append(chosen)
        return found


def _pictures(name: str, row: Any) -> tuple[Tensor | None, ...]:
    """One tensor per picture of a row: of a tensor or a list of numbers one, of a list of such as many as it has."""
    if isinstance(row, (list, tuple)) and not all(isinstance(item, Real) for item in row):
        return tuple(_numbers(name, item) for item in row)
    return () if isinstance(row, (list, tuple)) and not row else (_numbers(name, row),)


def _numbers(name: str, value: Any) -> Tensor | None:
    if value is None:
        return None
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidOption(f"using({name}=...): expected numbers for each picture, got {value!r}") from error
    if tensor.ndim != 1 or (name in _FORCED and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        kind = "a 1-D list of token indices" if name in _FORCED else "a 1-D list of scores"
        raise InvalidOption(f"using({name}=...): expected {kind} for each picture, got {value!r}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise InvalidOption(f"using({name}=...): scores must be finite; tokens are ruled out with forbid")
    return tensor


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Tokens of one unit that must or must not be kept, as indices into the unit."""

    protect: tuple[int, ...] = ()
    forbid: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Units can be stacked where these counts agree."""
        return (len(self.protect), len(self.forbid))


def forced_tokens(
    units: list[Unit], given: Given | None, layout: Layout, cuts: Callable[[Unit], tuple[int, ...]]
) -> list[Forced]:
    """What the user forced in and out, per unit; raises `UnsupportedCall` where the budget cannot honour it.

    `cuts` tells how many tokens of a unit stay at each cut, one after the other: protected ones stay at all of them,
    forbidden ones leave at the first.
    """
    if given is None:
        return [Forced()] * len(units)
    protect, forbid = given.indices("protect", layout), given.indices("forbid", layout)
    return [_check_forced(unit, _in_unit(unit, protect), _in_unit(unit, forbid), cuts(unit)) for unit in units]


def _in_unit(unit: Unit, per_segment: list[tuple[int, ...]]) -> tuple[int, ...]:
    found: list[int] = []
    offset = 0
    for piece in unit.pieces:
        own = np.isin(piece.at, per_segment[piece.segment])
        found += (own.nonzero()[0] + offset).tolist()
        offset += len(piece.at)
    return tuple(found)


def _check_forced(unit: Unit, protect: tuple[int, ...], forbid: tuple[int, ...], cuts: tuple[int, ...]) -> Forced:
    n, first, last = len(unit.at), cuts[0], cuts[-1]
    if set(protect) & set(forbid):
        raise UnsupportedCall("using(...): a token is both protected and forbidden")
    if len(protect) > last:
        cut = "are kept" if len(cuts) == 1 else "stay behind the last cut"
        raise UnsupportedCall(f"using(protect=...): {len(protect)} tokens protected, but only {last} of {n} {cut}")
    if n - len(forbid) < first:
        cut = "be kept" if len(cuts) == 1 else "stay at the first cut"
        raise UnsupportedCall(f"using(forbid=...): {len(forbid)} of {n} tokens forbidden, but {first} must {cut}")
    return Forced(protect=protect, forbid=forbid)
