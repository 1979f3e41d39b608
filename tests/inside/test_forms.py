"""Clips, padding on the right, masks by hand, training, guessed words: cuts between layers bear them."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.contracts.cases import answer
from tests.contracts.dense import hidden
from tests.inside.common import (
    BUDGETS,
    DEEP,
    LAYERS,
    ONE,
    SOME,
    TOLERANCE,
    WHOLE,
    assert_same,
    dense,
    fresh,
    lengths,
    merges,
    model_of,
    pruned,
    reach,
    run,
    stored,
)
from tests.models import IMAGE, VIDEO_FAMILIES

deep = pytest.mark.parametrize("method", DEEP)


@deep
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_clips(method, family):
    """Some families spread the frames of a clip over the prompt, with words between them."""
    model = model_of(family)
    inputs = models.inputs(model, kind="video")
    got = run(model, method, inputs)
    assert {segment.kind for segment in got.report.segments} == {"video"}
    assert stored(got.answer.cache) == lengths(got.reach, inputs["attention_mask"], 4)
    assert_same(got.answer, dense(model, inputs, got.reach, got.merges))


@deep
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_on_the_right(method, family, attention):
    """As for training: the same tokens stay as with padding on the left, and text has the logits of the dense model."""
    model = model_of(family, attention)
    left = models.inputs(model)
    pads = (left["attention_mask"] == 0).sum(dim=1).tolist()
    assert any(pads)
    right = {
        name: torch.stack([row.roll(-pad) for row, pad in zip(values, pads)]) if name in WHOLE else values
        for name, values in left.items()
    }
    with pruned(model, method) as pruner:
        model(**left)
        expected = [segment.depths.tolist() for segment in pruner.last.segments]
        logits = model(**right).logits
        assert [segment.depths.tolist() for segment in pruner.last.segments] == expected
        reached = reach(pruner.last, right["input_ids"])
        merged = merges(pruner.last, right["attention_mask"])
    with hidden(model, reached, merged):
        dense_logits = model(**right).logits
    left_over = right["attention_mask"].bool() & (reached == LAYERS)
    assert (logits - dense_logits)[left_over].abs().max() < TOLERANCE


@deep
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_square_mask_by_hand(method, kind, attention):
    model = model_of("llava", attention)
    inputs = models.inputs(model)
    real = inputs["attention_mask"].bool()
    mask = (
        torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril() & real[:, None, None] & real[:, None, :, None]
    )
    if kind == "float" or attention == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    with pruned(model, method) as pruner:
        expected, first = model(**inputs).logits, pruner.last
        got = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits
    for before, after in zip(first.segments, pruner.last.segments, strict=True):
        assert torch.equal(before.depths, after.depths)
    assert (got - expected)[real].abs().max() < TOLERANCE


@deep
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dense_model(method, checkpointing):
    """With words for labels; what comes right after a picture is predicted by a token that may be gone."""
    inputs = models.inputs(model_of("llava"))
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids < models.WORDS[0]) | (ids >= IMAGE), -100)

    def step(model):
        loss = model.train()(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model, reference = fresh("llava"), fresh("llava")
    if checkpointing:
        model.gradient_checkpointing_enable()
    with pruned(model, method) as pruner:
        loss, grads = step(model)
    with hidden(reference, reach(pruner.last, ids), merges(pruner.last, inputs["attention_mask"])):
        expected, dense_grads = step(reference)
    assert (loss - expected).abs() < TOLERANCE
    assert grads.keys() == dense_grads.keys()
    assert max((grads[name] - dense_grads[name]).abs().max() for name in grads) < TOLERANCE


@pytest.mark.parametrize("method", BUDGETS)
def test_guessed_words_are_taken_back(method):
    """Prompt lookup writes several tokens at once and crops the cache: all layers lose as many."""
    model = model_of("llava")
    inputs = models.inputs(model, ONE)
    with pruned(model, method):
        expected = answer(model, inputs, steps=12).sequences
        assert model.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=3).tolist() == expected.tolist()
