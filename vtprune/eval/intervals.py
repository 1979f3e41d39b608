"""Bootstrap intervals over scenes: questions about one picture are not independent, so whole scenes are drawn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vtprune.tiny.drawing import Stream

DRAWS = 2000
LEVEL = 0.95
FEW = 20
"""Of fewer scenes a bootstrap interval is far too narrow: theirs is the whole range."""
UNSEEN = 3.0
"""What never happened in n scenes may still happen in 3 / n of them (the rule of three, at 95 %)."""
Floats = NDArray[np.float64]


class Resamples:
    """`DRAWS` times as many scenes as there are, drawn with replacement; the same ones for every mean, so that
    differences are paired.

    Args:
        scenes: the number of its scene for every question, from 0.
        seed: the draw depends on it and on the number of scenes alone.
    """

    def __init__(self, scenes: Sequence[int], seed: int) -> None:
        self._scenes = np.asarray(scenes)
        self._count = int(self._scenes.max()) + 1
        drawn = Stream(seed).integers(0, self._count, DRAWS * self._count).reshape(DRAWS, self._count)
        rows = np.arange(DRAWS)[:, None] * self._count
        self._times = np.bincount((rows + drawn).ravel(), minlength=DRAWS * self._count).reshape(DRAWS, self._count)

    def interval(self, values: Floats, chosen: NDArray[np.bool_], least: float = 0.0) -> tuple[float, float]:
        """95 % interval of the mean of `values` (questions,), from `least` to 1, over the chosen questions."""
        scenes = self._scenes[chosen]
        if len(np.unique(scenes)) < FEW:
            return least, 1.0
        sums = np.bincount(scenes, weights=values[chosen], minlength=self._count)
        counts = np.bincount(scenes, minlength=self._count)
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)
            means = (self._times @ sums) / (self._times @ counts)
            low, high = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        margin = UNSEEN / len(np.unique(scenes)) if least == 0.0 else 0.0
        if sums.sum() == counts.sum():
            low = min(low, 1 - margin)
        if sums.sum() == 0:
            high = max(high, margin)
        return float(low), float(high)
