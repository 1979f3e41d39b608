"""Scores for the heat-map: those the selector of the first pick saw, and those it would have seen debiased."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.demo.common import ask, by_hand, clip, host, picture
from vtprune.catalog import build
from vtprune.debiasing import DEBIASERS, debiased
from vtprune.demo.panes import Pane
from vtprune.demo.running import run
from vtprune.demo.scoring import Scored, Watch
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
        ("divprune", "scores all tokens alike and goes by its rule Dispersion"),
        ("fastv", "between decoder layers"),
        ("zipvl", "in every layer"),
        ("attention_sink", "scores none"),
    ],
)
def test_where_there_is_no_map_a_sentence_says_why(method: str, words: str) -> None:
    found = pane(methods=(method, "random"))
    assert "scores" not in found.pictures and words in found.missing["scores"]
    assert "debiased" not in found.pictures and found.missing["debiased"]


def test_nothing_is_scored_where_everything_is_kept() -> None:
    found = pane(keep=1.0)
    assert "scores" not in found.pictures and "nothing was scored" in found.missing["scores"]
