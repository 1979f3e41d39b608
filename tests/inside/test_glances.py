"""What a glance sees is the attention that transformers compute, and what a rule makes of it is what papers say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch

import vtprune
from tests import models
from tests.contracts import oracle
from tests.contracts.cases import answer
from tests.contracts.dense import hidden
from tests.inside.common import FAMILIES, LAYERS, ONE, WHOLE, model_of, reach
from tests.models import IMAGE, ONE_AND_TWO, Prompt
from vtprune import Pick, Pipeline
from vtprune.glances import RowAttention
from vtprune.inside.glances import MOST_ROWS, find_raters
from vtprune.pipeline import LayerStage
from vtprune.stages.glances import MeanAttention
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

TOLERANCE = 1e-5
POINTS = {2: 0.5, 4: 0.25}
families = pytest.mark.parametrize("family", FAMILIES)
glances = pytest.mark.parametrize(
    ("rows", "at"), [("last", "before"), ("text", "before"), ("last", "behind"), ("text", "behind")]
)


@dataclass(frozen=True)
class Spy:
    """Mean attention, and a note of all it was shown."""

    name: ClassVar[str] = "spied"
    seen: list[RowAttention] = field(default_factory=list, compare=False)

    def __call__(self, seen: RowAttention):
        self.seen.append(seen)
        return MeanAttention()(seen)


def spying(rows, at):
    """Two cuts by what a spy sees."""
    spy = Spy()
    picks = (Pick(name="spied", scorer=Glanced(rule=spy, rows=rows, at=at), selector=TopK()),)
    inside = tuple(LayerStage(at=layer, keep=keep, picks=picks) for layer, keep in POINTS.items())
    return spy, Pipeline(name="spying", picks=(), inside=inside)


@torch.no_grad()
def maps_of(family, told, reached, at, known=0):
    """For every cut the map (B, H, L, L) a glance must have read and which keys (B, L) it had, by eager transformers.

    Behind a cut, tokens that are about to leave are read once more; those `known` from earlier turns have left already.
    """
    model, found = model_of(family, "eager"), []
    for layer in POINTS:
        layer = layer if at == "behind" else layer - 1
        there = reached.clone()
        if at == "behind":
            there[:, known:][reached[:, known:] == layer] += 1
        with hidden(model, there):
            attentions = model(**told, output_attentions=True).attentions
        found.append((attentions[layer], (there > layer) & told["attention_mask"].bool()))
    return found


def asked(told, row, rows):
    """Places of the text behind the last picture, or of its last token."""
    last = int((told["input_ids"][row] == IMAGE).nonzero().max())
    return list(range(last + 1, told["input_ids"].shape[1]))[-1 if rows == "last" else None :]


def assert_saw(spy, maps, told, rows):
    """The weights of real rows, key by key, and where the rows themselves are."""
    for seen, (attention, there) in zip(spy.seen, maps, strict=True):
        B, L = told["input_ids"].shape
        for row in range(B):
            places, keys = asked(told, row, rows), there[row].nonzero()[:, 0]
            real, n = seen.real[row].bool(), seen.weights.shape[3]
            expected = attention[row][:, places][:, :, keys]
            got = seen.weights[row][:, real]
            assert got[:, :, n - len(keys) :].shape == expected.shape
            assert (got[:, :, n - len(keys) :] - expected).abs().max() < TOLERANCE
            assert got[:, :, : n - len(keys)].abs().sum() == 0
            assert seen.own[row][real].tolist() == [place + n - L for place in places]


@families
@glances
def test_a_glance_sees_the_attention_of_transformers(family, rows, at):
    """At both cuts, in a left-padded batch whose texts differ in length."""
    model, told = model_of(family), models.inputs(family, ONE_AND_TWO)
    spy, pipeline = spying(rows, at)
    with vtprune.pruning(model, pipeline, keep=0.6) as pruner, torch.no_grad():
        model(**told)
        reached = reach(pruner.last, told["input_ids"])
    assert {int(depth) for depth in reached.unique()} == {*POINTS, LAYERS}
    assert_saw(spy, maps_of(family, told, reached, at), told, rows)
    assert spy.seen[0].real.all() == (rows == "last")


@pytest.mark.parametrize("family", ["llava", "internvl"])
@glances
def test_in_a_later_turn_it_sees_what_is_cached_too(family, rows, at):
    model = model_of(family)
    first, second = (models.inputs(model, (Prompt(images=((32, 32),), seed=seed),)) for seed in (1, 2))
    spy, pipeline = spying(rows, at)
    with vtprune.pruning(model, pipeline, keep=0.6) as pruner:
        said = answer(model, first, steps=3)
        reached = reach(pruner.last, first["input_ids"])
        ids = torch.cat([said.sequences, second["input_ids"]], dim=1)
        spy.seen.clear()
        given = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer(model, given, steps=1, past_key_values=said.cache)
        reached = reach(pruner.last, ids, reached)
    pixels = {name: torch.cat([first[name], second[name]]) for name in first if name not in WHOLE}
    known = said.sequences.shape[1]
    told = {**given, **pixels}
    assert_saw(spy, maps_of(family, told, reached, at, known), told, rows)


@families
def test_behind_a_cut_by_hand(family):
    """Norm, projections, norms of heads, rotary embedding and softmax of the layer to come, number by number."""
    model, told, caught = model_of(family), models.inputs(family, ONE), {}
    layer = model.model.language_model.layers[2]

    def catch(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        caught.update(
            hidden=hidden[0], cos=kwargs["position_embeddings"][0][0], sin=kwargs["position_embeddings"][1][0]
        )

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(**told)
    handle.remove()
    x, cos, sin = (caught[name].double().numpy() for name in ("hidden", "cos", "sin"))
    attention = layer.self_attn

    def normed(values, norm):
        spread = np.sqrt((values**2).mean(axis=-1, keepdims=True) + norm.variance_epsilon)
        return values / spread * norm.weight.detach().double().numpy()

    def heads_of(projection, norm):
        flat = normed(x, layer.input_layernorm) @ projection.weight.detach().double().numpy().T
        flat += 0 if projection.bias is None else projection.bias.detach().double().numpy()
        split = flat.reshape(len(x), -1, 16)
        return normed(split, getattr(attention, norm)) if hasattr(attention, norm) else split

    def turned(vector, place):
        mirrored = np.array([-vector[j + 8] if j < 8 else vector[j - 8] for j in range(16)])
        return vector * cos[place] + mirrored * sin[place]

    queries, keys = heads_of(attention.q_proj, "q_norm"), heads_of(attention.k_proj, "k_norm")
    place = len(x) - 1
    spy, pipeline = spying("last", "behind")
    with vtprune.pruning(model, pipeline, keep=0.6), torch.no_grad():
        model(**told)
    for head in range(4):
        query = turned(queries[place, head], place)
        logits = [query @ turned(keys[key, head // 2], key) / 4 for key in range(len(x))]
        expected = np.exp(logits) / np.exp(logits).sum()
        assert np.abs(spy.seen[0].weights[0, head, 0].numpy() - expected).max() < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_raters_are_the_words_nearest_to_the_pictures(family):
    """Word by word, from the embeddings that transformers merge."""
    model, told = model_of(family), models.inputs(family, ONE_AND_TWO)
    spy, pipeline = spying("raters", "before")
    with vtprune.pruning(model, pipeline, keep=0.6), torch.no_grad():
        model(**told)
    found = [seen.own[row][seen.real[row]] - seen.weights.shape[3] for seen in spy.seen for row in (0, 1)]
    for row, prompt in enumerate(ONE_AND_TWO):
        alone = models.inputs(family, (prompt,))
        embeds = oracle.merge(model, alone).embeds[0].double().numpy()
        visual = (alone["input_ids"][0] == IMAGE).numpy()
        places = asked(alone, 0, "text")
        expected = [place - len(embeds) for place in _rating(embeds, places, visual)]
        assert 0 < len(expected) < len(places)
        assert found[row].tolist() == found[2 + row].tolist() == expected


def _rating(embeds, places, visual):
    near = np.zeros(len(places))
    for token in np.flatnonzero(visual):
        products = np.array([embeds[token] @ embeds[place] for place in places])
        shares = np.exp(products - products.max())
        near += shares / shares.sum() / visual.sum()
    return [place for place, value in zip(places, near) if value > near.mean()]


def test_raters_by_hand():
    """Words (1, 0) and (0, 1) and a filler, one picture token (2, 0): the first word is nearer. Alike, both rate."""
    embeds = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    rows, real = torch.tensor([[1, 1, 2]]).expand(2, 3), torch.tensor([[False, True, True]]).expand(2, 3)
    visual = torch.tensor([[True, False, False]]).expand(2, 3)
    assert find_raters(embeds, rows, real, visual).tolist() == [[False, True, False], [False, True, True]]


def test_of_a_long_text_the_last_words_are_read():
    model = model_of("llava")
    told = models.inputs(model, (Prompt(images=((32, 32),), text_after=300, seed=3),))
    spy, pipeline = spying("text", "before")
    with vtprune.pruning(model, pipeline, keep=0.6), torch.no_grad():
        model(**told)
    L = told["input_ids"].shape[1]
    assert spy.seen[0].own[0].tolist() == list(range(L - MOST_ROWS, L))


@pytest.mark.parametrize("cached", [True, False])
def test_a_glance_behind_one_cut_and_one_before_the_next_share_a_layer(cached):
    """The first computes queries and keys of a layer by itself, the second takes those of its own call."""
    model, told = model_of("llava"), models.inputs(model_of("llava"), ONE)
    spies = Spy(), Spy()
    glances = Glanced(rule=spies[0], rows="last", at="behind"), Glanced(rule=spies[1], rows="text")
    inside = tuple(
        LayerStage(at=at, keep=keep, picks=(Pick(name="spied", scorer=glance, selector=TopK()),))
        for at, keep, glance in zip((2, 3), (0.5, 0.25), glances, strict=True)
    )
    pipeline = Pipeline(name="spying", picks=(), inside=inside)
    with torch.no_grad(), vtprune.pruning(model, pipeline, keep=0.55) as pruner:
        model(**told, use_cache=cached)
        reached = reach(pruner.last, told["input_ids"])
    eager = model_of("llava", "eager")
    with torch.no_grad(), hidden(eager, reached):
        maps = eager(**told, output_attentions=True).attentions
    seen, left = spies[1].seen[-1], reached[0] > 2
    expected = maps[2][0][:, asked(told, 0, "text")][..., left]
    assert (seen.weights[0] - expected).abs().max() < TOLERANCE
