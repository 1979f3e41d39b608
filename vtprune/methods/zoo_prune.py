"""ZOO-Prune: tokens to which the projector is sensitive, and which do not repeat each other."""

from __future__ import annotations

from vtprune._checks import check_switch
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.readings import Rule
from vtprune.stages.debiasers import MinMax
from vtprune.stages.diverse import SensitiveDiversity
from vtprune.stages.scorers import Read
from vtprune.stages.sensitivity import JacobianSensitivity, ProbedSensitivity


def zoo_prune(*, probes: int = 64, step: float = 0.01, seed: int = 0, closed_form: bool = False) -> Pipeline:
    """Greedy choice by sensitivity of the projector times distance to the nearest chosen token.

    Title: Zoo-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models
    Source: arXiv 2509.24837
    Deviations: the probe runs in fp32 (the authors: in the precision of the model, where steps of this length are
        mostly rounding) and with the whole projector (the authors: of rank 128 on LLaVA-NeXT). One set a picture over
        all its crops. Newline tokens are kept and not counted. Mergers are probed with their patches moved together.

    Published:
        llava: keep=192 | 128 | 64
        llava_next: keep=128 | 64 | 32, per="part"
        qwen2_5_vl: keep=0.2 | 0.1

    Args:
        probes: random directions; each takes two passes of the projector.
        step: length of a step.
        seed: of the directions.
        closed_form: take the norm of the Jacobian instead of probes, where the projector has two linears. Ours.
    """
    check_switch("closed_form", closed_form)
    rule: Rule = JacobianSensitivity() if closed_form else ProbedSensitivity(probes=probes, step=step, seed=seed)
    pick = Pick(name="sensitive", scorer=Read(rule=rule), debiasers=(MinMax(),), selector=SensitiveDiversity())
    return Pipeline(name="zoo_prune", picks=(pick,))
