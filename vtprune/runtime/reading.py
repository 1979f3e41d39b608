"""Reading a prompt: which tokens are visual, what the encoder said about them. The one wait for the device is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vtprune.adapters.base import Encoding, Family
from vtprune.adapters.layout import build_layout
from vtprune.errors import MissingEvidence
from vtprune.kernels import reference as kernels
from vtprune.runtime.encoded import Encoded
from vtprune.types import Layout, Modality, Segment


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The visual side of a prefill: its layout, and what was encoded for it.

    `seen` counts the pictures of earlier turns per row, `asked` is how much of the prompt was not written by the model.
    """

    layout: Layout
    asked: int
    seen: tuple[int, ...]
    encodings: Mapping[Modality, Encoding]
    encoded: Mapping[Modality, Encoded]
    family: Family
    inner: nn.Module

    @property
    def pictures(self) -> np.ndarray:
        """Pictures (B,) of the conversation per row, those of this prompt included."""
        count = np.array(self.seen, dtype=np.int64)
        for segment in self.layout.segments:
            count[segment.row] += 1
        return count

    def read(self, name: str, device: torch.device) -> list[Tensor]:
        """A reading of the encoder, one (n, C) per segment, separators left out.

        Raises:
            MissingEvidence: where it was not taken.
        """
        mapped: dict[Modality, list[Tensor]] = {}
        for kind, encoding in self.encodings.items():
            found = self.encoded[kind].of_tokens(name, encoding, self.family, self.inner)
            if found is None:
                raise MissingEvidence(
                    f"the {kind} features of this call were encoded without reading {name!r}: encode them while the "
                    "model is wrapped with this method, or pass the pixels"
                )
            mapped[kind] = found
        return [_of_segment(segment, mapped[segment.kind]).to(device) for segment in self.layout.segments]


def read_prompt(
    *,
    ids: Tensor,
    valid: Tensor | None,
    seen: Tensor | None,
    encoded: Mapping[Modality, Encoded],
    tokens: Mapping[Modality, int | None],
    family: Family,
    inner: nn.Module,
) -> Prompt:
    """Bring ids (B, L), mask, sizes and the count `seen` (B,) to the host in one copy, and lay the pictures out.

    Raises:
        UnsupportedCall: where placeholders and features do not match.
    """
    wanted = [tensor for tensor in (ids, valid, seen) if tensor is not None]
    for entry in encoded.values():
        wanted += [t for t in (entry.sizes, entry.pictures_per_prompt) if t is not None]
    arrays = iter(_to_host(wanted))
    host_ids = next(arrays)
    host_valid = np.ones(host_ids.shape, dtype=bool) if valid is None else next(arrays).astype(bool)
    host_seen = (0,) * len(host_ids) if seen is None else tuple(int(x) for x in next(arrays))
    encodings: dict[Modality, Encoding] = {}
    for kind, entry in encoded.items():
        sizes = () if entry.sizes is None else tuple(tuple(int(x) for x in row) for row in next(arrays))
        pictures = None if entry.pictures_per_prompt is None else tuple(int(x) for x in next(arrays).reshape(-1))
        encodings[kind] = entry.on_host(sizes, pictures)
    layout = build_layout(
        ids=host_ids, valid=host_valid, tokens=tokens, encodings=encodings, family=family, inner=inner
    )
    asked = max(entry.asked_length(host_ids) for entry in encoded.values())
    return Prompt(
        layout=layout, asked=asked, seen=host_seen, encodings=encodings, encoded=encoded, family=family, inner=inner
    )


def placeholders_in(embeds: Tensor, lookup: nn.Module, tokens: list[int]) -> Tensor:
    """Ids (B, L) of the placeholders among embeddings (B, L, D), -1 elsewhere."""
    ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
    for token in tokens:
        row = lookup(torch.full((), token, device=embeds.device))
        ids = ids.masked_fill((embeds == row).all(dim=-1), token)
    return ids


def _to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    device = tensors[0].device
    flat = kernels.joined([tensor.reshape(-1).to(device, torch.int64) for tensor in tensors]).cpu().numpy()
    arrays, start = [], 0
    for tensor in tensors:
        stop = start + tensor.numel()
        arrays.append(flat[start:stop].reshape(tensor.shape))
        start = stop
    return arrays


def _of_segment(segment: Segment, mapped: list[Tensor]) -> Tensor:
    rows = kernels.joined([mapped[entry] for entry in segment.entries])
    if segment.separators == 0:
        return rows
    offsets = np.concatenate([part.candidates for part in segment.parts])
    return rows[torch.from_numpy(offsets).to(rows.device, non_blocking=True)]
