"""What is compiled ahead of time: a kernel, the types of its arguments, and its constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Ampere, Hopper, Blackwell, and AMD's CDNA 3."""
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""The most memory that the threads of a program may share on each."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One specialisation: `module` of `vtprune.kernels`, `kernel` in it, types by argument, constants, and `warps`.

    A type is as Triton writes it, `"*bf16"` for a pointer; `None` says that the argument is given as None.
    """

    module: str
    kernel: str
    types: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in {**self.types, **self.constants}.items())
        return f"{self.module}.{self.kernel}({settings}; {self.warps} warps)"
