"""What the rotary embedding makes of two vectors of ones, against rotations in numpy, and attention divided by it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import vtprune
from tests import models
from tests.contracts import oracle
from tests.contracts.cases import answer
from tests.inside.common import LAYERS, model_of, reach
from tests.inside.test_glances import asked
from tests.models import ONE_AND_TWO, QWEN, Prompt
from vtprune import Pick, Pipeline
from vtprune.adapters.decoder import Decoder
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.glances import RowAttention
from vtprune.inside.glances import _decay
from vtprune.kernels.attention import rows_attention
from vtprune.pipeline import LayerStage
from vtprune.stages import STAGES
from vtprune.stages.glances import MassiveHeads, MeanAttention, SymmetricText, Undecayed
from vtprune.stages.scorers import Glanced
from vtprune.stages.selectors import TopK

PAIRS, BASE = 8, 10000.0
AXES = {"qwen2_vl": "tthhhwww", "qwen2_5_vl": "tthhhwww", "qwen3_vl": "thwthwth"}
"""Which of (t, h, w) turns each of the eight pairs of numbers of a head, from the sections of the tiny models."""
POINTS = {2: 0.5, 4: 0.25}
families = pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", *AXES])
places = pytest.mark.parametrize("at", ["before", "behind"])


@dataclass(frozen=True)
class Spy:
    """Mean attention, and a note of all it was shown; it asks for the decay or not."""

    divides: bool
    name: ClassVar[str] = "spied"
    seen: list[RowAttention] = field(default_factory=list, compare=False)

    def __call__(self, seen):
        self.seen.append(seen)
        return MeanAttention()(seen)


def spying(rows, at, divides=True):
    spy = Spy(divides)
    picks = (Pick(name="spied", scorer=Glanced(rule=spy, rows=rows, at=at), selector=TopK()),)
    inside = tuple(LayerStage(at=layer, keep=keep, picks=picks) for layer, keep in POINTS.items())
    return spy, Pipeline(name="spying", picks=(), inside=inside)


def turned_ones(positions, family):
    """Of ids (axes, L) the vectors (L, 16): each pair (1, 1) is turned by its angle, number by number."""
    found = np.zeros((positions.shape[1], 2 * PAIRS))
    for place in range(positions.shape[1]):
        for pair in range(PAIRS):
            axis = "thw".index(AXES[family][pair]) if family in AXES else 0
            angle = float(positions[axis, place]) * BASE ** (-pair / PAIRS)
            found[place, pair] = math.cos(angle) - math.sin(angle)
            found[place, PAIRS + pair] = math.sin(angle) + math.cos(angle)
    return found


def decay_of(vectors, row, key):
    """The product divided by the root of the width, as a share of that at the same place."""
    at_home = 2 * PAIRS / math.sqrt(2 * PAIRS)
    return float(vectors[row] @ vectors[key]) / math.sqrt(2 * PAIRS) / at_home


def there_at(reached, at, told, known=0):
    """For both cuts, which tokens the glance sees: those that reached the layer it looks at."""
    for layer in POINTS:
        there = reached >= layer if at == "behind" else reached > layer - 1
        there[:, :known] = reached[:, :known] > (layer if at == "behind" else layer - 1)
        yield there & told["attention_mask"].bool()


@families
@places
@pytest.mark.parametrize("rows", ["last", "text"])
def test_the_map_is_that_of_ones_turned_by_hand(family, rows, at):
    """At both cuts of a padded batch, on one axis and on three; the ids are those of transformers."""
    model, told = model_of(family), models.inputs(family, ONE_AND_TWO)
    spy, pipeline = spying(rows, at)
    with vtprune.pruning(model, pipeline, keep=0.6) as pruner, torch.no_grad():
        model(**told)
        reached = reach(pruner.last, told["input_ids"])
    assert len(spy.seen) == 2
    lowest = 1.0
    for seen, there in zip(spy.seen, there_at(reached, at, told), strict=True):
        assert seen.decay.dtype == torch.float32
        for row, prompt in enumerate(ONE_AND_TWO):
            alone = oracle.merge(model, models.inputs(family, (prompt,))).positions.numpy()
            vectors, pad = turned_ones(alone, family), told["input_ids"].shape[1] - alone.shape[1]
            keys = [int(key) - pad for key in there[row].nonzero()[:, 0]]
            texts = [place - pad for place in asked(told, row, rows)]
            expected = np.array([[decay_of(vectors, text, key) for key in keys] for text in texts])
            got = seen.decay[row][seen.real[row]][:, -len(keys) :].numpy()
            assert np.abs(got - expected).max() < 1e-5
            lowest = min(lowest, expected.min())
    assert lowest < 0.5


@places
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_cached_keys_of_earlier_turns_count_as_near(family, at):
    model = model_of(family)
    first, second = (models.inputs(model, (Prompt(images=((32, 32),), seed=seed),)) for seed in (1, 2))
    spy, pipeline = spying("text", at)
    with vtprune.pruning(model, pipeline, keep=0.6):
        said = answer(model, first, steps=3)
        past = [layer.keys.shape[2] for layer in said.cache.layers]
        spy.seen.clear()
        ids = torch.cat([said.sequences, second["input_ids"]], dim=1)
        given = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family in QWEN:
            given["position_ids"] = torch.arange(ids.shape[1]).expand(4, 1, -1)
        answer(model, given, steps=1, past_key_values=said.cache)
    for seen, layer in zip(spy.seen, POINTS, strict=True):
        known = past[layer - 1 if at == "before" else layer]
        assert (seen.decay[:, :, :known] == 1).all()
        assert (seen.decay[:, :, known:] != 1).any(dim=2).all()
        own = seen.decay.gather(2, seen.own[..., None])
        assert (own - 1).abs().max() < 1e-6


def test_who_does_not_ask_is_not_told():
    model, told = model_of("llava"), models.inputs("llava")
    spy, pipeline = spying("text", "before", divides=False)
    with vtprune.pruning(model, pipeline, keep=0.6), torch.no_grad():
        model(**told)
    assert [seen.decay for seen in spy.seen] == [None, None]
    assert Glanced(rule=Undecayed(rule=MeanAttention())).glance.divides
    assert not Glanced(rule=MeanAttention()).glance.divides


def tables(n, width=16, scale=1.0):
    angles = torch.arange(n)[:, None] * BASE ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.cat([angles, angles], dim=1)[None]
    return scale * angles.cos(), scale * angles.sin()


def decoder(head_dim):
    attention = SimpleNamespace(head_dim=head_dim)
    return Decoder(layers=(SimpleNamespace(self_attn=attention),), first=1)


def test_what_is_not_turned_and_tables_that_are_scaled():
    """Of six numbers four are turned: (2 cos 3 + 2 cos 0.03 + 2) / 6 three places away. A scale on tables drops out."""
    expected = (2 * math.cos(3) + 2 * math.cos(0.03) + 2) / 6
    got = _decay(decoder(6).ones(0, *tables(4, 4)), torch.tensor([[3]]), past=2)
    assert got[0, 0].tolist()[:3] == pytest.approx([1, 1, expected])
    assert got[0, 0, -1] == pytest.approx(1)
    plain, scaled = (_decay(decoder(4).ones(0, *tables(9, 4, s)), torch.tensor([[8, 2]]), 0) for s in (1.0, 1.3))
    assert torch.allclose(plain, scaled, atol=1e-6)


def test_attention_in_proportion_to_the_map_becomes_flat():
    """All content alike, and keys so near that no value of the map is clamped: all are worth the same then."""
    ones = decoder(16).ones(0, *tables(24))
    rows = torch.tensor([[20, 22, 23]])
    decay = _decay(ones, rows, past=0)
    assert 0.05 < decay.min() < 0.6
    even = decay / decay.sum(dim=2, keepdim=True)
    seen = _shown(even[:, None].expand(1, 4, -1, -1), decay)
    assert MeanAttention()(seen).std() > 0.005
    flat = Undecayed(rule=MeanAttention())(seen)
    assert torch.allclose(flat, flat[:, :1].expand_as(flat), atol=1e-6)


def test_attention_among_ones_leans_less_to_the_near():
    """Behind the softmax a division cannot make it flat: the range of 1 to 9 that ones have becomes one of 1 to 4."""
    ones = decoder(16).ones(0, *tables(24))
    rows = torch.tensor([[23]])
    decay = _decay(ones, rows, past=0)
    allowed = torch.ones(1, 1, 24, dtype=torch.bool)
    weights = rows_attention(ones[:, None, rows[0]], ones[:, None], allowed, scale=0.25)
    seen = _shown(weights, decay)
    before, after = (rule(seen) for rule in (MeanAttention(), Undecayed(rule=MeanAttention())))
    ranges = [float(scores.max() / scores.min()) for scores in (before, after)]
    assert 2 * ranges[1] < ranges[0]


def _shown(weights, decay):
    B, _, R, n = weights.shape
    own = torch.arange(n - R, n).expand(B, R)
    real, visual = torch.ones(B, R, dtype=torch.bool), torch.ones(B, n, dtype=torch.bool)
    return RowAttention(weights=weights, real=real, own=own, visual=visual, decay=decay)


def test_division_by_hand():
    """Maps of .5 and -1, of which the second counts as .1: .2 / .5 and .1 / .1; a row that fills up counts nowhere."""
    weights = torch.tensor([[[[0.9, 0.1], [0.2, 0.1]]]])
    decay = torch.tensor([[[0.01, 0.01], [0.5, -1.0]]])
    seen = RowAttention(
        weights=weights,
        real=torch.tensor([[False, True]]),
        own=torch.tensor([[1, 1]]),
        visual=torch.tensor([[True, True]]),
        decay=decay,
    )
    assert Undecayed(rule=MeanAttention(), least=0.1)(seen)[0].tolist() == pytest.approx([0.4, 1.0])
    assert Undecayed(rule=MeanAttention())(seen)[0].tolist() == pytest.approx([0.4, 2.0])


def test_heads_are_chosen_by_divided_attention():
    """To the picture the first head pays .3, the second .2; divided by 1 and .1 the second pays more: .1 + 1 to .3."""
    weights = torch.tensor([[[[0.3, 0.0, 0.7]], [[0.1, 0.1, 0.8]]]])
    visual = torch.tensor([[True, True, False]])
    own, real = torch.tensor([[2]]), torch.tensor([[True]])
    seen = RowAttention(weights=weights, real=real, own=own, visual=visual, decay=torch.tensor([[[1.0, 0.1, 1.0]]]))
    assert MassiveHeads(heads=1)(seen)[0, :2].tolist() == pytest.approx([0.3, 0.0])
    assert Undecayed(rule=MassiveHeads(heads=1))(seen)[0, :2].tolist() == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize("rule", [MeanAttention(), MassiveHeads(heads=2), SymmetricText()], ids=lambda r: r.name)
def test_any_rule_can_be_wrapped(rule):
    """It sees what it would see of attention that was divided before."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(2, 3, 4, 9, generator=generator).softmax(dim=3)
    decay = torch.rand(2, 4, 9, generator=generator) * 1.2 - 0.2
    divided = weights / decay.clamp_min(0.05)[:, None]
    wrapped = Undecayed(rule=rule)
    assert torch.equal(wrapped(_shown(weights, decay)), rule(_shown(divided, None)))
    assert wrapped.name == f"undecayed_{rule.name}"
    pick = Pick(name="one", scorer=Glanced(rule=wrapped), selector=TopK())
    pipeline = Pipeline(name="one", picks=(), inside=(LayerStage(at=0.5, keep=0.5, picks=(pick,)),))
    assert Pipeline.from_dict(pipeline.to_dict(), stages=STAGES) == pipeline
    with pytest.raises(MissingEvidence, match="decay"):
        wrapped(_shown(weights, None))


@pytest.mark.parametrize("least", [0, -0.1, 1.5, True, "small"])
def test_the_clamp_is_a_share_above_zero(least):
    with pytest.raises(InvalidOption, match="least="):
        Undecayed(rule=MeanAttention(), least=least)


@torch.no_grad()
def test_sparsevlm_plus_divides_unless_told():
    """By the same words and heads, and other tokens stay."""
    model, told = model_of("llava"), models.inputs("llava")
    found = []
    for divide in (True, False):
        with vtprune.pruning(model, "sparsevlm_plus", keep=0.4, divide=divide) as pruner:
            model(**told)
            found.append([segment.depths.tolist() for segment in pruner.last.segments])
        assert [sorted(depths) for depths in found[-1]] == [sorted(depths) for depths in found[0]]
    assert found[0] != found[1]
    assert {depth for depths in found[0] for depth in depths} == {1, 3, LAYERS}
    with pytest.raises(InvalidOption, match="divide="):
        vtprune.wrap(model, "sparsevlm_plus", keep=0.4, divide=1)
