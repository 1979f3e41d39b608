"""DyVTE: pictures leave altogether, at the layer where the text needs them no more."""

from __future__ import annotations

from typing import Literal

from vtprune._checks import check_share, check_whole
from vtprune.errors import InvalidOption
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.counters import AllOrNone
from vtprune.stages.glances import MeanAttention
from vtprune.stages.networks import ExitGate
from vtprune.stages.scorers import Constant, Glanced, Stated
from vtprune.stages.selectors import TopK
from vtprune.stages.states import Turn


def dyvte(
    *,
    rule: Literal["mass", "stable"] = "mass",
    below: float = 0.05,
    patience: int = 2,
    first: float = 0.25,
    every: int = 1,
    gate: str | None = None,
) -> Pipeline:
    """Let all tokens of a picture leave at the layer that a rule finds, or the last one that the budget pays for.

    Title: Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings
    Source: arXiv 2411.19628
    Deviations: the authors train a gate for each layer; without one a rule of ours decides. The budget is the most: no
        token goes through more layers than its average pays for (the authors have no budget). Every check waits once
        for the device, for pictures of each shape; what has left is asked no more. By attention every picture leaves by
        itself, else all of a prompt at once. Of long texts the gate sees the last 256 tokens, those behind the last
        picture. Batches work.

    Args:
        rule: "mass": the last token pays less attention to the picture than `below`. "stable": it is turned by less,
            as 1 - cos, from one layer to the next.
        below: threshold of the rule.
        patience: checks in a row that must find so.
        first: share of the depth where checks begin.
        every: layers from one check to the next.
        gate: a safetensors file with trained gates, see `ExitGate`; it takes the place of the rule, and one check will
            do.
    """
    if rule not in ("mass", "stable"):
        raise InvalidOption(f"rule={rule!r}: expected 'mass' or 'stable'")
    check_share("below", below)
    check_whole("patience", patience, least=1)
    check_share("first", first, below=1)
    check_whole("every", every, least=1)
    counter = AllOrNone(scorer=Glanced(rule=MeanAttention(), rows="last"), below=below)
    if gate is not None:
        patience = 1
        counter = AllOrNone(scorer=Stated(rule=ExitGate(path=str(gate)), rows="text"), below=0.0, reduce="mean")
    elif rule == "stable":
        counter = AllOrNone(scorer=Stated(rule=Turn()), below=below, reduce="mean")
    pick = Pick(name="exit", scorer=Constant(), selector=TopK())
    stage = LayerStage(at=first, keep=None, picks=(pick,), counter=counter, patience=patience, every=every)
    return Pipeline(name="dyvte", picks=(), inside=(stage,))
