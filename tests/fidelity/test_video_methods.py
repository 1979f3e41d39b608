"""Methods for clips against their loop forms, and cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.fidelity import loops_video as loops
from vtprune.catalog import build
from vtprune.errors import InvalidOption
from vtprune.types import Ordinal, Part, VisualTokens


def clip(features: Tensor, frames: int, scores: list[list[float]] | None = None) -> VisualTokens:
    """Stacked clips (S, N, D) of so many frames of one row each, whose frames may have scores."""
    S, N, _ = features.shape
    size = N // frames
    spread = {} if scores is None else {"frames": torch.tensor(scores).repeat_interleave(size, dim=1)}
    return VisualTokens(
        features=features,
        parts=tuple(Part(start=t * size, stop=(t + 1) * size, kind="frame", grid=(1, size)) for t in range(frames)),
        ordinals=tuple(Ordinal(segment=number) for number in range(S)),
        evidence=spread,
    )


@pytest.mark.parametrize(("frames", "size", "k"), [(1, 9, 4), (2, 5, 3), (4, 6, 11), (8, 4, 8), (3, 7, 21)])
def test_temporal_is_the_loop(frames: int, size: int, k: int) -> None:
    features = torch.randn(3, frames * size, 6, generator=torch.Generator().manual_seed(size))
    expected = []
    for row in features:
        scores = loops.novelty(row.double().numpy(), frames)
        expected.append(sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]))
    assert build("temporal").run(clip(features, frames), k).keep.tolist() == expected


def directions(*degrees: float) -> Tensor:
    """Unit vectors (1, N, 2) at these angles."""
    angles = [math.radians(angle) for angle in degrees]
    return torch.tensor([[[math.cos(angle), math.sin(angle)] for angle in angles]])


def test_temporal_by_hand() -> None:
    """The first frame at 0, 0, 0, 90 degrees has its mean at 18.4: its last token differs most. In the second frame the
    third token turned by 60, in the third frame back again."""
    stack = clip(directions(0, 0, 0, 90, 0, 0, 60, 90, 0, 0, 0, 90), 3)
    assert build("temporal").run(stack, 1).keep.tolist() == [[3]]
    assert build("temporal").run(stack, 3).keep.tolist() == [[3, 6, 10]]


def test_temporal_has_nothing_to_tell_a_still_clip_by() -> None:
    """Of a clip that never moves the first frame stays."""
    stack = clip(directions(0, 30, 90, 0, 30, 90, 0, 30, 90), 3)
    assert build("temporal").run(stack, 3).keep.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("frames", "size"), [(2, 5), (8, 16), (16, 4)])
@pytest.mark.parametrize("settings", [{}, {"power": 1.0}, {"floor": 1}, {"cap": 0.5}, {"floor": 2, "cap": 0.75}])
@pytest.mark.parametrize("share", [0.11, 0.4, 0.9])
def test_budgets_of_quota_are_the_loop(frames: int, size: int, settings: dict[str, float], share: float) -> None:
    scores = torch.rand(4, frames, generator=torch.Generator().manual_seed(frames)).tolist()
    k = max(1, int(share * frames * size))
    counts = build("quota", settings).share(clip(torch.zeros(4, frames * size, 2), frames, scores), k).tolist()
    power = settings.get("power", 2.0)
    bounds = {name: settings[name] for name in ("floor", "cap") if name in settings}
    assert counts == [loops.shares(own, [size] * frames, k, power, **bounds) for own in scores]
    assert all(sum(own) == k and max(own) <= size for own in counts)


def test_quota_by_hand() -> None:
    """Probabilities .9, .3, .3, 0 squared are 9 : 1 : 1 : 0; of 11 tokens. Of 8 in four frames of 4, the first is full,
    and the next two share what it leaves. Frames alike share alike."""
    frames = torch.zeros(1, 64, 2)
    quota = build("quota")
    assert quota.share(clip(frames, 4, [[0.9, 0.3, 0.3, 0.0]]), 11).tolist() == [[9, 1, 1, 0]]
    assert quota.share(clip(frames[:, :16], 4, [[0.9, 0.3, 0.3, 0.0]]), 8).tolist() == [[4, 2, 2, 0]]
    assert quota.share(clip(frames, 4, [[0.2, 0.2, 0.2, 0.2]]), 8).tolist() == [[2, 2, 2, 2]]


def test_quota_with_fewer_tokens_than_frames() -> None:
    """The best frames have one each."""
    scores = [[0.1, 0.9, 0.2, 0.8, 0.3]]
    assert build("quota", {"power": 1.0}).share(clip(torch.zeros(1, 20, 2), 5, scores), 2).tolist() == [[0, 1, 0, 1, 0]]
    assert build("quota", {"floor": 3}).share(clip(torch.zeros(1, 20, 2), 5, scores), 2).tolist() == [[0, 1, 0, 1, 0]]


def test_quota_prunes_frames_where_asked() -> None:
    pooled, pruned = build("quota"), build("quota", {"within": "prune"})
    assert pooled.merges and not pruned.merges
    assert "importance" in pruned.needs and "importance" not in pooled.needs
    with pytest.raises(InvalidOption, match="within='crop'"):
        build("quota", {"within": "crop"})
