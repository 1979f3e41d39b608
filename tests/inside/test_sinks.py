"""Attention of sinks given to the picture equals a model whose attention maps are changed by hand."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import vtprune
from tests import models
from tests.contracts.cases import Answer, answer
from tests.contracts.dense import hidden
from tests.contracts.sinks import Edit, Marks, edited
from tests.inside.common import (
    BUDGETS,
    FAMILIES,
    LAYERS,
    ONE,
    STEPS,
    TOLERANCE,
    WHOLE,
    assert_same,
    fresh,
    model_of,
    reach,
)
from tests.models import BOS, IMAGE, ONE_AND_TWO, VIDEO, Prompt
from tests.test_memory import LiveBytes
from vtprune.catalog import build
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel
from vtprune.inside.hooks import allowed_by
from vtprune.stages.sinks import MassiveActivations, Redistribute, WithoutMassive

GIVEN = {"share": 0.2, "threshold": 1.9, "most": 0.8, "least": 0.05, "channels": (3, 17, 40)}
FOUND = {"share": 0.3, "threshold": 6.0, "most": 0.9, "least": 0.02}
CHANNEL = 5
families = pytest.mark.parametrize("family", FAMILIES)
some = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
settings = pytest.mark.parametrize("settings", [GIVEN, FOUND], ids=["given", "found"])


@functools.cache
def massive_model(family: str, attention: str = "sdpa") -> nn.Module:
    """One whose first token has a massive activation, and a fifth of the others, by a neuron of the second layer."""
    model = fresh(family, attention)
    if attention != "sdpa":
        model.load_state_dict(massive_model(family).state_dict())
        return model
    layers, seen = model.model.language_model.layers, []
    handles = [
        layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][..., 0])),
        layers[2].register_forward_pre_hook(lambda module, args, kw: seen.append(args[0]), with_kwargs=True),
    ]
    with torch.no_grad():
        told = models.inputs(family)
        model(**told)
        for handle in handles:
            handle.remove()
        answers, states = (own[told["attention_mask"].bool()] for own in seen)
        model.get_input_embeddings().weight[BOS, CHANNEL] = 60.0
        layers[1].mlp.down_proj.weight[CHANNEL, 0] = 1.2 * states.norm(dim=1).median() / answers.abs().quantile(0.8)
    return model


def of(settings: dict, family: str, attention: str = "sdpa") -> nn.Module:
    return model_of(family, attention) if settings is GIVEN else massive_model(family, attention)


def marks(told: dict[str, torch.Tensor], written: torch.Tensor | None = None) -> list[Marks]:
    """For the reference: where pictures are, and what was told."""
    ids, real = told["input_ids"], told["attention_mask"].bool()
    real = real if written is None else real & ~written
    visual = (ids == IMAGE) | (ids == VIDEO)
    return [Marks(*row) for row in zip(visual.tolist(), real.tolist(), strict=True)]


def expected(model: nn.Module, told: dict[str, torch.Tensor], settings: dict, **mode: object) -> Answer:
    """The reference: it changes something, and what it changes shows."""
    plain = answer(model, told, **{"steps": STEPS, **mode})
    with edited(model, marks(told), Edit(**settings)) as count:
        found = answer(model, told, **{"steps": STEPS, **mode})
    assert 0 < count.changed < count.rows
    assert sum(own.sum() for own in count.sinks.values()) < sum(own.numel() for own in count.sinks.values()) / 2
    assert (plain.logits - found.logits).abs().max() > 100 * TOLERANCE
    return found


@families
@settings
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompts", [ONE, ONE_AND_TWO], ids=["one", "batch"])
def test_answers_are_those_of_changed_maps(family, settings, attention, prompts):
    model = of(settings, family, attention)
    told = models.inputs(model, prompts)
    reference = expected(model, told, settings)
    with vtprune.pruning(model, "attention_sink", keep=1.0, **settings) as pruner:
        for mode in ({}, {"use_cache": False}):
            assert_same(answer(model, told, steps=STEPS, **mode), reference)
        report = pruner.last
    assert report.kept == report.tokens > 0
    assert report.length_after == report.length_before
    assert "nothing dropped, attention of sinks redistributed" in report.summary()
    assert report.to_dict()["attention"] == "attention of sinks redistributed"
    assert report.picks == ("all",)


@families
def test_beams(family):
    model = of(FOUND, family)
    told = models.inputs(model, ONE_AND_TWO)
    mode = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": STEPS}
    with edited(model, marks(told), Edit(**FOUND)):
        reference = model.generate(**told, **mode)
    with vtprune.pruning(model, "attention_sink", keep=1.0, **FOUND):
        assert torch.equal(model.generate(**told, **mode), reference)


@families
def test_of_clips(family):
    if family in ("llava", "llava_next", "internvl"):
        pytest.skip("no clips")
    model = of(GIVEN, family)
    told = models.inputs(model, kind="video")
    reference = expected(model, told, GIVEN)
    with vtprune.pruning(model, "attention_sink", keep=1.0, **GIVEN):
        assert_same(answer(model, told, steps=STEPS), reference)


@some
def test_words_first_then_a_picture_then_words(family):
    """The first token of a chat is told in words alone: its channels and that it is a sink are remembered."""
    model = of(FOUND, family)
    words, more = (Prompt(text_before=4, seed=73),), (Prompt(text_before=7, seed=74),)
    so_far, cache, pixels, written = {}, None, {}, []
    with vtprune.pruning(model, "attention_sink", keep=1.0, **FOUND):
        done = []
        for prompts in (words, ONE, more):
            asked = models.inputs(model, prompts)
            pixels |= {name: asked[name] for name in asked if name not in WHOLE}
            so_far = {n: torch.cat([so_far[n], asked[n]], dim=1) if so_far else asked[n] for n in WHOLE if n in asked}
            written += [False] * asked["input_ids"].shape[1]
            given = {**{n: v for n, v in asked.items() if n not in WHOLE}, **so_far}
            if cache is not None:
                given["past_key_values"] = cache
                if family != "llava":
                    grids = {name: value for name, value in pixels.items() if name.endswith("grid_thw")}
                    ids, _ = model.model.get_rope_index(**so_far, **grids)
                    given["position_ids"] = torch.cat([torch.arange(ids.shape[2]).expand(1, 1, -1), ids])
            reply = answer(model, given, steps=STEPS)
            done.append((reply, {**so_far, **pixels}, torch.tensor([written])))
            cache = reply.cache
            said = {"input_ids": reply.tokens, "attention_mask": torch.ones_like(reply.tokens)}
            said["mm_token_type_ids"] = torch.zeros_like(reply.tokens).int()
            so_far = {name: torch.cat([so_far[name], said[name]], dim=1) for name in so_far}
            written += [True] * (STEPS - 1) + [False]
    for number, (reply, told, known) in enumerate(done):
        plain = answer(model, told, steps=STEPS, use_cache=False)
        with edited(model, marks(told, known), Edit(**FOUND)):
            assert_same(reply, answer(model, told, steps=STEPS, use_cache=False))
        moved = (plain.logits - reply.logits).abs().max()
        assert (moved > 100 * TOLERANCE) == (number > 0)


@pytest.mark.parametrize("count", [1, 3, STEPS + 2])
@torch.no_grad()
def test_what_was_written_can_be_forgotten(count):
    """The reply, and the last words of the question too: the marks of what is left are those of before."""
    model = of(FOUND, "llava")
    told = models.inputs(model, ONE)
    other = torch.tensor([[20, 21, 22]])
    with vtprune.pruning(model, "attention_sink", keep=1.0, **FOUND):
        first = answer(model, told, steps=STEPS)
        first.cache.crop(1 - count)
        got = model(input_ids=other, past_key_values=first.cache).logits
        word = model(input_ids=other[:, :1], past_key_values=first.cache).logits
    length = told["input_ids"].shape[1]
    left = first.sequences[:, : length + STEPS - count]
    ids = torch.cat([left, other, other[:, :1]], dim=1)
    written = torch.zeros_like(ids, dtype=torch.bool)
    written[:, length : left.shape[1]] = written[:, -1] = True
    whole = {**told, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with edited(model, marks(whole, written), Edit(**FOUND)):
        reference = model(**whole).logits[:, -4:]
    assert (torch.cat([got, word], dim=1) - reference).abs().max() < TOLERANCE


@some
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "divprune", "information_horizon"])
def test_beside_cuts(family, method):
    """In front of the language model and between its layers: what has left is hidden in the reference."""
    model = of(FOUND, family)
    told = models.inputs(model, ONE_AND_TWO)
    edit = build("attention_sink", FOUND).attention
    both = replace(build(method), attention=edit)
    options = {"keep": BUDGETS.get(method, 0.5), "positions": "keep"}
    got, uncached = (wrapped(model, both, told, options, use_cache=use) for use in (True, False))
    reached = reach_of(got[1], told)
    with hidden(model, reached), edited(model, marks(told), Edit(**FOUND)) as count:
        reference = answer(model, told, steps=STEPS, use_cache=False)
    assert count.changed > 0
    assert_same(got[0], reference)
    assert_same(uncached[0], reference)
    assert "dropped" not in got[1].summary()
    assert "attention of sinks redistributed" in got[1].summary()
    alone, _ = wrapped(model, build(method), told, options)
    assert (alone.logits - got[0].logits).abs().max() > 100 * TOLERANCE


def wrapped(model, pipeline, told, options, **mode):
    """The answer and the report."""
    with vtprune.pruning(model, pipeline, **options) as pruner:
        return answer(model, told, steps=STEPS, **mode), pruner.last


def reach_of(report, told):
    """As `reach`, and of a method that cuts nothing between layers."""
    segments = [
        segment if segment.depths is not None else replace(segment, depths=LAYERS * (segment.stages > -2).long())
        for segment in report.segments
    ]
    return reach(replace(report, segments=segments), told["input_ids"])


@some
@torch.no_grad()
def test_a_loop_written_by_hand(family):
    """One word at a time, and a question of several words behind them."""
    model = of(GIVEN, family)
    told = models.inputs(model, ONE)
    words = torch.tensor([[20, 21, 22, 23, 24]])
    with vtprune.pruning(model, "attention_sink", keep=1.0, **GIVEN):
        out = model(**told, use_cache=True)
        steps = [out.logits[:, -1:]]
        for few in (words[:, :1], words[:, 1:2], words[:, 2:]):
            steps.append(model(input_ids=few, past_key_values=out.past_key_values).logits)
    ids = torch.cat([told["input_ids"], words], dim=1)
    whole = {**told, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in told:
        whole["mm_token_type_ids"] = nn.functional.pad(told["mm_token_type_ids"], (0, 5))
    written = torch.zeros_like(ids, dtype=torch.bool)
    written[:, -5:-3] = True
    with edited(model, marks(whole, written), Edit(**GIVEN)):
        reference = model(**whole).logits[:, -6:]
    assert (torch.cat(steps, dim=1) - reference).abs().max() < TOLERANCE


@families
def test_a_batch_mate_without_a_picture_is_left_alone(family):
    """To the last bit, in the prefill and after it."""
    model = of(FOUND, family)
    prompts = (Prompt(text_before=40, seed=9), ONE[0])
    told = models.inputs(model, prompts)
    plain = answer(model, told, steps=STEPS)
    with vtprune.pruning(model, "attention_sink", keep=1.0, **FOUND):
        got = answer(model, told, steps=STEPS)
    assert torch.equal(got.logits[0], plain.logits[0])
    assert not torch.equal(got.logits[1], plain.logits[1])


@some
def test_bfloat16(family):
    """What changes in bfloat16 is near to what changes in fp32, and nothing is lost to its cache."""
    told = models.inputs(model_of(family), ONE)
    model = fresh(family).bfloat16()
    low = {name: value.bfloat16() if value.is_floating_point() else value for name, value in told.items()}
    with vtprune.pruning(model, "attention_sink", keep=1.0, **GIVEN):
        cached, uncached = (answer(model, low, steps=2, use_cache=use) for use in (True, False))
    plain = answer(model, low, steps=1)
    scale = plain.logits.abs().max()
    assert (cached.logits - uncached.logits)[:, 0].abs().max() < 0.02 * scale
    assert (cached.logits - plain.logits)[:, 0].abs().max() > 0.02 * scale


def test_gradients_are_those_of_changed_maps():
    model = fresh("llava")
    told = models.inputs(model, ONE)
    weight = model.model.language_model.layers[3].self_attn.v_proj.weight
    found = []
    for scale in (0.0, 1e-2):
        with torch.no_grad():
            weight[0, 0] += scale
        with vtprune.pruning(model, "attention_sink", keep=1.0, **GIVEN):
            loss = model(**told, use_cache=False).logits[0, -1, 7].double()
        found.append((loss, torch.autograd.grad(loss, weight)[0][0, 0]))
    slope = (found[1][0] - found[0][0]) / 1e-2
    assert slope.item() == pytest.approx((found[0][1] + found[1][1]).item() / 2, rel=0.02)


def test_long_texts_are_changed_some_rows_at_a_time():
    """More rows than a tile has, in prompts of different length."""
    model = of(FOUND, "llava")
    prompts = (replace(ONE[0], text_after=150), Prompt(images=((32, 32), (32, 32)), text_between=70, seed=3))
    told = models.inputs(model, prompts)
    reference = expected(model, told, FOUND)
    with vtprune.pruning(model, "attention_sink", keep=1.0, **FOUND):
        assert_same(answer(model, told, steps=STEPS), reference)


def test_scores_without_massive_tokens_at_cuts():
    """Tokens with massive activations in front of a cut go first; `debias` puts that in front of every choice."""
    model = of(FOUND, "llava")
    told = models.inputs(model, ONE_AND_TWO)
    debias = WithoutMassive(rule=MassiveActivations(threshold=FOUND["threshold"]))
    with edited(model, marks(told), Edit(**{**FOUND, "share": 1.0})) as count:
        answer(model, told, steps=1)
    with vtprune.pruning(model, "pyramiddrop", keep=0.6, debias=debias) as pruner:
        assert pruner.method == "pyramiddrop+WithoutMassive"
        answer(model, told, steps=STEPS)
        reached = reach(pruner.last, told["input_ids"])
    visual = told["input_ids"] == IMAGE
    massive = count.sinks[2] & visual
    assert 0 < massive.sum() < visual.sum() / 2
    for row in range(2):
        segments = [segment.n for segment in pruner.last.segments if segment.row == row]
        depths, sinks = (own[row][visual[row]].split(segments) for own in (reached, massive))
        for reach_of_one, sinks_of_one in zip(depths, sinks, strict=True):
            stay = reach_of_one > 2
            assert stay[sinks_of_one].sum() == max(0, stay.sum() - (~sinks_of_one).sum())


def test_at_cuts_in_a_later_turn_the_first_token_is_remembered():
    model = of(FOUND, "llava")
    debias = WithoutMassive(rule=MassiveActivations(threshold=FOUND["threshold"]))
    words, told = models.inputs(model, (Prompt(text_before=4, seed=73),)), models.inputs(model, ONE)
    ids = torch.cat([words["input_ids"], told["input_ids"][:, 1:]], dim=1)
    whole = {**told, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with vtprune.pruning(model, "fastv", keep=0.6, debias=debias, layer=2) as pruner, torch.no_grad():
        cache = model(**words, use_cache=True).past_key_values
        model(**whole | {"input_ids": told["input_ids"][:, 1:]}, past_key_values=cache)
        in_turns = pruner.last.segments[0].depths
        model(**whole)
        at_once = pruner.last.segments[0].depths
    assert torch.equal(in_turns, at_once)


@some
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_on_the_right(family, attention):
    model = of(FOUND, family, attention)
    left = models.inputs(model)
    pads = (left["attention_mask"] == 0).sum(dim=1).tolist()
    right = {
        name: torch.stack([row.roll(-pad) for row, pad in zip(values, pads, strict=True)]) if name in WHOLE else values
        for name, values in left.items()
    }
    with vtprune.pruning(model, "attention_sink", keep=1.0, **FOUND):
        got = model(**right).logits
    with edited(model, marks(right), Edit(**FOUND)) as count:
        reference = model(**right).logits
    assert count.changed > 0
    assert (got - reference)[right["attention_mask"].bool()].abs().max() < TOLERANCE


def test_a_mask_says_the_same_in_every_form():
    """Of three tokens behind two, rows of the last two; in the second prompt the first token is padding."""
    valid = torch.tensor([[True] * 5, [False] + [True] * 4])
    rows = torch.tensor([[1, 2], [1, 2]])
    square = (torch.arange(5) <= torch.arange(2, 5)[:, None])[None, None] & valid[:, None, None]
    added = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    expected = torch.tensor([[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]]).bool()
    for mask in (valid, valid.long(), square, added):
        assert torch.equal(allowed_by(mask, rows, 3, 5), expected)
    assert torch.equal(allowed_by(None, rows, 3, 5)[0], expected[0])


def test_guessed_words_are_taken_back():
    """Prompt lookup writes several tokens at once and crops the cache; none of these words is massive."""
    model = of(GIVEN, "llava")
    told = models.inputs(model, ONE)
    settings = {**GIVEN, "threshold": 2.2}
    with vtprune.pruning(model, "attention_sink", keep=1.0, **settings):
        expected_words = answer(model, told, steps=12).sequences
        guessed = model.generate(**told, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert guessed.tolist() == expected_words.tolist()


@torch.no_grad()
def test_no_map_of_all_tokens_exists():
    """A picture of 1024 tokens: what is there beside the model is far less than one head's map."""
    model = model_of("qwen2_5_vl")
    told = models.inputs(model, (Prompt(images=((256, 256),), seed=1),))
    peaks = []
    for share in (1.0, 0.2):
        with (
            vtprune.pruning(model, "attention_sink", keep=1.0, **{**GIVEN, "share": share}) as pruner,
            LiveBytes() as peak,
        ):
            model(**told)
        peaks.append(peak.peak)
    assert pruner.last.tokens == 1024
    assert peaks[1] - peaks[0] < 1024 * 1024 * 4


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compiled_code():
    """Compiled behind the wrap it is as in eager; code of before the wrap passes hooks by, and that is an error."""
    torch._dynamo.reset()
    model = models.build("llava", layers=4)
    told = models.inputs(model, ONE)
    compiled = torch.compile(model, backend="eager")
    with vtprune.pruning(model, "identity", keep=1.0):
        compiled(**told)
    with vtprune.pruning(model, "attention_sink", keep=1.0, **GIVEN):
        with pytest.raises(UnsupportedCall, match="compiled before this wrap"):
            compiled(**told)
        torch.compiler.reset()
        assert (compiled(**told).logits - model(**told).logits).abs().max() < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "attention_sink"}, "keeps everything, got keep=0.25: use keep=1.0, or put its `attention`"),
        ({"method": "attention_sink", "keep": 1.0, "share": 1.5}, "share=1.5"),
        ({"method": "attention_sink", "keep": 1.0, "channels": (1415, 2533)}, "channels 0 to 63"),
        ({"method": "attention_sink", "keep": 1.0, "channels": [3]}, "expected a tuple"),
        ({"method": "attention_sink", "keep": 1.0, "debias": True}, "looks at no attention"),
        ({"method": "fastervlm", "debias": "massive"}, "at a cut between layers"),
        ({"method": "random", "debias": "massive"}, "looks at no attention"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        vtprune.wrap(model_of("llava"), **options)
    assert not hasattr(model_of("llava"), "vtprune")


def test_models_and_calls_that_are_refused():
    with pytest.raises(UnsupportedModel, match="has 2 layers"):
        vtprune.wrap(models.build("llava"), "attention_sink", keep=1.0)
    model = fresh("llava")
    told = models.inputs(model, ONE)
    with vtprune.pruning(model, "attention_sink", keep=1.0, **GIVEN):
        with pytest.raises(UnsupportedCall, match="static cache"):
            answer(model, told, cache_implementation="static")
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(UnsupportedCall, match="gradient checkpointing"):
            model(**told)
        model.eval()
        expected_logits = answer(model, told, steps=1).logits
        attention = model.model.language_model.layers[2].self_attn
        hooked, attention.o_proj = attention.o_proj, nn.Linear(64, 64, bias=False)
        with pytest.raises(UnsupportedCall, match="o_proj of a decoder layer was replaced"):
            answer(model, told)
        attention.o_proj = hooked
        assert torch.equal(answer(model, told, steps=1).logits, expected_logits)


def test_at_its_neutral_setting_nothing_is_hooked():
    model = fresh("llava")
    with vtprune.pruning(model, "attention_sink", keep=1.0, share=1.0) as pruner:
        layers = model.model.language_model.layers
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in layers.modules())
        answer(model, models.inputs(model, ONE), steps=1)
        assert pruner.last.attention is None


def test_a_stage_that_is_none():
    with pytest.raises(InvalidOption, match="expected a stage that changes weights or masks"):
        vtprune.wrap(model_of("llava"), replace(build("attention_sink"), attention="sinks"), keep=1.0)
    assert Redistribute(share=1.0).neutral and not Redistribute().neutral
