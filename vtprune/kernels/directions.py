"""Rows to be compared by cosine, for GPUs: as they are where tensor cores multiply them without loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import BackendUnavailable
from vtprune.kernels.reference import rows_at, unit_rows

_EXACT = (torch.bfloat16, torch.float16)
"""A product of two such numbers is a number in fp32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """`rows` (S, N, D), contiguous, and `inverse` (S, N), one over their lengths; 0 at rows without a direction."""

    rows: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Directions:
        """Those of features (S, N, D): unit vectors in fp32, or the features themselves in a lower precision."""
        if features.dtype in _EXACT or features.dtype == torch.float64:
            return cls.as_they_are(features)
        units = unit_rows(features).contiguous()
        return cls(rows=units, inverse=torch.ones(units.shape[:2], device=units.device))

    @classmethod
    def as_they_are(cls, features: Tensor) -> Directions:
        """Those of features (S, N, D) of any precision but fp64, without a copy where they are contiguous."""
        if features.dtype == torch.float64:
            raise BackendUnavailable("float64")
        length = torch.linalg.vector_norm(features, dim=2, dtype=torch.float32)
        inverse = length.clamp_min(1e-12).reciprocal().nan_to_num_(nan=0.0)
        return cls(rows=features.contiguous(), inverse=inverse)

    def products(self, begin: int = 0, end: int | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Products (S, n, N) of rows from `begin` to `end` with all, contiguous."""
        own, all_ = self.rows[:, begin:end], self.rows.transpose(1, 2)
        if self.rows.dtype == dtype:
            return torch.bmm(own, all_)
        if own.is_cuda and own.dtype in _EXACT and hasattr(torch.ops.aten.bmm, "dtype"):
            return torch.bmm(own, all_, out_dtype=torch.float32).to(dtype)
        return torch.bmm(own.float(), all_.float()).to(dtype)

    def cosines(self, products: Tensor, indices: Tensor) -> Tensor:
        """Cosines (S, m, N) of all rows with m of each picture, `indices` (S, m), from all products."""
        both = self.inverse.gather(1, indices)[..., None] * self.inverse[:, None]
        return torch.where(both > 0, rows_at(products, indices) * both, 0.0)
