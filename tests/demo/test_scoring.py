"""Scores for the heat-map: those the selector of the first pick saw, and those it would have seen debiased."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.demo.common import ask, by_hand, clip, host, picture
from vtprune.catalog import build, list_methods
from vtprune.debiasing import DEBIASERS, debiased
from vtprune.demo.panes import Pane
from vtprune.demo.quantities import alike, no_scores, quantity
from vtprune.demo.running import run
from vtprune.demo.scoring import Scored, Watch
from vtprune.stages.scorers import Importance
from vtprune.tiny import QUESTION
from vtprune.types import VisualTokens


@dataclass(frozen=True, eq=False)
class Spy:
    """A selector that remembers the scores it is given."""

    selector: Any
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor:
        self.seen.append(scores.clone())
        return self.selector(tokens, scores, k, taken)


def seen_by_the_selector(name: str, media: Any, pipeline: Any) -> list[Tensor]:
    first = pipeline.picks[0]
    spy = Spy(first.selector)
    watched = replace(pipeline, picks=(replace(first, selector=spy), *pipeline.picks[1:]))
    by_hand(name, media, watched, keep=0.25)
    return spy.seen


def scored(name: str, media: Any, method: str, **options: Any) -> Scored:
    own = host(name)
    inputs = own._inputs(media, QUESTION)
    found = run(own.model, own.processor, ask(media=media, **options), inputs, method, longest=1).scored
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["vtprune", "fastervlm", "vispruner", "visionzip"])
@pytest.mark.parametrize("debias", [False, True])
def test_both_maps_are_what_selectors_see_whichever_of_them_runs(method: str, debias: bool) -> None:
    found = scored("llava", picture(), method, debias=debias, debiaser="trend")
    [plain] = seen_by_the_selector("llava", picture(), build(method))
    [treated] = seen_by_the_selector("llava", picture(), debiased(build(method), "trend"))
    assert found.scores is not None and found.debiased is not None
    assert torch.equal(found.scores[0], plain[0].float()) and torch.equal(found.debiased[0], treated[0].float())
    assert not torch.equal(plain, treated)


@pytest.mark.parametrize("debiaser", DEBIASERS)
def test_every_debiaser_gives_a_map_or_says_why_not(debiaser: str) -> None:
    found = scored("llava", picture(), "fastervlm", debiaser=debiaser)
    assert found.scores is not None and ((found.debiased is None) == ("debiased" in found.missing))


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl"])
def test_a_clip_has_a_score_for_every_token(name: str) -> None:
    found = scored(name, clip(), "vtprune")
    [plain] = seen_by_the_selector(name, clip(), build("vtprune"))
    assert found.scores is not None and torch.equal(found.scores[0], plain[0].float())


def test_scores_of_parts_are_put_where_they_belong() -> None:
    own = host("llava_next_video")
    pipeline = build("quota", {"within": "prune"})
    watch = Watch.of(pipeline, "recency", debias=False)
    parts = len(clip().pictures)
    _, report = by_hand(own.name[5:], clip(), watch.pipeline, {"frames": [torch.ones(parts)]}, keep=0.25)
    found = watch.scored(report).scores
    assert found is not None and not found[0].isnan().any()
    sizes = [part.tokens for part in report.segments[0].parts]
    heard = {tokens.ordinals[0].part: tokens for tokens in watch.heard if len(tokens.parts) == 1}
    assert len(watch.heard) >= 1 and sum(len(tokens.ordinals) for tokens in watch.heard) == parts
    for part, tokens in heard.items():
        raw = pipeline.picks[0].scorer(tokens)
        for debiaser in pipeline.picks[0].debiasers:
            raw = debiaser(tokens, raw)
        assert torch.equal(found[0].split(sizes)[part], raw[0].float())


def pane(**options: Any) -> Pane:
    return host().answer(ask(**options)).panes[0]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("divprune", "divprune goes by distances between tokens and gives none a score"),
        ("pool", "goes by where tokens lie"),
        ("uniform", "at even steps"),
        ("fastv", "between decoder layers"),
        ("zipvl", "in every layer"),
        ("attention_sink", "scores none"),
    ],
)
def test_where_there_is_no_map_a_sentence_says_why(method: str, words: str) -> None:
    found = pane(methods=(method, "random"))
    assert "scores" not in found.pictures and words in found.missing["scores"]
    assert "debiased" not in found.pictures and found.missing["debiased"]


def test_reasons_are_words_of_the_field_for_every_method() -> None:
    for name in list_methods():
        pipeline = build(name)
        watch = Watch.of(pipeline, "recency", debias=False)
        told = [*watch.why.values(), *(alike(name, pick) for pick in pipeline.picks[:1]), no_scores(pipeline)]
        assert watch.why or watch.treated is not None
        for sentence in told:
            assert not sentence or (sentence.startswith(name) and "'" not in sentence and "pick" not in sentence)
        for pick in pipeline.picks[:1]:
            kinds = {type(pick.selector).__name__, type(pick.scorer).__name__}
            assert not any(kind in alike(name, pick) for kind in kinds)
            assert quantity(pick.scorer, "cls_attention") != type(pick.scorer).__name__


def test_maps_say_what_is_scored() -> None:
    words = {"fastervlm": "attention of its CLS token", "dart": "L1 norm of the keys"}
    for method, told in words.items():
        names = scored("llava", picture(), method).names
        assert told in names["scores"] and "recency" not in names["scores"]
    assert scored("llava", picture(), "vtprune").names["scores"].endswith("stretched to 0 to 1")
    assert "recency taken off" in scored("llava", picture(), "fastervlm").names["debiased"]
    assert quantity(build("cdpruner").picks[0].scorer, None) == "relevance to the question"
    assert quantity(Importance(), "received_attention").endswith("attention that a patch receives")


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("method", ["vtprune", "fastervlm", "visionzip"])
def test_how_many_choices_a_debiaser_changes_is_counted(method: str, debias: bool) -> None:
    told = scored("llava", picture(), method, debias=debias, debiaser="trend").names["debiased"]
    reports = [
        by_hand("llava", picture(), one, keep=0.25)[1] for one in (build(method), debiased(build(method), "trend"))
    ]
    plain, treated = (set(report.segments[0].keep.tolist()) for report in reports)
    assert f"\n{len(plain - treated)} of 64 choices change by that" in told


def test_choices_of_frames_by_themselves_are_not_made_again() -> None:
    watch = Watch.of(build("quota", {"within": "prune"}), "recency", debias=False)
    given = {"frames": [torch.ones(len(clip().pictures))]}
    _, report = by_hand("llava_next_video", clip(), watch.pipeline, given, keep=0.25)
    assert "choices change" not in watch.scored(report).names["debiased"]


def test_nothing_is_scored_where_everything_is_kept() -> None:
    found = pane(keep=1.0)
    assert "scores" not in found.pictures and "nothing was scored" in found.missing["scores"]
