"""Several questions about one clip as inputs of a model: the pictures are prepared once, the words for each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.runtime.encoder import PIXELS
from vtprune.video.prompting import Pictures, clip_inputs, takes_clips

PIXEL_NAMES = frozenset(name for names in PIXELS.values() for name in names)
_PAD_WITH_ZERO = ("attention_mask", "mm_token_type_ids", "token_type_ids")


class Remembering:
    """Stands for a video processor that is given the same clips again and again, and prepares them once."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._made: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._made is None:
            self._made = self._processor(*args, **options)
        return copy.copy(self._made)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_processor", "_made"):
            raise AttributeError(name)
        return getattr(self._processor, name)


def remembering(processor: Any) -> Any:
    """A copy of a processor for prompts about the same clips again and again; the original stays as it is."""
    from transformers import ProcessorMixin

    if not takes_clips(processor) or not isinstance(processor, ProcessorMixin):
        return processor
    twin = copy.copy(processor)
    twin.video_processor = Remembering(processor.video_processor)
    return twin


def rows_of(
    processor: Any, pictures: Pictures, questions: Sequence[str], *, times: Sequence[float], duration: float
) -> list[dict[str, Any]]:
    """Inputs of one prompt for each question about a clip, pixels included.

    Raises:
        UnsupportedCall: where the processor does not take this.
    """
    processor = remembering(processor)
    return [
        dict(clip_inputs(processor, [pictures], [question], times=[times], durations=[duration]))
        for question in questions
    ]


def stacked(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Any]:
    """One batch of prompts without pixels: what is as long as the prompt is padded on the left, the rest is joined."""
    lengths = [row["input_ids"].shape[1] for row in rows]
    longest = max(lengths)
    batch: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if not torch.is_tensor(first):
            batch[name] = [entry for value in values for entry in value]
        elif first.shape[:2] == (1, lengths[0]):
            fill = 0 if name in _PAD_WITH_ZERO else pad_id
            batch[name] = torch.cat([_padded(value, longest, fill) for value in values])
        else:
            batch[name] = torch.cat(values)
    return batch


def moved(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the device of a model, pixels in its precision. Seconds keep theirs: positions are made of them."""

    def of(name: str, value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        return value.to(model.device, model.dtype if name in PIXEL_NAMES else value.dtype)

    return {name: of(name, value) for name, value in inputs.items()}


def _padded(value: Tensor, length: int, fill: int) -> Tensor:
    return pad(value, (length - value.shape[1], 0), value=fill)
