"""Stages of the cache alone: where layers store different numbers of tokens, a later turn sees those of each."""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests import models
from tests.inside.common import LAYERS, model_of
from tests.inside.test_found_by_reading import chat
from tests.models import IMAGE, Prompt
from vtprune import Pick, Pipeline
from vtprune.pipeline import CacheStage
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import TopK

FIRST, LATER = Prompt(images=((32, 32),), seed=1), Prompt(images=((32, 32),), seed=3)


class FewerEachTime:
    """One token less at every call, from `begin` on; what it is asked of is a layer of a turn."""

    needs = frozenset()

    def __init__(self, begin):
        self.begin, self.asked = begin, 0

    def __call__(self, tokens, k):
        count = self.begin - self.asked % LAYERS
        self.asked += 1
        return torch.full((len(tokens.features),), count)


def fewer(begin):
    pick = Pick(name="first", scorer=Constant(), selector=TopK())
    return Pipeline(name="fewer", picks=(), cache=CacheStage(picks=(pick,), counter=FewerEachTime(begin)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_later_picture_sees_what_each_layer_stored(attention):
    """Layer n stores the first 12 - n tokens of every picture: later turns see no others of the turn before."""
    model = model_of("llava", attention)
    first, later = models.inputs(model, (FIRST,)), models.inputs(model, (LATER,))
    with vtprune.pruning(model, fewer(12), keep=0.9, positions="keep"):
        got = chat(model, first, later)[0]
    ids = torch.cat([first["input_ids"], later["input_ids"]], dim=1)
    words = torch.full((1, 2), 7)
    told = {
        "input_ids": torch.cat([ids, words], dim=1),
        "pixel_values": torch.cat([first["pixel_values"], later["pixel_values"]]),
    }
    told["attention_mask"] = torch.ones_like(told["input_ids"])
    seen = [masks_of(ids, first["input_ids"].shape[1], layer) for layer in range(LAYERS)]
    plain = model_of("llava", "eager")
    layers, handles = plain.model.language_model.layers, []
    for layer, mask in zip(layers, seen, strict=True):
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
            )
        )
    try:
        with torch.no_grad():
            logits = plain(**told, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    ends = [first["input_ids"].shape[1] - 1, ids.shape[1] - 1, ids.shape[1], ids.shape[1] + 1]
    assert (got - logits[ends]).abs().max() < 1e-4


def masks_of(ids, turn, layer):
    """What rows of two turns and two words see: later ones only the first 12 - `layer` tokens of earlier pictures."""
    count = ids.shape[1] + 2
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    for begin, end in ((0, turn), (turn, ids.shape[1])):
        picture = (ids[0, begin:end] == IMAGE).nonzero()[:, 0] + begin
        seen[end:, picture[12 - layer :]] = False
    return torch.zeros(1, 1, count, count).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_rows_of_a_batch_are_those_alone():
    """One row has a picture more than the other, so what is padding differs from layer to layer."""
    model = model_of("llava")
    two = Prompt(images=((32, 32), (32, 32)), seed=2)
    lengths = [models.inputs(model, (prompt,))["input_ids"].shape[1] for prompt in (FIRST, two)]
    one = Prompt(images=((32, 32),), seed=1, text_after=FIRST.text_after + lengths[1] - lengths[0])
    found = []
    for prompts in ((one, two), (one,), (two,)):
        with vtprune.pruning(model, fewer(12), keep=0.9):
            found.append(chat(model, models.inputs(model, prompts), models.inputs(model, (LATER,) * len(prompts))))
    assert (found[0] - torch.cat(found[1:])).abs().max() < 1e-4
