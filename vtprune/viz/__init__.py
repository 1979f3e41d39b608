"""Show which tokens of a picture or clip were kept, from a report alone."""

from __future__ import annotations

from vtprune.viz.framing import Box, framing_of
from vtprune.viz.marks import marked
from vtprune.viz.overlays import heatmap, in_rows, overlay, with_bar
from vtprune.viz.placing import cells_of, token_at
from vtprune.viz.reported import legend
from vtprune.viz.sheets import sheet, strip

__all__ = [
    "Box",
    "cells_of",
    "framing_of",
    "heatmap",
    "in_rows",
    "legend",
    "marked",
    "overlay",
    "sheet",
    "strip",
    "token_at",
    "with_bar",
]
