"""Estimates against numbers worked by hand, and against those published for LLaVA-1.5-7B."""

from __future__ import annotations

import pytest

from vtprune.errors import InvalidOption
from vtprune.estimates import (
    Shape,
    attention_efficiency,
    decode_flops,
    kv_bytes,
    layer_flops,
    modality_dominance,
    prefill_flops,
)

LLAVA = Shape(layers=32, d=4096, heads=32, key_heads=32, head_dim=128, inner=11008, vocabulary=32000)
QWEN = Shape(layers=28, d=3584, heads=28, key_heads=4, head_dim=128, inner=18944, vocabulary=152064)


def test_a_layer_by_hand() -> None:
    """d 4, two heads of size 2 that share one of keys, inner width 8, three tokens.

    Queries and output 2 x 3 x 2 x 4 x 4 = 192, keys and values 2 x 3 x 2 x 4 x 2 = 96, attention: of 1 + 2 + 3 = 6
    pairs two products of 2 x 4 each, 96; the MLP 3 x 2 x 3 x 4 x 8 = 576.
    """
    shape = Shape(layers=1, d=4, heads=2, key_heads=1, head_dim=2, inner=8, vocabulary=5)
    assert layer_flops(shape, 3) == 192 + 96 + 96 + 576
    assert prefill_flops(shape, [3]) == 960 + 2 * 4 * 5
    assert decode_flops(shape, [3]) == (64 + 32) + 4 * 4 * 3 + 6 * 4 * 8 + 40
    assert kv_bytes(shape, [3], 2) == 2 * 1 * 2 * 2 * 3


def test_published_models() -> None:
    """8.40 T for LLaVA-1.5-7B at 640 tokens, 8.43 T for Qwen2.5-VL-7B; 320 MiB and 56 KiB a token of fp16 cache."""
    assert prefill_flops(LLAVA, [640] * 32) == pytest.approx(8.40e12, rel=2e-3)
    assert prefill_flops(QWEN, [640] * 28) == pytest.approx(8.43e12, rel=2e-3)
    assert kv_bytes(LLAVA, [640] * 32, 2) == 320 * 2**20
    assert kv_bytes(QWEN, [1] * 28, 2) == 56 * 2**10


def test_cuts_between_layers() -> None:
    """FastV at layer 2, half kept: 4.83 T and 185 MiB; PyramidDrop 4.37 T and 167 MiB."""
    fastv = [640] * 2 + [352] * 30
    pyramid = [640] * 8 + [352] * 8 + [208] * 8 + [136] * 8
    assert prefill_flops(LLAVA, fastv) == pytest.approx(4.83e12, rel=2e-3)
    assert kv_bytes(LLAVA, fastv, 2) == 185 * 2**20
    assert prefill_flops(LLAVA, pyramid) == pytest.approx(4.37e12, rel=2e-3)
    assert kv_bytes(LLAVA, pyramid, 2) == 167 * 2**20


def test_dominance_is_the_ratio_of_efficiencies() -> None:
    """Half of the attention to 50 of 200 tokens: each gets three times what one of the others gets."""
    assert modality_dominance(0.5, 0.5, 50, 150) == pytest.approx(3.0)
    text, others = attention_efficiency(0.5, 0.5, 50, 150)
    assert (text, others) == (pytest.approx(2.0), pytest.approx(2 / 3))
    assert modality_dominance(0.5, 0.5, 50, 150) == pytest.approx(text / others)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidOption, match="32 layers"):
        prefill_flops(LLAVA, [640])
    with pytest.raises(InvalidOption, match="nothing"):
        modality_dominance(0.5, 0.0, 50, 150)
