"""Trained stages: small networks whose weights are read from a safetensors file, and nothing else from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtprune.errors import InvalidOption
from vtprune.glances import RowStates
from vtprune.types import VisualTokens

Gate = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainedScorer:
    """A perceptron on the projected features, with GELU between its layers.

    The file holds `0.weight` (C, D), `0.bias` (C,), `1.weight` and so on, the last of one row; biases may be missing.

    Raises:
        InvalidOption: for a file that cannot be read or does not hold such layers, or was made for other features.
    """

    path: str

    def __post_init__(self) -> None:
        _ = self._layers

    @cached_property
    def _layers(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        return _read(self.path)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, tokens: VisualTokens) -> Tensor:
        hidden = tokens.features.float()
        for number, (weight, bias) in enumerate(self._layers):
            if hidden.shape[-1] != weight.shape[1]:
                raise InvalidOption(
                    f"{self.path} was trained on features of width {weight.shape[1]}, these have {hidden.shape[-1]}"
                )
            hidden = nn.functional.gelu(hidden) if number else hidden
            own = (None if part is None else part.to(hidden.device, non_blocking=True) for part in (weight, bias))
            hidden = nn.functional.linear(hidden, *own)  # type: ignore[arg-type]
        return hidden[..., 0]


@dataclass(frozen=True, kw_only=True)
class ExitGate:
    """A perceptron for each decoder layer that tells from text whether pictures may leave: DyVTE, arXiv 2411.19628.

    It sees the mean of the text behind the last picture but for its last token (zeros where there is no other), and
    that token. What it makes is the margin of staying over leaving: pictures leave where it is below 0.
    The file holds `layers.0.0.weight` (C, 2 D) and `layers.0.2.weight` (2, C), one row for staying and one for leaving,
    and so on for every layer, with GELU between the two and no biases.

    Raises:
        InvalidOption: for a file that cannot be read or does not hold such layers, or was made for another model.
    """

    name: ClassVar[str] = "exit_margin"
    path: str

    def __post_init__(self) -> None:
        _ = self._gates

    @cached_property
    def _gates(self) -> tuple[Gate, ...]:
        return _read_gates(self.path)

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, int], Gate]:
        """Gates on the devices that asked for them."""
        return {}

    def check(self, *, depth: int, width: int) -> None:
        """Raise `InvalidOption` where the gates are not those of so many layers of this width."""
        made = len(self._gates), self._gates[0][0].shape[1] / 2
        if made != (depth, width):
            raise InvalidOption(
                f"{self.path} holds gates of {made[0]} layers of width {made[1]:g}: this model has {depth} layers of "
                f"width {width}"
            )

    def __call__(self, seen: RowStates) -> Tensor:
        states = seen.entering.float()
        others = seen.real[:, :-1, None]
        mean = (states[:, :-1] * others).sum(dim=1) / others.sum(dim=1).clamp_min(1)
        first, second = self._gate(seen.number, states.device)
        hidden = nn.functional.gelu(torch.cat([mean, states[:, -1]], dim=1) @ first.float().T)
        stays, leaves = (hidden @ second.float().T).unbind(dim=1)
        return stays - leaves

    def _gate(self, number: int, device: torch.device) -> Gate:
        place = (device, number)
        if place not in self._placed:
            first, second = (weight.to(device, non_blocking=True) for weight in self._gates[number])
            self._placed[place] = (first, second)
        return self._placed[place]


def _tensors(path: str, what: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidOption(f"cannot read the {what} {path}: {error}") from error


def _read_gates(path: str) -> tuple[Gate, ...]:
    tensors = _tensors(path, "gate")
    count = len(tensors) // 2
    names = [(f"layers.{number}.0.weight", f"layers.{number}.2.weight") for number in range(count)]
    if not count or tensors.keys() != {name for pair in names for name in pair}:
        raise InvalidOption(
            f"{path} holds {', '.join(sorted(tensors)[:6])}: expected layers.0.0.weight, layers.0.2.weight, "
            "layers.1.0.weight, …"
        )
    gates = tuple((tensors[first], tensors[second]) for first, second in names)
    width = gates[0][0].shape[-1] if gates[0][0].ndim else 0
    for first, second in gates:
        fits = first.ndim == second.ndim == 2 and first.shape[1] == width and second.shape == (2, first.shape[0])
        if not fits or width % 2:
            raise InvalidOption(
                f"a gate of {path} has weights {tuple(first.shape)} and {tuple(second.shape)}: expected (C, {width}) "
                "and (2, C), of an even width that all share"
            )
    return gates


def _read(path: str) -> tuple[tuple[Tensor, Tensor | None], ...]:
    tensors = {name: tensor.float() for name, tensor in _tensors(path, "scorer").items()}
    count = sum(name.endswith(".weight") for name in tensors)
    wanted = {f"{number}.weight" for number in range(count)}
    if not count or not wanted <= tensors.keys() <= wanted | {f"{number}.bias" for number in range(count)}:
        raise InvalidOption(f"{path} holds {', '.join(sorted(tensors)[:6])}: expected 0.weight, 0.bias, 1.weight, …")
    layers = tuple((tensors[f"{number}.weight"], tensors.get(f"{number}.bias")) for number in range(count))
    widths = [weight.shape[0] for weight, _ in layers[:-1]]
    if any(weight.ndim != 2 for weight, _ in layers) or widths != [weight.shape[1] for weight, _ in layers[1:]]:
        raise InvalidOption(f"the layers of {path} do not fit each other")
    if any(bias is not None and bias.shape != weight.shape[:1] for weight, bias in layers):
        raise InvalidOption(f"biases of {path} do not fit their layers")
    if layers[-1][0].shape[0] != 1:
        raise InvalidOption(f"the last layer of {path} gives {layers[-1][0].shape[0]} numbers: expected one score")
    return layers
