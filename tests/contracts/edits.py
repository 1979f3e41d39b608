"""What the reference is told of prompts where a method changes attention; nothing of vtprune is imported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.contracts import heads, sinks


@dataclass(frozen=True)
class Told:
    """One prompt: what `sinks.edited` or `heads.masked` want to know of it."""

    marks: sinks.Marks | heads.Pictures
    edit: sinks.Edit | heads.Classes


def edited(model: nn.Module, rows: Sequence[Told | None], pads: Sequence[int]) -> AbstractContextManager[Any]:
    """A block where prompts, padded on the left, are answered with changed attention; nothing where nothing is told."""
    known = [row for row in rows if row is not None]
    if not known:
        return nullcontext()
    marks: Any = [row.marks.padded(pad) for row, pad in zip(known, pads, strict=True)]
    edit: Any = known[0].edit
    return sinks.edited(model, marks, edit) if isinstance(edit, sinks.Edit) else heads.masked(model, marks, edit)
