"""What is compiled of the kernels that choose step by step."""

from __future__ import annotations

from collections.abc import Iterable

from tests.kernels.variants import Variant

_SIZES = {1024: 4, 4096: 16, 16384: 32}
"""Blocks that hold a picture, and the warps that share one."""
_FRESH = {"M": 1, "DONE": 1}
"""Where nothing was taken before: Triton makes constants of arguments that are 1."""


def _types(fp32: Iterable[str], i64: Iterable[str], i32: Iterable[str]) -> dict[str, str]:
    """Types by argument: pointers to fp32 and to i64, and numbers."""
    return {**dict.fromkeys(fp32, "*fp32"), **dict.fromkeys(i64, "*i64"), **dict.fromkeys(i32, "i32")}


def _greedy(dtype: str, block: int, *, total: bool = False, pairwise: bool = False, fresh: bool = True) -> Variant:
    types = _types(["worth"], ["seeds", "chosen"], ["N", "K"])
    given = None if pairwise else "*fp32"
    return Variant(
        module="triton_greedy",
        kernel="_greedy",
        types={
            "table": dtype,
            **dict.fromkeys(("inverse", "relevance", "slopes"), given),
            **types,
            **({} if fresh else dict.fromkeys(("M", "DONE"), "i32")),
        },
        constants={"BLOCK": block, "SUM": total, "PAIRWISE": pairwise, **(_FRESH if fresh else {})},
        warps=_SIZES[block],
    )


def _look(dtype: str, *, total: bool) -> Variant:
    fp32, i64 = ["inverse", "relevance", "weight", "worth", "values"], ["best", "indices"]
    return Variant(
        module="triton_unheld",
        kernel="_look",
        types={"features": dtype, **_types(fp32, i64, ["N", "D", "PARTS"])},
        constants={"ROWS": 32, "CHANNELS": 128, "SUM": total},
    )


def _facility(block: int) -> list[Variant]:
    fp32 = ["table", "inverse", "salience", "covered", "bound"]
    gains = Variant(
        module="triton_facility",
        kernel="_gains",
        types=_types(fp32, [], ["N"]),
        constants={"BLOCK": block},
        warps=_SIZES[block],
    )
    steps = Variant(
        module="triton_facility",
        kernel="_facility",
        types=_types(fp32, ["chosen"], ["N", "K"]),
        constants={"BLOCK": block},
        warps=_SIZES[block],
    )
    return [gains, steps]


def _determinantal(block: int, steps: int) -> Variant:
    fp32 = ["table", "inverse", "relevance", "factor"]
    return Variant(
        module="triton_dpp",
        kernel="_determinantal",
        types={**_types(fp32, ["taken", "chosen"], ["N", "K", "M"]), "barred": "*i8", "novel": "fp32"},
        constants={"BLOCK": block, "STEPS": steps},
        warps=max(8, _SIZES[block]),
    )


VARIANTS = [
    *(_greedy("*fp32", block) for block in (1024, 4096)),
    _greedy("*bf16", 4096),
    _greedy("*fp32", 4096, total=True),
    _greedy("*fp32", 4096, pairwise=True),
    _greedy("*fp32", 4096, fresh=False),
    *(
        Variant(
            module="triton_greedy",
            kernel="_farthest",
            types={"table": dtype, **_types(["inverse", "found"], [], ["N", "begin", "ROWS"])},
            constants={"BLOCK": 1024},
        )
        for dtype in ("*fp32", "*bf16")
    ),
    Variant(
        module="triton_unheld",
        kernel="_take",
        types=_types(["values"], ["indices", "chosen", "best", "count"], ["K", "PARTS"]),
        constants={"BLOCK": 512},
    ),
    *(_look(dtype, total=total) for dtype in ("*fp32", "*bf16", "*fp16") for total in (False, True)),
    *(variant for block in (1024, 4096, 16384) for variant in _facility(block)),
    _determinantal(1024, 8),
    _determinantal(4096, 8),
    _determinantal(16384, 2),
]
