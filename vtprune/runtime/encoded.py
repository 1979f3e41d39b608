"""What the encoder leaves for the cut: it travels on the object that `get_*_features` returns.

Inside `generate`, pictures are encoded before the loop and grids never reach `forward`; the returned object does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from vtprune.adapters.base import Encoding, Family
from vtprune.errors import UnsupportedCall
from vtprune.kernels import attention as attentions
from vtprune.kernels import backends, host
from vtprune.kernels import reference as kernels
from vtprune.kernels.backends import Use
from vtprune.protocols import Allowance, EncoderStage
from vtprune.readings import BlockAttention, OfAttention, Rule
from vtprune.report import Stopwatch
from vtprune.types import Modality

_CARRIED = "vtprune_encoded"


@dataclass(kw_only=True)
class Pending:
    """A reading that waits for the lengths of the pictures, which come to the host with the layout."""

    rule: Rule
    attention: BlockAttention | None
    segments: Callable[[Encoding], tuple[int, ...]]
    value: Tensor | None = None

    @torch.no_grad()
    def resolve(self, encoding: Encoding) -> Tensor:
        """(1, N) or (1, N, C); queries and keys are let go."""
        if self.value is None:
            assert self.attention is not None
            self.value = by_segment(self.rule, self.attention, self.segments(encoding))
            self.attention = None
        return self.value


Blocks = tuple[Tensor | Pending, ...]
"""What was read, one entry for each block: (rows, N) or (rows, N, C)."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one call of the encoder leaves for the cut. `sizes` and `readings` stay on their device.

    `readings` are by name, not yet mapped to tokens; `has_cls` is that of the encoder they were taken from. `cut` says
    what pruned inside the encoder, and to which budget; None where nothing did. `patches` are those left after each of
    its blocks then. `use` says which backend kernels ran on. `mapped` are readings that were brought to tokens already,
    one (n, C) for each entry. `asked` see `asked_length`.
    """

    kind: Modality
    lengths: tuple[int, ...]
    stacked: bool
    pixels: tuple[int, ...]
    sizes: Tensor | None
    pictures_per_prompt: Tensor | None
    readings: Mapping[str, Blocks]
    has_cls: bool
    stopwatch: Stopwatch
    use: Use
    cut: tuple[EncoderStage, Allowance] | None = None
    patches: tuple[int, ...] = ()
    mapped: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    asked: list[np.ndarray] = field(default_factory=list, compare=False, repr=False)

    def asked_length(self, ids: np.ndarray) -> int:
        """How many of ids (B, L) are the prompt these pictures were first asked about with, where it begins like that.

        Without a cache, `generate` runs the prompt with all it wrote so far in every step, a token longer each time:
        what was written is no part of the question.
        """
        first, last = self.asked or (ids, ids)
        starts_alike = first.shape[0] == ids.shape[0] and np.array_equal(first, ids[:, : first.shape[1]])
        if not starts_alike or ids.shape[1] - last.shape[1] not in (0, 1):
            first = ids
        self.asked[:] = [first, ids]
        return first.shape[1]

    @property
    def names(self) -> frozenset[str]:
        """What was read."""
        return frozenset((*self.readings, *self.mapped))

    def of_tokens(self, name: str, encoding: Encoding, family: Family, inner: nn.Module) -> list[Tensor] | None:
        """One reading (n, C) for each entry, NaN at separators; None where it was not taken."""
        if name in self.mapped:
            return list(self.mapped[name])
        raw = self.read(name, encoding)
        return None if raw is None else family.rows(inner, raw, encoding)

    def read(self, name: str, encoding: Encoding) -> Tensor | None:
        """One reading (rows, N, C) of patches, summed over its blocks; None where it was not taken."""
        found = self.readings.get(name)
        if not found:
            return None
        values = [block.resolve(encoding) if isinstance(block, Pending) else block for block in found]
        total = functools.reduce(torch.add, values)
        return total if total.ndim == 3 else total[..., None]

    def on_host(self, sizes: tuple[tuple[int, ...], ...], pictures: tuple[int, ...] | None) -> Encoding:
        """The same as plain numbers, once the sizes are on the host."""
        return Encoding(
            kind=self.kind,
            lengths=self.lengths,
            stacked=self.stacked,
            sizes=sizes,
            pixels=self.pixels,
            pictures_per_prompt=pictures,
        )


def carried(kind: str, output: Any) -> Encoded | None:
    """What travels on an encoder output; None where there is no output.

    Raises:
        UnsupportedCall: for an output that was not made while the model was wrapped.
    """
    if output is None or getattr(output, "pooler_output", None) is None:
        return None
    encoded = output.get(_CARRIED) if isinstance(output, ModelOutput) else None
    if encoded is None:
        raise UnsupportedCall(
            f"mm_encoder_outputs[{kind!r}] was not made by this model while wrapped (or was sliced by chunked "
            "prefill): pass the pixels, encode while wrapped, and leave prefill_chunk_size out"
        )
    return encoded


def carry(output: ModelOutput, encoded: Encoded) -> None:
    """Let `encoded` travel on an encoder output: as an item, so that it survives a rebuild of the container."""
    output[_CARRIED] = encoded


def by_segment(rule: Rule, attention: BlockAttention, lengths: tuple[int, ...]) -> Tensor:
    """A rule on pictures or frames that share one sequence and do not see each other; runs of equal ones as a batch."""
    values, start = [], 0
    with kernels.exact(attention.query.device):
        if len(set(lengths)) > 1 and _spans_pay(rule, attention):
            return rule(replace(attention, spans=_spans_of(lengths, attention.query.device)))
        for length, run in itertools.groupby(lengths):
            count = len(list(run))
            stop = start + count * length
            query, key = (
                heads[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1)
                for heads in (attention.query, attention.key)
            )
            values.append(rule(replace(attention, query=query, key=key)).flatten(0, 1))
            start = stop
    return torch.cat(values)[None]


def _spans_pay(rule: Rule, attention: BlockAttention) -> bool:
    """Whether a rule should get all pictures in one call: only Triton leaves out what they would see of each other."""
    if attention.has_cls or not (isinstance(rule, OfAttention) and rule.spanning):
        return False
    requested = backends.requested_now()
    here = requested == "auto" and not host.holds(attention.query) and not backends.missing()
    return (here or requested == "triton") and attentions.fits_tiles(attention.query, attention.key)


def _spans_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """What each token sees, (N, 2), where pictures of these lengths share a sequence."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    tokens = torch.arange(sum(lengths), dtype=torch.int32, device=device)
    after = torch.searchsorted(bounds, tokens, right=True)
    return torch.stack([bounds[after - 1], bounds[after]], dim=1)
