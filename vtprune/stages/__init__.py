"""Stages: small frozen values that score, debias, select, merge and count. Pure; they know no model."""

from __future__ import annotations

from vtprune.stages import (
    cells,
    counters,
    debiasers,
    diverse,
    mergers,
    networks,
    rules,
    scorers,
    selectors,
    sensitivity,
    structured,
)

STAGES: dict[str, type] = {
    stage.__name__: stage
    for stage in (
        rules.ClsOrReceived,
        rules.ClsRow,
        rules.Received,
        rules.MoreVaried,
        rules.SinkRows,
        rules.PageRank,
        rules.Keys,
        rules.EncoderFeatures,
        sensitivity.ProbedSensitivity,
        sensitivity.JacobianSensitivity,
        scorers.Constant,
        scorers.Importance,
        scorers.Read,
        scorers.Given,
        scorers.Norm,
        networks.TrainedScorer,
        debiasers.MinMax,
        debiasers.WithoutSinks,
        debiasers.WithoutHighNorms,
        debiasers.WithoutTrend,
        debiasers.WithoutPadding,
        selectors.TopK,
        selectors.Stride,
        selectors.Random,
        selectors.MMR,
        diverse.Dispersion,
        diverse.SensitiveDiversity,
        diverse.DPP,
        diverse.Facility,
        structured.WholeRows,
        structured.AnchorsAndNeighbours,
        structured.ResidualDrop,
        structured.Pivots,
        structured.ChunkQuota,
        structured.GroupSuppress,
        cells.CellCentres,
        cells.CellBest,
        mergers.IntoNearest,
        mergers.IntoCell,
        mergers.NeighbourSum,
        counters.Outliers,
        counters.Mass,
        counters.Above,
    )
}
"""What a stored pipeline may be made of, by class name."""
