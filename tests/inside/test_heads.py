"""Masks of heads equal masks made token by token, and what heads are measured by is the attention of transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import vtprune
from tests import models
from tests.contracts.cases import SETTINGS, answer
from tests.contracts.dense import hidden
from tests.contracts.heads import masked, pictures_of
from tests.inside.common import (
    BUDGETS,
    FAMILIES,
    LAYERS,
    SOME,
    STEPS,
    TOLERANCE,
    WHOLE,
    assert_same,
    fresh,
    model_of,
    reach,
)
from tests.models import IMAGE, ONE_AND_TWO, VIDEO, Prompt
from vtprune.catalog import build
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel
from vtprune.eval.head_classes import head_classes, measure
from vtprune.stages import STAGES
from vtprune.stages.heads import CLASSES, HeadMasks

MIXED = SETTINGS["blindsight"]["classes"]
THREE = (Prompt(images=((32, 32), (30, 64), (32, 32)), seed=4), *ONE_AND_TWO)
families = pytest.mark.parametrize("family", FAMILIES)
some = pytest.mark.parametrize("family", SOME)


def lengths(model, told):
    """Tokens of the pictures of every row, in order."""
    with vtprune.pruning(model, "identity", keep=1.0) as pruner, torch.no_grad():
        model(**told)
    segments = pruner.last.segments
    return [[s.parts[-1].stop for s in segments if s.row == row] for row in range(len(told["input_ids"]))]


def albums(model, told):
    """For the reference; padding counts as text."""
    found = []
    for ids, mask, own in zip(told["input_ids"], told["attention_mask"], lengths(model, told), strict=True):
        real = mask.bool()
        visual = ((ids == IMAGE) | (ids == VIDEO))[real].tolist()
        found.append(pictures_of(visual, [(0, len(visual), own)]).padded(int((~real).sum())))
    return found


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_those_of_masks_made_by_hand(family, attention):
    model = model_of(family, attention)
    told = models.inputs(model, THREE)
    rows = albums(model, told)
    with masked(model, rows, MIXED) as count:
        reference = answer(model, told, steps=STEPS)
    assert all(count[number] > 0 for number in range(LAYERS) if number != 1)
    with vtprune.pruning(model, "blindsight", keep=1.0, classes=MIXED) as pruner:
        for mode in ({}, {"use_cache": False}):
            assert_same(answer(model, told, steps=STEPS, **mode), reference)
        assert "nothing dropped, pictures masked from each other" in pruner.last.summary()
    plain = answer(model, told, steps=STEPS)
    moved = (plain.logits - reference.logits).abs().amax(dim=(1, 2))
    assert (moved > 100 * TOLERANCE).tolist() == [True, False, True]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_by_itself(name):
    model = model_of("llava")
    told = models.inputs(model, THREE)
    classes = ((name,) * 4,) * LAYERS
    with masked(model, albums(model, told), classes):
        reference = answer(model, told, steps=STEPS)
    with vtprune.pruning(model, "blindsight", keep=1.0, classes=classes):
        assert_same(answer(model, told, steps=STEPS), reference)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "video_llava"])
def test_clips(family):
    """Some families spread the frames of a clip over the prompt, with words between them."""
    model = model_of(family)
    told = models.inputs(model, kind="video")
    with masked(model, albums(model, told), MIXED) as count:
        reference = answer(model, told, steps=STEPS)
    assert count[0] > 0
    with vtprune.pruning(model, "blindsight", keep=1.0, classes=MIXED):
        assert_same(answer(model, told, steps=STEPS), reference)


@some
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "adaptinfer"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_beside_cuts_between_layers(family, method, attention):
    model = model_of(family, attention)
    told = models.inputs(model, THREE)
    both = replace(build(method), attention=HeadMasks(classes=MIXED))
    with vtprune.pruning(model, both, keep=BUDGETS[method]) as pruner:
        got = answer(model, told, steps=STEPS)
        reached = reach(pruner.last, told["input_ids"])
    with hidden(model, reached), masked(model, albums(model, told), MIXED):
        assert_same(got, answer(model, told, steps=STEPS, use_cache=False))


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_behind_picks_in_front_of_the_language_model(positions):
    """With dense heads it is the method alone; cached and uncached agree with others."""
    model = model_of("llava")
    told = models.inputs(model, THREE)
    found = []
    for classes in (MIXED, ((("dense",) * 4,) * LAYERS)):
        both = replace(build("divprune"), attention=HeadMasks(classes=classes))
        with vtprune.pruning(model, both, keep=0.5, positions=positions):
            found.append([answer(model, told, steps=STEPS, use_cache=use) for use in (True, False)])
            assert_same(*found[-1])
    with vtprune.pruning(model, "divprune", keep=0.5, positions=positions):
        assert torch.equal(answer(model, told, steps=STEPS).logits, found[1][0].logits)
    assert (found[0][0].logits - found[1][0].logits)[2].abs().max() > 100 * TOLERANCE


@some
@torch.no_grad()
def test_padding_on_the_right(family):
    model = model_of(family)
    left = models.inputs(model, THREE)
    pads = (left["attention_mask"] == 0).sum(dim=1).tolist()
    right = {
        name: torch.stack([row.roll(-pad) for row, pad in zip(values, pads, strict=True)]) if name in WHOLE else values
        for name, values in left.items()
    }
    with vtprune.pruning(model, "blindsight", keep=1.0, classes=MIXED):
        expected, got = model(**left).logits, model(**right).logits
    for row, pad in enumerate(pads):
        length = got.shape[1] - pad
        assert (got[row, :length] - expected[row, pad:]).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradients_with_checkpointing_are_those_without():
    told = models.inputs(model_of("llava"), THREE)
    found = []
    for checkpointing in (False, True):
        model = fresh("llava").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with vtprune.pruning(model, "blindsight", keep=1.0, classes=MIXED):
            model(**told, labels=told["input_ids"], use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert max((found[0][name] - found[1][name]).abs().max() for name in found[0]) < TOLERANCE


@some
def test_heads_are_measured_by_the_attention_of_transformers(family):
    """Masses of the tokens of later pictures, prompt by prompt, from whole maps."""
    model, eager = model_of(family), model_of(family, "eager")
    told = models.inputs(model, THREE)
    with torch.no_grad():
        attentions = eager(**told, output_attentions=True, use_cache=False).attentions
    masses = np.zeros((LAYERS, 2, 4, 3))
    for number, row in enumerate((0, 2)):
        album = albums(model, told)[row]
        later = [place for place, picture in enumerate(album.numbers) if picture > 0]
        for layer, attention in enumerate(attentions):
            for place in later:
                for key, picture in enumerate(album.numbers):
                    own = 0 if picture == album.numbers[place] else 2
                    kind = 1 if album.sinks[key] else None if picture < 0 else own
                    if kind is not None:
                        masses[layer, number, :, kind] += attention[row, :, place, key].numpy() / len(later)
    limits = {"dense": float(np.quantile(masses[..., 2], 0.8)), "sink": float(np.median(masses[..., 1])), "share": 0.6}
    expected = [head_classes(*map(torch.tensor, np.moveaxis(own, 2, 0)), **limits) for own in masses]
    assert len({name for layer in expected for name in layer}) > 1
    assert measure(model, [lambda: told], **limits) == tuple(expected)
    one_by_one = [lambda prompt=prompt: models.inputs(model, (prompt,)) for prompt in THREE]
    assert measure(model, one_by_one, **limits) == tuple(expected)
    assert not hasattr(model, "vtprune")


def test_classes_by_hand():
    """Own, sinks, cross: of one prompt and six heads."""
    heads = [(0.5, 0.3, 0.1), (0.5, 0.3, 0.05), (0.5, 0.05, 0.05), (0.04, 0.6, 0.0), (0.06, 0.05, 0.0), (0.0, 0.0, 0.0)]
    own, sinks, cross = (torch.tensor([values]) for values in zip(*heads, strict=True))
    expected = ("dense", "intra+sink", "intra", "sink", "intra", "intra")
    assert head_classes(own, sinks, cross) == expected
    # the fourth head pays its own picture a sixteenth of 0.64, the sixth as much as sinks
    assert head_classes(own, sinks, cross, intra=0.05)[3] == "intra+sink"
    assert head_classes(own, sinks, cross, dense=0.05)[:3] == ("dense", "dense", "dense")
    assert head_classes(own, sinks, cross, sink=0.4)[1] == "intra"


def test_a_head_needs_what_enough_prompts_need():
    """Of ten prompts one looks at other pictures, two at sinks alone; the others at their own picture."""
    own = torch.tensor([[0.5]] * 7 + [[0.0]] * 2 + [[0.5]])
    sinks = torch.tensor([[0.0]] * 7 + [[0.5]] * 2 + [[0.0]])
    cross = torch.tensor([[0.0]] * 9 + [[0.5]])
    found = [head_classes(own, sinks, cross, share=share) for share in (1.0, 0.9, 0.7, 0.1)]
    assert found == [("dense",), ("intra+sink",), ("intra",), ("sink",)]


def test_a_stage_sees_numbers_only():
    """Two words, then a picture of two tokens around which the words are sinks, then another."""
    pictures = torch.tensor([[-1, -1, 0, 0, -1, 1]])
    sinks = torch.tensor([[True, True, False, False, False, False]])
    stage = HeadMasks()
    seen = {name: stage(name, pictures, pictures, sinks)[0].int().tolist() for name in CLASSES}
    assert all(own[row] == [1] * 6 for own in seen.values() for row in (0, 1, 4))
    assert seen["intra"][5] == [0, 0, 0, 0, 1, 1]
    assert seen["sink"][5] == [1, 1, 0, 0, 1, 0]
    assert seen["intra+sink"][2] == [1, 1, 1, 1, 1, 0]
    assert seen["dense"][5] == [1] * 6


def test_one_picture_is_answered_to_the_last_bit():
    model = model_of("llava")
    told = models.inputs(model, THREE[1:2])
    plain = answer(model, told, steps=STEPS)
    with vtprune.pruning(model, "blindsight", keep=1.0, classes=MIXED):
        assert torch.equal(answer(model, told, steps=STEPS).logits, plain.logits)


def test_classes_survive_storing():
    pipeline = build("blindsight", {"classes": MIXED})
    assert vtprune.Pipeline.from_dict(pipeline.to_dict(), stages=STAGES) == pipeline
    assert build("blindsight").attention == HeadMasks()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, "vtprune.eval.head_classes.measure"),
        (MIXED[:5], "classes of 5 layers with 4 heads: this model has 6 layers with 4"),
        (tuple(layer[:2] for layer in MIXED), "with 2 heads"),
        ((*MIXED[:5], ("dense",) * 3), "with 3 or 4 heads"),
        ((*MIXED[:5], ("dense", "blind", "sink", "sink")), "blind: expected sink, intra"),
        ([["dense"]], "expected a tuple"),
        ((), "classes of 0 layers"),
    ],
)
def test_classes_that_are_refused(classes, message):
    with pytest.raises(InvalidOption, match=message):
        vtprune.wrap(model_of("llava"), "blindsight", keep=1.0, classes=classes)
    assert not hasattr(model_of("llava"), "vtprune")


def test_models_and_calls_that_are_refused():
    model = fresh("llava")
    told = models.inputs(model, THREE)
    with vtprune.pruning(model, "blindsight", keep=1.0, classes=MIXED):
        expected = answer(model, told, steps=1)
        with pytest.raises(UnsupportedCall, match="static cache"):
            answer(model, told, cache_implementation="static")
        assert torch.equal(answer(model, told, steps=1).logits, expected.logits)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match="takes no masks of heads"):
        vtprune.wrap(model, "blindsight", keep=1.0, classes=MIXED)


@pytest.mark.parametrize("options", [{"dense": 1.5}, {"intra": -0.1}, {"sink": None}, {"share": "all"}])
def test_thresholds_that_are_none(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        head_classes(*torch.zeros(3, 1, 4), **options)


def test_without_several_pictures_there_is_nothing_to_measure():
    model = model_of("llava")
    with pytest.raises(InvalidOption, match="no prompt with several pictures"):
        measure(model, [lambda: models.inputs(model, THREE[1:2])])
    with pytest.raises(InvalidOption, match="no prompt with several pictures"):
        measure(model, [])
    assert not hasattr(model, "vtprune")
