"""Stages: small frozen values that score, debias and select. Pure; they know no model."""

from __future__ import annotations

from vtprune.stages import debiasers, scorers, selectors

STAGES: dict[str, type] = {
    "Constant": scorers.Constant,
    "Importance": scorers.Importance,
    "MinMax": debiasers.MinMax,
    "TopK": selectors.TopK,
    "Stride": selectors.Stride,
    "Random": selectors.Random,
    "MaxMin": selectors.MaxMin,
    "MMR": selectors.MMR,
}
