"""Evidence that the user gives for one call with `using(...)`: scores, and tokens to force in or out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.runtime.units import Unit
from vtprune.types import Layout, Segment

_FORCED = ("protect", "forbid")
FROM_ENCODER = frozenset({"importance", "cls_attention", "received_attention"})


@dataclass(frozen=True, kw_only=True)
class Given:
    """Evidence from the user, one entry per prompt row: a tensor, or a list of one tensor per picture of the row.

    `protect` and `forbid` hold token indices (separators left out of the count); everything else holds scores, one
    per token or one per part, which its tokens share.
    """

    values: Mapping[str, Sequence[Any]]

    @classmethod
    def check(cls, values: Mapping[str, Sequence[Any]], reads: frozenset[str]) -> Given:
        """Refuse names the method does not read and rows that differ in number."""
        for name, rows in values.items():
            if name not in reads and name not in _FORCED:
                known = ", ".join(sorted((reads - FROM_ENCODER) | set(_FORCED)))
                raise InvalidOption(f"using({name}=...): this method does not read {name!r}; it takes {known}")
            if isinstance(rows, (str, Tensor)) or not isinstance(rows, Sequence):
                raise InvalidOption(f"using({name}=...): expected a list with one entry per prompt row")
        if len({len(rows) for rows in values.values()}) > 1:
            raise InvalidOption("using(...): every list needs one entry per prompt row, these differ in length")
        return cls(values=values)

    def per_segment(self, name: str, layout: Layout) -> list[Tensor | None]:
        """The entry of every segment of `layout`, beams repeated; None where the user gave None."""
        rows, B = self.values[name], len(layout.valid)
        if not rows or B % len(rows):
            raise UnsupportedCall(f"using({name}=...) has {len(rows)} rows, the call has {B}")
        repeats = B // len(rows)
        number = [0] * B
        found: list[Tensor | None] = []
        for segment in layout.segments:
            entry = rows[segment.row // repeats]
            pictures = list(entry) if isinstance(entry, (list, tuple)) else [entry]
            if number[segment.row] >= len(pictures):
                raise UnsupportedCall(
                    f"using({name}=...) names {len(pictures)} pictures in row {segment.row}, the prompt has more"
                )
            value = pictures[number[segment.row]]
            number[segment.row] += 1
            found.append(None if value is None else torch.as_tensor(value))
        return found

    def scores(self, name: str, layout: Layout, device: torch.device) -> list[Tensor]:
        """Scores per token of every segment."""
        found = self.per_segment(name, layout)
        return [self._spread(name, s, v).to(device) for s, v in zip(layout.segments, found, strict=True)]

    @staticmethod
    def _spread(name: str, segment: Segment, value: Tensor | None) -> Tensor:
        if value is not None and value.shape == (segment.tokens,):
            return value.float()
        if value is not None and value.shape == (len(segment.parts),):
            return value.float().repeat_interleave(torch.tensor([part.tokens for part in segment.parts]))
        got = None if value is None else tuple(value.shape)
        raise UnsupportedCall(
            f"using({name}=...): got {got} for a {segment.kind} of {segment.tokens} tokens in {len(segment.parts)} "
            "parts: expected one score per token or per part"
        )

    def indices(self, name: str, layout: Layout) -> list[tuple[int, ...]]:
        """Sorted token indices of every segment; empty where none were given."""
        if name not in self.values:
            return [()] * len(layout.segments)
        found = []
        for segment, value in zip(layout.segments, self.per_segment(name, layout), strict=True):
            chosen = () if value is None else tuple(sorted({int(i) for i in value.flatten()}))
            if chosen and not 0 <= chosen[0] <= chosen[-1] < segment.tokens:
                raise UnsupportedCall(f"using({name}=...): indices must lie in [0, {segment.tokens}), got {chosen[-1]}")
            found.append(chosen)
        return found


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Tokens of one unit that must or must not be kept, as indices into the unit."""

    protect: tuple[int, ...] = ()
    forbid: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Units can be stacked where these counts agree."""
        return (len(self.protect), len(self.forbid))


def forced_tokens(units: list[Unit], given: Given | None, layout: Layout) -> list[Forced]:
    """What the user forced in and out, per unit; raises `UnsupportedCall` where the budget cannot honour it."""
    if given is None:
        return [Forced()] * len(units)
    protect, forbid = given.indices("protect", layout), given.indices("forbid", layout)
    return [_check_forced(unit, _in_unit(unit, protect), _in_unit(unit, forbid)) for unit in units]


def _in_unit(unit: Unit, per_segment: list[tuple[int, ...]]) -> tuple[int, ...]:
    found, offset = [], 0
    for piece in unit.pieces:
        inside = (i for i in per_segment[piece.segment] if piece.start <= i < piece.stop)
        found += [i - piece.start + offset for i in inside]
        offset += piece.stop - piece.start
    return tuple(found)


def _check_forced(unit: Unit, protect: tuple[int, ...], forbid: tuple[int, ...]) -> Forced:
    n = len(unit.positions)
    if set(protect) & set(forbid):
        raise UnsupportedCall("using(...): a token is both protected and forbidden")
    if len(protect) > unit.k:
        raise UnsupportedCall(f"using(protect=...): {len(protect)} tokens protected, but only {unit.k} of {n} are kept")
    if n - len(forbid) < unit.k:
        raise UnsupportedCall(f"using(forbid=...): {len(forbid)} of {n} tokens forbidden, but {unit.k} must be kept")
    return Forced(protect=protect, forbid=forbid)
