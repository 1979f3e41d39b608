"""Checks, of parameters and of what stages return: each raises with what was got and what was expected."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from vtprune.errors import InvalidOption, UnsupportedCall


def check_share(name: str, value: object, *, above: float | None = None, below: float | None = None) -> None:
    """`value` must be a number in [0, 1], without the end that `above` or `below` names."""
    inside = isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1
    if not inside or value in (above, below):
        ends = ("(" if above == 0 else "[") + "0, 1" + (")" if below == 1 else "]")
        raise InvalidOption(f"{name}={value!r}: expected a number in {ends}")


def check_positive(name: str, value: object, *, zero: bool = False) -> None:
    """`value` must be a finite number above 0, or 0 where that is allowed."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    if not number or float(value) < 0 or (float(value) == 0 and not zero):  # type: ignore[arg-type]
        raise InvalidOption(f"{name}={value!r}: expected a number {'of 0 or more' if zero else 'above 0'}")


def check_switch(name: str, value: object) -> None:
    """`value` must be True or False."""
    if not isinstance(value, bool):
        raise InvalidOption(f"{name}={value!r}: expected True or False")


def check_whole(name: str, value: object, *, least: int | None = None) -> None:
    """`value` must be a whole number, not below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        raise InvalidOption(
            f"{name}={value!r}: expected a whole number" + ("" if least is None else f" from {least} on")
        )


def check_returned(who: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise `UnsupportedCall` where a stage returned something else than a tensor of this shape and dtype."""
    if not isinstance(tensor, Tensor) or tensor.shape != shape or dtype not in (None, tensor.dtype):
        wanted = f"a tensor {tuple(shape)}" + (f" of {dtype}" if dtype is not None else "")
        got = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UnsupportedCall(f"{who} returned {got}: expected {wanted}")


def check_descending(name: str, values: object, count: int) -> None:
    """`values` must be so many shares in (0, 1), none above the one before it."""
    given = list(values) if isinstance(values, (tuple, list)) else []
    shares = [float(value) for value in given if isinstance(value, Real) and not isinstance(value, bool)]
    inside = len(shares) == len(given) == count and all(0 < share < 1 for share in shares)
    if not inside or shares != sorted(shares, reverse=True):
        raise InvalidOption(f"{name}={values!r}: expected {count} shares in (0, 1), none above the one before it")
