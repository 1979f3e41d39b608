"""The shapes of `kernels.py`: those that the bounds were stated for, and smaller ones for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_cases import Case, Setting
from kernel_choices import RULES, choice_case
from kernel_rows import attention_case, cut_case, encoder_case, merge_case

NEXT = {"S": 8, "N": 2880, "K": 320, "D": 4096}
LONG = {"S": 1, "N": 16384, "K": 1638, "D": 4096}
PLAIN = {"S": 8, "N": 576, "K": 64, "D": 1024}
WIDE = {"S": 4, "N": 1024, "K": 113, "D": 1024}
LAYER = {"B": 1, "H": 16, "N": 4096, "d": 64}
SMALL_LAYER = {"B": 1, "H": 16, "N": 577, "d": 64}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case to be made: the kernel, its shape, and what `choice_case` wants to know besides."""

    kernel: str
    shape: Mapping[str, int]
    more: Mapping[str, Any] = field(default_factory=dict)

    def case(self, setting: Setting) -> Case:
        """The case, with nothing drawn yet."""
        if self.kernel in RULES:
            return choice_case(setting, self.kernel, self.shape, **self.more)
        if self.kernel.endswith("_attention"):
            return attention_case(setting, self.kernel, self.shape)
        make = {"cut_sequence": cut_case, "merge_rows": merge_case, "encoder-probe": encoder_case}
        return make[self.kernel](setting, self.shape)


def _long(kernel: str) -> Problem:
    more = {"faster": 10, "held": torch.bfloat16, "unheld": kernel == "mmr", "compiled": False}
    return Problem(kernel=kernel, shape=LONG, more=more)


PRESETS: dict[str, tuple[Problem, ...]] = {
    "gpu": (
        Problem(kernel="mmr", shape=NEXT, more={"faster": 20, "unheld": True}),
        Problem(kernel="k-center", shape=NEXT, more={"faster": 20, "compiled": False}),
        Problem(kernel="max-sum", shape=NEXT, more={"faster": 20, "compiled": False}),
        Problem(kernel="score-x-distance", shape=NEXT, more={"faster": 20, "compiled": False}),
        Problem(kernel="facility", shape=NEXT, more={"compiled": False}),
        Problem(kernel="dpp", shape=NEXT, more={"compiled": False}),
        _long("mmr"),
        _long("k-center"),
        Problem(kernel="cut_sequence", shape={"B": 8, "L": 2880, "K": 320, "D": 4096}),
        Problem(kernel="cut_sequence", shape={"B": 8, "L": 2880, "K": 1440, "D": 4096}),
        Problem(kernel="merge_rows", shape=NEXT),
        Problem(kernel="cls_attention", shape=LAYER),
        Problem(kernel="rows_attention", shape={"B": 1, "H": 32, "G": 8, "N": 4096, "R": 64, "d": 128}),
        Problem(kernel="received_attention", shape=LAYER),
        Problem(kernel="encoder-probe", shape={"B": 1, "layers": 24}),
        Problem(kernel="encoder-probe", shape={"B": 5, "layers": 24}),
    ),
    "cpu": (
        *(Problem(kernel=kernel, shape=PLAIN) for kernel in RULES),
        Problem(kernel="mmr", shape=WIDE),
        Problem(kernel="k-center", shape=WIDE),
        Problem(kernel="cut_sequence", shape={"B": 4, "L": 640, "K": 124, "D": 1024}),
        Problem(kernel="merge_rows", shape=PLAIN),
        Problem(kernel="cls_attention", shape=SMALL_LAYER),
        Problem(kernel="rows_attention", shape={"B": 1, "H": 16, "G": 4, "N": 577, "R": 40, "d": 64}),
        Problem(kernel="received_attention", shape=SMALL_LAYER),
        Problem(kernel="encoder-probe", shape={"B": 1, "layers": 2}),
    ),
}
DTYPES = {"gpu": torch.bfloat16, "cpu": torch.float32}
NAMES = list(dict.fromkeys(problem.kernel for problems in PRESETS.values() for problem in problems))
