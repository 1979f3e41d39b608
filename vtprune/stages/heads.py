"""Classes of heads by what tokens of pictures attend to in prompts with several: BlindSight, arXiv 2507.09071."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import InvalidOption

CLASSES = ("sink", "intra", "intra+sink", "dense")
"""What tokens of a picture see besides text: sinks, their own picture, both, or everything."""


@dataclass(frozen=True, kw_only=True)
class HeadMasks:
    """Masks of heads by their class, for tokens of pictures in a prefill with several.

    Sinks are the first token of the prompt and the ones in front of each picture and behind it. Tokens of text, and
    prompts with one picture, see all they would. The mask (B, H, n, n) is there as a whole: the attention of PyTorch
    takes as long with it as without. A kernel that skips what is hidden (FlexAttention) would save that time.

    Args:
        classes: for every layer, the class of every head: one of `CLASSES`.
    """

    name: ClassVar[str] = "pictures masked from each other"
    of: ClassVar[Literal["mask"]] = "mask"
    classes: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.classes is None:
            return
        if not isinstance(self.classes, tuple) or not all(isinstance(layer, tuple) and layer for layer in self.classes):
            raise InvalidOption(f"classes={self.classes!r}: expected a tuple with a tuple of names for every layer")
        wrong = sorted({str(name) for layer in self.classes for name in layer if name not in CLASSES})
        if wrong:
            raise InvalidOption(f"classes: {', '.join(wrong)}: expected {', '.join(CLASSES)}")

    @property
    def neutral(self) -> bool:
        """Whether nothing is hidden."""
        names = {name for layer in self.classes or () for name in layer}
        return names == {"dense"}

    def __call__(self, name: str, rows: Tensor, keys: Tensor, sinks: Tensor) -> Tensor:
        seen = (rows < 0)[:, :, None] | ((keys < 0) & ~sinks)[:, None]
        if name == "dense":
            return torch.ones_like(seen)
        if name != "sink":
            seen = seen | (rows[:, :, None] == keys[:, None])
        return seen if name == "intra" else seen | sinks[:, None]
