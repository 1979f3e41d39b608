"""Pictures that leave as a whole, by each rule: as the dense model hides them, alone, in batches, beams and chats."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtprune
from tests import models
from tests.contracts.cases import answer
from tests.fidelity.test_exits import gates
from tests.inside.common import (
    LAYERS,
    ONE,
    SOME,
    STEPS,
    TOLERANCE,
    WHOLE,
    assert_same,
    dense,
    fresh,
    lengths,
    model_of,
    pruned,
    run,
    stored,
)
from tests.inside.test_turns import PICTURES, TURNS, Chat
from tests.integration.common import fingerprint
from tests.models import ONE_AND_TWO, Prompt
from vtprune import Pick, Pipeline, masks
from vtprune.catalog import build
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel
from vtprune.pipeline import LayerStage
from vtprune.stages import STAGES
from vtprune.stages.networks import ExitGate
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import TopK

RULES = {"mass": 0.35, "stable": 0.25, "gate": 0.0}
"""By a threshold of each that some pictures of tiny models cross early, and some late or never."""
rules = pytest.mark.parametrize("rule", RULES)
some = pytest.mark.parametrize("family", SOME)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return gates(tmp_path_factory.mktemp("gates") / "gate.safetensors", depth=LAYERS, seed=3)


@pytest.fixture
def options(rule, path):
    chosen = {"gate": path} if rule == "gate" else {"rule": rule, "below": RULES[rule]}
    return {"keep": 0.9, "first": 1 / 6, "patience": 1, **chosen}


@some
@rules
def test_tokens_and_logits_are_those_of_the_dense_model(rule, family, options):
    """In a padded batch, with a cache and without, and every layer stores what reached it."""
    model, inputs = model_of(family), models.inputs(family, ONE_AND_TWO)
    got, uncached = (run(model, "dyvte", inputs, {"use_cache": use}, **options) for use in (True, False))
    assert_same(got.answer, dense(model, inputs, got.reach))
    assert torch.equal(uncached.reach, got.reach)
    assert_same(uncached.answer, got.answer)
    assert stored(got.answer.cache) == lengths(got.reach, inputs["attention_mask"], STEPS)
    assert got.report.adaptive and got.report.kept == 0


@rules
def test_rows_lose_their_pictures_at_several_layers(rule, options):
    """Else the comparisons here would see no difference between rows."""
    found = [run(model_of(f), "dyvte", models.inputs(f, ONE_AND_TWO), **options).report.segments for f in SOME]
    assert any(len({int(segment.depths[0]) for segment in segments}) > 1 for segments in found)
    assert any(int(segment.depths[0]) < 5 for segments in found for segment in segments)


@some
@rules
@pytest.mark.parametrize("prompts", [ONE_AND_TWO, ONE_AND_TWO[::-1]], ids=["short first", "long first"])
@pytest.mark.parametrize("patience", [1, 2])
def test_a_batch_equals_its_rows_alone(rule, family, prompts, patience, options):
    model, options = model_of(family), {**options, "patience": patience}
    together = run(model, "dyvte", models.inputs(family, prompts), **options)
    for row, prompt in enumerate(prompts):
        alone = run(model, "dyvte", models.inputs(family, (prompt,)), **options)
        depths = [segment.depths.tolist() for segment in together.report.segments if segment.row == row]
        assert depths == [segment.depths.tolist() for segment in alone.report.segments]
        assert_same(alone.answer, together.answer, [row])


@some
@rules
def test_beams(rule, family, options):
    model, inputs = model_of(family), models.inputs(family, ONE_AND_TWO)
    mode = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    got = run(model, "dyvte", inputs, mode, **options)
    reached = got.reach[::3]
    assert torch.equal(got.reach, reached.repeat_interleave(3, dim=0))
    assert torch.equal(dense(model, inputs, reached, **mode).sequences, got.answer.sequences)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("turns", ["a picture", "words, a picture, words", "words first"])
@rules
def test_a_chat_goes_on(rule, family, turns, options):
    with pruned(model_of(family), "dyvte", positions="keep", **options) as pruner:
        chat = Chat(family, pruner)
        done = [chat.turn(prompts) for prompts in TURNS[turns]]
    for reply, told, reached, merged in done:
        assert_same(reply, dense(model_of(family), told, reached, merged))


@rules
@torch.no_grad()
def test_padding_on_the_right(rule, options):
    model, left = model_of("llava"), models.inputs("llava", ONE_AND_TWO)
    pads = (left["attention_mask"] == 0).sum(dim=1).tolist()
    right = {
        name: torch.stack([row.roll(-pad) for row, pad in zip(values, pads)]) if name in WHOLE else values
        for name, values in left.items()
    }
    with pruned(model, "dyvte", **options) as pruner:
        expected, first = model(**left).logits, pruner.last
        got = model(**right).logits
    for before, after in zip(first.segments, pruner.last.segments, strict=True):
        assert torch.equal(before.depths, after.depths)
    for row, pad in enumerate(pads):
        length = left["input_ids"].shape[1] - pad
        assert (got[row, :length] - expected[row, pad:]).abs().max() < TOLERANCE


@rules
def test_budgets_of_parts_and_of_whole_prompts(rule, options):
    model, inputs = model_of("llava_onevision"), models.inputs("llava_onevision", ONE_AND_TWO)
    for per in ("part", "prompt"):
        got = run(model, "dyvte", inputs, per=per, **options)
        assert_same(got.answer, dense(model, inputs, got.reach))


@rules
def test_nothing_leaves_where_a_number_is_large_and_the_rule_finds_nothing(rule, options, tmp_path):
    never = {"below": 0.0}
    if rule == "gate":
        save_file(weights(), tmp_path / "never.safetensors")  # the margin is 0
        never = {"gate": tmp_path / "never.safetensors"}
    model, inputs = model_of("llava"), models.inputs("llava", ONE_AND_TWO)
    plain = answer(model, inputs)
    with pruned(model, "dyvte", **{**options, **never, "keep": 10_000}) as pruner:
        got = answer(model, inputs)
    assert pruner.last.kept == pruner.last.tokens == pruner.last.average
    assert (got.logits - plain.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize(("keep", "below", "left"), [(0.9, 0.0, {5}), (0.2, 0.0, {1}), (0.9, 0.4, {1, 5})])
@torch.no_grad()
def test_a_step_makes_a_mask_for_each_cut_and_not_for_each_layer(keep, below, left, monkeypatch):
    """Tokens may leave in front of layers 1 to 5; what is stored differs only where some did, also in chosen rows."""
    model, inputs, made = model_of("llava"), models.inputs("llava", ONE_AND_TWO), []
    original = masks.over_keys
    monkeypatch.setattr(masks, "over_keys", lambda valid, **call: made.append(valid) or original(valid, **call))
    with pruned(model, "dyvte", keep=keep, below=below, first=1 / 6, patience=1) as pruner:
        cache = answer(model, inputs, steps=1).cache
        assert {int(segment.depths[0]) for segment in pruner.last.segments} == left
        for rows in ([0, 1], [1, 0]):
            cache.reorder_cache(torch.tensor(rows))
            made.clear()
            mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long)
            mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
            model(input_ids=torch.tensor([[7], [9]]), attention_mask=mask, past_key_values=cache, use_cache=True)
            assert len(made) == len({1, *left}), "as many lengths as layers 1 to 5 store"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@rules
def test_a_prompt_that_ends_with_its_picture(rule, family, options):
    """The gate looks at text, and there is none; the last token may be one of the picture."""
    model = model_of(family)
    inputs = models.inputs(model, (Prompt(images=((32, 32),), seed=1, text_after=0),))
    inputs = {name: values[:, :-1] if name in WHOLE else values for name, values in inputs.items()}
    with torch.no_grad(), pruned(model, "dyvte", **options) as pruner:
        if rule == "gate":
            with pytest.raises(UnsupportedCall, match="row 0 ends with a picture"):
                model(**inputs)
        else:
            model(**inputs)
            assert pruner.last.kept == 0 < pruner.last.average


def weights(layers=LAYERS, *, hidden=8, width=64, out=2, name="layers.{}.{}.weight", between=2):
    held = {}
    for number in range(layers):
        held[name.format(number, 0)] = torch.zeros(hidden, 2 * width)
        held[name.format(number, between)] = torch.zeros(out, hidden)
    return held


LACKING = {name: tensor for name, tensor in weights().items() if name != "layers.3.2.weight"}
BAD = {
    "empty": ({}, "expected layers.0.0.weight"),
    "other names": (weights(name="gate.{}.{}.weight"), "expected layers.0.0.weight"),
    "other numbers": (weights(between=1), "expected layers.0.0.weight"),
    "a bias": ({**weights(), "layers.0.0.bias": torch.zeros(8)}, "expected layers.0.0.weight"),
    "one is missing": (LACKING, "expected layers.0.0.weight"),
    "three classes": (weights(out=3), re.escape("(8, 128) and (3, 8)")),
    "layers that do not fit": ({**weights(), "layers.2.2.weight": torch.zeros(2, 9)}, re.escape("(8, 128) and (2, 9)")),
    "two widths": ({**weights(), "layers.2.0.weight": torch.zeros(8, 64)}, re.escape("expected (C, 128)")),
    "an odd width": ({name: tensor[:, :7] for name, tensor in weights(hidden=7).items()}, "even width"),
    "a vector": ({**weights(), "layers.0.0.weight": torch.zeros(8)}, "a gate of"),
    "a number": ({**weights(), "layers.0.0.weight": torch.zeros(())}, "a gate of"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_holds_no_gates(name, tmp_path):
    held, message = BAD[name]
    save_file({key: tensor.contiguous() for key, tensor in held.items()}, tmp_path / "gate.safetensors")
    for make in (lambda file: ExitGate(path=file), lambda file: build("dyvte", {"gate": file})):
        with pytest.raises(InvalidOption, match=message):
            make(str(tmp_path / "gate.safetensors"))


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 9, b"\x80\x04pickle"])
def test_a_file_that_cannot_be_read(content, tmp_path):
    if content is not None:
        (tmp_path / "gate.safetensors").write_bytes(content)
    for file in (tmp_path / "gate.safetensors", tmp_path):
        with pytest.raises(InvalidOption, match="cannot read the gate"):
            build("dyvte", {"gate": file})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": LAYERS + 1}, "gates of 7 layers of width 64: this model has 6 layers of width 64"),
        ({"layers": LAYERS - 1}, "gates of 5 layers"),
        ({"width": 32}, "layers of width 32: this model has 6 layers of width 64"),
    ],
)
def test_a_gate_of_another_model(options, message, tmp_path):
    """At `wrap`, and nothing is left on the model."""
    file = str(tmp_path / "gate.safetensors")
    save_file(weights(**options), file)
    model = fresh("llava")
    before = fingerprint(model)
    with pytest.raises(InvalidOption, match=message):
        vtprune.wrap(model, "dyvte", keep=0.5, gate=file)
    assert fingerprint(model) == before


@rules
def test_it_is_stored_and_restored(rule, options, path):
    parameters = {name: value for name, value in options.items() if name != "keep"}
    pipeline = build("dyvte", {**parameters, "every": 2})
    described = json.loads(json.dumps(pipeline.to_dict()))
    again = Pipeline.from_dict(described, stages=STAGES)
    assert again == pipeline
    (stage,) = described["inside"]
    assert (stage["keep"], stage["every"], stage["patience"]) == (None, 2, 1)
    if rule == "gate":
        assert stage["counter"]["scorer"]["rule"] == {"stage": "ExitGate", "path": path}
    stored_before = {key: value for key, value in stage.items() if key not in ("every", "patience")}
    old = {**described, "inside": [stored_before]}
    assert Pipeline.from_dict(old, stages=STAGES).inside[0].every == 1, "what was stored before there was such a field"


def test_a_stored_gate_that_is_gone(tmp_path):
    file = gates(tmp_path / "gate.safetensors", depth=LAYERS)
    described = build("dyvte", {"gate": file}).to_dict()
    Path(file).unlink()
    with pytest.raises(InvalidOption, match="cannot read the gate"):
        Pipeline.from_dict(described, stages=STAGES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_in_half_precision_is_used_as_what_it_is(dtype, tmp_path):
    """And model and gate need not agree."""
    file = gates(tmp_path / "gate.safetensors", depth=LAYERS, seed=3)
    held = load_file(file)
    save_file({name: tensor.to(dtype) for name, tensor in held.items()}, tmp_path / "half.safetensors")
    save_file({name: tensor.to(dtype).float() for name, tensor in held.items()}, tmp_path / "whole.safetensors")
    inputs, found = models.inputs("llava", ONE_AND_TWO), []
    for name in ("half", "whole"):
        gate = str(tmp_path / f"{name}.safetensors")
        got = run(model_of("llava"), "dyvte", inputs, keep=0.9, first=1 / 6, gate=gate)
        found.append(got.reach)
    assert torch.equal(*found)
    run(fresh("llava").bfloat16(), "dyvte", {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}, gate=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "gate"}, "rule='gate'"),
        ({"below": 1.5}, "below=1.5"),
        ({"patience": 0}, "patience=0"),
        ({"first": 1.0}, "first=1.0"),
        ({"every": 0}, "every=0"),
    ],
)
def test_parameters_that_are_none(options, message):
    with pytest.raises(InvalidOption, match=message):
        build("dyvte", options)


def test_layers_without_an_mlp_are_refused_where_what_it_makes_is_read():
    model = fresh("llava")
    for layer in model.model.language_model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="no `mlp`"):
        vtprune.wrap(model, "transprune", keep=0.5)
    assert fingerprint(model) == before
    vtprune.unwrap(vtprune.wrap(model, "dyvte", keep=0.5))


def test_what_modules_make_is_not_held():
    """In front of a layer nothing is left of what attention and MLP gave in the layers before it."""
    model, held, alive, handles = model_of("llava"), [], [], []

    def note(module, args, output):
        held.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    for layer in model.model.language_model.layers:
        handles += [module.register_forward_hook(note) for module in (layer.self_attn, layer.mlp)]
        count = layer.register_forward_pre_hook(lambda *call: alive.append(sum(one() is not None for one in held)))
        handles.append(count)
    with torch.no_grad(), pruned(model, "transprune"):
        model(**models.inputs("llava", ONE))
    for handle in handles:
        handle.remove()
    assert len(held) == 2 * LAYERS and alive == [0] * LAYERS


@dataclass
class Grants:
    """A counter that grants one number after the other."""

    left: list[int]

    def __call__(self, tokens, k):
        assert k == tokens.features.shape[1], "all that came may stay"
        return torch.full((len(tokens.features),), self.left.pop(0))


@pytest.mark.parametrize(
    ("patience", "depths"),
    [(1, [6] * 2 + [4] * 2 + [2] * 6 + [1] * 6), (2, [6] * 8 + [3] * 2 + [2] * 6), (3, [6] * 8 + [4] * 2 + [3] * 6)],
)
def test_the_most_that_was_granted_in_a_row_stays(patience, depths):
    """Of 16 tokens 10, 4, 8, 2 and 8 are granted in front of layers 1 to 5; of three in a row 10, 8 and 8 are most."""
    pick = Pick(name="first", scorer=Constant(), selector=TopK())
    counter = Grants([10, 4, 8, 2, 8])
    stage = LayerStage(at=1, keep=None, picks=(pick,), counter=counter, patience=patience)
    pipeline = Pipeline(name="grants", picks=(), inside=(stage,))
    got = run(model_of("llava"), pipeline, models.inputs("llava", ONE), {"steps": 1}, keep=100)
    assert got.report.segments[0].depths.tolist() == depths
    assert not counter.left


def test_pictures_of_a_turn_ask_for_themselves():
    """Those of an earlier turn have left; new ones leave where the new text looks at them no more."""
    with pruned(model_of("llava"), "dyvte", keep=0.9, first=1 / 6, patience=2, below=0.4) as pruner:
        chat = Chat("llava", pruner)
        chat.turn(PICTURES)
        first = [int(segment.depths[0]) for segment in pruner.last.segments]
        chat.turn(TURNS["a picture"][0])
        assert len(pruner.last.segments) == len(first) == 3
