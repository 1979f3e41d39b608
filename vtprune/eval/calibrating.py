"""Measuring one model for a `Calibration`: attention to pictures layer by layer, and where they can leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vtprune.adapters.base import language_model, placeholder_id
from vtprune.adapters.decoder import decoder_of
from vtprune.api import pruning
from vtprune.calibration import Calibration, Trend, quick_fingerprint
from vtprune.errors import InvalidOption
from vtprune.eval.questions import judged
from vtprune.eval.schedules import check_search, search_settings
from vtprune.glances import RowAttention, Rows
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.seam import find_base
from vtprune.stages.scorers import Constant, Glanced
from vtprune.stages.selectors import TopK

_BINS = 128
_NEARLY_ALL = 1 - 1e-9
_APART = 5 / 32
_STAGES = 3
AGREEMENT = 0.99
Curves = NDArray[np.float64]


@dataclass(eq=False)
class _Record:
    """A rule that notes what it sees of every layer."""

    name: ClassVar[str] = "recorded"
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, seen: RowAttention) -> Tensor:
        weights = seen.real / seen.real.sum(dim=1, keepdim=True)
        mean = (weights[:, None] @ seen.weights.mean(dim=1))[:, 0]
        self.seen.append(mean.cpu())
        return mean


def calibrate(
    model: nn.Module,
    batches: Sequence[Callable[[], dict[str, Any]]],
    *,
    name: str,
    data: str,
    versions: str,
    max_new_tokens: int = 3,
    decode: Callable[[Tensor], list[str]],
    keeps: Sequence[float] = (0.25,),
    trials: int = 0,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Calibration:
    """Run a model on every batch: for each kind of rows, each layer where all tokens may leave, and each trial.

    Args:
        model: a model that is not wrapped.
        batches: each makes the inputs of some prompts with one picture each, padded on the left.
        name: what to call the model.
        data: what to call the batches.
        versions: of the libraries.
        max_new_tokens: of the answers that are compared.
        decode: texts of the new tokens.
        keeps: averages to search settings of `vflowopt` for.
        trials: settings to try at each of them, 0 for no search.
        seed: of the search.
        on_step: called after each of `steps_of(depth, len(batches), searches=..., trials=...)`.

    Raises:
        InvalidOption: without batches. Where settings are searched, also the errors of `wrap`, before any work.
    """
    if not batches:
        raise InvalidOption("nothing to calibrate on: expected at least one picture")
    if trials:
        check_search(model, keeps)
    inner = find_base(model)
    depth = int(inner.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    first = decoder_of(inner, language_model(inner), glances=True).first
    curves = {rows: _curves(model, inner, batches, rows, range(first, depth), on_step) for rows in ("last", "text")}
    trends = [
        Trend(rows=rows, layer=layer, exponential=exponential_of(curve), cubic=cubic_of(curve))
        for rows, own in curves.items()
        for layer, curve in enumerate(own, start=first - 1)
    ]
    return Calibration(
        model=name,
        fingerprint=quick_fingerprint(inner),
        data=data,
        pictures=sum(len(make()["input_ids"]) for make in batches),
        versions=versions,
        depth=depth,
        trends=tuple(trends),
        inflections=inflections_of(curves["text"], depth, first=first),
        horizon=_horizon(model, batches, range(first, depth), max_new_tokens, decode, on_step),
        settings=search_settings(model, batches, keeps, trials=trials, seed=seed, on_step=on_step) if trials else (),
    )


def steps_of(depth: int, batches: int, *, searches: int = 0, trials: int = 0) -> int:
    """How often `calibrate` calls `on_step` at most; `searches` are the averages that `trials` are made for."""
    return (2 + depth + (1 + searches * trials if trials else 0)) * batches


def _curves(
    model: nn.Module,
    inner: nn.Module,
    batches: Sequence[Callable[[], dict[str, Any]]],
    rows: Rows,
    points: range,
    on_step: Callable[[], None],
) -> Curves:
    """Attention to a picture over the place in it, in the layer before each point, (points, bins).

    It is the mean of all pictures, each scaled to sum 1.
    """
    total = np.zeros((len(points), _BINS))
    for make in batches:
        record = _Record()
        pick = Pick(name="recorded", scorer=Glanced(rule=record, rows=rows), selector=TopK())
        stages = tuple(LayerStage(at=layer, keep=_NEARLY_ALL, picks=(pick,)) for layer in points)
        inputs = make()
        with torch.no_grad(), pruning(model, Pipeline(name="recording", picks=(), inside=stages), keep=_NEARLY_ALL):
            model(**inputs)
        token = placeholder_id(inner.config, "image")
        for row, ids in enumerate(inputs["input_ids"].cpu()):
            places = (ids == token).nonzero()[:, 0]
            for layer, seen in enumerate(record.seen):
                own = seen[row, places].double().numpy()
                total[layer] += resampled(own / max(own.sum(), 1e-12))
        on_step()
    return total / total.sum(axis=1, keepdims=True)


def resampled(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """A curve of any length at as many places as all others, scaled to sum 1."""
    places = np.linspace(0, 1, len(curve))
    found: NDArray[np.float64] = np.interp(np.linspace(0, 1, _BINS), places, curve)
    return found / max(found.sum(), 1e-12)


def exponential_of(curve: NDArray[np.float64]) -> tuple[float]:
    """The constant k >= 0 of exp(k u), by least squares of the logarithm."""
    slope = np.polyfit(np.linspace(0, 1, len(curve)), np.log(np.maximum(curve, 1e-12)), 1)[0]
    return (float(max(0.0, slope)),)


def cubic_of(curve: NDArray[np.float64]) -> tuple[float, float, float]:
    """The constants of 1 + a u + b u^2 + c u^3, by least squares; of a trend that is nowhere near 0, else none."""
    c, b, a, first = np.polyfit(np.linspace(0, 1, len(curve)), curve, 3)
    fitted = np.polyval((c, b, a, first), np.linspace(0, 1, len(curve)))
    if first <= 0 or fitted.min() < 0.05 * first:
        return (0.0, 0.0, 0.0)
    return (float(a / first), float(b / first), float(c / first))


def inflections_of(curves: Curves, depth: int, *, first: int = 1) -> tuple[int, ...]:
    """The layers, at most three and five of 32 apart, in front of which attention shifts most from one to the next.

    `curves` are those of the layers from the one before `first` on. The shift is the Jensen-Shannon divergence of
    neighbouring curves (AdaptInfer, arXiv 2508.06084).
    """
    shifts = [
        (_divergence(early, late), layer + first + 1) for layer, (early, late) in enumerate(itertools.pairwise(curves))
    ]
    chosen: list[int] = []
    for _, layer in sorted(shifts, reverse=True):
        if len(chosen) < _STAGES and layer < depth and all(abs(layer - other) >= _APART * depth for other in chosen):
            chosen.append(layer)
    return tuple(sorted(chosen))


def _divergence(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    middle = (first + second) / 2
    parts = [(own * np.log(np.maximum(own, 1e-12) / np.maximum(middle, 1e-12))).sum() for own in (first, second)]
    return float(sum(parts) / 2)


def _horizon(
    model: nn.Module,
    batches: Sequence[Callable[[], dict[str, Any]]],
    points: range,
    max_new_tokens: int,
    decode: Callable[[Tensor], list[str]],
    on_step: Callable[[], None],
) -> int | None:
    """The first layer from which on all visual tokens can leave and answers stay what they are, nearly all of them."""

    def answers(make: Callable[[], dict[str, Any]]) -> list[str]:
        inputs = make()
        written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
        on_step()
        return [judged(text) for text in decode(written[:, inputs["input_ids"].shape[1] :])]

    whole = [answers(make) for make in batches]
    pick = Pick(name="none", scorer=Constant(), selector=TopK())
    found = None
    for layer in reversed(points):
        stage = LayerStage(at=layer, keep=0.0, picks=(pick,))
        with pruning(model, Pipeline(name="leaving", picks=(), inside=(stage,)), keep=layer / points.stop):
            pruned = [answers(make) for make in batches]
        pairs = zip(itertools.chain(*whole), itertools.chain(*pruned), strict=True)
        same = [one == other for one, other in pairs]
        if np.mean(same) < AGREEMENT:
            break
        found = layer
    return found
