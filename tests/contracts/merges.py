"""Which tokens went into which one between decoder layers, written down while a wrapped model runs.

A report says who holds a token in the end; the reference has to know what happened at every single cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from torch import Tensor

from tests.contracts.dense import Merge
from vtprune.inside.walk import Walk
from vtprune.report import PruneReport
from vtprune.runtime.reporting import Reports

_TOLD: WeakKeyDictionary[PruneReport, dict[int, list[Merge]]] = WeakKeyDictionary()


def merges_of(report: PruneReport, row: int) -> tuple[Merge, ...]:
    """Those of a row of a prefill under `noted`, counted through the tokens that entered the language model."""
    return tuple(_TOLD.get(report, {}).get(row, ()))


@contextmanager
def noted() -> Iterator[None]:
    """Prefills in the block are written down with their report."""
    choose, write = Walk._choose, Reports._report

    def choosing(walk: Any, stack: Any, number: int, hidden: Tensor, glances: Any) -> Any:
        selection, merged = choose(walk, stack, number, hidden, glances)
        if merged is not None:
            _note(walk, stack, walk.layers[number], selection.keep, merged.into)
        return selection, merged

    def writing(reports: Any, *args: Any) -> PruneReport:
        report = write(reports, *args)
        _TOLD[report] = getattr(args[-1], "told", {})
        return report

    with patch.object(Walk, "_choose", choosing), patch.object(Reports, "_report", writing):
        yield


def _note(walk: Any, stack: Any, layer: int, keep: Tensor, into: Tensor) -> None:
    told: dict[int, list[Merge]] = walk.__dict__.setdefault("told", {})
    count = walk.entry.valid.long().cumsum(dim=1) - 1
    for at, kept, holders in zip(stack.at.tolist(), keep.tolist(), into.tolist(), strict=True):
        row = at[0] // walk.valid.shape[1]
        places = [int(count[row, walk.index[row, one % walk.valid.shape[1]]]) for one in at]
        for number, one in enumerate(kept):
            members = tuple(place for place, holder in zip(places, holders, strict=True) if holder == number)
            if len(members) > 1:
                told.setdefault(row, []).append(Merge(layer=layer, at=places[one], members=members))
