"""Which frames of a clip to look at: values that can be printed, compared and stored. T frames, K chosen ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image

from vtprune.errors import InvalidOption
from vtprune.video.frames import Video

_ROUNDING = 2e-3
"""Seconds: containers round when a frame is shown, and how long the last one is, to thousandths."""
_FASTEST = 1e9
"""Frames a second: no two frames are closer, and floating point counts so many for days."""
_SIDE = 16
_STILL = 1.0
"""Grey levels of 255 by which the thumbnails of one scene may differ anyway, from compression."""


@dataclass(frozen=True)
class Sampling:
    """Base of all ways to choose frames."""

    def choose(self, video: Video) -> np.ndarray:
        """Indices (K,) of frames, distinct and ascending."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which `from_dict` reads back."""
        return {"sampling": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Uniform(Sampling):
    """What is shown in the middle of each of `count` equal stretches of time.

    Where one frame is shown in the middle of several, its neighbours stand in, so that the number is that of frames in
    the clip or `count`, whichever is smaller. At a constant rate these are the frames floor((i + 0.5) * T / count).
    """

    count: int

    def __post_init__(self) -> None:
        _whole(self, "count")

    def choose(self, video: Video) -> np.ndarray:
        """Indices (K,) of frames."""
        T = len(video.times)
        count = min(self.count, T)
        moments = (np.arange(count) + 0.5) * video.duration / count
        steps = np.arange(count)
        spread = np.maximum.accumulate(_shown_at(video, moments) - steps)
        return np.minimum(spread, T - count) + steps


@dataclass(frozen=True)
class ByRate(Sampling):
    """`fps` frames a second, each from the middle of its stretch; thinned evenly where that makes more than `most`."""

    fps: float
    most: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.fps, bool) or not isinstance(self.fps, Real) or not 0 < self.fps < math.inf:
            raise InvalidOption(f"fps={self.fps!r}: expected a number above 0, in frames a second")
        object.__setattr__(self, "fps", int(self.fps) if isinstance(self.fps, Integral) else float(self.fps))
        if self.most is not None:
            _whole(self, "most")

    def choose(self, video: Video) -> np.ndarray:
        """Indices (K,) of frames, one at least."""
        edges = np.append(_times(video), video.duration)
        passed = np.maximum(np.ceil((edges - _slack(video)) * min(self.fps, _FASTEST) - 0.5), 0)
        found = np.flatnonzero(np.diff(passed) > 0)
        if not len(found):
            found = _shown_at(video, np.asarray([video.duration / 2]))
        return found if self.most is None else _thinned(found, self.most)


@dataclass(frozen=True)
class Scenes(Sampling):
    """The middle of each of `count` scenes, cut where small grey pictures of neighbours differ most.

    `candidates` frames are looked at, one after another. Where the clip changes less often, its longest scenes are
    halved. The earlier cut wins a tie.
    """

    count: int
    candidates: int = 128

    def __post_init__(self) -> None:
        _whole(self, "count")
        _whole(self, "candidates")

    def choose(self, video: Video) -> np.ndarray:
        """Indices (K,) of frames, none where no candidate can be decoded."""
        looked, changes = _changes(video, Uniform(max(self.count, self.candidates)).choose(video))
        count = min(self.count, len(looked))
        order = np.argsort(-changes, kind="stable")[: max(count - 1, 0)]
        edges = sorted([0, *(order[changes[order] > _STILL] + 1).tolist(), len(looked)])
        while len(edges) < count + 1:
            longest = int(np.argmax(np.diff(edges)))
            edges.insert(longest + 1, (edges[longest] + edges[longest + 1]) // 2)
        middles = [(start + stop - 1) // 2 for start, stop in pairwise(edges) if start < stop]
        return looked[np.asarray(middles, dtype=np.int64)]


SAMPLINGS: dict[str, type[Sampling]] = {"Uniform": Uniform, "ByRate": ByRate, "Scenes": Scenes}


def from_dict(stored: Mapping[str, Any]) -> Sampling:
    """The sampling that `to_dict` stored. Raises `InvalidOption` for anything else."""
    fields = dict(stored)
    name = fields.pop("sampling", None)
    if name not in SAMPLINGS:
        raise InvalidOption(f"sampling={name!r}: expected one of {', '.join(SAMPLINGS)}")
    try:
        return SAMPLINGS[name](**fields)
    except TypeError as error:
        raise InvalidOption(f"{name} cannot be made of {fields}: {error}") from error


def best_frames(scores: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """Indices (K,), ascending, of the `count` frames with the highest scores (T,).

    Of those that score alike and do not all fit, evenly spaced ones: the middle of each of so many stretches of them.

    Raises:
        InvalidOption: for scores that are not one finite number for each frame.
    """
    _check_count("count", count)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InvalidOption(f"scores of shape {values.shape}: expected one finite number for each frame")
    if count >= len(values):
        return np.arange(len(values))
    bar = np.sort(values)[-count]
    above, alike = np.flatnonzero(values > bar), np.flatnonzero(values == bar)
    left = count - len(above)
    return np.sort(np.concatenate([above, alike[(2 * np.arange(left) + 1) * len(alike) // (2 * left)]]))


def _whole(sampling: Sampling, name: str) -> None:
    """Check a field, and make it a number that JSON takes too."""
    _check_count(name, getattr(sampling, name))
    object.__setattr__(sampling, name, int(getattr(sampling, name)))


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InvalidOption(f"{name}={value!r}: expected a whole number from 1 on")


def _shown_at(video: Video, moments: np.ndarray) -> np.ndarray:
    """Indices of the frames that are shown at those moments: the last ones that are not later."""
    return np.maximum(np.searchsorted(_times(video), moments + _slack(video), side="right") - 1, 0)


def _times(video: Video) -> np.ndarray:
    """(T,) when frames are shown, exactly so where the rate is constant but for rounding."""
    T = len(video.times)
    even = np.arange(T) * (video.duration / T)
    off = np.abs(video.times - even).max()
    return even if off <= min(_ROUNDING, video.duration / T / 4) else video.times


def _slack(video: Video) -> float:
    """Seconds by which floating point may be off."""
    return 1e-12 * video.duration


def _thinned(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many, from the middles of equal stretches."""
    count = min(most, len(indices))
    return indices[(2 * np.arange(count) + 1) * len(indices) // (2 * count)]


def _changes(video: Video, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates can be decoded (K,), and by how many grey levels each differs from the one before (K - 1,)."""
    looked, changes = [], []
    before = None
    for index, pixels in video.frames(candidates):
        small = Image.fromarray(np.ascontiguousarray(pixels)).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
        now = np.asarray(small, dtype=np.float64)
        if before is not None:
            changes.append(float(np.abs(now - before).mean()))
        looked.append(index)
        before = now
    return np.asarray(looked, dtype=np.int64), np.asarray(changes, dtype=np.float64)
