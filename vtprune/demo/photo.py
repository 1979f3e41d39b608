"""Which patches of a photo methods keep, on a vision tower without a language model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtprune._pictures import read_picture
from vtprune.catalog import build, describe, list_methods
from vtprune.demo.seen import Seen
from vtprune.demo.towers import Tower
from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.kernels import backends
from vtprune.pipeline import Pipeline
from vtprune.report import DROPPED, PruneReport, SegmentReport, Stopwatch
from vtprune.runtime.evidence import readings_of
from vtprune.runtime.stacking import soundness
from vtprune.stages.rules import NAMED_RULES
from vtprune.tiny.loading import PICTURE
from vtprune.types import Budget, Selection, VisualTokens

FAMILY = "photo"
SCENE = "scene"
"""The name of the picture that comes with vtprune, which is drawn."""
_PHOTOS = {"astronaut": "astronaut.png", "chelsea": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}
"""Those of scikit-image that are in colour, with a subject, and in the package itself."""


def choose(
    seen: Seen,
    method: str | Pipeline = "vtprune",
    keep: float | int = 0.25,
    *,
    seed: int = 0,
    parameters: Mapping[str, Any] | None = None,
) -> PruneReport:
    """Let a method choose among the patches of a photo, and report it as of a prompt of one picture.

    There is no language model: lengths are empty, bytes and FLOPs 0. Of methods that merge, what kept patches become
    goes nowhere; the report says which take which over.

    Args:
        seen: what `Tower.look` found; with `protect` (1, m) numbers of patches and `forbid` (1, N) bool among the
            evidence of its tokens, these are forced in and out.
        method: a name, or a pipeline.
        keep: share of the patches in (0, 1], or their number.
        seed: for methods that take one.
        parameters: others of the method, by name.

    Raises:
        InvalidOption: for a method that needs more than a photo, with the reason; for a name or value out of range;
            where forced patches do not go into the budget.
    """
    given = dict(parameters or {})
    if isinstance(method, str) and "seed" in describe(method).parameters:
        given.setdefault("seed", seed)
    pipeline = build(method, given)
    if reason := _why_not(pipeline, seen.has_cls, seen.registers):
        raise InvalidOption(f"method {pipeline.name!r} cannot choose patches of a photo: {reason}")
    features = seen.tokens.features
    k = Budget(keep=keep).resolve(features.shape[1])
    stopwatch = Stopwatch()
    stopwatch.absorb(seen.stopwatch)
    with torch.no_grad(), backends.using("auto") as use, stopwatch.measure("select", like=features):
        readings = readings_of(pipeline)
        found = {name: seen.read(reading) for name, reading in readings.items() if name in pipeline.asked}
        tokens = replace(seen.tokens, evidence={**seen.tokens.evidence, **found})
        soundness(tokens)
        k = _count(pipeline, tokens, k)
        segment = _segment(pipeline, tokens, pipeline.run(tokens, k))
    return PruneReport(
        method=pipeline.name,
        family=FAMILY,
        backend=str(use),
        positions="none",
        importance=", ".join(sorted(reading.source(seen.has_cls) for reading in readings.values())) or None,
        picks=tuple(pick.name for pick in pipeline.picks),
        segments=(segment,),
        length_before=(),
        length_after=(),
        kv_bytes_saved=0,
        stopwatch=stopwatch,
        adaptive=pipeline.adaptive,
    )


def _count(pipeline: Pipeline, tokens: VisualTokens, k: int) -> int:
    """How many patches stay, where the method is adaptive at most `k`; raises where forced ones do not go into that."""
    protect, forbid = tokens.evidence.get("protect"), tokens.evidence.get("forbid")
    forced = 0 if protect is None else protect.shape[1]
    allowed = tokens.features.shape[1] - (0 if forbid is None else int(forbid.sum()))
    if not forced <= k <= allowed:
        raise InvalidOption(
            f"{k} patches are to be kept, but {forced} are forced in and {allowed} may stay: expected a number "
            "between; change keep, or force fewer"
        )
    if pipeline.counter is None:
        return k
    return min(k, max(1, forced, int(pipeline.count(tokens, k))))


def _segment(pipeline: Pipeline, tokens: VisualTokens, selection: Selection) -> SegmentReport:
    stages = torch.full(tokens.features.shape[:2], DROPPED).scatter_(1, selection.keep, selection.taken)
    into, held = _holders(pipeline, tokens, selection)
    return SegmentReport(row=0, kind="image", parts=tokens.parts, stages=stages[0], into=into, held=held)


def _holders(pipeline: Pipeline, tokens: VisualTokens, selection: Selection) -> tuple[Tensor | None, Tensor | None]:
    """The patch (N,) that takes each over, -1 where it is lost, and how many each holds; None where nothing merges."""
    merged = pipeline.merge(tokens, selection)
    if merged is None:
        return None, None
    lost = merged.into[0] < 0
    into = selection.keep[0][merged.into[0].clamp(min=0)].masked_fill(lost, -1)
    return into, torch.bincount(into[~lost], minlength=len(into))


def methods(tower: Tower) -> tuple[tuple[str, str], ...]:
    """Every method by name, with the reason why it cannot choose among patches of a photo, empty where it can."""
    return tuple((name, _why_not(build(name), tower.has_cls, tower.registers)) for name in list_methods())


def _why_not(pipeline: Pipeline, has_cls: bool, registers: int) -> str:
    if pipeline.inside:
        return "it cuts between layers of a language model, and there is none"
    if pipeline.cache is not None:
        return "it cuts the cache of a language model, and there is none"
    if pipeline.attention is not None:
        return "it changes attention inside a language model, and there is none"
    if pipeline.encoder is not None:
        return "it cuts inside the encoder, which sees the whole photo here"
    if not pipeline.drops:
        return "it keeps everything"
    if pipeline.frames is not None:
        return "it shares its budget among the frames of a clip"
    if "relevance" in pipeline.needs:
        return "it needs a question"
    readings = readings_of(pipeline)
    if unknown := sorted(pipeline.needs - readings.keys()):
        return f"it needs {', '.join(unknown)}, which nobody gives here"
    rules = [reading.rule for reading in readings.values()]
    if any(rule.of == "projector" and rule.name not in NAMED_RULES for rule in rules):
        return "it tries out the projector to a language model, and there is none"
    if any(rule.needs_cls > has_cls for rule in rules):
        return "it needs a CLS token, which this tower does not have"
    if registers and any(rule.name not in NAMED_RULES for rule in rules):
        return f"it would take the {registers} registers of this tower for patches"
    return ""


def photographs() -> tuple[str, ...]:
    """Names that `photograph` takes here; without scikit-image only that of a drawn picture."""
    folder = _folder()
    return (*(name for name, file in _PHOTOS.items() if folder is not None and (folder / file).is_file()), SCENE)


def photograph(name: str) -> Image.Image:
    """A photo of scikit-image, which lies in its package, or the drawn picture that comes with vtprune.

    Raises:
        BackendUnavailable: without scikit-image.
        InvalidOption: for another name.
    """
    if name == SCENE:
        return read_picture(PICTURE)
    if name not in _PHOTOS:
        raise InvalidOption(f"no photo {name!r}: there are {', '.join((*_PHOTOS, SCENE))}")
    if name not in photographs():
        raise BackendUnavailable(f"the photo {name!r} is one of scikit-image: pip install --no-deps scikit-image")
    folder = _folder()
    assert folder is not None
    return read_picture(folder / _PHOTOS[name])


def _folder() -> Path | None:
    """Where the photos of scikit-image lie; it is not imported, since it would bring more packages."""
    found = importlib.util.find_spec("skimage")
    return Path(found.origin).parent / "data" if found is not None and found.origin else None
