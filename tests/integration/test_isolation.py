"""What happened in one call, model or thread does not show in another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import vtprune
from tests import models
from tests.integration.common import (
    GIVEN,
    ONE,
    OTHER,
    TEXT,
    Fails,
    assert_answers,
    expect,
    failing,
    fingerprint,
    kept_of,
    llava,
    logits,
    reachable,
    room,
    write,
)
from tests.models import IMAGE_FAMILIES, Prompt
from vtprune.catalog import build

ROUNDS = 60


@pytest.mark.parametrize("call", [logits, write])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_an_exception_inside_a_stage_leaves_the_next_call_right(name: str, call: Callable[..., Any]) -> None:
    model = models.build(name)
    inputs = models.inputs(model)
    expected = expect(model, inputs, failing(Fails()))
    selector = Fails()
    vtprune.wrap(model, failing(selector))
    before = fingerprint(model)
    for error in (ZeroDivisionError("stage"), KeyboardInterrupt()):
        selector.armed.append(error)
        with pytest.raises(type(error)):
            call(model, inputs)
        assert selector.armed == []
        assert_answers(model, inputs, expected)
    assert fingerprint(model) == before


def test_an_exception_in_the_second_turn_leaves_the_chat_where_it_was() -> None:
    selector = Fails()
    model = vtprune.wrap(llava(), failing(selector))
    first, second = models.inputs(model, ONE), models.inputs(model, OTHER)
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.long)
    turns = []
    for fails in (False, True):
        cache = DynamicCache()
        logits(model, first, past_key_values=cache)
        if fails:
            selector.armed.append(ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                logits(model, second | {"attention_mask": mask}, past_key_values=cache)
        turns.append(logits(model, second | {"attention_mask": mask}, past_key_values=cache))
    assert torch.equal(turns[0], turns[1])


def test_a_report_receiver_that_raises_leaves_the_next_call_right() -> None:
    model = llava()
    inputs = models.inputs(model)
    expected = expect(model, inputs, "random")
    armed = [True]

    def receive(report: vtprune.PruneReport) -> None:
        if armed.pop():
            raise ZeroDivisionError

    vtprune.wrap(model, "random", on_report=receive)
    with pytest.raises(ZeroDivisionError):
        write(model, inputs)
    armed.append(False)
    assert_answers(model, inputs, expected)


def test_an_exception_in_the_middle_of_a_decoder_leaves_the_next_call_right() -> None:
    model = llava()
    inputs = models.inputs(model)
    expected = expect(model, inputs, "fastervlm")
    vtprune.wrap(model, "fastervlm")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.language_model.layers[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        write(model, inputs)
    handle.remove()
    assert_answers(model, inputs, expected)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_a_prompt_without_pictures_is_answered_as_by_the_plain_model(name: str) -> None:
    model = models.build(name)
    text = models.inputs(model, TEXT)
    plain, written = logits(model, text), write(model, text)
    vtprune.wrap(model, "random")
    assert torch.equal(logits(model, text), plain)
    report = model.vtprune.last
    assert (report.segments, report.tokens, report.kept, report.kv_bytes_saved) == ((), 0, 0, 0)
    assert "no picture" in report.summary()
    assert write(model, text).tolist() == written.tolist()


def test_the_report_of_a_prompt_without_pictures_counts_padding_and_waits_for_nothing() -> None:
    model = vtprune.wrap(llava(), "random")
    text = models.inputs(model, TEXT)
    logits(model, text)
    assert len(set(text["attention_mask"].sum(1).tolist())) == 2
    padded = (text["input_ids"].shape[1],) * 2
    assert model.vtprune.last.length_before == model.vtprune.last.length_after == padded


def test_a_row_without_a_picture_next_to_one_with_is_answered_as_alone() -> None:
    model = vtprune.wrap(llava(), "random")
    words = Prompt(text_before=5, text_after=0, seed=8)
    pair = write(model, models.inputs(model, (*ONE, words)))
    assert [segment.row for segment in model.vtprune.last.segments] == [0]
    assert pair[0].tolist() == write(model, models.inputs(model, ONE))[0].tolist()
    assert pair[1].tolist() == write(model, models.inputs(model, (words,)))[0].tolist()


RUNNING = [
    (name, method)
    for name in ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
    for method in vtprune.list_methods()
    if method not in GIVEN and (name == "llava" or build(method).encoder is None)
]
"""Methods on families that bear them, without evidence from the user."""


@pytest.mark.parametrize(("name", "method"), RUNNING)
def test_every_later_generate_on_one_wrap_is_as_good_as_the_first(name: str, method: str) -> None:
    model = models.build(name, **room(method))
    options = reachable(method)
    prompts = [models.inputs(model, ONE), models.inputs(model), models.inputs(model, TEXT), models.inputs(model, OTHER)]
    expected = [expect(model, inputs, method, **options) for inputs in prompts]
    vtprune.wrap(model, method, **options)
    for inputs, answer in zip(prompts + prompts[:1], expected + expected[:1], strict=True):
        assert_answers(model, inputs, answer)


def test_two_models_wrapped_in_one_process_do_not_disturb_each_other() -> None:
    one, two = models.build("llava"), models.build("qwen2_5_vl")
    inputs = models.inputs(one), models.inputs(two)
    expected = expect(one, inputs[0], "fastervlm"), expect(two, inputs[1], "divprune", keep=3)
    vtprune.wrap(one, "fastervlm")
    vtprune.wrap(two, "divprune", keep=3)
    for _ in range(2):
        assert_answers(one, inputs[0], expected[0])
        assert_answers(two, inputs[1], expected[1])
    plain = llava()
    vtprune.unwrap(one)
    assert torch.equal(logits(one, inputs[0]), logits(plain, inputs[0]))
    assert_answers(two, inputs[1], expected[1])


def test_two_models_of_one_family_keep_their_own_caches() -> None:
    one, two = vtprune.wrap(llava(), "uniform"), vtprune.wrap(llava(seed=1), "random")
    inputs = models.inputs(one, ONE)
    words = {"input_ids": torch.tensor([[20, 21]])}
    alone = []
    for model in (one, two):
        cache = DynamicCache()
        logits(model, inputs, past_key_values=cache)
        alone.append(logits(model, words, past_key_values=cache))
    caches = DynamicCache(), DynamicCache()
    for model, cache in zip((one, two), caches, strict=True):
        logits(model, inputs, past_key_values=cache)
    together = [logits(model, words, past_key_values=cache) for model, cache in zip((one, two), caches, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def in_threads(*jobs: Callable[[], None]) -> list[BaseException]:
    """Run the jobs at once; what they raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        start.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize(
    "pair",
    [(("llava", "fastervlm"), ("llava", "vtprune")), (("qwen2_5_vl", "vtprune"), ("llava_next", "fastervlm"))],
    ids=["same family", "two families"],
)
def test_threads_with_their_own_models_answer_as_alone(pair: tuple[tuple[str, str], tuple[str, str]]) -> None:
    jobs = []
    for number, (name, method) in enumerate(pair):
        model = models.build(name, seed=number)
        inputs = models.inputs(model)
        expected = expect(model, inputs, method)
        vtprune.wrap(model, method)

        def job(model: nn.Module = model, inputs: Any = inputs, expected: Any = expected) -> None:
            for _ in range(ROUNDS):
                assert_answers(model, inputs, expected)

        jobs.append(job)
    assert in_threads(*jobs) == []


def test_a_thread_that_wraps_and_unwraps_does_not_disturb_another() -> None:
    steady, busy = llava(), llava(seed=1)
    inputs = models.inputs(steady)
    expected = expect(steady, inputs, "fastervlm")
    plain = logits(busy, inputs)
    vtprune.wrap(steady, "fastervlm")

    def answer() -> None:
        for _ in range(ROUNDS):
            assert_answers(steady, inputs, expected)

    def wrap_and_unwrap() -> None:
        for _ in range(ROUNDS):
            with vtprune.pruning(busy, "fastervlm") as pruner:
                logits(busy, inputs)
                assert pruner.last.kept == 12
            assert torch.equal(logits(busy, inputs), plain)

    assert in_threads(answer, wrap_and_unwrap) == []


RANDOM = {"method": "random", "keep": 0.5}


def test_the_check_of_threads_sees_what_a_thread_raised() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    assert [type(error) for error in in_threads(fail, fail)] == [ZeroDivisionError] * 2


def test_random_is_the_same_for_every_beam_and_every_returned_sequence() -> None:
    model = vtprune.wrap(llava(), **RANDOM)
    inputs = models.inputs(model)
    write(model, inputs)
    plain = {row: [] for row in range(2)}
    for segment in model.vtprune.last.segments:
        plain[segment.row].append(segment.keep.tolist())
    write(model, inputs, num_beams=3, num_return_sequences=3)
    beams: dict[int, list[list[int]]] = {row: [] for row in range(6)}
    for segment in model.vtprune.last.segments:
        beams[segment.row].append(segment.keep.tolist())
    assert [beams[row] for row in range(6)] == [plain[row // 3] for row in range(6)]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_random_does_not_depend_on_the_other_prompts_of_the_batch(name: str) -> None:
    model = vtprune.wrap(models.build(name), **RANDOM)
    prompts = (Prompt(images=((60, 64), (30, 92)), text_after=6, seed=2), Prompt(images=((30, 64),), seed=1))
    together = []
    for order in (prompts, prompts[::-1]):
        write(model, models.inputs(model, order))
        rows = [[s.keep.tolist() for s in model.vtprune.last.segments if s.row == row] for row in range(2)]
        together.append(rows if order is prompts else rows[::-1])
    alone = []
    for prompt in prompts:
        write(model, models.inputs(model, (prompt,)))
        alone.append(kept_of(model.vtprune.last))
    assert together == [alone, alone]


def test_random_is_the_same_with_and_without_a_cache() -> None:
    reports: list[vtprune.PruneReport] = []
    model = vtprune.wrap(llava(), on_report=reports.append, **RANDOM)
    inputs = models.inputs(model)
    cached = write(model, inputs)
    uncached = write(model, inputs, use_cache=False)
    assert uncached.tolist() == cached.tolist()
    assert len(reports) > 2
    assert all(kept_of(report) == kept_of(reports[0]) for report in reports)


def test_random_ignores_the_global_generator_and_leaves_it_alone() -> None:
    model = vtprune.wrap(llava(), **RANDOM)
    inputs = models.inputs(model)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        logits(model, inputs)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(kept_of(model.vtprune.last))
    assert found[0] == found[1]


def test_another_seed_is_another_draw() -> None:
    model = llava()
    inputs = models.inputs(model)
    draws = [expect(model, inputs, "random", keep=0.5, seed=seed).kept for seed in range(4)]
    assert len({str(draw) for draw in draws}) == 4


def test_the_pictures_of_one_prompt_get_different_draws() -> None:
    model = llava()
    kept = expect(model, models.inputs(model), "random", keep=0.5).kept
    assert kept[1] != kept[2]
