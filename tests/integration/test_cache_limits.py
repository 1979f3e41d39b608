"""What a pruned cache can give back: text after the cut, nothing of the cut prompt; and the bytes it does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts.cases import assert_close, model_of
from tests.models import Prompt
from vtprune.errors import UnsupportedCall

ONE = (Prompt(images=((32, 32),), seed=1),)
RAGGED = (Prompt(images=((32, 32),), seed=1), Prompt(images=((32, 32), (32, 32)), seed=2, text_after=6))
PICTURE = (Prompt(images=((32, 32),), text_before=5, seed=7),)
WORDS, OTHER_WORDS = torch.tensor([[11, 12, 13, 14, 15, 16]]), torch.tensor([[31, 32, 33, 34]])
FAMILIES = ("llava", "qwen2_5_vl")


def prefill(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The cache after one forward."""
    with torch.no_grad():
        return model(**inputs, use_cache=True, **options).past_key_values


def say(model: nn.Module, cache: Any, words: Tensor) -> Tensor:
    """Logits of words after what is cached, the same ones in every row."""
    with torch.no_grad():
        rows = cache.layers[0].keys.shape[0]
        return model(input_ids=words.expand(rows, -1), past_key_values=cache).logits


def stored(cache: Any) -> tuple[int, list[Tensor]]:
    """Logical length and a copy of what lies in the cache."""
    tensors = [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return cache.get_seq_length(), tensors


def assert_unchanged(cache: Any, before: tuple[int, list[Tensor]]) -> None:
    length, tensors = stored(cache)
    assert length == before[0]
    assert [t.shape for t in tensors] == [t.shape for t in before[1]]
    assert all(torch.equal(one, other) for one, other in zip(tensors, before[1], strict=True))


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("prompts", [ONE, RAGGED], ids=["one", "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_after_the_cut_can_be_taken_back(family: str, prompts: Any, positions: str) -> None:
    model = model_of(family)
    inputs = models.inputs(model, prompts)
    with vtprune.pruning(model, "random", keep=0.25, positions=positions):
        expected = say(model, prefill(model, inputs), OTHER_WORDS)
        cache = prefill(model, inputs)
        length = cache.get_seq_length()
        unwanted = say(model, cache, WORDS)
        cache.crop(-WORDS.shape[1])
        assert cache.get_seq_length() == length
        assert_close(say(model, cache, OTHER_WORDS), expected)
        assert unwanted.shape[1] == WORDS.shape[1]


@pytest.mark.parametrize("too_many", [6, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_crop_that_reaches_a_pruned_picture_is_refused_and_changes_nothing(family: str, too_many: int) -> None:
    """Five tokens of text follow the picture; whether those may go is left open here."""
    model = model_of(family)
    inputs = models.inputs(model, ONE)
    with vtprune.pruning(model, "random", keep=0.25):
        expected = say(model, prefill(model, inputs), WORDS[:, :2])
        cache = prefill(model, inputs)
        say(model, cache, WORDS)
        before = stored(cache)
        with pytest.raises(UnsupportedCall, match="crop"):
            cache.crop(-WORDS.shape[1] - too_many)
        assert_unchanged(cache, before)
        cache.crop(-WORDS.shape[1])
        assert_close(say(model, cache, WORDS[:, :2]), expected)


def test_the_last_cut_is_the_limit() -> None:
    """A picture of a later turn may not be cropped away either, its question may."""
    model = model_of("llava")
    first, second = models.inputs(model, ONE), models.inputs(model, PICTURE)
    second.pop("attention_mask")
    with vtprune.pruning(model, "random", keep=0.25):
        cache = prefill(model, first)
        cache = prefill(model, second, past_key_values=cache)
        say(model, cache, WORDS)
        before = stored(cache)
        with pytest.raises(UnsupportedCall, match="crop"):
            cache.crop(-WORDS.shape[1] - second["input_ids"].shape[1])
        assert_unchanged(cache, before)
        cache.crop(-WORDS.shape[1])
        assert cache.get_seq_length() == before[0] - WORDS.shape[1]


def test_a_cache_that_was_reset_can_be_cropped_anywhere() -> None:
    model = model_of("llava")
    with vtprune.pruning(model, "random", keep=0.25):
        cache = prefill(model, models.inputs(model, ONE))
        cache.reset()
        say(model, prefill(model, {"input_ids": OTHER_WORDS}, past_key_values=cache), WORDS)
        cache.crop(-WORDS.shape[1] - 1)
        assert cache.get_seq_length() == OTHER_WORDS.shape[1] - 1


BATCHES: dict[str, tuple[Prompt, ...]] = {
    "one row": ONE,
    "ragged rows": RAGGED,
    "the longest row has no picture": (Prompt(text_before=60, seed=3), *RAGGED),
    "the longest row has no picture until the others are cut": (Prompt(text_before=22, seed=3), *RAGGED),
}


def bytes_of(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_saved_are_those_missing_from_the_cache(family: str, batch: str, dtype: torch.dtype) -> None:
    model = models.build(family).to(dtype)
    inputs = models.inputs(model, BATCHES[batch])
    full = bytes_of(prefill(model, inputs))
    with vtprune.pruning(model, "random", keep=0.25) as pruner:
        missing = full - bytes_of(prefill(model, inputs))
        report = pruner.last
    assert report.kv_bytes_saved == missing
    assert report.kept < report.tokens
    assert (missing == 0) == (batch == "the longest row has no picture")
