"""Cuts between layers equal a dense model whose layers hide what did not reach them."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.contracts.cases import answer
from tests.inside.common import (
    BUDGETS,
    DEEP,
    EARLY,
    FAMILIES,
    LAYERS,
    ONE,
    PROMPTS,
    SOME,
    STEPS,
    TOLERANCE,
    assert_same,
    dense,
    fresh,
    lengths,
    model_of,
    run,
    stored,
)

AVERAGE_LAYERS = {
    "fastv": (1,),
    "pyramiddrop": (2, 3, 5),
    "sparsevlm": (1, 3),
    "sparsevlm_plus": (1, 3),
    "adaptinfer": (1, 2, 4),
    "transprune": (1, 2),
    "dyvte": (3,),
}
"""Where six layers are cut, counted by hand from the published shares of the depth, or from the budget."""
families = pytest.mark.parametrize(
    "family", [name if name in SOME else pytest.param(name, marks=pytest.mark.matrix) for name in FAMILIES]
)
"""Some of them, and all in the matrix."""
prompts = pytest.mark.parametrize("prompts", PROMPTS)


@families
@prompts
@pytest.mark.parametrize("method", DEEP)
def test_tokens_and_logits_are_those_of_the_dense_model(method, family, prompts):
    model = model_of(family)
    inputs = models.inputs(model, PROMPTS[prompts])
    got = run(model, method, inputs)
    assert {int(depth) for depth in got.reach.unique()} == {*AVERAGE_LAYERS[method], LAYERS}
    assert_same(got.answer, dense(model, inputs, got.reach, got.merges))


@families
@prompts
def test_what_never_entered_is_hidden_from_all_layers(family, prompts):
    """Where ids are kept, a token that is picked out in front of the language model is one that reached no layer."""
    model = model_of(family)
    inputs = models.inputs(model, PROMPTS[prompts])
    got = run(model, "information_horizon", inputs, positions="keep")
    assert {int(depth) for depth in got.reach.unique()} == {0, 3, 4, LAYERS}
    assert_same(got.answer, dense(model, inputs, got.reach, got.merges))


@families
@pytest.mark.parametrize("method", DEEP)
def test_the_comparison_is_sensitive(method, family):
    """A dense model that hides the same tokens one layer later, or none, answers otherwise."""
    model = model_of(family)
    inputs = models.inputs(model, ONE)
    got = run(model, method, inputs)
    for wrong in (torch.where(got.reach < LAYERS, got.reach + 1, LAYERS), torch.full_like(got.reach, LAYERS)):
        assert (got.answer.logits - dense(model, inputs, wrong, got.merges).logits).abs().max() > 100 * TOLERANCE


@families
@prompts
@pytest.mark.parametrize("method", BUDGETS)
def test_without_a_cache(method, family, prompts):
    """Every step decides anew, from what was asked and not from what was written since."""
    model = model_of(family)
    inputs = models.inputs(model, PROMPTS[prompts])
    cached = run(model, method, inputs)
    uncached = run(model, method, inputs, {"use_cache": False})
    assert uncached.answer.cache is None
    assert torch.equal(uncached.reach, cached.reach)
    assert_same(uncached.answer, cached.answer)


@families
@prompts
@pytest.mark.parametrize("method", BUDGETS)
def test_every_layer_stores_what_reached_it(method, family, prompts):
    model = model_of(family)
    inputs = models.inputs(model, PROMPTS[prompts])
    got = run(model, method, inputs)
    assert stored(got.answer.cache) == lengths(got.reach, inputs["attention_mask"], STEPS)
    assert len(set(stored(got.answer.cache))) > 1
    real = inputs["attention_mask"].bool()
    assert got.report.length_before == tuple(real.sum(dim=1).tolist())
    assert got.report.length_after == tuple((real & (got.reach == LAYERS)).sum(dim=1).tolist())


@families
@pytest.mark.parametrize("method", BUDGETS)
def test_the_average_over_layers_is_what_was_asked_for(method, family):
    """Of every picture, within half a token; and the cost that is reported is that."""
    model = model_of(family)
    report = run(model, method, models.inputs(model)).report
    assert len(report.segments) == 3
    for segment in report.segments:
        assert segment.depths.shape == (segment.n,)
        assert abs(int(segment.depths.sum()) / LAYERS - BUDGETS[method] * segment.n) <= 0.5
        assert segment.keep.tolist() == (segment.depths == LAYERS).nonzero()[:, 0].tolist()
    total = sum(int(segment.depths.sum()) for segment in report.segments)
    assert report.average == pytest.approx(total / LAYERS)


@families
@prompts
@pytest.mark.parametrize("method", BUDGETS)
def test_bytes_saved_are_those_missing_from_the_cache(method, family, prompts):
    model = model_of(family)
    inputs = models.inputs(model, PROMPTS[prompts])

    def size(cache):
        return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

    full, got = answer(model, inputs, steps=1), run(model, method, inputs, {"steps": 1})
    assert size(full.cache) - size(got.answer.cache) == got.report.kv_bytes_saved > 0


@pytest.mark.parametrize(
    ("method", "options", "keep", "left"),
    [
        ("fastv", {}, 7 / 12, [16, 8, 8, 8, 8, 8]),
        ("fastv", {"layer": 2}, 2 / 3, [16, 16, 8, 8, 8, 8]),
        ("pyramiddrop", {}, 3.125 / 6, [16, 16, 8, 4, 4, 2]),
        ("adaptinfer", {}, (1 + (290 + 2 * 72 + 2 * 18) / 576) / 6, [16, 8, 2, 2, 1, 1]),
        ("information_horizon", {"horizon": None}, 0.375, [8, 8, 8, 4, 4, 4]),
        ("information_horizon", {"horizon": 0.7}, 1.75 / 6, [8, 8, 8, 4, 0, 0]),
    ],
)
def test_counts_by_hand(method, options, keep, left):
    """A picture of 16 tokens where the average is that of the published shares."""
    model = model_of("llava")
    inputs = models.inputs(model, ONE)
    got = run(model, method, inputs, keep=keep, **options)
    assert got.report.tokens == 16
    words = inputs["input_ids"].shape[1] - 16
    assert stored(got.answer.cache) == [words + n + STEPS - 1 for n in left]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", BUDGETS)
def test_eager_and_sdpa_agree(method, family):
    sdpa, eager = model_of(family), model_of(family, "eager")
    assert eager.config.text_config._attn_implementation == "eager"
    inputs = models.inputs(sdpa)
    expected, got = (run(model, method, inputs) for model in (sdpa, eager))
    assert torch.equal(got.reach, expected.reach)
    assert_same(got.answer, expected.answer)


@pytest.mark.parametrize("method", DEEP)
def test_eager_equals_the_dense_model(method):
    """The dense reference under its own masks, so that eager is not held to sdpa alone."""
    model = model_of("qwen2_5_vl", "eager")
    inputs = models.inputs(model)
    got = run(model, method, inputs)
    assert_same(got.answer, dense(model, inputs, got.reach, got.merges))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("method", BUDGETS)
def test_bfloat16(method, family):
    """Counts do not depend on the dtype, and what a cache holds is what a whole forward computes."""
    model = fresh(family).bfloat16()
    inputs = models.inputs(model_of(family))
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    cached, uncached = (run(model, method, inputs, {"use_cache": use}) for use in (True, False))
    assert stored(cached.answer.cache) == lengths(cached.reach, inputs["attention_mask"], STEPS)
    assert torch.equal(cached.reach, uncached.reach)
    scale = cached.answer.logits[:, 0].abs().max()
    assert (cached.answer.logits - uncached.answer.logits)[:, 0].abs().max() < 0.05 * scale


@pytest.mark.parametrize("method", EARLY)
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_what_is_picked_before_the_language_model_goes_through_no_layer(method, positions):
    model = model_of("llava")
    inputs = models.inputs(model)
    got = run(model, method, inputs, positions=positions)
    assert {0, LAYERS} < {int(depth) for depth in got.reach.unique()}
    uncached = run(model, method, inputs, {"use_cache": False}, positions=positions)
    assert_same(uncached.answer, got.answer)
