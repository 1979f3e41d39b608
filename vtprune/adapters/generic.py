"""Any other model with the seam: features only, every entry of the encoder output one picture."""

from __future__ import annotations

from vtprune.adapters.base import Family

GENERIC = Family(
    name="generic",
    model_types=(),
    tested="by a sweep over tiny random models",
    kinds=("image", "video"),
    notes="methods that need features only; grids are square where they can be",
)
