"""Methods side by side on one batch of prompts, pictures encoded once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters import family_of
from vtprune.api import pruning
from vtprune.catalog import build, list_methods
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedModel
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport
from vtprune.runtime.encoder import encode_once
from vtprune.runtime.evidence import readings_of
from vtprune.seam import find_base

_FOR_SOME = ("debias", "calibration")
"""Options that only some methods take."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of `compare`: `answer` (B, new tokens) and the share of prompts answered as without pruning."""

    method: str
    keep: float | int
    tokens: int
    kept: int
    answer: Tensor
    agreement: float
    report: PruneReport


def compare(
    model: nn.Module,
    inputs: Mapping[str, Any],
    methods: Sequence[str | Pipeline] | None = None,
    keep: Sequence[float | int] = (0.5, 0.25, 0.11),
    *,
    on_row: Callable[[Comparison], None] | None = None,
    max_new_tokens: int = 32,
    **options: Any,
) -> list[Comparison]:
    """Answer one batch of prompts under every method and budget; pictures are encoded once,
    and anew for methods that prune inside the encoder.

    Args:
        model: an unwrapped model; it is unwrapped again when this returns or raises.
        inputs: what the processor returned.
        methods: names or pipelines; by default all that drop tokens, need nothing but this model, go on from what its
            encoder gives, and take the options.
        keep: shares or numbers, as in `wrap`.
        on_row: called with every row as it comes (for a progress bar, say).
        max_new_tokens: length of the greedy answers.
        **options: options of `wrap` for every row: `per`, `positions`, `backend`, and for all but the unpruned one
            `debias` and `calibration`.

    Returns:
        The unpruned row first (`identity`, keep 1.0), then one row per method and budget, each with its report.

    Raises:
        The errors of `wrap`.
    """
    inner = find_base(model)
    options = {**options, "history": 1}
    if methods is None:
        asked = _able(model, _listed(keep), options)
    else:
        asked = list(itertools.product(_listed(methods), _listed(keep)))
        for method in _listed(methods):
            build(method)
    plain = {name: value for name, value in options.items() if name not in _FOR_SOME}
    arms = [("identity", 1.0, plain), *((method, budget, options) for method, budget in asked)]
    pipelines = []
    for method, budget, own in arms:
        with pruning(model, method, keep=budget, **own) as pruner:
            pipelines.append(pruner.pipeline)
    readings = {name: reading for pipeline in pipelines[1:] for name, reading in readings_of(pipeline).items()}
    shared = encode_once(model, inner, family_of(inner.config), inputs, readings=readings)
    rows: list[Comparison] = []
    unpruned: Tensor | None = None
    for (method, budget, own), pipeline in zip(arms, pipelines, strict=True):
        with pruning(model, method, keep=budget, **own) as pruner:
            given = {**(inputs if pipeline.encoder else shared()), "max_new_tokens": max_new_tokens, "do_sample": False}
            written = model.generate(**given)  # type: ignore[operator]
            report = pruner.last
            assert report is not None
        answer = written[:, inputs["input_ids"].shape[1] :]
        unpruned = answer if unpruned is None else unpruned
        rows.append(_row(pipeline.name, budget, answer, unpruned, report))
        if on_row is not None:
            on_row(rows[-1])
    return rows


def _row(method: str, keep: float | int, answer: Tensor, unpruned: Tensor, report: PruneReport) -> Comparison:
    return Comparison(
        method=method,
        keep=keep,
        tokens=report.tokens,
        kept=report.kept,
        answer=answer,
        agreement=_agreement(answer, unpruned),
        report=report,
    )


def _able(
    model: nn.Module, budgets: Sequence[float | int], options: Mapping[str, Any]
) -> list[tuple[str, float | int]]:
    """Methods that run on the model without evidence from the user, behind the encoder, at the budgets they reach.

    With options that only some methods take, those that refuse them are left out, but not all of them.
    """
    found: list[tuple[str, float | int]] = []
    known = {name: build(name) for name in list_methods()}
    alone = [name for name, one in known.items() if one.drops and one.asked <= readings_of(one).keys()]
    for_some = any(options.get(name) not in (None, False) for name in _FOR_SOME)
    refused: InvalidOption | None = None
    for name, budget in itertools.product(alone, budgets):
        try:
            with pruning(model, name, keep=budget, **options):
                able = known[name].encoder is None
        except (MissingEvidence, UnsupportedModel):
            continue
        except InvalidOption as error:
            if not known[name].inside and not for_some:
                raise
            refused = error
            continue
        if able:
            found.append((name, budget))
    if refused is not None and not found:
        raise refused
    return found


def _listed(given: Any) -> list[Any]:
    """A list of what was given: one thing, or several."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _agreement(answer: Tensor, reference: Tensor) -> float:
    length = min(answer.shape[1], reference.shape[1])
    same = (answer[:, :length] == reference[:, :length]).all(dim=1)
    return same.float().mean().item()


def overlap(first: PruneReport, second: PruneReport) -> float | None:
    """Intersection over union of two choices among the same tokens, None where neither holds any, or tokens differ.

    A token counts by the share of decoder layers that it goes through, or is stored in: wholly, or not at all, where
    the cut is in front of them.
    """
    if [segment.n for segment in first.segments] != [segment.n for segment in second.segments] or not first.segments:
        return None
    own, others = _presence(first), _presence(second)
    either = float(torch.maximum(own, others).sum())
    return float(torch.minimum(own, others).sum()) / either if either else None


def _presence(report: PruneReport) -> Tensor:
    """The share (n,) of decoder layers that has each token."""
    found = []
    for segment in report.segments:
        kept = torch.zeros(segment.n, dtype=torch.float64)
        kept[segment.keep] = 1.0
        layers = segment.cached if segment.depths is None else segment.depths
        found.append(kept if layers is None else layers.cpu().double() / report.layers)
    return torch.cat(found)
