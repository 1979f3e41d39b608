"""The cases of `kernels.py` that choose tokens: greedily, by a determinantal point process, by facility location."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import step_loops
import torch
from kernel_cases import OURS, Arm, Case, Disagreement, Inputs, Setting, Work, bounds, specification
from torch import Tensor

from vtprune.kernels import backends, greedy

LOOP, REFERENCE, COMPILED, UNHELD = "per-step loop", "reference", "torch.compile of the reference", "ours, none held"
SMALL = {"S": 3, "N": 48, "K": 6, "D": 64}
"""The shape on which all arms must choose alike."""
CLEAR = 4e-3
"""The least lead of each choice there: more than what rounding similarities to bf16 can take away."""
LEAST_AGREED = 0.9
"""What share of the tokens of the reference ours are at least, on random inputs, similarities in fp32."""
DRAWS = 20_000
UNHELD_BYTES_PER_TOKEN = 64
"""What O(N) memory comes to at most."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to choose: the kernel, its arguments from the inputs, the loop, and whether it needs all similarities."""

    kernel: Any
    arguments: Callable[[Inputs], tuple[tuple[Any, ...], dict[str, Any]]]
    loop: Callable[..., Tensor]
    all_pairs: bool = False
    holds: bool = True


def _mmr(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    relevance = inputs["half"]
    return (inputs["features"], relevance, relevance, inputs["K"]), {"weight": 0.5}


def _k_center(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (inputs["features"], inputs["nothing"], None, inputs["K"]), {}


def _max_sum(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (inputs["features"], inputs["nothing"], inputs["relevance"], inputs["K"]), {"reduce": "sum"}


def _product(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    relevance = inputs["relevance"]
    return (inputs["features"], relevance, relevance, inputs["K"]), {"weight": relevance}


def _scored(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (inputs["features"], inputs["relevance"], inputs["K"]), {}


RULES = {
    "mmr": Rule(kernel=greedy.greedy_select, arguments=_mmr, loop=step_loops.mmr),
    "k-center": Rule(kernel=greedy.greedy_select, arguments=_k_center, loop=step_loops.k_center, all_pairs=True),
    "max-sum": Rule(kernel=greedy.greedy_select, arguments=_max_sum, loop=step_loops.max_sum),
    "score-x-distance": Rule(kernel=greedy.greedy_select, arguments=_product, loop=step_loops.product),
    "dpp": Rule(kernel=greedy.dpp_select, arguments=_scored, loop=step_loops.dpp, holds=False),
    "facility": Rule(
        kernel=greedy.facility_select, arguments=_scored, loop=step_loops.facility, all_pairs=True, holds=False
    ),
}


def choice_case(
    setting: Setting,
    name: str,
    shape: Mapping[str, int],
    *,
    faster: float | None = None,
    held: Any = "auto",
    unheld: bool = False,
    compiled: bool = True,
) -> Case:
    """A rule on random features.

    Args:
        setting: where it is measured.
        name: one of `RULES`.
        shape: S, N, K and D.
        faster: how many times as long the loop is to take, if that is said.
        held: dtype in which similarities are held.
        unheld: whether there is an arm that holds none.
        compiled: whether torch.compile may be tried: it unrolls the steps, which takes it minutes where they are many.
    """
    rule = RULES[name]
    options = {"held": held} if rule.holds and held != "auto" else {}

    def call(kernel: Callable[..., Tensor], more: Mapping[str, Any]) -> Callable[[Inputs], Tensor]:
        def run(inputs: Inputs) -> Tensor:
            arguments, words = rule.arguments(inputs)
            return kernel(*arguments, **words, **more)

        return run

    ours = partial(backends.using, setting.backend)
    wanted = [("ratio", ">=", faster)] if faster is not None else []
    arms = [
        Arm(name=OURS, run=call(rule.kernel, options), around=ours, work=_work(rule, shape, setting.dtype)),
        Arm(name=LOOP, run=partial(_loop, rule), bounds=bounds(setting, *wanted)),
    ]
    if unheld and rule.holds and setting.device == "cuda":
        limits = bounds(
            setting,
            ("share_of_floor", ">=", 0.6),
            ("extra_bytes", "<=", UNHELD_BYTES_PER_TOKEN * shape["S"] * shape["N"]),
        )
        steps = _steps_work(shape, setting.dtype)
        arms.append(Arm(name=UNHELD, run=call(rule.kernel, {"held": None}), around=ours, work=steps, bounds=limits))
    plain = specification(rule.kernel)
    if setting.device == "cuda":
        arms.append(Arm(name=REFERENCE, run=call(plain, options)))
    if setting.compiled and compiled:
        arms.append(Arm(name=COMPILED, run=call(_compiled(plain), options)))
    return Case(
        kernel=name,
        letters=shape,
        dtype=setting.dtype,
        draw=partial(_draw, shape, setting),
        arms=tuple(arms),
        check=lambda _: _check(rule, arms, setting.device),
        agreement=partial(_agreement, call(plain, options), LEAST_AGREED if held == "auto" else 0.0),
    )


def _compiled(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same by torch.compile, which is imported when it is called first."""

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(plain, dynamic=False)

    return lambda *arguments, **words: compiled()(*arguments, **words)


def _draw(shape: Mapping[str, int], setting: Setting, generator: torch.Generator) -> Inputs:
    S, N, K, D = (shape[letter] for letter in "SNKD")
    features = torch.randn(S, N, D, generator=generator, device=setting.device).to(setting.dtype)
    return _inputs(features, torch.rand(S, N, generator=generator, device=setting.device), K)


def _inputs(features: Tensor, relevance: Tensor, K: int) -> Inputs:
    nothing = torch.zeros_like(relevance)
    return {"features": features, "relevance": relevance, "half": relevance / 2, "nothing": nothing, "K": K}


def _loop(rule: Rule, inputs: Inputs) -> Tensor:
    return rule.loop(inputs["features"], inputs["relevance"], inputs["K"])


def _work(rule: Rule, shape: Mapping[str, int], dtype: torch.dtype) -> Work:
    """The features once; a product for every pair, or only for pairs with a chosen one where that is enough."""
    S, N, K, D = (shape[letter] for letter in "SNKD")
    pairs = N * N / 2 if rule.all_pairs else min(N * N / 2, K * N)
    return Work(bytes=S * N * D * dtype.itemsize, operations=2 * S * pairs * D)


def _steps_work(shape: Mapping[str, int], dtype: torch.dtype) -> Work:
    """The features once in every step: nothing that grows with D is kept from one to the next."""
    S, N, K, D = (shape[letter] for letter in "SNKD")
    return Work(bytes=K * S * N * D * dtype.itemsize)


def _check(rule: Rule, arms: list[Arm], device: str) -> None:
    """All arms on pictures without near ties, in fp32: they must choose the same, in the same order."""
    inputs = without_ties(rule, device)
    wanted = _loop(rule, inputs)
    for arm in arms:
        with arm.around():
            found = arm.run(inputs)
        if not torch.equal(found.to(wanted.device, wanted.dtype), wanted):
            raise Disagreement(f"{arm.name} chooses {found.tolist()}, the loop {wanted.tolist()}")


def without_ties(rule: Rule, device: str) -> Inputs:
    """Random pictures of which every choice of the rule is clear: drawn until they are."""
    S, N, K, D = (SMALL[letter] for letter in "SNKD")
    generator, leads, found = torch.Generator().manual_seed(0), [], []

    def pick(scores: Tensor) -> int:
        best, second = scores.topk(2).values.tolist()
        leads.append((best - second) / max(1.0, abs(best)))
        return int(scores.argmax())

    for _ in range(DRAWS):
        features = torch.randn(1, N, D, generator=generator, dtype=torch.float64)
        relevance = torch.rand(1, N, generator=generator, dtype=torch.float64)
        leads.clear()
        rule.loop(features, relevance, K, pick=pick)
        if min(leads) > CLEAR:
            found.append((features, relevance))
        if len(found) == S:
            features, relevance = (torch.cat(parts).float().to(device) for parts in zip(*found, strict=True))
            return _inputs(features, relevance, K)
    raise Disagreement(f"no {S} pictures without near ties in {DRAWS} draws")


def _agreement(plain: Callable[[Inputs], Tensor], least: float, inputs: Inputs, arm: Arm) -> float:
    """Share of the tokens of the reference, on the inputs that are timed: near ties may go either way there.

    Raises:
        Disagreement: where ours are others than near ties explain.
    """
    with arm.around():
        found = arm.run(inputs)
    wanted = plain(inputs)
    common = [len(set(a) & set(b)) / len(set(b)) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]
    agreed = sum(common) / len(common)
    if arm.name in (OURS, UNHELD) and agreed < least:
        raise Disagreement(f"{arm.name} has {agreed:.0%} of its tokens in common with the reference on what is timed")
    return agreed
