"""Compile kernels for targets that need not be there: `python -m tests.kernels.compile_variants TARGET [SET]`.

Run in a process of its own, where Triton does not interpret. Prints a line for each variant of a set, `core` or `more`,
and fails with the first that does not compile.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tests.kernels import variants_attention, variants_choice, variants_rows
from tests.kernels.variants import TARGETS, Variant

_MOST_THREADS = 1024
SETS: dict[str, list[Variant]] = {
    "core": [*variants_rows.VARIANTS, *variants_choice.VARIANTS, *variants_attention.VARIANTS],
    "more": variants_attention.MORE,
}


def compiled(variant: Variant, target: str) -> Any:
    """The variant for a target, as Triton hands it over."""
    kernel = getattr(importlib.import_module(f"vtprune.kernels.{variant.module}"), variant.kernel)
    absent = {name: None for name, kind in variant.types.items() if kind is None}
    constants = {**variant.constants, **absent}
    types = {**variant.types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned(signature))
    warps = min(variant.warps, _MOST_THREADS // TARGETS[target][2])
    return compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps})


def aligned(kinds: Mapping[str, Any] | Sequence[Any], path: tuple[int, ...] = ()) -> dict[tuple[int, ...], Any]:
    """That all pointers and sizes are multiples of 16, as they mostly are: loads get wider, and share more memory."""
    found: dict[tuple[int, ...], Any] = {}
    for number, kind in enumerate(kinds.values() if isinstance(kinds, Mapping) else kinds):
        own = (*path, number)
        if isinstance(kind, tuple):
            found |= aligned(kind, own)
        elif kind == "i32" or str(kind).startswith("*"):
            found[own] = [["tt.divisibility", 16]]
    return found


def main() -> None:
    """Compile all variants of a set."""
    target, name = sys.argv[1:]
    for variant in SETS[name]:
        found = compiled(variant, target)
        binary = found.asm["hsaco" if TARGETS[target][0] == "hip" else "cubin"]
        print(f"{len(binary)} bytes, {found.metadata.shared} shared: {variant}", flush=True)


if __name__ == "__main__":
    main()
