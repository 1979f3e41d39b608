"""Measuring the classes of heads that `blindsight` needs: BlindSight, arXiv 2507.09071."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vtprune._checks import check_share
from vtprune.api import pruning
from vtprune.errors import InvalidOption
from vtprune.pipeline import Pipeline

_SLIGHT = 1e-9


@dataclass(eq=False)
class _Record:
    """A watch that notes what it sees of every layer: for each prompt (H, 3), and whether there is anything."""

    name: ClassVar[str] = "watched"
    of: ClassVar[Literal["masses"]] = "masses"
    neutral: ClassVar[bool] = False
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, masses: Tensor, found: Tensor) -> None:
        self.seen.setdefault(layer, []).append(masses[found].cpu())


def measure(
    model: nn.Module,
    batches: Sequence[Callable[[], dict[str, Any]]],
    *,
    dense: float = 0.1,
    intra: float = 0.1,
    sink: float = 0.1,
    share: float = 0.9,
) -> tuple[tuple[str, ...], ...]:
    """The class of every head of every layer, from prompts with several pictures each.

    Attention is read a few rows at a time while the model runs; pictures that come first in a prompt see no other and
    do not count. What it returns is for `wrap(model, "blindsight", keep=1.0, classes=...)`.

    Args:
        model: a model that is not wrapped.
        batches: each makes the inputs of some prompts, padded on the left.
        dense, intra, sink, share: see `head_classes`.

    Raises:
        InvalidOption: without a prompt with several pictures, or for a threshold out of range.
    """
    record = _Record()
    for make in batches:
        inputs = make()
        with torch.no_grad(), pruning(model, Pipeline(name="measuring", picks=(), attention=record), keep=1.0):
            model(**inputs, use_cache=False)
    layers = [torch.cat(record.seen[layer]) for layer in sorted(record.seen)]
    if not layers or not len(layers[0]):
        raise InvalidOption("no prompt with several pictures: expected at least one")
    find = functools.partial(head_classes, dense=dense, intra=intra, sink=sink, share=share)
    return tuple(find(*masses.unbind(dim=2)) for masses in layers)


def head_classes(
    own: Tensor,
    sinks: Tensor,
    cross: Tensor,
    *,
    dense: float = 0.1,
    intra: float = 0.1,
    sink: float = 0.1,
    share: float = 0.9,
) -> tuple[str, ...]:
    """The cheapest class of every head that loses little of the attention of tokens of pictures.

    A prompt needs everything where other pictures get `dense` of a head's attention. Where not, it needs the own
    picture, unless that gets no more than `intra` of what sinks and pictures get together, and less than the sinks; and
    it needs sinks where they get `sink`, or where it does not need its own picture. A head needs what more than
    `1 - share` of the prompts need. The thresholds of the authors are not public.

    Args:
        own: (P, H), attention of P prompts to the own picture, on average over its tokens.
        sinks: (P, H), to sinks.
        cross: (P, H), to other pictures.

    Raises:
        InvalidOption: without prompts, or for a threshold out of range.
    """
    for name, value in {"dense": dense, "intra": intra, "sink": sink, "share": share}.items():
        check_share(name, value)
    if not len(own):
        raise InvalidOption("no prompt with several pictures: expected at least one")
    everything = cross >= dense
    itself = everything | (own > intra * (own + sinks + cross)) | (own >= sinks)
    caught = everything | ~itself | (sinks >= sink)
    needs = (asked.double().mean(dim=0) > 1 - share + _SLIGHT for asked in (everything, itself, caught))
    return tuple(_class_of(*map(bool, head)) for head in zip(*needs, strict=True))


def _class_of(everything: bool, itself: bool, caught: bool) -> str:
    if everything:
        return "dense"
    return "intra+sink" if itself and caught else "intra" if itself else "sink"
