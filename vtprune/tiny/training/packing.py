"""Several questions about one picture in one sequence: blocks that see the picture and themselves only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.tiny.scenes import COLORS, SHAPES, Question
from vtprune.tiny.words import END, PAD, encode

IGNORE = -100
_SUFFIX = encode("assistant :")


@dataclass(frozen=True, eq=False)
class Blocks:
    """B x T: `ids`; `block`, the number of the question from 1, 0 where padded; `offset` within the block; `answer` and
    `early`: the next token to be predicted at the end, and the answer asked for already in the two words before;
    `named`: the index of the one thing that a word names, -1 elsewhere."""

    ids: Tensor
    block: Tensor
    offset: Tensor
    answer: Tensor
    early: Tensor
    named: Tensor

    def masked(self, keep: Tensor) -> Blocks:
        """The same, with no target in the questions that `keep` (B, questions) leaves out."""
        kept = torch.cat([torch.zeros_like(keep[:, :1]), keep], dim=1).to(self.block.device).gather(1, self.block)
        answer, early = (torch.where(kept, field, IGNORE) for field in (self.answer, self.early))
        named = torch.where(kept, self.named, -1)
        return Blocks(self.ids, self.block, self.offset, answer, early, named)


def pack_questions(rows: list[list[Question]], device: torch.device) -> Blocks:
    """One row of blocks per picture, padded on the right to a multiple of eight."""
    packed = [_pack_row(row) for row in rows]
    length = -(-max(len(row[0]) for row in packed) // 8) * 8
    fills = (PAD, 0, 0, IGNORE, IGNORE, -1)
    fields = []
    for fill, column in zip(fills, zip(*packed, strict=True), strict=True):
        fields.append(torch.tensor([values + [fill] * (length - len(values)) for values in column], device=device))
    return Blocks(*fields)


def _pack_row(questions: list[Question]) -> tuple[list[int], ...]:
    ids: list[int] = []
    block: list[int] = []
    offset: list[int] = []
    answer: list[int] = []
    early: list[int] = []
    named: list[int] = []
    for number, question in enumerate(questions, start=1):
        head = encode(question.text) + _SUFFIX
        word = encode(question.answer)[0]
        ids += [*head, word, END]
        block += [number] * (len(head) + 2)
        offset += range(len(head) + 2)
        answer += [IGNORE] * (len(head) - 1) + [word, END, IGNORE]
        early += [IGNORE] * (len(head) - 3) + [word, word] + [IGNORE] * 3
        named += _named(question, len(head) + 2)
    return ids, block, offset, answer, early, named


def _named(question: Question, length: int) -> list[int]:
    """Which thing each token of a block names; words for things that may be several name none."""
    things = [-1] * length
    if question.kind in ("color", "shape", "where", "left"):
        at = [i for i, word in enumerate(question.text.split()) if word in SHAPES or word in COLORS]
        for i, thing in zip(at, question.about, strict=True):
            things[i] = thing
    return things


def block_mask(block: Tensor, before: int) -> Tensor:
    """Causal mask, (B, 1, L, L): a block sees the `before` tokens in front of all blocks and itself."""
    own = torch.where(block == 0, -1, block)
    groups = torch.cat([own.new_zeros(len(own), before), own], dim=1)
    causal = torch.ones(groups.shape[1], groups.shape[1], dtype=torch.bool, device=block.device).tril()
    seen = (groups[:, None, :] == 0) | (groups[:, None, :] == groups[:, :, None])
    return (causal & seen)[:, None]
