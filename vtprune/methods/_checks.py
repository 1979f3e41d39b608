"""Checks of method parameters; each raises `InvalidOption` with what was got and what was expected."""

from __future__ import annotations

from numbers import Integral, Real

from vtprune.errors import InvalidOption


def check_share(name: str, value: object) -> None:
    """`value` must be a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InvalidOption(f"{name}={value!r}: expected a number in [0, 1]")


def check_whole(name: str, value: object) -> None:
    """`value` must be a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidOption(f"{name}={value!r}: expected a whole number")
