"""What the encoder leaves for the cut: it travels on the object that `get_*_features` returns.

Inside `generate`, pictures are encoded before the loop and grids never reach `forward`; the returned object does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from vtprune.adapters.base import Encoding, Probe
from vtprune.errors import UnsupportedCall
from vtprune.kernels import reference as kernels
from vtprune.report import Stopwatch
from vtprune.types import Modality

_CARRIED = "vtprune_encoded"


@dataclass(kw_only=True)
class PendingScores:
    """Scores that wait for the lengths of the pictures, which come to the host with the layout.

    Holds the queries and keys (1, H, N, d) of one attention until then.
    """

    query: Tensor | None
    key: Tensor | None
    probe: Probe
    scores: Tensor | None = None

    @torch.no_grad()
    def resolve(self, encoding: Encoding) -> Tensor:
        """Scores (1, N); queries and keys are let go."""
        if self.scores is None:
            assert self.query is not None and self.key is not None and self.probe.segments is not None
            self.scores = score(self.probe, self.query, self.key, self.probe.segments(encoding))
            self.query = self.key = None
        return self.scores


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one call of the encoder leaves for the cut. `sizes` and `scores` stay on their device.

    `scores` (rows, N) are the raw probe scores, perhaps still pending, None where no probe was installed; `evidence`
    names them.
    """

    kind: Modality
    lengths: tuple[int, ...]
    stacked: bool
    pixels: tuple[int, ...]
    sizes: Tensor | None
    pictures_per_prompt: Tensor | None
    scores: Tensor | PendingScores | None
    evidence: str | None
    stopwatch: Stopwatch

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


def score(probe: Probe, query: Tensor, key: Tensor, segments: tuple[int, ...] | None) -> Tensor:
    """Scores (B, N) of queries and keys (B, H, N, d) by the rule of the probe."""
    with kernels.exact(query.device):
        rows: Literal["cls", "received"] = "cls" if probe.has_cls else "received"
        return kernels.attention_scores(query, key, scale=probe.scale, rows=rows, segments=segments)
