"""Listening to the vision encoder: grids, and attention of the layer that a probe names."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from vtprune.adapters.base import Family, Probe, pooled_lengths
from vtprune.errors import UnsupportedCall
from vtprune.report import Stopwatch
from vtprune.runtime.encoded import Encoded, PendingScores, carry, score
from vtprune.seam import without_adapters
from vtprune.types import Modality

PIXELS: dict[Modality, tuple[str, ...]] = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
}
_SIZES: dict[Modality, tuple[str, ...]] = {
    "image": ("image_grid_thw", "image_sizes"),
    "video": ("video_grid_thw", "image_grid_thw"),
}


class _Recording(threading.local):
    """What one thread is encoding: scores so far (None: nothing), and the parts of the attention call under way."""

    def __init__(self) -> None:
        self.scores: list[Tensor | PendingScores] | None = None
        self.projections: dict[str, Tensor] = {}
        self.call: dict[str, Any] = {}


class EncoderTap:
    """Wraps `get_image_features` and `get_video_features` of one model, and hooks the probes a method needs."""

    def __init__(self, inner: nn.Module, family: Family) -> None:
        self.probes: dict[Modality, Probe] = {}
        self.on_encoded: Callable[[Encoded], None] | None = None
        self._inner = inner
        self._family = family
        self.kinds: tuple[Modality, ...] = tuple(
            kind for kind in ("image", "video") if hasattr(type(inner), f"get_{kind}_features")
        )
        self._handles: list[RemovableHandle] = []
        self._forwards: list[tuple[nn.Module, Any, Any]] = []
        self._thread = _Recording()

    def install(self, *, probing: bool) -> None:
        """Wrap the feature calls; with `probing` also hook the attention named by the family's probes."""
        for kind in self.kinds:
            setattr(self._inner, f"get_{kind}_features", self._listening(kind))
        if probing:
            self.probe()

    def probe(self) -> None:
        """Hook the probes, once each."""
        hooked: list[nn.Module] = []
        for kind in self.kinds:
            probe = self._family.probe(self._inner, kind)
            if probe is None:
                continue
            self.probes[kind] = probe
            if any(probe.attention is module for module in hooked):
                continue
            hooked.append(probe.attention)
            self._hook(probe)

    def remove(self) -> None:
        """Undo `install`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for attention, before, eager in self._forwards:
            if attention.__dict__.get("forward") is eager:
                attention.__dict__.pop("forward")
                attention.__dict__.update({} if before is None else {"forward": before})
        self._forwards.clear()
        self.probes.clear()
        for kind in self.kinds:
            self._inner.__dict__.pop(f"get_{kind}_features", None)

    def _listening(self, kind: Modality) -> Callable[..., Any]:
        original = getattr(self._inner, f"get_{kind}_features")
        signature = inspect.signature(original)

        @functools.wraps(original)
        def listen(*args: Any, **kwargs: Any) -> Any:
            if self._thread.scores is not None:
                return original(*args, **kwargs)
            stopwatch = Stopwatch()
            with self._recording(stopwatch) as scores:
                output = original(*args, **kwargs)
            if isinstance(output, ModelOutput):
                given = signature.bind_partial(*args, **kwargs).arguments
                given = {**given, **given.get("kwargs", {})}
                encoded = self._encoded(kind, given, output.get("pooler_output"), scores, stopwatch)
                carry(output, encoded)
                if self.on_encoded is not None:
                    self.on_encoded(encoded)
            return output

        return torch.compiler.disable(listen, recursive=False)

    def _encoded(
        self,
        kind: Modality,
        given: dict[str, Any],
        pooled: Any,
        scores: list[Tensor | PendingScores],
        stopwatch: Stopwatch,
    ) -> Encoded:
        if pooled is None:
            raise UnsupportedCall(
                f"{type(self._inner).__name__}.get_{kind}_features returned no pooler_output: there is no telling "
                "which tokens are visual, so this model cannot be pruned"
            )
        lengths, stacked = pooled_lengths(pooled)
        pixels = _first(given, (*PIXELS[kind], "pixel_values"))
        sizes = _first(given, _SIZES[kind])
        pictures = given.get("batch_num_images")
        probe = self.probes.get(kind)
        return Encoded(
            kind=kind,
            lengths=lengths,
            stacked=stacked,
            pixels=() if pixels is None else tuple(pixels.shape),
            sizes=None if sizes is None else torch.as_tensor(sizes),
            pictures_per_prompt=None if pictures is None else torch.as_tensor(pictures),
            scores=_joined(scores),
            evidence=probe.evidence if probe and scores else None,
            stopwatch=stopwatch,
        )

    @contextmanager
    def _recording(self, stopwatch: Stopwatch) -> Iterator[list[Tensor | PendingScores]]:
        """Listen during the block, and measure it."""
        self._begin(stopwatch)
        assert self._thread.scores is not None
        try:
            yield self._thread.scores
        finally:
            self._end(stopwatch)

    @torch.compiler.disable
    def _begin(self, stopwatch: Stopwatch) -> None:
        stopwatch.start("encode", like=self._inner)
        self._thread.scores = []

    @torch.compiler.disable
    def _end(self, stopwatch: Stopwatch) -> None:
        stopwatch.stop("encode")
        self._thread.scores = None
        self._thread.projections.clear()
        self._thread.call.clear()

    def _hook(self, probe: Probe) -> None:
        """Hook the projections of one attention, and keep it eager inside a model that is compiled later.

        Compiled code of the other blocks would be used for this one too, and pass its hooks by.
        """
        own = probe.attention.__dict__
        eager = torch.compiler.disable(probe.attention.forward)
        self._forwards.append((probe.attention, own.get("forward"), eager))
        own["forward"] = eager
        names = (probe.fused,) if probe.fused else (probe.query, probe.key)
        projections = {name: probe.attention.get_submodule(name) for name in names}
        before = functools.partial(self._before, projections)
        self._handles.append(probe.attention.register_forward_pre_hook(before, with_kwargs=True))
        for name, module in projections.items():
            self._handles.append(module.register_forward_hook(functools.partial(self._projected, name)))
        self._handles.append(probe.attention.register_forward_hook(functools.partial(self._attended, probe)))

    def _before(
        self, projections: dict[str, nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._thread.scores is None:
            return
        for name, hooked in projections.items():
            if module.get_submodule(name) is not hooked:
                raise UnsupportedCall(
                    f"{name} of the vision encoder was replaced after wrap (by an adapter, say), so its attention "
                    "cannot be read: unwrap, change the model, then wrap it again"
                )
        self._thread.call = dict(kwargs)

    def _projected(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._thread.scores is not None:
            self._thread.projections[name] = output.detach()

    @torch.no_grad()
    def _attended(self, probe: Probe, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._thread.scores is None:
            return
        query, key = _split_heads(probe, self._thread.projections)
        if probe.normalise is not None:
            query, key = probe.normalise(query, key)
        if probe.rotate is not None:
            query, key = probe.rotate(query, key, self._thread.call)
        dtype = next(iter(self._thread.projections.values())).dtype
        if probe.segments is None:
            self._thread.scores.append(score(probe, query, key, None))
        else:
            self._thread.scores.append(PendingScores(query=query.to(dtype), key=key.to(dtype), probe=probe))
        self._thread.projections.clear()
        self._thread.call.clear()


def _joined(scores: list[Tensor | PendingScores]) -> Tensor | PendingScores | None:
    """The scores of a call: all its crops together, or what is pending for the whole of it."""
    ready = [entry for entry in scores if isinstance(entry, Tensor)]
    return torch.cat(ready) if ready else next(iter(scores), None)


def _split_heads(probe: Probe, projections: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if probe.fused:
        joint = projections[probe.fused]
        joint = joint.view(*joint.shape[:-1], 3, probe.heads, -1)
        query, key = joint[..., 0, :, :], joint[..., 1, :, :]
    else:
        query, key = (projections[name].unflatten(-1, (probe.heads, -1)) for name in (probe.query, probe.key))
    if query.ndim == 3:
        query, key = query[None], key[None]
    return query.transpose(1, 2), key.transpose(1, 2)


def _first(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def encode_once(
    model: nn.Module,
    inner: nn.Module,
    family: Family,
    inputs: Mapping[str, Any],
    *,
    probing: bool,
    options: Mapping[str, Any] | None = None,
) -> Callable[[], dict[str, Any]]:
    """Encode the pictures of `inputs` now; each call of the result gives inputs for one `generate` that reuses them.

    `options` are more arguments for the encoder. Where the model's forward takes no `mm_encoder_outputs`, the inputs
    are handed back as they are, and options have no effect.
    """
    if "mm_encoder_outputs" not in inspect.signature(without_adapters(model).forward).parameters:
        return lambda: dict(inputs)
    tap = EncoderTap(inner, family)
    tap.install(probing=probing)
    outputs, pixels = {}, set()
    try:
        for kind in tap.kinds:
            encode = getattr(inner, f"get_{kind}_features")
            given = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
            names = [name for name in PIXELS[kind] if given.get(name) is not None]
            if names:
                with torch.no_grad():
                    outputs[kind] = encode(**given, **(options or {}), return_dict=True)
                pixels.update(names)
    finally:
        tap.remove()
    rest = {name: value for name, value in inputs.items() if name not in pixels}
    return lambda: {**rest, "mm_encoder_outputs": {kind: copy.copy(output) for kind, output in outputs.items()}}
