"""Decoders that no family was written for are read rightly or refused: a glance with other formulas would go unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vtprune
from tests import generic_models
from tests.contracts.sinks import Edit, Marks, edited
from tests.generic_models import SPECS, build_generic
from tests.inside.test_glances import TOLERANCE, Spy
from tests.inside.test_sinks import GIVEN
from tests.models import IMAGE
from vtprune import Pick, Pipeline
from vtprune.errors import UnsupportedCall, UnsupportedModel
from vtprune.pipeline import LayerStage
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

OPEN = ("deepseek_vl", "idefics3", "ovis2", "paddleocr_vl", "paligemma", "qianfan_ocr", "smolvlm", "vipllava")
"""Some that must not be refused."""


def spying(at):
    spy = Spy()
    picks = (Pick(name="spied", scorer=Glanced(rule=spy, rows="last", at=at), selector=TopK()),)
    return spy, Pipeline(name="spying", picks=(), inside=(LayerStage(at=1, keep=0.5, picks=picks),))


@pytest.mark.parametrize("name", sorted(SPECS))
@torch.no_grad()
def test_a_glance_sees_the_attention_of_transformers_or_the_model_is_refused(name):
    model, told = build_generic(name)
    model.set_attn_implementation("eager")
    attentions = None
    for at, layer in (("before", 0), ("behind", 1)):
        spy, pipeline = spying(at)
        try:
            with vtprune.pruning(model, pipeline, keep=0.75):
                model(**told)
        except (UnsupportedModel, UnsupportedCall) as error:
            assert name not in OPEN, error
            return
        attentions = attentions or model(**told, output_attentions=True).attentions
        assert (spy.seen[0].weights[:, :, 0] - attentions[layer][:, :, -1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "transprune"])
@pytest.mark.parametrize("name", OPEN)
def test_without_a_cache(name, method):
    """They cut, and decide without a cache what they decide with one."""
    model, told = build_generic(name)
    model.generation_config.eos_token_id = None
    mode = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    with vtprune.pruning(model, method, keep=0.75) as pruner:
        found = []
        for use_cache in (True, False):
            out = model.generate(**told, **mode, use_cache=use_cache)
            found.append((torch.stack(out.logits), [segment.depths.tolist() for segment in pruner.last.segments]))
    assert found[0][1] == found[1][1]
    assert {1, 2} == {depth for depths in found[0][1] for depth in depths}
    assert (found[0][0] - found[1][0]).abs().max() < 1e-4


DEEP = sorted(
    name for name, spec in SPECS.items() if spec.text and not {"layer_types", "mlp_layer_types"} & {*spec.text}
)


@pytest.mark.parametrize("name", DEEP)
def test_attention_is_changed_as_in_whole_maps_or_the_model_is_refused(name, monkeypatch):
    """On five layers of it, of which two are changed; with a cache and without."""
    spec = SPECS[name]
    monkeypatch.setitem(generic_models.SPECS, name, replace(spec, text={**spec.text, "num_hidden_layers": 5}))
    model, told = build_generic(name)
    model.generation_config.eos_token_id = None
    mode = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    found = []
    try:
        with vtprune.pruning(model, "attention_sink", keep=1.0, **GIVEN):
            for use_cache in (True, False):
                found.append(torch.stack(model.generate(**told, **mode, use_cache=use_cache).logits))
    except (UnsupportedModel, UnsupportedCall) as error:
        assert name not in OPEN, error
        return
    visual, real = told["input_ids"] == IMAGE, told["attention_mask"].bool()
    plain = torch.stack(model.generate(**told, **mode).logits)
    with edited(model, [Marks(*row) for row in zip(visual.tolist(), real.tolist())], Edit(**GIVEN)) as count:
        expected = torch.stack(model.generate(**told, **mode).logits)
    assert count.changed > 0
    assert (plain - expected).abs().max() > 1e-3
    assert max((logits - expected).abs().max() for logits in found) < 1e-4
