"""A model in training: what stages ask of it, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.positions import compact
from vtprune.tiny.scenes import SIZE
from vtprune.tiny.training.aids import IdealTokens, Probes, ThingReadings
from vtprune.tiny.training.batches import Source
from vtprune.tiny.training.packing import Blocks, block_mask
from vtprune.tiny.words import encode

PLACES_AT = 2
THINGS_AT = 4


@dataclass(frozen=True, eq=False)
class Sight:
    """Of B pictures or clips: `cells`, B x N x width, before the projector.

    Where there is a CLS token, `whole`, B x width, is that of the same layer, and `last` that of the last one.
    """

    cells: Tensor
    whole: Tensor | None = None
    last: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """Visual tokens in front of the questions: `tokens`, B x K x width, of the cells `index`, B x K, out of `of`.

    `compact`: they are numbered without gaps; otherwise they keep the positions they had among all.
    """

    tokens: Tensor
    index: Tensor
    of: int
    compact: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """`blocks`: hidden states of the questions, B x T x width. `places`: logits of rows and columns, B x K x side.

    `things`: hidden states of the questions halfway, B x T x width, None where nothing is to be read from them.
    """

    blocks: Tensor
    places: tuple[Tensor, ...]
    things: Tensor | None


class Student(nn.Module, ABC):
    """A model and its training aids. `patch` pixels a side are one visual token."""

    patch: ClassVar[int]
    source: ClassVar[type[Source]] = Source
    before: ClassVar[str] = "<s> user :"
    """What comes in front of the visual tokens."""
    behind: ClassVar[str] = ""
    """What comes between them and the question."""
    compacts: ClassVar[bool] = True
    """Whether position ids may be numbered without gaps in training: not where they alone tell places."""

    vlm: Any
    probes: Probes
    ideal: IdealTokens

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ModuleList()
        """Readings of row and column after `PLACES_AT` decoder layers, where tokens tell no places by themselves."""
        self.things: ThingReadings | None = None
        """After `THINGS_AT` layers, of the words that name a thing: what it is and where."""

    @property
    def side(self) -> int:
        """Visual tokens along a side of a picture."""
        return SIZE // self.patch

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """What sees, without the projector."""

    @property
    @abstractmethod
    def projector(self) -> Any:
        """What turns sight into visual tokens."""

    @property
    def language(self) -> Any:
        """The language model without its head."""
        return self.vlm.model.language_model

    @abstractmethod
    def look(self, pixels: Tensor) -> Sight:
        """Run the tower on bytes, (B, views, 3, size, size)."""

    @abstractmethod
    def project(self, cells: Tensor) -> Tensor:
        """Visual tokens of sight, (B, N, width)."""

    @abstractmethod
    def scale_projector(self, given: float, wanted: float) -> None:
        """Make it one that expects and gives values of these standard deviations."""

    @abstractmethod
    def cell_positions(self, count: int) -> Tensor:
        """Positions of so many cells, (rows of ids, count), the least being 0."""

    def parts(self, names: tuple[str, ...]) -> list[nn.Module]:
        """Modules by attribute name; those that this student does not have are left out."""
        found = (getattr(self, name) for name in names)
        return [module for module in found if module is not None]

    def read(self, shown: Shown, blocks: Blocks) -> Reading:
        """What the language model makes of visual tokens and questions."""
        embed, device = self.language.embed_tokens, shown.index.device
        words = [torch.tensor(ids, dtype=torch.long, device=device) for ids in self._around]
        before, behind = (embed(ids.expand(len(shown.index), -1)) for ids in words)
        embeds = torch.cat([before, shown.tokens, behind, embed(blocks.ids)], dim=1)
        first, start = before.shape[1], embeds.shape[1] - blocks.ids.shape[1]
        output = self.language(
            inputs_embeds=embeds,
            attention_mask=block_mask(blocks.block, start),
            position_ids=self.positions(shown, blocks.offset),
            use_cache=False,
            output_hidden_states=len(self.places) > 0 or self.things is not None,
        )
        seen = slice(first, first + shown.index.shape[1])
        places = tuple(place(output.hidden_states[PLACES_AT][:, seen]) for place in self.places)
        things = None if self.things is None else output.hidden_states[THINGS_AT][:, start:]
        return Reading(blocks=output.last_hidden_state[:, start:], places=places, things=things)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        return encode(self.before), encode(self.behind)

    def positions(self, shown: Shown, offset: Tensor) -> Tensor:
        """Position ids of a packed sequence, (B, L) or (3, B, L): each block begins where the text begins."""
        start, behind = (len(ids) for ids in self._around)
        cells = self.cell_positions(shown.of).to(offset.device) + start
        end = int(cells.max()) + 1
        around = [torch.arange(start), torch.arange(end, end + behind)]
        before, after = (ids.to(offset.device).expand(len(cells), -1) for ids in around)
        front = torch.cat([before, cells, after], dim=1)[:, None].expand(-1, len(offset), -1)
        ids = torch.cat([front, (offset + end + behind).expand(len(cells), -1, -1)], dim=2)
        stays = torch.ones(ids.shape[1:], dtype=torch.bool, device=ids.device)
        stays[:, start : start + shown.of] = False
        stays.scatter_(1, shown.index + start, True)
        if shown.compact:
            ids, _ = compact(ids, torch.ones_like(stays), stays)
        kept = ids[:, stays].view(len(ids), len(offset), -1)
        return kept if len(kept) > 1 else kept[0]

    def words(self, hidden: Tensor) -> Tensor:
        """Logits, in fp32."""
        return self.vlm.lm_head(hidden).float()
