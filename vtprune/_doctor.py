"""What `vtprune doctor` finds out, about this machine and about a model."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

from vtprune.errors import UnsupportedModel, VtpruneError

_PACKAGES = ("torch", "transformers", "pillow", "numpy", "safetensors", "rich")


def machine() -> Iterator[tuple[str, str]]:
    """Versions, devices and the health of torchvision."""
    from vtprune._version import __version__

    yield "vtprune", __version__
    yield "python", platform.python_version()
    for package in _PACKAGES:
        yield package, _version(package) or "absent"
    yield "torchvision", _torchvision()
    yield "devices", _devices()
    yield "kernels", _kernels()
    yield "clips", _readers()


def model(source: str) -> Iterator[tuple[str, str]]:
    """Family, seam, probes, placeholders, cache and methods of a model, from its config alone."""
    from vtprune import _console
    from vtprune.adapters import family_of
    from vtprune.adapters.base import language_model, placeholder_id, rope_axes
    from vtprune.seam import find_base

    _console.quiet_transformers()
    skeleton = _console.model_skeleton(source)
    family = family_of(skeleton.config)
    yield "model", f"{type(skeleton).__name__} (model_type {skeleton.config.model_type!r})"
    yield "family", family.name + (f": {family.notes}" if family.notes else "")
    try:
        inner = find_base(skeleton)
    except UnsupportedModel as error:
        yield "seam", f"none, this model cannot be pruned: {error}"
        return
    yield "seam", f"{type(inner).__name__} -> {type(language_model(inner)).__name__}"
    for kind in family.kinds:
        token = placeholder_id(inner.config, kind)
        if kind == "video" and (token is None or not hasattr(type(inner), "get_video_features")):
            yield kind, "none: this model reads no clips"
            continue
        tower = family.tower(inner, kind)
        attention = "cls_attention" if tower is not None and tower.has_cls else "received_attention"
        evidence = attention if tower is not None else "no encoder attention, features only"
        yield kind, f"placeholder id {token}; {evidence}"
    yield "positions", "auto keeps the ids (M-RoPE)" if rope_axes(inner.config) else "auto closes the gaps (1-D RoPE)"
    yield "cache", _cache(skeleton)
    yield from _methods(skeleton)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _readers() -> str:
    """What reads video files, in the order in which `auto` tries."""
    from vtprune.video.reader import AUTO, BACKENDS, prepare

    obstacles = {name: prepare(name) for name in dict.fromkeys((*AUTO, *BACKENDS))}
    found = [f"{name} reads them" if not obstacle else f"{name}: {obstacle}" for name, obstacle in obstacles.items()]
    return "; ".join(found) + ("" if not all(obstacles.values()) else "; pip install 'vtprune[video]'")


def _torchvision() -> str:
    from vtprune._torchvision import heal

    version = _version("torchvision")
    if version is None:
        return "absent: image processors use Pillow, video processors need it (extra `processors`)"
    healed = heal()
    try:
        import torchvision  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"{version}, broken: {error}"
    return (
        f"{version}, built for another torch, usable for processors but not for nms"
        if healed
        else f"{version}, healthy"
    )


def _devices() -> str:
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)


def _kernels() -> str:
    from vtprune.kernels.backends import unavailable

    why = unavailable()
    return f"torch: {why}" if why else "triton for tensors on a GPU, torch elsewhere"


def _cache(skeleton: Any) -> str:
    from transformers.cache_utils import DynamicCache

    from vtprune.cache import check_prunable

    cache = DynamicCache(config=skeleton.config.get_text_config(decoder=True))
    kinds = sorted({type(layer).__name__ for layer in cache.layers}) or ["DynamicLayer"]
    try:
        check_prunable(cache)
    except VtpruneError as error:
        return f"{type(cache).__name__} of {', '.join(kinds)}: refused, {error}"
    return f"{type(cache).__name__} of {', '.join(kinds)}"


def _methods(skeleton: Any) -> Iterator[tuple[str, str]]:
    import vtprune
    from vtprune.catalog import build

    works, refused, unmeasured = [], [], []
    for name in vtprune.list_methods():
        pipeline = build(name)
        if getattr(pipeline.attention, "classes", ()) is None:
            unmeasured.append(name)
            continue
        try:
            with vtprune.pruning(skeleton, name, keep=0.5 if pipeline.drops else 1.0):
                works.append(name)
        except VtpruneError as error:
            refused.append(f"{name}: {error}")
    yield "methods", ", ".join(works) or "none"
    yield "methods to be measured for", ", ".join(unmeasured) or "none"
    for line in refused or ["nothing"]:
        yield "unsupported", line
