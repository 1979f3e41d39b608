"""Panes of the bundled models: what `vtprune.pruning` gives directly, and no more than a sentence where it fails."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vtprune
from tests.demo.common import MODELS, ask, by_hand, clip, host, kept, media_of, picture
from vtprune.demo import page, running, session
from vtprune.demo.panes import Outcome, Pane
from vtprune.demo.running import run
from vtprune.demo.session import Host
from vtprune.errors import InvalidOption, UnsupportedCall, VtpruneError
from vtprune.tiny import ANSWER, QUESTION
from vtprune.tiny.loading import load_tiny_clip
from vtprune.video import per_part, score_frames


def by_place(outcome: Outcome) -> dict[str, Pane]:
    assert outcome.unpruned is not None
    return {"unpruned": outcome.unpruned, **dict(zip(("a", "b", "random"), outcome.panes, strict=True))}


@pytest.mark.parametrize("name", MODELS)
def test_panes_are_what_pruning_gives(name: str) -> None:
    media = media_of(name)
    outcome = host(name).answer(ask(media=media, methods=("vtprune", "fastv"), keep=0.25, seed=3))
    panes = by_place(outcome)
    expected = {
        "unpruned": by_hand(name, media, "identity", keep=1.0),
        "a": by_hand(name, media, "vtprune", keep=0.25),
        "b": by_hand(name, media, "fastv", keep=0.25),
        "random": by_hand(name, media, "random", keep=0.25, seed=3),
    }
    for place, (ids, report) in expected.items():
        pane = panes[place]
        assert pane.error == "" and pane.ids == ids and kept(pane.report) == kept(report), place
        assert pane.numbers is not None
        assert (pane.numbers.tokens, pane.numbers.kept) == (report.tokens, report.kept)
        assert pane.numbers.kv_bytes_whole - pane.numbers.kv_bytes == report.kv_bytes_saved


def test_the_unpruned_answer_is_right_and_the_others_are_held_against_it() -> None:
    outcome = host().answer(ask(methods=("vtprune", "random"), keep=4, seed=1))
    assert outcome.unpruned is not None and outcome.unpruned.answer == ANSWER
    for pane in outcome.panes:
        assert pane.same == (pane.answer == ANSWER)
        assert pane.agreement is not None and (pane.agreement == 1) == (pane.ids == outcome.unpruned.ids)


def test_the_third_pane_is_random_whatever_is_asked_for() -> None:
    for methods in (("vtprune", "divprune"), ("random", "random"), ("nonsense", "nonsense")):
        outcome = host().answer(ask(methods=methods))
        assert [pane.method for pane in outcome.panes] == [*methods, "random"]
        assert outcome.panes[2].error == "" and outcome.panes[2].answer is not None


def test_a_pane_that_fails_has_a_sentence_and_leaves_the_others_alone() -> None:
    outcome = host().answer(ask(methods=("pyramiddrop", "vtprune"), keep=0.11))
    failing, fine, chance = outcome.panes
    assert "reaches 0.25 to 1" in failing.error and "\n" not in failing.error
    assert failing.line and failing.numbers is None and failing.answer is None
    assert fine.error == "" and chance.error == "" and fine.numbers is not None and fine.numbers.kept == 28
    assert outcome.overlap(0, 1) is None and outcome.overlap(1, 2) is not None


def test_an_error_of_another_kind_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = host()

    def fails(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(own.model), "generate", fails)
    outcome = own.answer(ask())
    assert {pane.error for pane in by_place(outcome).values()} == {
        "out of memory: try a smaller picture, fewer frames or a smaller model"
    }
    assert not hasattr(own.model, "vtprune")


def test_where_only_all_tokens_are_too_many_the_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to hold them against, and patches are where they are."""
    own, run = host(), session.run

    def failing(model: Any, processor: Any, ask: Any, inputs: Any, method: str, **options: Any) -> Any:
        if method == "identity":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(model, processor, ask, inputs, method, **options)

    monkeypatch.setattr(session, "run", failing)
    outcome = own.answer(ask())
    assert outcome.unpruned is not None and "out of memory" in outcome.unpruned.error
    assert [(pane.same, pane.answer) for pane in outcome.panes] == [(None, "orange")] * 3
    assert outcome.framing is not None
    assert "unpruned" not in page.head_html(outcome.panes[0], "a")


def test_debiasing_is_that_of_wrap_where_a_method_goes_by_attention() -> None:
    outcome = host().answer(ask(methods=("fastervlm", "divprune"), debias=True, debiaser="trend"))
    ids, report = by_hand("llava", picture(), "fastervlm", keep=0.25, debias="trend")
    assert outcome.panes[0].ids == ids and kept(outcome.panes[0].report) == kept(report)
    assert kept(report) != kept(by_hand("llava", picture(), "fastervlm", keep=0.25)[1])
    assert outcome.panes[0].notes == ("debiased: trend",)
    assert "looks at no attention" in outcome.panes[1].notes[0]
    assert kept(outcome.panes[1].report) == kept(by_hand("llava", picture(), "divprune", keep=0.25)[1])


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl"])
def test_frames_are_scored_for_a_method_that_shares_by_them(name: str) -> None:
    model, processor = host(name).model, host(name).processor
    pane = host(name).answer(ask(media=clip(), methods=("quota", "temporal"))).panes[0]
    scores = per_part(score_frames(model, processor, clip().pictures, QUESTION), model)
    ids, report = by_hand(name, clip(), "quota", {"frames": [scores]}, keep=0.25)
    assert pane.ids == ids and kept(pane.report) == kept(report)
    assert pane.numbers is not None and "score" in pane.numbers.seconds


def test_relevance_is_told_for_the_model_with_a_text_tower() -> None:
    tower, tokenizer = load_tiny_clip("llava")
    pixels = host().processor(images=picture().pictures[0], text="<image>", return_tensors="pt")["pixel_values"]
    relevance = -vtprune.text_relevance(tower, tokenizer, pixels, [QUESTION])
    ids, report = by_hand("llava", picture(), "cdpruner", {"relevance": [relevance[0]]}, keep=0.25)
    pane = host().answer(ask(methods=("cdpruner", "vtprune"))).panes[0]
    assert pane.ids == ids and kept(pane.report) == kept(report)


def test_forced_tokens_are_in_and_out_in_every_pane() -> None:
    plain = host().answer(ask())
    chosen = [set(kept(pane.report)[0]) for pane in plain.panes]
    dropped = sorted(set(range(256)) - set.union(*chosen))[:2]
    wanted = sorted(set.union(*chosen))[:2]
    outcome = host().answer(ask(forced_in=tuple(dropped), forced_out=tuple(wanted)))
    for pane in outcome.panes:
        own = set(kept(pane.report)[0])
        assert set(dropped) <= own and not set(wanted) & own and len(own) == 64
        assert [name for name, _ in pane.colours[-2:]] == ["forced in by hand", "forced out by hand"]
        assert "protected" not in dict(pane.colours)
    assert outcome.unpruned is not None and "forced" not in str(outcome.unpruned.colours)
    assert outcome.unpruned is not None and outcome.unpruned.numbers is not None
    assert outcome.unpruned.numbers.kept == 256


def test_tokens_that_cannot_be_forced_are_a_sentence_in_that_pane() -> None:
    outcome = host().answer(ask(methods=("tome", "vtprune"), forced_in=(0, 1, 2)))
    assert "inside the encoder" in outcome.panes[0].error and outcome.panes[1].error == ""
    outcome = host().answer(ask(forced_in=(0, 1, 2), keep=2))
    assert all("3 tokens protected, but only 2" in pane.error for pane in outcome.panes)


@pytest.mark.parametrize("name", MODELS)
def test_methods_that_are_offered_answer_and_others_do_not(name: str) -> None:
    own, media = host(name), media_of(name)
    inputs = own._inputs(media, QUESTION)
    for choice in own.methods(media.kind):
        asked = ask(media=media, methods=(choice.name, "random"), keep=0.5)
        options: Any = {"longest": 1, "relevance": own.relevance}
        if choice.reason == "":
            assert run(own.model, own.processor, asked, inputs, choice.name, **options).report.tokens > 0
        elif choice.name not in ("identity", "quota"):
            with pytest.raises(VtpruneError):
                run(own.model, own.processor, asked, inputs, choice.name, **options)


def test_methods_have_a_line_a_paper_and_a_reason() -> None:
    choices = {choice.name: choice for choice in host("qwen2_5_vl").methods("image")}
    assert list(choices) == vtprune.list_methods()
    assert choices["visionzip"].paper.endswith("(arXiv 2412.04467)") and choices["random"].paper == ""
    assert all(choice.line.endswith(".") for choice in choices.values())
    assert "merges patches" in choices["tome"].reason and "tiny:llava" in choices["cdpruner"].reason
    assert "clip" in choices["quota"].reason
    assert next(one for one in host("qwen2_5_vl").methods("video") if one.name == "quota").reason == ""


def test_two_threads_get_what_they_would_get_alone() -> None:
    asked = [ask(methods=("vtprune", "fastv"), keep=0.25), ask(methods=("divprune", "tome"), keep=0.5, seed=5)]
    alone = [_plain(host().answer(one)) for one in asked]
    together: list[Any] = [None] * 4
    begin = threading.Barrier(4)

    def work(place: int) -> None:
        begin.wait()
        together[place] = _plain(host().answer(asked[place % 2]))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 2
    assert not hasattr(host().model, "vtprune")


def _plain(outcome: Outcome) -> list[Any]:
    return [(pane.ids, kept(pane.report), pane.error) for pane in by_place(outcome).values()]


def test_panes_are_told_as_they_come() -> None:
    told: list[tuple[str, str]] = []
    outcome = host().answer(ask(), lambda place, pane: told.append((place, pane.method)))
    assert told == [(place, pane.method) for place, pane in by_place(outcome).items()]


def test_seconds_are_measured_for_what_was_done() -> None:
    outcome = host().answer(ask())
    assert outcome.unpruned is not None and outcome.unpruned.numbers is not None
    assert set(outcome.unpruned.numbers.seconds) == {"encode", "layout", "prefill", "decode", "total"}
    for pane in outcome.panes:
        assert pane.numbers is not None
        seconds = pane.numbers.seconds
        assert set(seconds) == {"encode", "layout", "select", "cut", "prefill", "decode", "total"}
        assert sum(seconds.values()) - seconds["total"] <= seconds["total"]
    seconds = outcome.unpruned.numbers.seconds
    assert len(outcome.unpruned.ids or ()) > 1 and 0 < seconds["decode"] < seconds["total"]


def test_decoding_is_from_the_first_token_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt comes by first, and the end is no token."""
    moments = iter([1.0, 4.0, 4.5, 6.25])
    monkeypatch.setattr(running, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    clock, found = running.Clock(), []
    for _ in range(4):
        clock.put(torch.zeros(1))
        found.append(clock.decoding)
    clock.end()
    assert found == [0.0, 0.0, 0.5, 2.25] and clock.decoding == 2.25


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"question": "  "}, InvalidOption, "the question is empty"),
        ({"question": "what is <image> ?"}, InvalidOption, "stands for pictures"),
        ({"media": clip()}, UnsupportedCall, "tiny:llava takes pictures only"),
    ],
)
def test_what_no_pane_could_answer_is_refused(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        host().answer(ask(**options))


def test_words_that_a_tiny_model_does_not_know_are_named() -> None:
    assert host().answer(ask(question="what colour is the cross ?")).notes == (
        "the model does not know these words: colour",
    )


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_counted_without_asking_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, media = host(name), media_of(name)
    outcome = own.answer(ask(media=media))

    def fails(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(type(own.model), "forward", fails)
    monkeypatch.setattr(type(own.model), "generate", fails)
    assert own.count(media) == outcome.tokens


def test_a_model_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(VtpruneError, match="no such directory"):
        Host.load("./no-model-here", "cpu")
