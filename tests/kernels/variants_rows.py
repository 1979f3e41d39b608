"""What is compiled of `triton_rows`."""

from __future__ import annotations

from tests.kernels.variants import Variant

_ALONG = ("i32", "i32", "i32", "constexpr", "i32", "i32", "constexpr")
"""Width, and steps of the source and of the target; those from channel to channel are 1."""


def _cut(types: tuple[str, ...], blocks: tuple[int, ...], *, padded: bool) -> Variant:
    """Tensors of these types, as integers of their size, that go together."""
    ones = {(2, number, step): 1 for number in range(len(types)) for step in (3, 6)}
    return Variant(
        module="triton_rows",
        kernel="_cut",
        types={
            "sources": types,
            "targets": types,
            "shapes": (_ALONG,) * len(types),
            "indices": "*i64",
            "valid": "*i8" if padded else "*i64",
            "K": "i32",
        },
        constants={"PADDED": padded, "COUNT": len(types), "BLOCKS": blocks, **ones},
    )


def _merge(dtype: str) -> Variant:
    return Variant(
        module="triton_rows",
        kernel="_merge",
        types={
            "features": dtype,
            **{name: "*i64" for name in ("order", "begins")},
            **{name: "*fp32" for name in ("weights", "merged")},
            **{name: "i32" for name in ("N", "K", "D", "step_s", "step_n")},
        },
        constants={"BLOCK": 1024, "step_d": 1},
    )


VARIANTS = [
    _cut(("*i16", "*i64"), (2048, 4), padded=False),
    _cut(("*i16", "*i64", "*i8", "*i16"), (2048, 4, 1, 2048), padded=True),
    _cut(("*i32",), (1024,), padded=False),
    *(_merge(dtype) for dtype in ("*fp32", "*bf16", "*fp16")),
]
