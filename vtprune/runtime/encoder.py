"""Around the feature calls of a model: grids, and what the readings of a method take from the encoder."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from vtprune.adapters.base import Family, Tower, pooled_lengths
from vtprune.errors import UnsupportedCall
from vtprune.kernels import backends
from vtprune.kernels.backends import Use
from vtprune.protocols import Allowance, EncoderStage
from vtprune.readings import Reading
from vtprune.report import Stopwatch
from vtprune.runtime.encoded import Blocks, Encoded, carry
from vtprune.runtime.encoder_cut import HOLDERS, EncoderCutter, Going
from vtprune.runtime.listening import Listener
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


class _Patches(threading.local):
    """Patches left after each block of the encoder, of the last picture this thread encoded."""

    counts: tuple[int, ...] = ()


class EncoderTap:
    """Wraps `get_image_features` and `get_video_features` of one model, and listens to what a method needs."""

    def __init__(self, inner: nn.Module, family: Family, backend: str = "auto") -> None:
        self.on_encoded: Callable[[Encoded], None] | None = None
        self.cut: tuple[EncoderStage, Allowance] | None = None
        self._inner = inner
        self._family = family
        self._backend = backend
        self.kinds: tuple[Modality, ...] = tuple(
            kind for kind in ("image", "video") if hasattr(type(inner), f"get_{kind}_features")
        )
        self._has_cls: dict[Modality, bool] = {}
        self._listener = Listener()
        self._cutters: list[EncoderCutter] = []
        self._patches = _Patches()

    def install(
        self,
        readings: Mapping[str, Reading],
        *,
        stage: EncoderStage | None = None,
        budget: Allowance | None = None,
    ) -> None:
        """Wrap the feature calls, and hook what `readings` are taken from.

        A `stage` prunes inside the encoder, as far as the `budget` allows for any row; its readings are of the cut.
        """
        for kind in self.kinds:
            setattr(self._inner, f"get_{kind}_features", self._wrapped(kind))
        self.listen(readings)
        if stage is not None and budget is not None:
            self.cut = (stage, budget)
            self._cut(stage, budget, [name for name, reading in readings.items() if reading.rule.of == "cut"])

    def _cut(self, stage: EncoderStage, budget: Allowance, names: list[str]) -> None:
        """Hook the blocks of every tower, once each. Rows that share a budget keep all it could want of them."""

        def note(going: Going) -> None:
            for name in names:
                self._listener.take(name, going.survivors())
            self._listener.take(HOLDERS, going.steps_to_holders())
            self._patches.counts = going.counts

        towers = {id(tower.blocks[0].block): (kind, tower) for kind, tower in self._towers().items()}
        for kind, tower in towers.values():
            alone = budget.per == "part" or (budget.per == "image" and kind == "image")
            count = budget.resolve if alone else budget.at_least
            cutter = EncoderCutter(
                tower, stage, count=count, active=self._listener.recording, on_done=note, restore=True
            )
            cutter.hook()
            self._cutters.append(cutter)

    def listen(self, readings: Mapping[str, Reading]) -> None:
        """Hook what `readings` are taken from."""
        if readings:
            towers = self._towers()
            self._has_cls = {kind: tower.has_cls for kind, tower in towers.items()}
            self._listener.hook(list(towers.values()), readings)

    def _towers(self) -> dict[Modality, Tower]:
        """The encoder of every kind of picture, where it is known how to read it."""
        found = {kind: self._family.tower(self._inner, kind) for kind in self.kinds}
        return {kind: tower for kind, tower in found.items() if tower is not None}

    def remove(self) -> None:
        """Undo `install`."""
        self._listener.remove()
        for cutter in self._cutters:
            cutter.remove()
        self._cutters.clear()
        for kind in self.kinds:
            self._inner.__dict__.pop(f"get_{kind}_features", None)

    def _wrapped(self, kind: Modality) -> Callable[..., Any]:
        original = getattr(self._inner, f"get_{kind}_features")
        signature = inspect.signature(original)

        @functools.wraps(original)
        def listen(*args: Any, **kwargs: Any) -> Any:
            if self._listener.recording():
                return original(*args, **kwargs)
            stopwatch = Stopwatch()
            readings: dict[str, Blocks] = {}
            with backends.using(self._backend) as use, self._recording(readings, stopwatch):
                output = original(*args, **kwargs)
            if isinstance(output, ModelOutput):
                given = signature.bind_partial(*args, **kwargs).arguments
                given = {**given, **given.get("kwargs", {})}
                encoded = self._encoded(kind, given, output.get("pooler_output"), readings, stopwatch, use)
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
        readings: Mapping[str, Blocks],
        stopwatch: Stopwatch,
        use: Use,
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
        return Encoded(
            kind=kind,
            lengths=lengths,
            stacked=stacked,
            pixels=() if pixels is None else tuple(pixels.shape),
            sizes=None if sizes is None else torch.as_tensor(sizes),
            pictures_per_prompt=None if pictures is None else torch.as_tensor(pictures),
            readings=readings,
            has_cls=self._has_cls.get(kind, False),
            stopwatch=stopwatch,
            use=use,
            cut=self.cut,
            patches=self._patches.counts,
        )

    @contextmanager
    def _recording(self, readings: dict[str, Blocks], stopwatch: Stopwatch) -> Iterator[None]:
        """Listen during the block, and measure it; afterwards `readings` holds what was heard."""
        self._begin(stopwatch)
        try:
            yield
        finally:
            self._end(readings, stopwatch)

    @torch.compiler.disable
    def _begin(self, stopwatch: Stopwatch) -> None:
        stopwatch.start("encode", like=self._inner)
        self._listener.begin()

    @torch.compiler.disable
    def _end(self, readings: dict[str, Blocks], stopwatch: Stopwatch) -> None:
        stopwatch.stop("encode")
        readings.update(self._listener.end())


def _first(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def encode_once(
    model: nn.Module,
    inner: nn.Module,
    family: Family,
    inputs: Mapping[str, Any],
    *,
    readings: Mapping[str, Reading],
    options: Mapping[str, Any] | None = None,
) -> Callable[[], dict[str, Any]]:
    """Encode the pictures of `inputs` now; each call of the result gives inputs for one `generate` that reuses them.

    `options` are more arguments for the encoder. Where the model's forward takes no `mm_encoder_outputs`, the inputs
    are handed back as they are, and options have no effect.
    """
    if "mm_encoder_outputs" not in inspect.signature(without_adapters(model).forward).parameters:
        return lambda: dict(inputs)
    tap = EncoderTap(inner, family)
    tap.install(readings)
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
