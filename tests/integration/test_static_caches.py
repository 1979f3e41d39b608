"""A static cache answers what a dynamic one does: under a sliding window, and in the second turn of a padded chat."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import vtprune
from tests import models
from tests.contracts.cases import Answer, answer, assert_close
from tests.integration.common import llava
from tests.models import Prompt

Prompts = tuple[Prompt, ...]
STEPS = 5
WINDOW = 10
ONE_PICTURE, TWO_PICTURES = (32, 32), ((32, 32), (32, 32))
FIRST = (Prompt(images=(ONE_PICTURE,), seed=1), Prompt(images=TWO_PICTURES, seed=2, text_after=6))
SECOND = {
    "even text": (Prompt(text_before=4, seed=5), Prompt(text_before=4, seed=6)),
    "ragged text": (Prompt(text_before=4, seed=5), Prompt(text_before=7, seed=6)),
    "a new picture": (
        Prompt(images=(ONE_PICTURE,), text_before=4, seed=5),
        Prompt(images=(ONE_PICTURE,), text_before=7, seed=6),
    ),
}


def never_stops(model: nn.Module) -> nn.Module:
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def windowed(window: int | None) -> nn.Module:
    """A tiny LLaVA on Mistral, or on Llama where there is no window."""
    if window is None:
        return never_stops(llava())
    text = models.text_config("mistral", 2, sliding_window=window, head_dim=16)
    return never_stops(llava(text_config=text))


def static_cache(model: nn.Module, length: int = 200) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=length)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("prompts", [FIRST[:1], FIRST], ids=["one row", "padded batch"])
@pytest.mark.parametrize("window", [None, 4096])
def test_a_static_cache_gives_the_logits_of_a_dynamic_one(window: int | None, prompts: Prompts, positions: str) -> None:
    model = windowed(window)
    inputs = models.inputs(model, prompts)
    with vtprune.pruning(model, "random", keep=0.5, positions=positions) as pruner:
        dynamic, expected = answer(model, inputs, steps=STEPS), pruner.last
        static, report = answer(model, inputs, steps=STEPS, cache_implementation="static"), pruner.last
    assert static.tokens.tolist() == dynamic.tokens.tolist()
    assert_close(static.logits, dynamic.logits)
    assert (report.length_before, report.length_after) == (expected.length_before, expected.length_after)
    assert report.length_before != report.length_after


@pytest.mark.parametrize("prompts", [FIRST[:1], FIRST], ids=["one row", "padded batch"])
def test_a_static_cache_under_a_window_shorter_than_the_prompt_is_refused(prompts: Prompts) -> None:
    """Its mask counts the window over tokens that are dropped; the dynamic cache counts those that stay."""
    model = windowed(WINDOW)
    inputs = models.inputs(model, prompts)
    with vtprune.pruning(model, "random", keep=0.5):
        before = answer(model, inputs, steps=STEPS)
        with pytest.raises(vtprune.VtpruneError, match="sliding window"):
            answer(model, inputs, steps=STEPS, cache_implementation="static")
        assert answer(model, inputs, steps=STEPS).tokens.tolist() == before.tokens.tolist()


@pytest.mark.parametrize("prompts", [FIRST[:1], FIRST], ids=["one row", "padded batch"])
@pytest.mark.parametrize("window", [None, 4096])
def test_room_that_a_static_cache_has_left_does_not_matter(window: int | None, prompts: Prompts) -> None:
    """What is not written yet must not be attended to."""
    model = windowed(window)
    inputs = models.inputs(model, prompts)
    with vtprune.pruning(model, "random", keep=0.5):
        tight, roomy = (answer(model, inputs, past_key_values=static_cache(model, n)).logits for n in (60, 300))
    assert_close(roomy, tight)


def test_the_window_is_narrow_enough_to_matter() -> None:
    """The comparison above is sensitive: with a wide window the same weights answer otherwise."""
    narrow, wide = windowed(WINDOW), windowed(4096)
    inputs = models.inputs(narrow, FIRST)
    with vtprune.pruning(narrow, "random", keep=0.5), vtprune.pruning(wide, "random", keep=0.5):
        assert (answer(narrow, inputs, steps=STEPS).logits - answer(wide, inputs, steps=STEPS).logits).abs().max() > 0.1


def chat(model: nn.Module, second: Prompts, *, static: bool, positions: str) -> tuple[Answer, Answer]:
    """Two turns under one wrap, padding left of each."""
    asked, again = models.inputs(model, FIRST), models.inputs(model, second)
    with vtprune.pruning(model, "random", keep=0.4, positions=positions):
        options: dict[str, Any] = {"past_key_values": static_cache(model)} if static else {}
        first = answer(model, asked, steps=STEPS, **options)
        turn = {name: value for name, value in again.items() if name not in asked or name == "pixel_values"}
        turn["input_ids"] = torch.cat([first.sequences, again["input_ids"]], dim=1)
        turn["attention_mask"] = attended(asked["attention_mask"], first.tokens, again["attention_mask"])
        return first, answer(model, turn, steps=STEPS, past_key_values=first.cache)


def attended(first: Tensor, written: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, torch.ones_like(written), second], dim=1)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("second", SECOND)
def test_the_second_turn_of_a_padded_chat_is_that_of_a_dynamic_cache(second: str, positions: str) -> None:
    model = windowed(None)
    dynamic = chat(model, SECOND[second], static=False, positions=positions)
    static = chat(model, SECOND[second], static=True, positions=positions)
    assert isinstance(static[0].cache, StaticCache)
    for expected, got in zip(dynamic, static, strict=True):
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert_close(got.logits, expected.logits)


@pytest.mark.parametrize("second", SECOND)
def test_the_second_turn_of_a_padded_chat_does_not_depend_on_batch_mates(second: str) -> None:
    """Both caches could be wrong alike: every row is compared with itself alone, without padding, dynamic."""
    model = windowed(None)
    together = chat(model, SECOND[second], static=True, positions="keep")[1]
    for row in range(len(FIRST)):
        mine = slice(row, row + 1)
        asked, again = models.inputs(model, FIRST[mine]), models.inputs(model, SECOND[second][mine])
        with vtprune.pruning(model, "random", keep=0.4, positions="keep"):
            first = answer(model, asked, steps=STEPS)
            turn = {"input_ids": torch.cat([first.sequences, again["input_ids"]], dim=1)}
            turn |= {"pixel_values": again["pixel_values"]} if "pixel_values" in again else {}
            alone = answer(model, turn, steps=STEPS, past_key_values=first.cache)
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        assert_close(together.logits[row], alone.logits[0])
