"""Sentences of the page: what a method is, why something failed, which words a model does not know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtprune.catalog import describe
from vtprune.demo.choices import paper_of
from vtprune.video.records import plainly
from vtprune.video.relevance import knows_tiny_words_only

_LONGEST = 400


@dataclass(frozen=True, kw_only=True)
class About:
    """A method in a line, and its paper."""

    line: str
    paper: str


def about(method: str) -> About:
    """What a method is. Raises `InvalidOption` for an unknown one."""
    card = describe(method)
    return About(line=card.summary, paper=paper_of(card))


def failed(error: BaseException) -> str:
    """An error in a sentence."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory: try a smaller picture, fewer frames or a smaller model"
    text = plainly(error)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def unknown_words(processor: Any, question: str) -> list[str]:
    """Words of a question that a bundled tiny model has no token for; others know any text."""
    if not knows_tiny_words_only(processor):
        return []
    tokenizer = getattr(processor, "tokenizer", processor)
    unknown = tokenizer.unk_token_id
    return [word for word in dict.fromkeys(question.split()) if unknown in tokenizer.encode(word)]
