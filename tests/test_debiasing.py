"""`wrap(debias=...)`: a debiaser in front of every choice by attention, told by the report, refused elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.models import Prompt
from vtprune import Pick, Pipeline
from vtprune.catalog import build
from vtprune.debiasing import DEBIASERS, debiased
from vtprune.errors import InvalidOption
from vtprune.glances import Glance
from vtprune.pipeline import LayerStage
from vtprune.stages import STAGES
from vtprune.stages.debiasers import WithoutSinks, WithoutTrend
from vtprune.stages.glances import MeanAttention, Undecayed
from vtprune.stages.recency import WithoutRecency
from vtprune.stages.scorers import Constant, Debiased, Glanced, Importance, Mixed, Norm, Product
from vtprune.stages.selectors import TopK
from vtprune.stages.sinks import WithoutMassive
from vtprune.types import Ordinal, Part, VisualTokens

K = 4
ONE = (Prompt(images=((32, 32),), seed=1),)
WITH_ATTENTION = ["vtprune", "fastervlm", "vtc_cls", "holov", "visionzip", "todre_select", "vflowopt_select"]
IN_LAYERS = ["fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus", "adaptinfer", "vflowopt"]
WITHOUT = ["divprune", "information_horizon", "cdpruner", "zoo_prune", "tome", "flowcut", "random", "uniform", "pool"]


@dataclass(frozen=True, kw_only=True)
class Backwards:
    """The lowest scores are the highest."""

    times: float = 1.0

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        return -self.times * scores


@pytest.fixture
def model() -> nn.Module:
    return models.build("llava", layers=8)


@torch.no_grad()
def report(model: nn.Module, method: Any, keep: Any = K, **options: Any) -> Any:
    """Of a prefill with one picture."""
    with vtprune.pruning(model, method, keep=keep, **options) as pruner:
        model(**models.inputs(model, ONE))
        return pruner.last


def picks_of(pipeline: Pipeline) -> tuple[Pick, ...]:
    """Those between layers last."""
    return (*pipeline.picks, *(pick for deep in pipeline.inside for pick in deep.picks))


@pytest.mark.parametrize("name", [name for name in DEBIASERS if name != "massive"])
def test_a_name_is_the_debiaser_put_in_by_hand(model: nn.Module, name: str) -> None:
    """In the pipeline, in the choice, and in what the report calls it."""
    pick = Pick(name="cls", scorer=Importance(), debiasers=(DEBIASERS[name],), selector=TopK())
    own = Pipeline(name=f"fastervlm+{name}", picks=(pick,))
    assert debiased(build("fastervlm"), name) == own
    named, by_hand = report(model, "fastervlm", debias=name), report(model, own)
    assert named.method == by_hand.method == f"fastervlm+{name}"
    assert named.segments[0].keep.tolist() == by_hand.segments[0].keep.tolist()


def test_massive_stands_at_cuts_between_layers_only() -> None:
    """Of a method that looks at attention in front of the language model too, there it stays as it is."""
    both = replace(build("fastv"), name="both", picks=build("fastervlm").picks, before=0.5)
    found = debiased(both, "massive")
    assert found.name == "both+massive"
    assert found.picks == both.picks
    assert [pick.debiasers for stage in found.inside for pick in stage.picks] == [(WithoutMassive(),)]
    with pytest.raises(InvalidOption, match="at a cut between layers"):
        debiased(build("fastervlm"), "massive")


def test_true_is_recency() -> None:
    assert DEBIASERS["recency"] == WithoutRecency()
    assert debiased(build("fastervlm"), True) == debiased(build("fastervlm"), "recency")


@pytest.mark.parametrize("nothing", [None, False])
def test_nothing_is_the_default(model: nn.Module, nothing: Any) -> None:
    assert debiased(build("fastervlm"), nothing) == build("fastervlm")
    assert report(model, "fastervlm", debias=nothing).method == report(model, "fastervlm").method == "fastervlm"


def test_a_debiaser_of_ones_own(model: nn.Module) -> None:
    """It is called by its class, and here it turns the choice round."""
    best, worst = report(model, "fastervlm"), report(model, "fastervlm", debias=Backwards())
    assert worst.method == "fastervlm+Backwards"
    assert not set(best.segments[0].keep.tolist()) & set(worst.segments[0].keep.tolist())
    of_all_but_the_worst = report(model, "fastervlm", keep=12).segments[0].keep.tolist()
    assert sorted([*of_all_but_the_worst, *worst.segments[0].keep.tolist()]) == list(range(16))
    assert report(model, "fastervlm", debias=lambda tokens, scores: -scores).method == "fastervlm+function"


@pytest.mark.parametrize("method", [*WITH_ATTENTION, *IN_LAYERS, "todre"])
def test_it_comes_first_in_every_pick_by_attention(method: str) -> None:
    """What the method does to its scores itself comes behind it; other stages are as before."""
    plain, own = build(method), Backwards(times=2.0)
    found = debiased(plain, own)
    for before, after in zip(picks_of(plain), picks_of(found), strict=True):
        first = () if isinstance(before.scorer, Constant) else (own,)
        assert after == replace(before, debiasers=(*first, *before.debiasers))
    assert (found.merger, found.before, found.needs) == (plain.merger, plain.before, plain.needs)
    assert [replace(deep, picks=picks_of(plain)) for deep in found.inside] == [
        replace(deep, picks=picks_of(plain)) for deep in plain.inside
    ]


@pytest.mark.parametrize("wrong", ["recencies", "", 1, 0, 2.5, ("recencies",), WithoutSinks, []])
def test_what_is_no_debiaser_is_refused_with_the_names(model: nn.Module, wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="recency, cubic, sinks, padding, trend, massive, rope"):
        vtprune.wrap(model, "fastervlm", debias=wrong)
    assert not hasattr(model, "vtprune")


@pytest.mark.parametrize("debias", [True, "sinks", Backwards()], ids=str)
@pytest.mark.parametrize("method", WITHOUT)
def test_a_method_that_looks_at_no_attention_is_refused(method: str, debias: Any) -> None:
    with pytest.raises(InvalidOption, match=f"{method!r} looks at no attention"):
        debiased(build(method), debias)


@pytest.mark.parametrize("method", ["flowcut", "tome", "zero_tprune", "divprune", "information_horizon"])
def test_of_a_method_inside_the_encoder_it_is_said_where_it_looks(method: str) -> None:
    """That attention is out of reach; elsewhere there is none."""
    with pytest.raises(InvalidOption) as caught:
        debiased(build(method), "sinks")
    inside = "that debiasers reach: it chooses inside the encoder, and they work behind it" in str(caught.value)
    assert inside == (build(method).encoder is not None)


def test_so_does_wrap(model: nn.Module) -> None:
    with pytest.raises(InvalidOption, match="'divprune' looks at no attention"):
        vtprune.wrap(model, "divprune", debias=True)
    assert not hasattr(model, "vtprune")


def test_dart_ranks_by_the_length_of_keys() -> None:
    with pytest.raises(InvalidOption, match="looks at no attention"):
        debiased(build("dart"), True)


@pytest.mark.parametrize("method", [name for name in IN_LAYERS if name != "vflowopt"])
def test_padding_of_pictures_leaves_first_between_layers(method: str) -> None:
    """Bars at the edges are told in front of the language model, and remembered: hidden states resemble nothing."""
    model = models.build("llava", layers=6)
    inputs = models.inputs(model, ONE)
    bars = torch.zeros(1, 4, 4, dtype=torch.bool)
    bars[:, 0] = bars[:, -1] = True

    def letterboxed(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where(bars.flatten()[None, :, None], torch.ones(output.shape[-1]), output)

    handle = model.model.multi_modal_projector.register_forward_hook(letterboxed)
    depths = {}
    for name in (None, "padding", ("padding", "recency")):
        with vtprune.pruning(model, method, keep=0.6, debias=name) as pruner, torch.no_grad():
            model(**inputs)
            depths[name] = pruner.last.segments[0].depths
    handle.remove()
    for name in ("padding", ("padding", "recency")):
        kept, gone = depths[name][~bars.flatten()], depths[name][bars.flatten()]
        assert gone.max() <= kept.min()
        assert sorted(depths[name].tolist()) == sorted(depths[None].tolist())


def test_parts_of_a_scorer_that_attend_are_debiased() -> None:
    """Of MustDrop both filters and the importance, and what counts by them; of TransPrune not what layers change."""
    own = Backwards(times=2.0)
    plain, found = (debiased(build("mustdrop", {"vision": False, "adaptive": True}), one) for one in (None, own))
    for before, after in zip(plain.inside, found.inside, strict=True):
        scorer = after.picks[0].scorer
        assert {scorer.overall, scorer.single, scorer.importance} == {
            Debiased(scorer=part, debiaser=own)
            for part in (
                before.picks[0].scorer.overall,
                before.picks[0].scorer.single,
                before.picks[0].scorer.importance,
            )
        }
        assert after.counter.filter == scorer
        assert after.picks[0].debiasers == ()
    mixed = debiased(build("transprune"), own).inside[0].picks[0].scorer
    assert mixed.second == Debiased(scorer=build("transprune").inside[0].picks[0].scorer.second, debiaser=own)
    assert mixed.first == build("transprune").inside[0].picks[0].scorer.first


@pytest.mark.parametrize("method", ["look_m", "zipvl"])
def test_what_chooses_in_the_cache_is_debiased(method: str) -> None:
    own = Backwards(times=2.0)
    found = debiased(build(method), own)
    assert [pick.debiasers for pick in found.cache.picks] == [(own,)]
    assert replace(found.cache, picks=build(method).cache.picks) == build(method).cache


@pytest.mark.parametrize("name", ["trend"])
@pytest.mark.parametrize("method", IN_LAYERS)
def test_grids_have_holes_between_layers(method: str, name: str) -> None:
    with pytest.raises(InvalidOption, match=f"debias={name!r}: method {method!r} cuts between layers"):
        debiased(build(method), name)
    assert debiased(build("todre"), name).name == f"todre+{name}", "its attention is that of the encoder"


@pytest.mark.parametrize("stage", [WithoutTrend(), (WithoutTrend(), WithoutRecency())], ids=str)
def test_so_they_have_for_the_stages_behind_the_names(model: nn.Module, stage: Any) -> None:
    with pytest.raises(InvalidOption, match="cuts between layers"):
        report(model, "pyramiddrop", keep=0.5, debias=stage)


@pytest.mark.parametrize("method", ["fastervlm", "vtprune", "pyramiddrop", "vflowopt", "todre"])
@pytest.mark.parametrize(
    "debias", ["recency", "cubic", "sinks", WithoutRecency(form="cubic", constants=(1.0, 0.0, 2.0))]
)
def test_it_is_stored_with_the_pipeline(method: str, debias: Any) -> None:
    pipeline = debiased(build(method), debias)
    again = Pipeline.from_dict(json.loads(json.dumps(pipeline.to_dict())), stages=STAGES)
    assert again == pipeline != build(method)
    assert again.name == pipeline.name == f"{method}+{debias if isinstance(debias, str) else 'WithoutRecency'}"
    stored = debiased(build(method), Backwards(times=3.0)).to_dict()
    known = {**STAGES, "Backwards": Backwards}
    assert picks_of(Pipeline.from_dict(stored, stages=known))[0].debiasers[0] == Backwards(times=3.0)
    with pytest.raises(InvalidOption, match="unknown stage 'Backwards'"):
        Pipeline.from_dict(stored, stages=STAGES)


def test_between_layers_it_changes_the_choice() -> None:
    """Twelve early tokens hold three times what others do; times exp(2.3 u) late ones win until the trend is off."""
    N, content = 576, np.random.default_rng(0).lognormal(0, 0.1, 576)
    content[20:260:20] *= 3
    (name,) = build("pyramiddrop").glances
    attention = torch.tensor(content * np.exp(2.3 * np.arange(N) / (N - 1)) / N, dtype=torch.float32)[None]
    tokens = VisualTokens(
        features=torch.zeros(1, N, 1),
        parts=(Part(start=0, stop=N, kind="image", grid=(24, 24)),),
        ordinals=(Ordinal(segment=0),),
        evidence={name: attention, "origin": torch.arange(N)[None]},
    )
    plain, without = build("pyramiddrop"), debiased(build("pyramiddrop"), True)
    assert min(plain.inside[0].choice.run(tokens, 12).keep[0].tolist()) > 500
    assert without.inside[0].choice.run(tokens, 12).keep[0].tolist() == list(range(20, 260, 20))


def test_so_it_does_in_a_model(model: nn.Module) -> None:
    """At all three cuts: a known trend that lets early tokens win takes them further than without."""
    plain = report(model, "pyramiddrop", keep=0.5)
    steep = report(model, "pyramiddrop", keep=0.5, debias=WithoutRecency(constants=(50.0,)))
    assert (plain.method, steep.method) == ("pyramiddrop", "pyramiddrop+WithoutRecency")
    depths, expected = (sorted(found.segments[0].depths.tolist(), reverse=True) for found in (steep, plain))
    assert depths == steep.segments[0].depths.tolist() == expected != plain.segments[0].depths.tolist()


def glances_of(pipeline: Pipeline) -> list[Any]:
    """The rules of all glances of picks between layers."""
    return [pick.scorer.rule for deep in pipeline.inside for pick in deep.picks]


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "adaptinfer", "atp"])
def test_rope_wraps_the_rule_of_every_glance(method: str) -> None:
    """Rows, layers, other stages and debiasers stay; it is stored and told by its name."""
    plain, found = build(method), debiased(build(method), "rope")
    assert found.name == f"{method}+rope"
    assert glances_of(found) == [Undecayed(rule=rule) for rule in glances_of(plain)]
    for before, after in zip(picks_of(plain), picks_of(found), strict=True):
        assert replace(after.scorer, rule=before.scorer.rule) == before.scorer
        assert replace(after, scorer=before.scorer) == before
    assert [replace(deep, picks=picks_of(plain)) for deep in found.inside] == [
        replace(deep, picks=picks_of(plain)) for deep in plain.inside
    ]
    assert Pipeline.from_dict(json.loads(json.dumps(found.to_dict())), stages=STAGES) == found


def test_rope_reaches_into_scores_made_of_others() -> None:
    glanced = Glanced(rule=MeanAttention(), rows="last")
    scorer = Mixed(first=Product(first=glanced, second=Norm()), second=Constant())
    pick = Pick(name="mixed", scorer=scorer, selector=TopK())
    found = debiased(Pipeline(name="mixed", picks=(), inside=(LayerStage(at=0.5, keep=0.5, picks=(pick,)),)), "rope")
    divided = replace(glanced, rule=Undecayed(rule=MeanAttention()))
    expected = Mixed(first=Product(first=divided, second=Norm()), second=Constant())
    assert found.inside[0].picks[0].scorer == expected


def test_rope_changes_the_choice_and_is_undone(model: nn.Module) -> None:
    plain, divided = (report(model, "fastv", keep=0.5, debias=debias) for debias in (None, "rope"))
    assert (plain.method, divided.method) == ("fastv", "fastv+rope")
    assert plain.kept == divided.kept
    undivided = report(model, "sparsevlm_plus", keep=0.5, divide=False, debias="rope").segments[0]
    assert torch.equal(undivided.depths, report(model, "sparsevlm_plus", keep=0.5).segments[0].depths)
    assert not hasattr(model, "vtprune")


@pytest.mark.parametrize("method", ["fastervlm", "vtprune", "divprune", "vflowopt", "todre", "information_horizon"])
def test_rope_is_refused_where_no_layer_is_looked_at(model: nn.Module, method: str) -> None:
    """Attention of encoders is not turned as that of the layers is; an exit has a threshold of its own."""
    with pytest.raises(InvalidOption, match=f"'rope': method {method!r} chooses by no attention of decoder layers"):
        vtprune.wrap(model, method, debias="rope")
    assert not hasattr(model, "vtprune")


def test_rope_is_refused_where_it_is_there_already() -> None:
    with pytest.raises(InvalidOption, match="'sparsevlm_plus' divides its attention by the decay already"):
        debiased(build("sparsevlm_plus"), "rope")
    assert debiased(build("sparsevlm_plus", {"divide": False}), "rope").needs == build("sparsevlm_plus").needs


@dataclass(frozen=True, kw_only=True)
class Own:
    """A scorer that hides its rule."""

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({Glance(rule=MeanAttention())})

    def __call__(self, tokens: VisualTokens) -> Tensor:
        return tokens.evidence["text_attention"]


def test_rope_is_refused_where_a_rule_cannot_be_reached() -> None:
    pick = Pick(name="own", scorer=Own(), selector=TopK())
    pipeline = Pipeline(name="own", picks=(), inside=(LayerStage(at=0.5, keep=0.5, picks=(pick,)),))
    with pytest.raises(InvalidOption, match="'own' reads attention of decoder layers by a scorer of its own"):
        debiased(pipeline, "rope")
