"""The rules on the attention of a few rows, against loops that import nothing of the package, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtprune.glances import RowAttention
from vtprune.kernels.attention import rows_attention
from vtprune.stages.glances import MassiveHeads, MeanAttention, SymmetricText

B, H, R, N = 3, 6, 5, 12
ROWS = [[0, 1, 2, 3, 4], [2, 3, 4], [4]]
"""Which rows are real; the others fill up, and repeat the first real one."""


def pictures(own, n):
    """(B, n): whatever is not text belongs to a picture here."""
    return torch.ones(len(own), n, dtype=torch.bool).scatter(1, own, False)


def drawn(seed):
    """Attention (B, H, R, N) of rows that stand at the end of N keys and see nothing behind themselves."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.tensor([[N - R + max(row, rows[0]) for row in range(R)] for rows in ROWS])
    logits = torch.randn(B, H, R, N, generator=generator) * 2
    logits = logits.masked_fill(torch.arange(N) > own[:, None, :, None], float("-inf"))
    real = torch.tensor([[row in rows for row in range(R)] for rows in ROWS])
    return RowAttention(weights=logits.softmax(dim=3), real=real, own=own, visual=pictures(own, N))


def shown(weights, own, real=None):
    """Attention of one prompt, written out: heads x rows x keys."""
    weights = torch.tensor(weights)[None]
    real = torch.tensor([[True] * weights.shape[2] if real is None else real])
    own = torch.tensor([own])
    return RowAttention(weights=weights, real=real, own=own, visual=pictures(own, weights.shape[3]))


def mean_loop(weights, rows, own):
    return sum(weights[h, r] for h in range(len(weights)) for r in rows) / (len(weights) * len(rows))


def massive_loop(weights, rows, own, count):
    others = [key for key in range(weights.shape[2]) if key not in own]
    mass = [sum(weights[h, r, key] for r in rows for key in others) for h in range(len(weights))]
    best = sorted(range(len(weights)), key=lambda h: -mass[h])[:count]
    return mean_loop(weights[best], rows, own)


def symmetric_loop(weights, rows, own):
    total = np.zeros(weights.shape[2])
    for head in weights:
        for r in rows:
            weight = head[r, own[r]]
            for other in rows:
                if other != r:
                    weight += head[r, own[other]] + head[other, own[r]]
            total += weight * head[r]
    return total


RULES = {
    "mean": (MeanAttention(), mean_loop),
    "massive 1": (MassiveHeads(heads=1), lambda *seen: massive_loop(*seen, 1)),
    "massive 4": (MassiveHeads(heads=4), lambda *seen: massive_loop(*seen, 4)),
    "massive, more than there are": (MassiveHeads(), mean_loop),
    "symmetric": (SymmetricText(), symmetric_loop),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_a_rule_is_its_loop(rule, seed):
    """Rows that fill up count nowhere."""
    seen = drawn(seed)
    got = RULES[rule][0](seen).numpy()
    assert got.shape == (B, N)
    for row, rows in enumerate(ROWS):
        expected = RULES[rule][1](seen.weights[row].double().numpy(), rows, seen.own[row].tolist())
        assert np.abs(got[row] - expected).max() < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_fill_up_may_hold_anything(rule):
    seen = drawn(0)
    weights = seen.weights.masked_fill(~seen.real[:, None, :, None], 7.0)
    other = RowAttention(weights=weights, real=seen.real, own=seen.own, visual=seen.visual)
    assert torch.equal(RULES[rule][0](other), RULES[rule][0](seen))


def test_mean_attention_by_hand():
    """Two heads, two rows, of which the first fills up: (0.2 + 0.6) / 2 and (0.8 + 0.4) / 2."""
    seen = shown([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.6, 0.4]]], own=[1, 1], real=[False, True])
    assert MeanAttention()(seen)[0].tolist() == pytest.approx([0.4, 0.6])


def test_massive_heads_by_hand():
    """The second head looks at itself: of one head the first counts alone, which prefers the other token."""
    seen = shown([[[0.5, 0.3, 0.2]], [[0.0, 0.4, 0.6]]], own=[2])
    assert MassiveHeads(heads=1)(seen)[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert MassiveHeads(heads=2)(seen)[0].tolist() == pytest.approx([0.25, 0.35, 0.4])


def test_symmetric_text_by_hand():
    """Keys are two tokens and two words. Among the words 0.2, 0 and 0.2, 0.3: the first weighs 0.4, the second 0.5."""
    seen = shown([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.4, 0.2, 0.3]]], own=[2, 3])
    assert SymmetricText()(seen)[0, :2].tolist() == pytest.approx([0.4 * 0.5 + 0.5 * 0.1, 0.4 * 0.3 + 0.5 * 0.4])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_of_rows_is_a_loop(groups):
    """Over rows, heads that share keys, and keys; a row that may see nothing is zeros."""
    generator = torch.Generator().manual_seed(groups)
    query, key = torch.randn(2, 4, 3, 8, generator=generator), torch.randn(2, groups, 7, 8, generator=generator)
    allowed = torch.rand(2, 3, 7, generator=generator) > 0.4
    allowed[1, 2] = False
    got = rows_attention(query, key, allowed, scale=0.3).numpy()
    for b, h, r in np.ndindex(2, 4, 3):
        mine = key[b, h // (4 // groups)].double().numpy()
        weights = np.array([np.exp(0.3 * query[b, h, r].double().numpy() @ mine[k]) for k in range(7)])
        weights = weights * allowed[b, r].numpy()
        expected = weights / max(weights.sum(), 1e-30)
        assert np.abs(got[b, h, r] - expected).max() < 1e-6
    assert got.dtype == np.float32


def test_attention_of_rows_is_computed_in_fp32():
    """Of bfloat16 tensors too: their products would tie tokens that differ."""
    query, key = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (2, 9))
    query, key = query.bfloat16(), key.bfloat16()
    allowed = torch.ones(1, 2, 9, dtype=torch.bool)
    got = rows_attention(query, key, allowed, scale=0.25)
    assert torch.equal(got, rows_attention(query.float(), key.float(), allowed, scale=0.25))
