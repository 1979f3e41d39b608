"""Batches, beams, samples, text alone, crops, threads, errors: a call with cuts between layers is like any other."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import vtprune
from tests import models
from tests.contracts.cases import answer
from tests.contracts.dense import hidden
from tests.inside.common import (
    BUDGETS,
    DEEP,
    LAYERS,
    ONE,
    SETTINGS,
    SOME,
    STEPS,
    TOLERANCE,
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
from tests.integration.common import TEXT, fingerprint
from tests.models import ONE_AND_TWO, Prompt
from vtprune.errors import UnsupportedModel

MIXED = (Prompt(text_before=9, text_after=0, seed=6), Prompt(images=((32, 32),), seed=7))
methods = pytest.mark.parametrize("method", BUDGETS)
some = pytest.mark.parametrize("family", SOME)


class Boom(Exception):
    """Raised on purpose."""


def inputs_of(family, prompts=ONE_AND_TWO):
    return models.inputs(model_of(family), prompts)


def same_bits(got, expected):
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)


@some
@methods
@pytest.mark.parametrize("prompts", [ONE_AND_TWO, ONE_AND_TWO[::-1]], ids=["short first", "long first"])
def test_a_batch_equals_its_rows_alone(method, family, prompts):
    model = model_of(family)
    together = run(model, method, inputs_of(family, prompts))
    for row, prompt in enumerate(prompts):
        alone = run(model, method, inputs_of(family, (prompt,)))
        depths = [segment.depths.tolist() for segment in together.report.segments if segment.row == row]
        assert depths == [segment.depths.tolist() for segment in alone.report.segments]
        assert_same(alone.answer, together.answer, [row])


@some
@methods
def test_beams(method, family):
    """As without a cache; and where all cuts lie between layers, as the dense model searches by itself."""
    model, inputs = model_of(family), inputs_of(family)
    mode = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    got, uncached = (run(model, method, inputs, {**mode, "use_cache": use}) for use in (True, False))
    assert torch.equal(got.answer.sequences, uncached.answer.sequences)
    assert not torch.equal(got.answer.sequences[::2], got.answer.sequences[1::2])
    if method in DEEP:
        reached = got.reach[::3]
        assert torch.equal(got.reach, reached.repeat_interleave(3, dim=0))
        assert torch.equal(dense(model, inputs, reached, got.merges[::3], **mode).sequences, got.answer.sequences)


@some
@methods
def test_seeded_samples(method, family):
    model, inputs = model_of(family), inputs_of(family)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(11)
        mode = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "use_cache": use_cache}
        with pruned(model, method):
            found.append(answer(model, inputs, steps=STEPS, **mode))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert (found[0].logits - found[1].logits).abs().max() < TOLERANCE
    assert len(found[0].tokens) == 6
    assert not torch.equal(found[0].tokens[0], found[0].tokens[1])


@some
@methods
def test_text_alone_is_untouched(method, family):
    """Also after a call with a picture."""
    model, inputs = model_of(family), inputs_of(family, TEXT)
    expected = answer(model, inputs)
    with pruned(model, method) as pruner:
        same_bits(answer(model, inputs), expected)
        assert pruner.last.segments == ()
        answer(model, inputs_of(family))
        got = answer(model, inputs)
    same_bits(got, expected)
    assert len(set(stored(got.cache))) == 1


@some
@methods
@pytest.mark.parametrize("prompts", [MIXED, MIXED[::-1]], ids=["text first", "picture first"])
def test_a_row_of_text_beside_a_row_with_a_picture(method, family, prompts):
    model, inputs = model_of(family), inputs_of(family, prompts)
    got = run(model, method, inputs)
    assert stored(got.answer.cache) == lengths(got.reach, inputs["attention_mask"], STEPS)
    for row, prompt in enumerate(prompts):
        alone = inputs_of(family, (prompt,))
        expected = run(model, method, alone).answer if prompt.images else answer(model, alone, steps=STEPS)
        assert_same(expected, got.answer, [row])


@some
@methods
def test_a_budget_of_one_changes_no_bit(method, family):
    model, inputs = model_of(family), inputs_of(family)
    expected = answer(model, inputs)
    with pruned(model, method, keep=1.0) as pruner:
        got = answer(model, inputs)
    same_bits(got, expected)
    assert pruner.last.kept == pruner.last.tokens == pruner.last.average


@methods
def test_one_forward_returns_logits_at_the_length_of_the_caller(method):
    """Kept tokens and text have those of the dense model; training loops index them by position."""
    model, inputs = model_of("llava"), inputs_of("llava")
    with torch.no_grad(), pruned(model, method) as pruner:
        logits = model(**inputs).logits
        reached = reach(pruner.last, inputs["input_ids"])
        merged = merges(pruner.last, inputs["attention_mask"])
    assert logits.shape[:2] == inputs["input_ids"].shape
    if method in DEEP:
        with torch.no_grad(), hidden(model, reached, merged):
            expected = model(**inputs).logits
        left = (reached == LAYERS) & inputs["attention_mask"].bool()
        assert (logits - expected)[left].abs().max() < TOLERANCE


@pytest.mark.parametrize("per", ["part", "prompt"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
@methods
def test_budgets_of_parts_and_of_whole_prompts(method, family, per):
    model, inputs = model_of(family), inputs_of(family)
    got, uncached = (run(model, method, inputs, {"use_cache": use}, per=per) for use in (True, False))
    assert stored(got.answer.cache) == lengths(got.reach, inputs["attention_mask"], STEPS)
    assert torch.equal(got.reach, uncached.reach)
    assert_same(got.answer, uncached.answer)
    for row in (0, 1):
        own = [segment for segment in got.report.segments if segment.row == row]
        units = sum(len(models.units_of_parts(segment.parts)) for segment in own) if per == "part" else 1
        wanted = BUDGETS[method] * sum(segment.n for segment in own)
        assert abs(sum(int(segment.depths.sum()) for segment in own) / LAYERS - wanted) <= 0.5 * units
    if method in DEEP:
        assert_same(got.answer, dense(model, inputs, got.reach, got.merges))


@some
@methods
def test_unwrap_leaves_nothing(method, family):
    model, inputs = fresh(family), inputs_of(family)
    expected, before = answer(model, inputs), fingerprint(model)
    vtprune.wrap(model, method, keep=BUDGETS[method], **SETTINGS.get(method, {}))
    hooked = fingerprint(model)
    assert hooked[f"model.language_model.layers.{LAYERS - 1}"] != before[f"model.language_model.layers.{LAYERS - 1}"]
    first = answer(model, inputs)
    with pytest.raises(UnsupportedModel, match="wrapped already"):
        vtprune.wrap(model, method)
    assert fingerprint(model) == hooked
    same_bits(answer(model, inputs), first)
    vtprune.unwrap(model)
    assert fingerprint(model) == before
    same_bits(answer(model, inputs), expected)
    with pruned(model, method):
        same_bits(answer(model, inputs), first)


@methods
@pytest.mark.parametrize("place", [0, 1, 3, LAYERS - 1, "q_proj", "norm"])
@pytest.mark.parametrize("step", [0, 1])
def test_an_error_in_a_layer_leaves_the_next_call_right(method, place, step):
    """Wherever the walk through the layers stops, in the prefill or while decoding, nothing of it is left behind."""
    model, inputs, words = model_of("llava"), inputs_of("llava"), inputs_of("llava", TEXT)
    language_model = model.model.language_model
    plain = answer(model, words)
    layer = language_model.layers[place if isinstance(place, int) else 2]
    module = {"q_proj": layer.self_attn.q_proj, "norm": language_model.norm}.get(place, layer)
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == step + 1:
            raise Boom

    with pruned(model, method):
        expected = answer(model, inputs)
        handle = module.register_forward_hook(fail)
        try:
            with pytest.raises(Boom):
                answer(model, inputs)
        finally:
            handle.remove()
        same_bits(answer(model, words), plain)
        same_bits(answer(model, inputs), expected)


@methods
def test_threads(method):
    """Each thread walks by itself, with prompts of several lengths under way at once."""
    model = model_of("llava_next")
    batches = [models.inputs(model, (replace(ONE[0], text_after=3 + i, seed=i),)) for i in range(3)]
    found = [[] for _ in batches]
    with pruned(model, method):
        expected = [answer(model, batch).sequences.tolist() for batch in batches]

        def work(number):
            for _ in range(4):
                found[number].append(answer(model, batches[number]).sequences.tolist())

        workers = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert found == [[one] * 4 for one in expected]
