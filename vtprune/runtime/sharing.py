"""Pictures and clips that are encoded once and then stand in several prompts, each of which is pruned by itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from vtprune.adapters.base import Family
from vtprune.errors import UnsupportedCall
from vtprune.kernels import reference as kernels
from vtprune.report import Stopwatch
from vtprune.runtime.encoded import Encoded, carried, carry
from vtprune.runtime.encoder import PIXELS
from vtprune.types import Modality


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """What the encoder made of the pictures of one prompt, to be used in any number of prompts with the same ones."""

    outputs: Mapping[Modality, ModelOutput]

    @property
    def shape(self) -> tuple[object, ...]:
        """What is of equal shape can stand in one batch. Families that stack clips need them of equal length."""
        found: list[object] = []
        for kind, output in self.outputs.items():
            entry, pooled = carried(kind, output), output["pooler_output"]
            assert entry is not None
            found.append((kind, tuple(pooled.shape[1:]) if torch.is_tensor(pooled) else None, entry.pixels[1:]))
        return tuple(found)


@torch.no_grad()
def encode_shared(inner: nn.Module, family: Family, inputs: Mapping[str, Any]) -> tuple[Shared, dict[str, Any]]:
    """Encode the pictures of one prompt while its model is wrapped; also gives the inputs without their pixels.

    Readings are brought to tokens at once: this waits for the device.

    Raises:
        UnsupportedCall: where there are no pixels, or the model is not wrapped.
    """
    outputs: dict[Modality, ModelOutput] = {}
    pixels: set[str] = set()
    for kind in family.kinds:
        names = [name for name in PIXELS[kind] if inputs.get(name) is not None]
        if names:
            encode = getattr(inner, f"get_{kind}_features")
            given = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
            outputs[kind] = _slim(kind, encode(**given, return_dict=True), inner, family)
            pixels.update(names)
    if not outputs:
        raise UnsupportedCall(f"no pixels to encode: got {', '.join(inputs)}")
    return Shared(outputs=outputs), {name: value for name, value in inputs.items() if name not in pixels}


def joined(shared: Sequence[Shared]) -> dict[Modality, ModelOutput]:
    """`mm_encoder_outputs` of a batch whose rows have these pictures, one after the other; the same one may repeat."""
    found: dict[Modality, ModelOutput] = {}
    for kind in {kind: None for one in shared for kind in one.outputs}:
        outputs: list[Any] = [one.outputs[kind] for one in shared if kind in one.outputs]
        entries = [entry for entry in (carried(kind, output) for output in outputs) if entry is not None]
        parts: dict[str, Any] = {"pooler_output": _chained([output.pooler_output for output in outputs])}
        if outputs[0].get("deepstack_features") is not None:
            layers = zip(*(output.deepstack_features for output in outputs), strict=True)
            parts["deepstack_features"] = [_chained(layer) for layer in layers]
        found[kind] = type(outputs[0])(**parts)
        carry(found[kind], _batch(entries))
    return found


def _slim(kind: Modality, output: ModelOutput, inner: nn.Module, family: Family) -> ModelOutput:
    """What the language model gets, and what was read of it, token by token."""
    entry = carried(kind, output)
    assert entry is not None
    sizes = () if entry.sizes is None else tuple(tuple(row) for row in entry.sizes.tolist())
    pictures = None if entry.pictures_per_prompt is None else tuple(entry.pictures_per_prompt.reshape(-1).tolist())
    encoding = entry.on_host(sizes, pictures)
    mapped = {name: entry.of_tokens(name, encoding, family, inner) for name in entry.readings}
    kept = {name: output.get(name) for name in ("pooler_output", "deepstack_features")}
    slim = type(output)(**{name: value for name, value in kept.items() if value is not None})
    rows = {name: tuple(found) for name, found in mapped.items() if found is not None}
    carry(slim, replace(entry, readings={}, mapped=rows))
    return slim


def _chained(values: Sequence[Any]) -> Any:
    """Stacked tensors one below the other, and lists one behind the other."""
    if all(torch.is_tensor(value) for value in values):
        return kernels.joined(list(values))
    return [entry for value in values for entry in value]


def _batch(entries: Sequence[Encoded]) -> Encoded:
    """What travels with the pictures of several prompts; their encoder is not timed again."""
    first = entries[0]
    return replace(
        first,
        lengths=tuple(length for entry in entries for length in entry.lengths),
        pixels=(sum(entry.pixels[0] for entry in entries), *first.pixels[1:]) if first.pixels else (),
        sizes=_rows([entry.sizes for entry in entries]),
        pictures_per_prompt=_rows([entry.pictures_per_prompt for entry in entries]),
        mapped={name: tuple(rows for entry in entries for rows in entry.mapped[name]) for name in first.mapped},
        stopwatch=Stopwatch(),
        asked=[],
    )


def _rows(values: Sequence[Tensor | None]) -> Tensor | None:
    given = [value for value in values if value is not None]
    return torch.cat(given) if given else None
