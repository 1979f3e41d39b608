"""The visual tokens of one prefill on their way through the decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from vtprune.inside.stacks import Entry, LayerStack, by_count, visual_of
from vtprune.kernels import reference as kernels
from vtprune.pipeline import LayerStage
from vtprune.types import Merged, Selection


@dataclass
class Walk:
    """Where everything is: `index` (B, K) are places in the sequence at entry, `slots` those of every cut for the way
    back, `places` (B, K') what of the sequence in front of each goes on, None where all does. `stored` (B, K) tells for
    each what behind it is real, `lengths` how many tokens that are in each row. `trims` says that caches of layers
    behind the first are cut to what is left behind the last. `picks` are the numbers, among all of the pipeline, of the
    first pick at each drop point.

    `sums` (B, K) are what layers add up of every token, by name; `entered` (B, R, D) is what the layer in front of a
    drop point got of the rows.
    """

    stages: tuple[LayerStage, ...]
    layers: tuple[int, ...]
    depth: int
    entry: Entry
    stacks: list[LayerStack]
    picks: tuple[int, ...] = ()
    trims: bool = False
    index: Tensor = field(init=False)
    valid: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    slots: list[Tensor] = field(default_factory=list)
    places: list[Tensor | None] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)
    lengths: list[tuple[int, ...]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    entered: Tensor | None = None

    def __post_init__(self) -> None:
        B, K = self.entry.valid.shape
        self.index = torch.arange(K, device=self.entry.valid.device).expand(B, K)
        self.valid = self.entry.valid
        self.rows = self.entry.rows

    @property
    def cuts(self) -> int:
        """How many drop points are behind."""
        return len(self.stored)

    @property
    def depths(self) -> dict[int, Tensor]:
        """Of every picture, by its number, how many layers each of its tokens at first has gone through, (N,)."""
        return self._of_pictures(lambda stack: stack.depths)

    @property
    def taken(self) -> dict[int, Tensor]:
        """Of every picture, by its number, which pick took each of its tokens at the last cut it passed, (N,)."""
        return self._of_pictures(lambda stack: stack.taken)

    def _of_pictures(self, rows: Callable[[LayerStack], Tensor]) -> dict[int, Tensor]:
        return {
            number: row
            for stack in self.stacks
            for number, row in zip(stack.numbers, rows(stack).unbind(), strict=True)
        }

    @property
    def into(self) -> list[tuple[tuple[int, ...], Tensor]]:
        """Numbers of equal pictures, with which of their tokens holds each one, (S, N); empty where nothing merges."""
        return [(stack.numbers, stack.into) for stack in self.stacks if stack.into is not None]

    @property
    def visual(self) -> Tensor:
        """(B, K), True at the tokens of pictures that are left."""
        return visual_of(self.valid, (stack.at for stack in self.stacks))

    @property
    def cached(self) -> dict[int, Tensor] | None:
        """Of every picture in how many layers each of its tokens at first is stored, (N,); None where as `depths`."""
        if not self.trims:
            return None
        first = self.layers[0]
        return {
            number: torch.where(depth < self.depth, depth.clamp(max=first), depth)
            for number, depth in self.depths.items()
        }

    @property
    def average_stored(self) -> float:
        """Length of what layers store, averaged over them; of a prefill that fails half-way, as far as it came."""
        widths = (self.entry.valid.shape[1], *self.widths)
        if self.trims:
            widths = (widths[0], *(min(widths),) * len(self.widths))
        bounds = (0, *self.layers[: len(self.widths)], self.depth)
        return (
            sum(width * (stop - start) for width, (start, stop) in zip(widths, pairwise(bounds), strict=True))
            / self.depth
        )

    @property
    def lengths_of_layers(self) -> list[tuple[int, ...]]:
        """Real tokens per row, for every layer."""
        bounds = (0, *self.layers[: len(self.lengths)], self.depth)
        steps = zip((self.entry.lengths, *self.lengths), pairwise(bounds), strict=True)
        return [lengths for lengths, (start, stop) in steps for _ in range(start, stop)]

    @property
    def padded(self) -> bool:
        """Whether any row of the sequence as it is now is shorter than the others."""
        lengths = self.lengths[-1] if self.lengths else self.entry.lengths
        return any(length != self.valid.shape[1] for length in lengths)

    def due(self, layer: int) -> bool:
        """Whether a cut comes in front of `layer`."""
        return self.cuts < len(self.layers) and self.layers[self.cuts] == layer

    @property
    def asks(self) -> bool:
        """Whether evidence is read at the next drop point: not where all leave or have left, or nobody asks."""
        stage = self.stages[self.cuts]
        asked = stage.keep is not None or stage.counter is not None
        return asked and any(stack.stays(self.cuts) for stack in self.stacks)

    def add(self, name: str, values: Tensor) -> None:
        """Add to what layers say of every token, (B, K)."""
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def cut(self, hidden: Tensor, glances: Mapping[str, Tensor]) -> Tensor:
        """Hidden states (B, K', D) that go on behind the next drop point; `glances` are (B, K) each."""
        number, glances = self.cuts, {**self.sums, **glances}
        if self.stages[number].counter is not None:
            self.stacks = [part for stack in self.stacks for part in self._counted(stack, number, hidden, glances)]
        before = self.lengths[-1] if self.lengths else self.entry.lengths
        gone = [0] * len(before)
        for stack in self.stacks:
            for row in stack.prompt_rows:
                gone[row] += stack.at.shape[1] - stack.stays(number)
        lengths = tuple(length - less for length, less in zip(before, gone, strict=True))
        self.lengths.append(lengths)
        self.widths.append(max(lengths))
        if not any(gone):
            self.widths[-1] = self.valid.shape[1]
            self.stored.append(self.valid)
            self.places.append(None)
            return hidden
        kept = self.valid.clone()
        chosen = [self._choose(stack, number, hidden, glances) for stack in self.stacks]
        flat = hidden.reshape(-1, hidden.shape[2])
        for stack, (selection, merged) in zip(self.stacks, chosen, strict=True):
            keep = _kept(stack, selection)
            kept.view(-1)[stack.at] = False
            kept.view(-1)[stack.at.gather(1, keep)] = True
            if merged is not None:
                flat = flat.index_copy(0, stack.at.gather(1, keep).flatten(), merged.rows.flatten(0, 1))
        hidden = flat.view(hidden.shape)
        places, self.valid, slots = kernels.kept_indices(kept, max(lengths), left_padded=self.entry.left_padded)
        pairs = zip(self.stacks, chosen, strict=True)
        self.stacks = [self._moved(stack, *choice, slots, number) for stack, choice in pairs]
        self.index, self.rows = self.index.gather(1, places), slots.gather(1, self.rows)
        self.sums = {name: values.gather(1, places) for name, values in self.sums.items()}
        self.slots.append(slots)
        self.places.append(places)
        self.stored.append(self.valid)
        return kernels.rows_at(hidden, places)

    def left_of(self, number: int) -> Tensor | None:
        """Places (B, K') in the sequence behind a drop point of what is left behind the last; None where all is."""
        found = None
        for places in reversed(self.places[number + 1 :]):
            if places is not None:
                found = places if found is None else places.gather(1, found)
        return found

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, K', D) at the length at entry; each dropped token repeats the kept one before."""
        for slots in reversed(self.slots):
            hidden = kernels.rows_at(hidden, slots)
        return hidden

    def _choose(
        self, stack: LayerStack, number: int, hidden: Tensor, glances: Mapping[str, Tensor]
    ) -> tuple[Selection | None, Merged | None]:
        """Which k tokens of a stack go on, None where all do, and what becomes of them."""
        k = stack.stays(number)
        if k == stack.at.shape[1]:
            return None, None
        tokens = stack.tokens(hidden, glances)
        choice = self.stages[number].choice
        with kernels.exact(hidden.device):
            with torch.no_grad():
                selection = choice.run(tokens, k)
            return selection, choice.merge(tokens, selection) if k else None

    @torch.no_grad()
    def _counted(
        self, stack: LayerStack, number: int, hidden: Tensor, glances: Mapping[str, Tensor]
    ) -> list[LayerStack]:
        """The pictures of a stack by how many of their tokens an adaptive stage lets stay: it waits for the device.

        Not where they have left, or where too few counters were asked to let any go.
        """
        stage, most = self.stages[number], stack.stays(number)
        assert stage.counter is not None
        if not most:
            return [stack]
        with kernels.exact(hidden.device):
            wanted = stage.counter(stack.tokens(hidden, glances), most).clamp(stack.least, most)
        stack = replace(stack, wishes=(*stack.wishes, wanted)[-stage.patience :])
        if len(stack.wishes) < stage.patience:
            return [stack]
        largest = torch.stack(list(stack.wishes)).amax(dim=0)
        return [stack.part(rows, number, count) for count, rows in by_count(largest).items()]

    def _moved(
        self, stack: LayerStack, selection: Selection | None, merged: Merged | None, slots: Tensor, number: int
    ) -> LayerStack:
        """The stack behind a cut: its places in the shorter sequence, how far tokens went, who took and holds them."""
        keep, taken = _kept(stack, selection), stack.taken
        if selection is not None:
            own = torch.where(selection.taken < 0, selection.taken, selection.taken + self.picks[number])
            taken = taken.scatter(1, stack.origin.gather(1, keep), own)
        at, origin = stack.at.gather(1, keep), stack.origin.gather(1, keep)
        depths = stack.depths.scatter(1, stack.origin, self.layers[number]).scatter(1, origin, self.depth)
        at = kernels.moved(at, slots, self.valid.shape[1])
        return replace(stack, at=at, origin=origin, depths=depths, taken=taken, into=stack.followed(keep, merged))


def _kept(stack: LayerStack, selection: Selection | None) -> Tensor:
    """Ascending indices (S, k) of the tokens of a stack that go on, all of them where nothing was selected."""
    if selection is not None:
        return selection.keep
    return torch.arange(stack.at.shape[1], device=stack.at.device).expand(stack.at.shape)
