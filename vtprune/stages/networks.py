"""Trained scorers: small networks whose weights are read from a safetensors file, and nothing else from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtprune.errors import InvalidOption
from vtprune.types import VisualTokens


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


def _read(path: str) -> tuple[tuple[Tensor, Tensor | None], ...]:
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise InvalidOption(f"cannot read the scorer {path}: {error}") from error
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
