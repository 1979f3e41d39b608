"""Wrap a model, and unwrap it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vtprune.adapters import family_of
from vtprune.adapters.base import Family, Tower, language_model, rope_axes
from vtprune.adapters.plain import plain_tower
from vtprune.calibration import FEW, LAYERS, Calibration
from vtprune.catalog import build, features_only, list_methods
from vtprune.debiasing import debiased
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedModel
from vtprune.kernels.backends import choose_backend
from vtprune.pipeline import Pipeline
from vtprune.protocols import Debiaser, EncoderStage
from vtprune.report import PruneReport
from vtprune.runtime.deep import schedule_of
from vtprune.runtime.encoder_pruner import EncoderPruner
from vtprune.runtime.evidence import readings_of
from vtprune.runtime.pruner import Pruner
from vtprune.schedule import AnySchedule
from vtprune.seam import HANDLE, find_base, is_compiled, shells
from vtprune.types import Budget, Per

ModelT = TypeVar("ModelT", bound=nn.Module)


def wrap(
    model: ModelT,
    method: str | Pipeline = "vtprune",
    *,
    keep: float | int = 0.25,
    per: Per = "image",
    positions: str = "auto",
    backend: str = "auto",
    debias: bool | str | Debiaser | tuple[str | Debiaser, ...] | None = None,
    calibration: str | Path | None = None,
    on_report: Callable[[PruneReport], None] | None = None,
    history: int = 1,
    **parameters: Any,
) -> ModelT:
    """Hook `model` so that only a part of its visual tokens reaches the language model; returns the same object.

    Args:
        model: a transformers image-text-to-text model (or a PEFT model around one); for methods that prune inside it
            also a vision encoder by itself, of timm, open_clip or transformers.
        method: a name from `list_methods()`, or a `Pipeline`.
        keep: share of the tokens as a float in (0, 1], or their number as an int, on average over decoder layers.
        per: what `keep` applies to: each `"image"` (a clip counts as one), each `"part"` (crop, tile, frame), or the
            whole `"prompt"`.
        positions: `"compact"` closes the gaps that pruning leaves in the position ids, `"keep"` leaves the ids alone,
            `"auto"` compacts on 1-D RoPE and keeps on M-RoPE. Cuts between decoder layers always keep them.
        backend: what kernels run on: `"torch"`, `"triton"`, or `"auto"`, Triton for tensors on a GPU.
        debias: to take off attention: True or `"recency"`, `"cubic"`, `"sinks"`, `"padding"`, `"trend"`; in methods
            that cut between layers also `"rope"` or `"massive"`; a debiaser, or a tuple of several.
        calibration: a file of `vtprune calibrate`, for methods that cut between layers. One of few pictures warns.
        on_report: called with the `PruneReport` of every prefill.
        history: how many reports `model.vtprune.history` remembers.
        **parameters: parameters of the method, see `describe(method)`.

    Raises:
        InvalidOption: for an option out of range or an unknown method or parameter.
        UnsupportedModel: for a model without the seam, compiled, or wrapped already.
        MissingEvidence: where the method needs encoder attention and the family offers none.
        BackendUnavailable: for `backend="triton"` where Triton or a device for it is missing.
    """
    budget = Budget(keep=keep, per=per)
    measured = None if calibration is None else _measured(calibration, method, parameters, budget)
    pipeline = _pipeline(method, parameters, debias, measured)
    tower = plain_tower(model) if isinstance(model, nn.Module) else None
    if tower is not None:
        if (per, positions, backend, measured, on_report, history) != ("image", "auto", "auto", None, None, 1):
            raise InvalidOption("a vision encoder by itself takes a method, its parameters and `keep`, nothing else")
        return _wrap_encoder(model, tower, pipeline, budget)
    inner = find_base(model)
    _check_options(pipeline, budget, history, on_report)
    _warn_of_one(keep)
    options = {"compact": _compacts(positions, pipeline, inner), "backend": choose_backend(backend, _place(inner))}
    pruner = _pruner(inner, pipeline, budget, measured, on_report=on_report, history=history, **options)
    pruner.install(shells(model, inner))
    _warn_of_few(measured)
    return model


def _place(inner: nn.Module) -> str:
    """The type of device where a model begins."""
    first = next(inner.parameters(), None)
    return "cpu" if first is None else first.device.type


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A calibration, what it says of the parameters of a method, and what of that is taken: what nobody gave."""

    calibration: Calibration
    path: str
    said: dict[str, Any]
    taken: dict[str, Any]


def _measured(path: str | Path, method: str | Pipeline, parameters: dict[str, Any], budget: Budget) -> _Measured:
    calibration = Calibration.read(path)
    said = calibration.parameters(method, budget.keep) if isinstance(method, str) else {}
    taken = {name: value for name, value in said.items() if name not in parameters}
    return _Measured(calibration=calibration, path=str(path), said=said, taken=taken)


def _pruner(inner: nn.Module, pipeline: Pipeline, budget: Budget, measured: _Measured | None, **options: Any) -> Pruner:
    """The handle of a model, which does not hook yet."""
    family = family_of(inner.config)
    _check_evidence(pipeline, budget, family, inner)
    if measured is not None:
        measured.calibration.check(inner)
    schedule = _schedule(pipeline, budget, inner, measured)
    if measured is not None:
        pipeline = _calibrated(pipeline, measured, schedule)
    return Pruner(inner, family=family, pipeline=pipeline, budget=budget, schedule=schedule, **options)


def _calibrated(pipeline: Pipeline, measured: _Measured, schedule: AnySchedule | None) -> Pipeline:
    """The pipeline with what was measured; raises `InvalidOption` where it can use none of it."""
    applied = measured.calibration.applied(pipeline, schedule)
    if schedule is None or (applied == pipeline and not measured.said):
        raise InvalidOption(
            f"calibration: method {pipeline.name!r} uses nothing of it. Methods that cut between layers take trends "
            "with debias=True; adaptinfer and information_horizon take layers, vflowopt its shares, if they were found"
        )
    return applied


def _pipeline(method: str | Pipeline, parameters: dict[str, Any], debias: Any, measured: _Measured | None) -> Pipeline:
    """The method with its parameters, those that were measured where none are given, debiased where asked."""
    pipeline = build(method, parameters, options=inspect.signature(wrap).parameters)
    if measured is not None and measured.taken:
        try:
            pipeline = build(method, {**measured.taken, **parameters})
        except InvalidOption as error:
            own = ", ".join(f"{name}={value!r}" for name, value in measured.taken.items())
            raise InvalidOption(f"{error}. Of the calibration: {own}; pass your own, or leave yours out") from error
    return debiased(pipeline, debias)


def _warn_of_few(measured: _Measured | None) -> None:
    if measured is not None and measured.calibration.few:
        warnings.warn(
            f"calibration={measured.path!r} was measured on {measured.calibration.pictures} pictures, which is few: "
            f"trends, layers and settings are rough; write one with `vtprune calibrate --samples {FEW}` or more",
            stacklevel=3,
        )


def _warn_of_one(keep: object) -> None:
    if type(keep) is int and keep == 1:
        warnings.warn("keep=1 keeps a single token per picture; 1.0 keeps all of them", stacklevel=3)


def _wrap_encoder(model: ModelT, tower: Tower, pipeline: Pipeline, budget: Budget) -> ModelT:
    """Hook a vision encoder that stands by itself."""
    name = type(model).__name__
    if HANDLE in model.__dict__:
        raise UnsupportedModel("this model is wrapped already: call vtprune.unwrap(model) first")
    if pipeline.encoder is None:
        able = ", ".join(method for method in list_methods() if build(method).encoder is not None)
        raise UnsupportedModel(
            f"{name} is a vision encoder by itself, and method {pipeline.name!r} prunes in front of a language model; "
            f"methods that prune inside encoders: {able}"
        )
    _check_encoder(pipeline.name, pipeline.encoder, tower, name)
    if any(map(is_compiled, model.modules())):
        raise UnsupportedModel(f"{name} is compiled, and hooks added now would be ignored: wrap first, then compile")
    EncoderPruner(tower, pipeline=pipeline, budget=budget).install(model)
    return model


def unwrap(model: ModelT) -> ModelT:
    """Take every hook and attribute of `wrap` off the model; returns it. Raises `UnsupportedModel` if not wrapped."""
    pruner = model.__dict__.get(HANDLE) if isinstance(model, nn.Module) else None
    if pruner is None:
        raise UnsupportedModel("unwrap: this model is not wrapped")
    pruner.remove()
    return model


@contextmanager
def pruning(model: nn.Module, method: str | Pipeline = "vtprune", **options: Any) -> Iterator[Pruner]:
    """`wrap` for the length of a block, undone also when the block raises; takes the options of `wrap`."""
    pruner: Pruner = wrap(model, method, **options).__dict__[HANDLE]
    try:
        yield pruner
    finally:
        if model.__dict__.get(HANDLE) is pruner:
            unwrap(model)


@contextmanager
def unpruned(model: ModelT) -> Iterator[ModelT]:
    """The model without the hooks of `wrap` for the length of a block, and with them again behind it.

    For what has to see all tokens, as scores of frames do. No other thread may be inside the model meanwhile. A model
    that is not wrapped stays as it is.

    Raises:
        UnsupportedModel: for a vision encoder that was wrapped by itself.
    """
    pruner = model.__dict__.get(HANDLE)
    if pruner is None:
        yield model
        return
    if not isinstance(pruner, Pruner):
        raise UnsupportedModel("unpruned: expected an image-text-to-text model, got a vision encoder by itself")
    pruner.remove()
    try:
        yield model
    finally:
        pruner.install(shells(model, find_base(model)))


def _check_options(pipeline: Pipeline, budget: Budget, history: int, on_report: object) -> None:
    if on_report is not None and not callable(on_report):
        raise InvalidOption(f"on_report={on_report!r}: expected a function that takes a PruneReport")
    if isinstance(history, bool) or not isinstance(history, int) or history < 0:
        raise InvalidOption(f"history={history!r}: expected how many reports to remember, 0 or more")
    if not pipeline.drops and not budget.keeps_all:
        attends = pipeline.attention is not None
        hint = ", or put its `attention` into a pipeline that drops tokens, with dataclasses.replace" if attends else ""
        raise InvalidOption(f"method {pipeline.name!r} keeps everything, got keep={budget.keep}: use keep=1.0{hint}")
    if pipeline.attention is not None and getattr(pipeline.attention, "of", None) not in ("weights", "mask", "masses"):
        raise InvalidOption(f"attention={pipeline.attention!r}: expected a stage that changes weights or masks")


def _check_evidence(pipeline: Pipeline, budget: Budget, family: Family, inner: nn.Module) -> None:
    """Refuse a method whose readings an encoder of the model does not have."""
    readings = {} if budget.keeps_all else readings_of(pipeline)
    for kind in family.kinds if readings else ():
        tower = family.tower(inner, kind)
        encoder = f"the {kind} encoder of {type(inner).__name__} (family {family.name!r})"
        for name, reading in readings.items():
            if pipeline.encoder is not None and tower is not None:
                _check_encoder(pipeline.name, pipeline.encoder, tower, encoder)
                _check_rows(pipeline.name, budget)
            if tower is None or (reading.rule.of == "projector" and tower.projector is None):
                raise MissingEvidence(
                    f"method {pipeline.name!r} needs {name!r}, and it is not known how to read that of {encoder}; "
                    f"methods that need features only: {', '.join(features_only())}"
                )
            if reading.rule.needs_cls and not tower.has_cls:
                raise MissingEvidence(f"method {pipeline.name!r} needs {name!r}, and {encoder} has no CLS token")


def _schedule(pipeline: Pipeline, budget: Budget, inner: nn.Module, measured: _Measured | None) -> AnySchedule | None:
    """The drop points of a method that cuts between layers, None for any other and where everything is kept."""
    lm = language_model(inner)
    if not pipeline.inside or budget.keeps_all or lm is None:
        return None
    taken = () if measured is None else tuple(name for name in LAYERS if name in measured.taken)
    schedule = schedule_of(pipeline, inner, lm, taken)
    if isinstance(budget.keep, float):
        schedule.solve(budget.keep)
    return schedule


def _check_rows(method: str, budget: Budget) -> None:
    """Raise `InvalidOption` for a number of patches that pictures of a prompt share: encoders see them one by one."""
    if budget.per == "prompt" and isinstance(budget.keep, int):
        raise InvalidOption(f"method {method!r} prunes inside the encoder: with per='prompt' keep must be a share")


def _check_encoder(method: str, stage: EncoderStage, tower: Tower, encoder: str) -> None:
    """Raise `UnsupportedModel` where a method prunes inside an encoder that does not bear it."""
    if tower.refuses is not None:
        raise UnsupportedModel(f"method {method!r} prunes inside the encoder, and {encoder} cannot be: {tower.refuses}")
    if stage.needs_cls and not tower.has_cls:
        raise UnsupportedModel(f"method {method!r} prunes by the CLS token, and {encoder} has none")


def _compacts(positions: str, pipeline: Pipeline, inner: nn.Module) -> bool:
    """Whether gaps in the position ids are closed; there are none where no token leaves before the language model."""
    if positions not in ("auto", "compact", "keep"):
        raise InvalidOption(f"positions={positions!r}: expected 'auto', 'compact' or 'keep'")
    if (pipeline.inside or pipeline.cache) and not pipeline.picks:
        if positions == "compact":
            raise InvalidOption(
                f"positions='compact': method {pipeline.name!r} cuts nothing in front of the language model, and "
                "inside tokens have their position ids already: leave positions out, or say 'keep'"
            )
        return False
    return positions == "compact" or (positions == "auto" and not rope_axes(inner.config))
