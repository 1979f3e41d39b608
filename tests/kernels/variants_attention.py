"""Attention in Triton: the tiles that practice leads to. Tokens lie with their heads side by side."""

from __future__ import annotations

from typing import Any

from tests.kernels.variants import Variant

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
WIDTHS = (64, 72, 80, 128)
MASK = ("*u1", "i32", "i32", 1)
SPANS = ("*i32", "i32", 1)
WEIGHTS = ("*fp32", "i32", "i32", 1)


def variant(kernel: str, dtype: str, d: int, rows: int, types: dict[str, Any], **constants: Any) -> Variant:
    """One specialisation for heads of width d and so many rows for each; `types` go on where those of pairs end.

    Numbers in the tuples are constants, as Triton makes them of arguments that are 1.
    """
    from vtprune.kernels.triton_attention import tile_of

    tile = tile_of(d, rows, BYTES[dtype])
    warps = tile.pop("num_warps")
    heads = (f"*{dtype}", "i32", "i32", "i32", 1)
    types = {"query": heads, "key": heads, "scale": "fp32", **types}
    ones = {}
    for argument, (name, kind) in enumerate(types.items()):
        if isinstance(kind, tuple):
            ones.update({(argument, place): one for place, one in enumerate(kind) if one == 1})
            types[name] = tuple("constexpr" if one == 1 else one for one in kind)
    return Variant(
        module="triton_attention", kernel=kernel, types=types, constants={**tile, **constants, **ones}, warps=warps
    )


def walked(dtype: str, d: int, rows: int, spans: Any, sizes: Any = ("i32", 1, "i32", "i32")) -> list[Variant]:
    """What `attention_to` and `attention_from` launch."""
    statistics = {"allowed": None, "spans": spans, "sums": "*fp32"}
    ends = {"sizes": sizes, "chunk": "i32"}
    weighted = {"spans": spans, "sums": "*fp32", "weights": WEIGHTS, "out": "*fp32", "sizes": sizes}
    return [
        variant("exponentials", dtype, d, rows, {**statistics, "paid": None, **ends}),
        variant("exponentials", dtype, d, rows, {**statistics, "paid": "*fp32", **ends}),
        variant("columns", dtype, d, rows, weighted),
    ]


def attended(dtype: str, d: int, rows: int, chunks: int, allowed: Any, sizes: Any) -> list[Variant]:
    """What `rows_attention` launches, and without a mask `cls_attention`."""
    statistics = {"allowed": allowed, "spans": None, "sums": "*fp32", "paid": None, "sizes": sizes, "chunk": "i32"}
    weights = {"allowed": allowed, "sums": "*fp32", "out": "*fp32", "sizes": sizes}
    return [
        variant("exponentials", dtype, d, rows, statistics),
        variant("attend", dtype, d, rows, weights, CHUNKS=chunks),
    ]


PRACTICE = [("fp32", d) for d in WIDTHS] + [("bf16", d) for d in WIDTHS] + [("fp16", 64)]
ROWS = (
    (1, 32, ("i32", 1, 1, "i32")),
    (28, 8, ("i32", "i32", 1, "i32")),
    (60, 1, (1, 1, "i32", "i32")),
    (7 * 256, 4, ("i32", "i32", "i32", "i32")),
)
"""How many rows a key head serves, in how many chunks of keys, and what G, H / G, R and n are then."""

_ALONE = ("i32", 1, 1, "i32")

VARIANTS: list[Variant] = [
    *(found for spans in (None, SPANS) for found in walked("bf16", 64, 4096, spans)),
    *walked("bf16", 80, 577, SPANS),
    *walked("fp16", 64, 577, None),
    *walked("fp32", 64, 577, None),
    *(found for dtype in BYTES for found in attended(dtype, 64, 1, 2, None, sizes=_ALONE)),
    *(found for rows, chunks, sizes in ROWS[1:3] for found in attended("bf16", 128, rows, chunks, MASK, sizes)),
]
"""One of each kind."""

MORE: list[Variant] = [
    *(
        found
        for dtype, d in PRACTICE
        for rows in ((577,) if dtype == "fp32" else (577, 4096))
        for spans in (None, SPANS)
        for found in walked(dtype, d, rows, spans)
    ),
    *walked("fp32", 16, 1, None, sizes=(1, 1, 1, 1)),
    *(found for dtype, d in PRACTICE for found in attended(dtype, d, 1, 2, None, sizes=_ALONE)),
    *(
        found
        for dtype in BYTES
        for rows, chunks, sizes in ROWS
        for found in attended(dtype, 128, rows, chunks, MASK, sizes)
    ),
]
"""All that practice leads to: minutes for every target."""
