"""What `kernels.py` measures, as values: a case is a kernel on inputs of one shape, and the ways to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "ours"
LETTERS = ("S", "B", "L", "N", "K", "D", "H", "G", "R", "d", "layers")
Inputs = dict[str, Any]


class Disagreement(RuntimeError):
    """Arms that are to say the same do not: their times mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a case is measured: `compiled` adds torch.compile, `bounded` what the times are to stay within."""

    device: str
    dtype: torch.dtype
    backend: str = "auto"
    compiled: bool = False
    bounded: bool = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an arm cannot do without: `bytes` read and written, `operations` of products."""

    bytes: float = 0.0
    operations: float = 0.0

    def floor_ms(self, bytes_per_ms: float, operations_per_ms: float) -> tuple[float, str]:
        """The least that this takes, and which of the two it is."""
        return max((self.bytes / bytes_per_ms, "bytes"), (self.operations / operations_per_ms, "operations"))


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a number of a row is to be at most, or at least."""

    column: str
    sign: str
    value: float | int

    def __str__(self) -> str:
        return f"{self.column} {self.sign} {self.value if isinstance(self.value, int) else format(self.value, 'g')}"

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether it is so."""
        found = float(row[self.column])
        return found >= self.value if self.sign == ">=" else found <= self.value


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to run a kernel on some inputs; its time is divided by that of the arm `over`.

    `around` is entered outside of the clock.
    """

    name: str
    run: Callable[[Inputs], Any]
    over: str = OURS
    work: Work | None = None
    bounds: tuple[Bound, ...] = ()
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel, its shape by letters, how inputs are drawn, and its arms, `ours` among them.

    `check` raises `Disagreement` where arms differ; it gets one set of the inputs. `agreement` tells, of the same, the
    share of the tokens of the reference that an arm chooses too.
    """

    kernel: str
    letters: Mapping[str, int]
    dtype: torch.dtype
    draw: Callable[[torch.Generator], Inputs]
    arms: tuple[Arm, ...]
    check: Callable[[Inputs], None]
    agreement: Callable[[Inputs, Arm], float] | None = None

    @property
    def shape(self) -> str:
        """As a line tells it."""
        return " ".join(f"{letter}={value}" for letter, value in self.letters.items())

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def bounds(setting: Setting, *wanted: tuple[str, str, float]) -> tuple[Bound, ...]:
    """Bounds as (column, sign, value), where the setting is one that they were stated for."""
    return tuple(Bound(column=c, sign=s, value=v) for c, s, v in wanted) if setting.bounded else ()


def specification(kernel: Any) -> Callable[..., Any]:
    """A kernel in plain PyTorch, whatever backend is chosen."""
    return getattr(kernel, "specification", kernel)


def same_numbers(ours: Tensor, other: Tensor, what: str, *, off: float = 2e-2) -> None:
    """Raise `Disagreement` where numbers are further apart than the largest of them times `off`."""
    apart = float((ours.float() - other.float()).abs().max())
    if apart > off * float(other.float().abs().max()):
        raise Disagreement(f"{what}: arms are {apart:.3g} apart, of numbers up to {float(other.abs().max()):.3g}")
