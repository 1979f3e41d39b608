"""The arms of `prefill.py`, and the calls that they time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from shapes import IMAGE, TEXT_AFTER, TEXT_BEFORE, Shape, build_inputs, build_model, build_positions
from timing import clock_ms
from torch import Tensor, nn

import vtprune
from vtprune.runtime.encoded import carried

BOUND_KEEP, MOST_OVER_ORACLE, MOST_OVER_ENCODER = 0.11, 1.03, 1.02


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A call to be timed, and the key of the one it is held against (its own where there is none)."""

    name: str
    method: str = ""
    keep: float = 1.0
    against: str = ""
    bound: float | None = None

    @property
    def key(self) -> str:
        """A name that no other arm has."""
        plain = self.keep == 1.0 and not self.method
        return " ".join(filter(None, [self.name, self.method, "" if plain else str(self.keep)]))


def plan(shape: Shape, methods: list[str], keeps: list[float]) -> dict[str, Arm]:
    """Every arm by its key."""
    arms = [Arm(name="unwrapped"), Arm(name="unwrapped+encoder"), *(Arm(name="oracle", keep=keep) for keep in keeps)]
    for method in methods:
        for keep in (1.0, *keeps):
            most = MOST_OVER_ORACLE if shape.bounded and keep == BOUND_KEEP else None
            whole = keep == 1.0
            against = "unwrapped" if whole else Arm(name="oracle", keep=keep).key
            arms.append(Arm(name="wrapped", method=method, keep=keep, against=against, bound=most))
            arms.append(Arm(name="wrapped+encoder", method=method, keep=keep, against="unwrapped+encoder"))
            if shape.bounded and not whole:
                other = Arm(name="oracle first token", keep=keep).key
                arms.append(Arm(name="first token", method=method, keep=keep, against=other, bound=most))
        if shape.bounded:
            probe = Arm(name="encoder probe", method=method, keep=keeps[0], against="encoder", bound=MOST_OVER_ENCODER)
            arms.append(probe)
    if shape.bounded:
        arms += [Arm(name="encoder"), *(Arm(name="oracle first token", keep=keep) for keep in keeps)]
    return {arm.key: arm if arm.against else replace(arm, against=arm.key) for arm in arms}


class Calls:
    """The calls of the arms; each sets itself up outside of the clock."""

    def __init__(
        self,
        shape: Shape,
        methods: list[str],
        keeps: list[float],
        device: str,
        dtype: torch.dtype,
        backend: str = "auto",
    ) -> None:
        self._backend = backend
        self.model: nn.Module = build_model(shape, device, dtype)
        self.device = device
        inputs = build_inputs(shape, device, dtype)
        self._positions = build_positions(self.model, inputs)
        self._ids = inputs.pop("input_ids")
        self._picture = inputs
        sizes = inputs.get("image_grid_thw", inputs.get("image_sizes", torch.zeros(0, 2)))
        self._sizes = tuple(tuple(row) for row in sizes.tolist())
        self._lengths: dict[tuple[str, float], int] = {}
        self._encoded = {method: self._encode_for(method, keeps[0]) for method in methods}
        self._features = self._encode().pooler_output[0]
        self._short = {keep: self._shortened(self._length("random", keep)) for keep in keeps}

    def _pruning(self, method: str, keep: float) -> AbstractContextManager[Any]:
        return vtprune.pruning(self.model, method, keep=keep, backend=self._backend)

    def timed(self, arm: Arm) -> float:
        """Milliseconds of one call."""
        call = self._call(arm)
        with self._pruning(arm.method, arm.keep) if arm.method else nullcontext():
            return clock_ms(self.device, call)

    def tokens(self, arm: Arm) -> int:
        """Length of the prompt that the last decoder layer sees."""
        if arm.method:
            return self._length(arm.method, arm.keep)
        short = self._short.get(arm.keep)
        return int((self._ids if short is None else short["input_ids"]).shape[1])

    def _call(self, arm: Arm) -> Callable[[], Any]:
        calls: dict[str, Callable[[], Any]] = {
            "unwrapped": self._prefill,
            "unwrapped+encoder": self._whole,
            "oracle": lambda: self._oracle(arm.keep, self._features),
            "oracle first token": lambda: self._oracle(arm.keep, self._encode().pooler_output[0]),
            "wrapped": lambda: self._prefill(arm.method),
            "wrapped+encoder": self._whole,
            "first token": lambda: self._prefill(arm.method, self._encode()),
            "encoder": self._encode,
            "encoder probe": self._read,
        }
        return calls[arm.name]

    def _encode(self) -> Any:
        return self.model.model.get_image_features(**self._picture, return_dict=True)

    def _encode_for(self, method: str, keep: float) -> Any:
        """Encode while wrapped, so that evidence travels with the features."""
        with self._pruning(method, keep):
            return self._encode()

    def _read(self) -> None:
        """Encode, and work out what is read of the encoder."""
        encoded = carried("image", self._encode())
        assert encoded is not None
        for name in encoded.readings:
            encoded.read(name, encoded.on_host(self._sizes, None))

    def _prefill(self, method: str = "", encoded: Any = None) -> Any:
        if encoded is None:
            encoded = self._encoded[method or next(iter(self._encoded))]
        return self._forward(input_ids=self._ids, mm_encoder_outputs={"image": encoded}, **self._positions)

    def _whole(self) -> Any:
        return self._forward(input_ids=self._ids, **self._picture, **self._positions)

    def _oracle(self, keep: float, features: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        short = self._short[keep]
        kept = int(short["input_ids"].shape[1]) - TEXT_BEFORE - TEXT_AFTER
        given = BaseModelOutputWithPooling(pooler_output=[features[:kept]])
        return self._forward(mm_encoder_outputs={"image": given}, **short)

    def _forward(self, **given: Any) -> Any:
        return self.model(**given, use_cache=True, logits_to_keep=1)

    def _length(self, method: str, keep: float) -> int:
        """Tokens of the prompt that a method leaves."""
        if (method, keep) not in self._lengths:
            with self._pruning(method, keep) as pruner:
                self._prefill(method, None if method in self._encoded else self._encode())
                self._lengths[method, keep] = pruner.last.length_after[0]
        return self._lengths[method, keep]

    def _shortened(self, length: int) -> dict[str, Tensor]:
        """The prompt with so many of its tokens, all of the text and evenly spaced placeholders."""
        places = torch.arange(self._ids.shape[1], device=self._ids.device)
        visual = places[self._ids[0] == IMAGE]
        kept = length - TEXT_BEFORE - TEXT_AFTER
        even = torch.arange(kept, device=places.device) * len(visual) // kept
        stays = torch.cat([places[self._ids[0] != IMAGE], visual[even]]).sort().values
        short = {"input_ids": self._ids[:, stays]}
        return short | {name: ids[..., stays] for name, ids in self._positions.items()}
