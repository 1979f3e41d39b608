"""Stages of one's own between layers: which of them chooses where, what it sees, and what merging makes of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests import models
from tests.inside.common import (
    LAYERS,
    ONE,
    SOME,
    STEPS,
    assert_same,
    lengths,
    model_of,
    pruned,
    reach,
    run,
    stored,
)
from tests.models import ONE_AND_TWO
from vtprune import Pick, Pipeline
from vtprune.errors import InvalidOption
from vtprune.pipeline import LayerStage
from vtprune.readings import Reading
from vtprune.stages.rules import Received
from vtprune.stages.scorers import Constant


@dataclass(frozen=True)
class Ends:
    """The first tokens of a picture, or the last."""

    last: bool

    def __call__(self, tokens, scores, k, taken):
        first = scores.shape[1] - k if self.last else 0
        return torch.arange(first, first + k).expand(len(scores), k)


def stage(at, keep, last):
    return LayerStage(at=at, keep=keep, picks=(Pick(name="ends", scorer=Constant(), selector=Ends(last)),))


def depths_of(*stages, keep, **options):
    model = model_of("llava")
    pipeline = Pipeline(name="ends", picks=options.pop("picks", ()), inside=stages, **options)
    return run(model, pipeline, models.inputs(model, ONE), keep=keep).report.segments[0].depths.tolist()


def test_every_stage_makes_its_own_choice():
    """(2 x 16 + 2 x 8 + 2 x 4) / 6 tokens: the first half stays first, and of that the second."""
    assert depths_of(stage(2, 0.5, False), stage(4, 0.25, True), keep=3.5 / 6) == [4] * 4 + [6] * 4 + [2] * 8


def test_where_two_stages_fall_on_one_layer_the_later_chooses():
    assert depths_of(stage(0.1, 0.5, False), stage(0.2, 0.25, True), keep=2.25 / 6) == [1] * 12 + [6] * 4


def test_all_may_leave():
    assert depths_of(stage(3, 0.0, False), keep=0.5) == [3] * 16


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        ((stage(2, 0.25, False), stage(4, 0.5, False)), {}),
        ((stage(2, 0.5, False),), {"before": 0.25, "picks": stage(2, 0.5, False).picks}),
    ],
    ids=["inside", "before"],
)
def test_a_schedule_that_would_bring_tokens_back_is_refused(stages, options):
    """What left at one cut cannot be there behind the next, and the average would not be met."""
    with pytest.raises(InvalidOption):
        depths_of(*stages, keep=0.5, **options)


@dataclass(frozen=True)
class Notes:
    """A scorer that keeps what it was shown; it asks for evidence of the encoder."""

    seen: list[Any] = field(default_factory=list, compare=False)
    reading = Reading(rule=Received())

    @property
    def needs(self):
        return frozenset({self.reading})

    def __call__(self, tokens):
        self.seen.append(tokens)
        return torch.zeros(tokens.features.shape[:2])


@dataclass(frozen=True)
class Averages:
    """Every kept token becomes the mean of all of its picture that are still there."""

    def __call__(self, tokens, selection):
        S, N = tokens.features.shape[:2]
        return torch.full((S, selection.keep.shape[1], N), 1 / N)


def hidden_at(model, layers, inputs):
    """What the layers get, in one forward."""
    found, handles = {}, []
    for number in layers:

        def catch(module, args, kwargs, number=number):
            found[number] = args[0] if args else kwargs["hidden_states"]

        handles.append(model.model.language_model.layers[number].register_forward_pre_hook(catch, with_kwargs=True))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_a_stage_sees_hidden_states_and_evidence_of_the_tokens_that_are_left():
    """`origin` says which they are; what the encoder said of them at first is theirs still."""
    model, notes = model_of("llava"), Notes()
    inputs = models.inputs(model, ONE)
    picks = (Pick(name="noted", scorer=notes, selector=Ends(last=True)),)
    inside = tuple(LayerStage(at=at, keep=keep, picks=picks) for at, keep in ((2, 0.5), (4, 0.25)))
    with pruned(model, Pipeline(name="notes", picks=(), inside=inside), keep=3.5 / 6) as pruner:
        hidden = hidden_at(model, (1, 2, 3, 4), inputs)
        places = (reach(pruner.last, inputs["input_ids"])[0] < LAYERS).nonzero()[:, 0]
    assert pruner.last.segments[0].depths.tolist() == [2] * 8 + [4] * 4 + [6] * 4
    first, second = notes.seen
    assert first.evidence["origin"].tolist() == [list(range(16))]
    assert second.evidence["origin"].tolist() == [list(range(8, 16))]
    start = int(places[0])
    uncut = hidden_at(model, (2,), inputs)[2]
    assert torch.allclose(first.features, uncut[:, start : start + 16], atol=1e-5)
    assert torch.equal(hidden[2][:, start : start + 8], first.features[:, 8:])
    assert torch.equal(hidden[4][:, start : start + 4], second.features[:, 4:])
    early = first.evidence[Notes.reading.name]
    assert early.unique().numel() == 16
    assert torch.equal(second.evidence[Notes.reading.name], early[:, 8:])


@pytest.mark.parametrize("family", SOME)
def test_merging_between_layers(family):
    """In a padded batch of pictures of several sizes; positions, caches and later steps are as without it."""
    model = model_of(family)
    inputs = models.inputs(model, ONE_AND_TWO)
    stages = (LayerStage(at=2, keep=0.5, picks=stage(2, 0.5, False).picks, merger=Averages()), stage(4, 0.25, True))
    pipeline = Pipeline(name="averages", picks=(), inside=stages)
    cached, uncached = (run(model, pipeline, inputs, {"use_cache": use}, keep=3.5 / 6) for use in (True, False))
    assert_same(uncached.answer, cached.answer)
    assert stored(cached.answer.cache) == lengths(cached.reach, inputs["attention_mask"], STEPS)
    before = hidden_at(model, (2,), inputs)[2]
    with pruned(model, pipeline, keep=3.5 / 6):
        behind = hidden_at(model, (2,), inputs)[2]
    for row in (0, 1):
        left = (inputs["attention_mask"][row].bool() & (cached.reach[row] > 2)).nonzero()[:, 0]
        words = inputs["input_ids"][row, left] != models.IMAGE
        short = behind[row, -len(left) :]
        assert torch.allclose(short[words], before[row, left[words]], atol=1e-5)
        assert (short[~words] - before[row, left[~words]]).abs().max() > 0.1


def test_merged_rows_by_hand():
    """One picture: the eight tokens that stay are the mean of all sixteen as layer 2 would have got them."""
    model = model_of("llava")
    inputs = models.inputs(model, ONE)
    stages = (LayerStage(at=2, keep=0.5, picks=stage(2, 0.5, False).picks, merger=Averages()),)
    picture = (inputs["input_ids"][0] == models.IMAGE).nonzero()[:, 0]
    before = hidden_at(model, (2,), inputs)[2]
    with pruned(model, Pipeline(name="averages", picks=(), inside=stages), keep=4 / 6):
        behind = hidden_at(model, (2,), inputs)[2]
    mean = before[0, picture].mean(dim=0)
    start = int(picture[0])
    assert behind.shape[1] == before.shape[1] - 8
    assert torch.allclose(behind[0, start : start + 8], mean.expand(8, -1), atol=1e-5)
    assert torch.allclose(behind[0, start + 8 :], before[0, start + 16 :], atol=1e-5)
