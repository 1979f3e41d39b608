"""What was pruned, and what it cost and saved. Tensors stay on their device until somebody asks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedCall
from vtprune.types import Modality, Part

DROPPED, PROTECTED = -2, -1
NOT_FINITE = (
    "{} of the pictures hold NaN or infinity: nothing can be chosen by them. Look at the pixels, or run the "
    "encoder in a wider dtype (bfloat16 or float32 instead of float16)"
)


class Stopwatch:
    """Seconds per named part: by CUDA events where the work runs on a GPU, read when asked for, else by the clock.

    To be used where nothing is compiled.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: dict[str, Any] = {}

    def measure(self, part: str, *, like: nn.Module | Tensor) -> _Measured:
        """Add the time of the block to `part`; `like` tells the device."""
        return _Measured(self, part, like)

    def start(self, part: str, *, like: nn.Module | Tensor) -> None:
        """Begin to time `part`."""
        device = like.device if isinstance(like, Tensor) else next(like.parameters()).device
        self._open[part] = _cuda_event() if device.type == "cuda" else time.perf_counter()

    def stop(self, part: str) -> None:
        """Add the time since `start` to `part`; nothing where it was not started."""
        begin = self._open.pop(part, None)
        if begin is None:
            return
        if isinstance(begin, float):
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - begin
        else:
            self._events.append((part, begin, _cuda_event()))

    def absorb(self, other: Stopwatch) -> None:
        """Take over what another stopwatch measured."""
        for part, seconds in other._seconds.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds
        self._events += other._events

    def seconds(self) -> dict[str, float]:
        """Seconds per part; waits for the GPU where events are pending."""
        total = dict(self._seconds)
        for part, begin, end in self._events:
            end.synchronize()
            total[part] = total.get(part, 0.0) + begin.elapsed_time(end) / 1000
        return total


class _Measured:
    """A block that a stopwatch measures."""

    def __init__(self, stopwatch: Stopwatch, part: str, like: nn.Module | Tensor) -> None:
        self._stopwatch = stopwatch
        self._part = part
        self._like = like

    def __enter__(self) -> None:
        self._stopwatch.start(self._part, like=self._like)

    def __exit__(self, *error: object) -> None:
        self._stopwatch.stop(self._part)


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentReport:
    """One picture or clip: `stages` (n,) says which pick took each token (-1 protected, -2 dropped).

    `into` (n,), where the method merges, says which token took each over, -1 where it is lost; where pictures of a
    prompt share one budget, and parts none of their own, the tokens are counted through all of them. `held` (n,) then
    says how many tokens live in each, itself included, 0 where it was dropped.

    `depths` (n,), where the method cuts between decoder layers, is how many of these each token went through. `cached`
    (n,), where it cuts caches, is in how many layers each token is stored, heads that do not store it counted out.
    """

    row: int
    kind: Modality
    parts: tuple[Part, ...]
    stages: Tensor = field(repr=False)
    into: Tensor | None = field(default=None, repr=False)
    held: Tensor | None = field(default=None, repr=False)
    depths: Tensor | None = field(default=None, repr=False)
    cached: Tensor | None = field(default=None, repr=False)

    @property
    def n(self) -> int:
        """Tokens that could be pruned."""
        return self.stages.shape[0]

    @property
    def separators(self) -> int:
        """Newline, CLS and like tokens: always kept, counted apart."""
        return sum(len(part.separators) for part in self.parts)

    @cached_property
    def keep(self) -> Tensor:
        """Ascending indices of the kept tokens, on the CPU; separators are left out of the count."""
        return (self.stages > DROPPED).nonzero()[:, 0].cpu()

    @cached_property
    def taken(self) -> Tensor:
        """Which pick took each token of `keep` (-1: protected)."""
        return self.stages.cpu()[self.keep]

    @property
    def k(self) -> int:
        """Tokens kept."""
        return len(self.keep)

    @cached_property
    def sizes(self) -> Tensor:
        """How many tokens each of `keep` stands for, itself included, on the CPU: 1 where nothing is merged."""
        return torch.ones(self.k, dtype=torch.long) if self.held is None else self.held.cpu()[self.keep]

    @cached_property
    def merged(self) -> int:
        """Dropped tokens that live on in a kept one."""
        return 0 if self.into is None else int(((self.into >= 0) & (self.stages <= DROPPED)).sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        parts = [{"kind": p.kind, "grid": list(p.grid), "separators": len(p.separators)} for p in self.parts]
        counts = {"n": self.n, "k": self.k, "separators": self.separators}
        return {
            "row": self.row,
            "kind": self.kind,
            **counts,
            "parts": parts,
            "keep": self.keep.tolist(),
            "taken": self.taken.tolist(),
            **({} if self.depths is None else {"depths": self.depths.tolist()}),
            **({} if self.cached is None else {"cached": self.cached.tolist()}),
            **({} if self.into is None else {"into": self.into.tolist(), "sizes": self.sizes.tolist()}),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneReport:
    """One prefill: what was kept of each picture, the lengths, the bytes and the seconds.

    `adaptive`: what the pictures hold decided how many tokens stay; the budget was only the most.

    `importance` names the evidence behind attention-guided choices (`cls_attention`, `received_attention`) or is None.
    `attention` says what was changed in attention inside the language model, None where nothing was.
    `patches` counts those left of a picture or frame after each block of the encoder, where the method cuts there.
    `flops_before` and `flops_after` are estimates of the operations of the language model in the prefill, from lengths
    of the call: keys of earlier turns, and attention that is left out where layers attend to fewer, are not counted.
    `layers` is the number of decoder layers. `picks` are the names that `SegmentReport.taken` counts. `length_before`
    and `length_after` (in the last layer) are tokens per row, padding left out where there are pictures; without any,
    nothing is read from the device and it is counted in.
    `kv_bytes_saved` is bytes of keys and values, over all rows and layers, that a growing cache does not store (an
    upper bound where layers have a sliding window).
    """

    method: str
    family: str
    backend: str
    positions: str
    importance: str | None
    picks: tuple[str, ...]
    segments: tuple[SegmentReport, ...]
    length_before: tuple[int, ...]
    length_after: tuple[int, ...]
    kv_bytes_saved: int
    stopwatch: Stopwatch = field(compare=False, repr=False)
    adaptive: bool = False
    layers: int = 0
    attention: str | None = None
    patches: tuple[int, ...] = ()
    flops_before: int = 0
    flops_after: int = 0
    sound: Tensor | None = field(default=None, repr=False)

    @property
    def average(self) -> float:
        """Tokens that a decoder layer saw, on average over layers: `kept`, but for cuts between layers.

        Of methods that cut nothing but caches: tokens that a layer stored.
        """
        return sum(map(self.average_of, self.segments))

    def average_of(self, segment: SegmentReport) -> float:
        """The same of one picture or clip."""
        if segment.depths is not None:
            return int(segment.depths.sum()) / self.layers
        return segment.k if segment.cached is None else float(segment.cached.sum()) / self.layers

    def check(self) -> None:
        """Raise where features or evidence were not finite on a device that nothing waited for.

        On the CPU the call itself raised. `kept`, `to_dict` and `summary` look first.

        Raises:
            UnsupportedCall: where the choice means nothing.
        """
        if self.sound is not None and not self.sound:
            raise UnsupportedCall(NOT_FINITE.format("features or evidence"))

    @property
    def tokens(self) -> int:
        """Tokens that could be pruned, over all segments."""
        return sum(segment.n for segment in self.segments)

    @property
    def kept(self) -> int:
        """Tokens kept of them."""
        self.check()
        return sum(segment.k for segment in self.segments)

    @property
    def merged(self) -> int:
        """Dropped tokens that live on in kept ones."""
        return sum(segment.merged for segment in self.segments)

    @property
    def separators(self) -> int:
        """Newline, CLS and like tokens: kept and not counted in `tokens`."""
        return sum(segment.separators for segment in self.segments)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Measured seconds of `encode`, `layout`, `select`, `cut` and `prefill`."""
        return self.stopwatch.seconds()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; units: tokens, bytes, seconds."""
        return {
            "method": self.method,
            "family": self.family,
            "backend": self.backend,
            "positions": self.positions,
            "importance": self.importance,
            "attention": self.attention,
            "picks": list(self.picks),
            "tokens": self.tokens,
            "kept": self.kept,
            "merged": self.merged,
            "average": self.average,
            "flops_estimate": {"before": self.flops_before, "after": self.flops_after},
            "patches": list(self.patches),
            "separators": self.separators,
            "length_before": list(self.length_before),
            "length_after": list(self.length_after),
            "kv_bytes_saved": self.kv_bytes_saved,
            "adaptive": self.adaptive,
            "seconds": dict(self.seconds),
            "segments": [segment.to_dict() for segment in self.segments],
        }

    def write_jsonl(self, path: str | Path) -> None:
        """Append one line to `path`."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.to_dict()) + "\n")

    def summary(self) -> str:
        """One line for people."""
        if not self.segments:
            return f"{self.method}: no picture was given, nothing pruned"
        pictures = f"{len(self.segments)} picture{'s' if len(self.segments) > 1 else ''}"
        separators = f" (+{self.separators} separators)" if self.separators else ""
        saved = f"{self.kv_bytes_saved / 2**20:.2f} MiB of KV cache saved"
        merged = f", {self.merged} of the others merged into them" if self.merged else ""
        average = ""
        if any(segment.depths is not None for segment in self.segments):
            average = f" in the last layer, {self.average:.0f} on average over layers"
        elif any(segment.cached is not None for segment in self.segments):
            average = f", {self.average:.0f} of them in the KV cache of a layer"
        kept = f"kept {self.kept} of {self.tokens} tokens{separators} of {pictures}{merged}{average}"
        method = f"{self.method} (adaptive)" if self.adaptive else self.method
        edited = f", {self.attention}" if self.attention else ""
        dropped = ", nothing dropped" if edited and self.average == self.tokens else ""
        return f"{method} on {self.family}: {kept}{dropped}{edited}, {saved}"
