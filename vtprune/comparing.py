"""Methods side by side on one batch of prompts, pictures encoded once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtprune.adapters import family_of
from vtprune.api import pruning
from vtprune.catalog import build, list_methods
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport
from vtprune.runtime.encoder import encode_once
from vtprune.runtime.evidence import readings_of
from vtprune.seam import find_base


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
    """Answer one batch of prompts under every method and budget; pictures are encoded once.

    Args:
        model: an unwrapped model; it is unwrapped again when this returns or raises.
        inputs: what the processor returned.
        methods: names or pipelines; all but `identity` by default.
        keep: shares or numbers, as in `wrap`.
        on_row: called with every row as it comes (for a progress bar, say).
        max_new_tokens: length of the greedy answers.
        **options: options of `wrap` for every row: `per`, `positions`, `backend`.

    Returns:
        The unpruned row first (`identity`, keep 1.0), then one row per method and budget, each with its report.

    Raises:
        The errors of `wrap`.
    """
    names = [name for name in list_methods() if name != "identity"] if methods is None else _listed(methods)
    pipelines = [build(method) for method in names]
    options = {**options, "history": 1}
    arms = [(build("identity"), 1.0), *itertools.product(pipelines, _listed(keep))]
    for pipeline, budget in arms:
        with pruning(model, pipeline, keep=budget, **options):
            pass
    inner = find_base(model)
    readings = {name: reading for pipeline in pipelines for name, reading in readings_of(pipeline).items()}
    shared = encode_once(model, inner, family_of(inner.config), inputs, readings=readings)
    rows: list[Comparison] = []
    unpruned: Tensor | None = None
    for pipeline, budget in arms:
        with pruning(model, pipeline, keep=budget, **options) as pruner:
            given = shared() if pipeline.encoder is None else inputs
            written = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
            report = pruner.last
            assert report is not None
        answer = written[:, inputs["input_ids"].shape[1] :]
        unpruned = answer if unpruned is None else unpruned
        rows.append(
            Comparison(
                method=pipeline.name,
                keep=budget,
                tokens=report.tokens,
                kept=report.kept,
                answer=answer,
                agreement=_agreement(answer, unpruned),
                report=report,
            )
        )
        if on_row is not None:
            on_row(rows[-1])
    return rows


def _listed(given: Any) -> list[Any]:
    """A list of what was given: one thing, or several."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _agreement(answer: Tensor, reference: Tensor) -> float:
    length = min(answer.shape[1], reference.shape[1])
    same = (answer[:, :length] == reference[:, :length]).all(dim=1)
    return same.float().mean().item()
