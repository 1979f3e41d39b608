"""What cuts between layers cannot do rightly raises an error of ours, and the next call is right."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import StaticCache

import vtprune
from tests import models
from tests.contracts.cases import answer
from tests.generic_models import build_generic
from tests.inside.common import (
    BUDGETS,
    DEEP,
    EARLY,
    EXITS,
    LAYERS,
    ONE,
    SETTINGS,
    TEXTUAL,
    WHOLE,
    fresh,
    model_of,
    pruned,
)
from tests.integration.common import TEXT, fingerprint
from tests.models import ONE_AND_TWO, Prompt
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel

ENDS = (Prompt(images=((32, 32),), seed=1, text_after=0),)
methods = pytest.mark.parametrize("method", BUDGETS)


def without_the_end(inputs):
    """The prompt up to the last token of its picture: tiny models write one more word of markup behind it."""
    return {name: values[:, :-1] if name in WHOLE else values for name, values in inputs.items()}


def right_after(model, method, refused, error, match, **options):
    """The call is refused with that error, and a picture and a text are answered as before."""
    inputs, words = models.inputs(model, ONE_AND_TWO), models.inputs(model, TEXT)
    plain = answer(model, words)
    with pruned(model, method, **options):
        expected = answer(model, inputs)
        with pytest.raises(error, match=match):
            refused()
        for asked, told in ((words, plain), (inputs, expected)):
            got = answer(model, asked)
            assert torch.equal(got.logits, told.logits)
            assert got.sequences.tolist() == told.sequences.tolist()


@methods
@pytest.mark.parametrize("given", ["by name", "by hand"])
def test_a_static_cache(method, given):
    """Its layers are all of one length."""
    model = model_of("llava")

    def refused():
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
        mode = {"cache_implementation": "static"} if given == "by name" else {"past_key_values": cache}
        answer(model, models.inputs(model, ONE), **mode)

    right_after(model, method, refused, UnsupportedCall, f"'{method}'.* static cache")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", TEXTUAL)
def test_a_prompt_that_ends_with_its_picture(method, family):
    """There is no text that could rate it; also where another row of the batch has some."""
    model = model_of(family)
    right_after(
        model,
        method,
        lambda: model(**without_the_end(models.inputs(model, ENDS))),
        UnsupportedCall,
        "row 0 ends with a picture",
    )
    batch = without_the_end(models.inputs(model, (ENDS[0], ONE_AND_TWO[1])))
    with pruned(model, method), pytest.raises(UnsupportedCall, match="row 0 ends with a picture"):
        model(**batch)


@pytest.mark.parametrize("method", sorted(set(BUDGETS) - set(TEXTUAL)))
@torch.no_grad()
def test_a_method_that_reads_no_text_takes_such_a_prompt(method):
    model = model_of("llava")
    with pruned(model, method) as pruner:
        model(**without_the_end(models.inputs(model, ENDS)))
    assert 0 < pruner.last.average < pruner.last.tokens


@pytest.mark.parametrize("layer", [LAYERS, 32, 0, -1])
def test_the_number_of_a_layer_the_model_has_not(layer):
    model = fresh("llava")
    before = fingerprint(model)
    with pytest.raises(InvalidOption):
        vtprune.wrap(model, "fastv", keep=0.6, layer=layer)
    assert fingerprint(model) == before
    if layer >= LAYERS:
        with pytest.raises(InvalidOption, match=f"layer {layer}: this model has layers 0 to {LAYERS - 1}"):
            vtprune.wrap(model, "fastv", keep=0.6, layer=layer)


def test_the_last_layer_can_be_cut():
    model = model_of("llava")
    with pruned(model, "fastv", keep=0.9, layer=LAYERS - 1) as pruner:
        answer(model, models.inputs(model, ONE))
    assert pruner.last.segments[0].depths.unique().tolist() == [LAYERS - 1, LAYERS]


LOWEST = {
    "fastv": 1 / 6,
    "pyramiddrop": 2 / 6,
    "sparsevlm": 1 / 6,
    "sparsevlm_plus": 1 / 6,
    "adaptinfer": 1 / 6,
    "transprune": 1 / 6,
    "dyvte": 2 / 6,
}
"""What the layers in front of the first cut cost, of six."""


@pytest.mark.parametrize("method", DEEP)
def test_a_share_below_what_the_first_layers_cost(method):
    """At `wrap` already, with the range that can be had."""
    model = fresh("llava")
    before = fingerprint(model)
    for keep in (0.01, LOWEST[method] - 0.001):
        with pytest.raises(InvalidOption, match=re.escape(f"{LOWEST[method]:.4g} to 1")):
            vtprune.wrap(model, method, keep=keep)
    assert fingerprint(model) == before
    with pruned(model, method, keep=LOWEST[method]) as pruner:
        answer(model, models.inputs(model, ONE))
    assert pruner.last.kept == (method not in EXITS)


@pytest.mark.parametrize("method", DEEP)
def test_a_number_below_what_the_first_layers_cost(method):
    """Only the picture says how much a number is: 2 of 16 tokens are too few, and 12 are not."""
    model = model_of("llava")
    inputs = models.inputs(model, ONE)
    with pruned(model, method, keep=2) as pruner:
        with pytest.raises(InvalidOption, match=re.escape(f"{LOWEST[method]:.4g} to 1")):
            answer(model, inputs)
        assert pruner.last is None
        words = models.inputs(model, TEXT)
        got = answer(model, words)
    assert torch.equal(got.logits, answer(model, words).logits)
    with pruned(model, method, keep=12) as pruner:
        answer(model, inputs)
    wanted = 16 * 4 / LAYERS if method in EXITS else 12  # 12 pay for four layers of all, and half of one more
    assert abs(pruner.last.average - wanted) <= 0.5


@pytest.mark.parametrize("method", EARLY)
def test_where_picks_come_first_any_share_can_be_had(method):
    model = model_of("llava")
    with pruned(model, method, keep=0.05) as pruner:
        answer(model, models.inputs(model, ONE))
    assert abs(pruner.last.average - 0.05 * 16) <= 0.5


def test_what_is_read_in_the_layers_cannot_be_given():
    model = model_of("llava")
    with pruned(model, "fastv") as pruner:
        for name in pruner.pipeline.needs:
            with pytest.raises(InvalidOption), pruner.using(**{name: [torch.zeros(16)]}):
                pass
        answer(model, models.inputs(model, ONE))
        assert pruner.last.kept == 8


@methods
@pytest.mark.parametrize("attention", ["flex_attention", "paged|eager"])
def test_an_attention_whose_masks_are_not_known(method, attention):
    model = fresh("llava")
    model.config.text_config._attn_implementation = attention
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=re.escape(f"attn_implementation={attention!r}")):
        vtprune.wrap(model, method, keep=BUDGETS[method], **SETTINGS.get(method, {}))
    assert fingerprint(model) == before
    assert model.config.text_config._attn_implementation == attention


def windowed():
    text = models.text_config("mistral", LAYERS, sliding_window=4096, head_dim=16)
    return models.build("llava", LAYERS, text_config=text)


@pytest.mark.parametrize("build", [windowed, lambda: build_generic("gemma3")[0]], ids=["mistral", "gemma3"])
@pytest.mark.parametrize("method", DEEP)
def test_a_sliding_window(method, build):
    """A cut would bring tokens into a window that are outside of it."""
    model = build()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="sliding window"):
        vtprune.wrap(model, method, keep=0.9)
    assert fingerprint(model) == before
    vtprune.unwrap(vtprune.wrap(model, "random", keep=0.9))
    assert fingerprint(model) == before


UNHOOKED = {("transprune", "q_proj"), ("zipvl", "q_proj")}
"""Projections that these only call by themselves."""


@pytest.mark.parametrize("place", ["q_proj", "self_attn", "layer"])
@pytest.mark.parametrize("method", ["fastv", "mustdrop", "transprune", "look_m", "zipvl"])
def test_a_module_that_was_replaced_after_wrap(method, place):
    """What took its place has no hooks and is refused where there were any; put back, all is as before."""
    model, other = fresh("llava"), fresh("llava")
    layers, others = model.model.language_model.layers, other.model.language_model.layers
    inputs = models.inputs(model, ONE)
    with vtprune.pruning(model, method, keep=0.6):
        hooks = [number for number, layer in enumerate(layers) if layer.self_attn._forward_hooks]
        at = 2 if method == "zipvl" else hooks[-1]
        (parent, spare), name = {
            "q_proj": ((layers[at].self_attn, others[at].self_attn), "q_proj"),
            "self_attn": ((layers[at], others[at]), "self_attn"),
            "layer": ((layers, others), str(LAYERS - 1)),
        }[place]
        expected, hooked = answer(model, inputs), getattr(parent, name)
        setattr(parent, name, getattr(spare, name))
        if (method, place) in UNHOOKED:
            assert torch.equal(answer(model, inputs).logits, expected.logits)
        else:
            with pytest.raises(UnsupportedCall, match=r"replaced after wrap.*wrap it again"):
                answer(model, inputs)
        setattr(parent, name, hooked)
        assert torch.equal(answer(model, inputs).logits, expected.logits)
