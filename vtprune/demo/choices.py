"""The methods to choose from, and why a model cannot serve some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtprune.api import pruning
from vtprune.catalog import MethodCard, build, describe, list_methods
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedModel
from vtprune.pipeline import Pipeline
from vtprune.runtime.evidence import readings_of
from vtprune.types import Modality

_BUDGETS = (0.25, 0.5, 0.75, 0.9, 0.1)
"""Shares that are tried: methods that cut between layers do not reach all of them."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A method: what it does in a `line`, its `paper`, and the `reason` why it cannot be served, empty if it can."""

    name: str
    line: str
    paper: str
    reason: str = ""


def choices_of(model: Any, kind: Modality, *, relevance: bool) -> tuple[Choice, ...]:
    """Every method for an unwrapped model that is shown pictures or clips; nobody else may use the model meanwhile.

    `relevance` says whether that of patches to a question can be told.
    """
    return tuple(
        Choice(name=name, line=card.summary, paper=paper_of(card), reason=_reason(model, name, kind, relevance))
        for name, card in ((name, describe(name)) for name in list_methods())
    )


def paper_of(card: MethodCard) -> str:
    """Title and source in a line, empty where there is no paper."""
    return "" if card.source == "none" else f"{card.title} ({card.source})"


def evidence_of(pipeline: Pipeline) -> frozenset[str]:
    """Names of the evidence that the model does not give by itself."""
    return pipeline.asked - readings_of(pipeline).keys()


def _reason(model: Any, name: str, kind: Modality, relevance: bool) -> str:
    pipeline = build(name)
    if name == "identity":
        return "keeps everything: that is the unpruned answer"
    wanted = evidence_of(pipeline)
    if "relevance" in wanted and not (relevance and kind == "image"):
        return (
            "reads how relevant patches of a picture are to the question, which takes a text tower aligned with the "
            "vision tower; of the bundled models tiny:llava has one"
        )
    if "frames" in wanted and kind != "video":
        return "shares the budget among the frames of a clip: show it one"
    if wanted - {"relevance", "frames"}:
        return f"reads {', '.join(sorted(wanted))}, which nobody gives here"
    refused = ""
    for keep in _BUDGETS if pipeline.drops else (1.0,):
        try:
            with pruning(model, pipeline, keep=keep):
                return ""
        except (MissingEvidence, UnsupportedModel) as error:
            return str(error)
        except InvalidOption as error:
            refused = str(error)
    return refused
