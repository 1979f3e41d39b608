"""What tells models apart: every number of every weight does, in whatever precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vtprune.video import identity
from vtprune.video.identity import weights_of


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(500, 32), nn.Linear(32, 7))


@pytest.mark.parametrize("piece", [1 << 22, 1000, 7])
def test_any_single_number_tells(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_PIECE", piece)
    whole = weights_of(model())
    assert whole == weights_of(model())
    for number in (0, 1, 999, 1000, 15_998, 15_999):
        other = model()
        with torch.no_grad():
            other[0].weight.view(-1)[number] += 0.5
        assert weights_of(other) != whole, number


def test_order_and_shape_tell() -> None:
    whole, other = model(), model()
    with torch.no_grad():
        other[0].weight[[3, 4]] = other[0].weight[[4, 3]]
    turned = nn.Sequential(nn.Embedding(32, 500), nn.Linear(32, 7))
    turned[0].weight = nn.Parameter(whole[0].weight.detach().view(32, 500))
    turned[1].load_state_dict(whole[1].state_dict())
    assert len({weights_of(whole), weights_of(other), weights_of(turned)}) == 3


def test_precision_does_not_tell() -> None:
    assert weights_of(model()) == weights_of(model().to(torch.bfloat16)) == weights_of(model().double())
