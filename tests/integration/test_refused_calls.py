"""Calls that cannot be pruned rightly raise an error of ours, and the next call is right."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.models.llava.modeling_llava import LlavaModel

import vtprune
from tests import models
from tests.integration.common import (
    ONE,
    OTHER,
    STEPS,
    TEXT,
    Expected,
    assert_answers,
    by_hand,
    expect,
    hooks_of,
    kept_of,
    llava,
    logits,
    write,
)
from tests.models import IMAGE, Prompt
from vtprune.errors import MissingEvidence, UnsupportedCall

WORDS = torch.tensor([[20, 21, 22]])


class Wrapped:
    """A wrapped model, an input, and what it must answer to it before and after any refused call."""

    def __init__(self, name: str = "llava", method: str = "fastervlm") -> None:
        self.model = models.build(name)
        self.inputs = models.inputs(self.model, ONE)
        self.expected: Expected = expect(self.model, self.inputs, method)
        vtprune.wrap(self.model, method)

    def assert_right(self) -> None:
        assert_answers(self.model, self.inputs, self.expected)


@pytest.fixture
def wrapped() -> Wrapped:
    return Wrapped()


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def followed_by(inputs: dict[str, Any], written: Tensor) -> dict[str, Any]:
    """The prompt of the next chat turn: everything so far and three words more, as `generate` wants it."""
    ids = torch.cat([written, WORDS.expand(len(written), -1)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prefilled(model: nn.Module, inputs: dict[str, Any]) -> DynamicCache:
    """A cache that holds the prompt."""
    cache = DynamicCache()
    logits(model, inputs, past_key_values=cache)
    return cache


def test_the_expected_answer_is_the_one_worked_out_by_hand(wrapped: Wrapped) -> None:
    wrapped.assert_right()
    report = wrapped.model.vtprune.last
    vtprune.unwrap(wrapped.model)
    assert by_hand(wrapped.model, wrapped.inputs, report, compact=True) == wrapped.expected.tokens[0].tolist()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("size", [3, 8])
def test_chunked_prefill_is_refused(name: str, size: int) -> None:
    wrapped = Wrapped(name)
    with pytest.raises(UnsupportedCall, match="prefill_chunk_size"):
        write(wrapped.model, wrapped.inputs, prefill_chunk_size=size)
    wrapped.assert_right()


def test_chunked_prefill_set_in_the_generation_config_is_refused(wrapped: Wrapped) -> None:
    wrapped.model.generation_config.prefill_chunk_size = 8
    with pytest.raises(UnsupportedCall, match="prefill_chunk_size"):
        write(wrapped.model, wrapped.inputs)
    wrapped.model.generation_config.prefill_chunk_size = None
    wrapped.assert_right()


def mismatched(inputs: dict[str, Any], change: int) -> dict[str, Any]:
    """One placeholder too many (1) or too few (-1)."""
    ids = inputs["input_ids"].clone()
    first = int((ids[0] == IMAGE).nonzero()[0])
    ids[0, first if change < 0 else first - 2] = 30 if change < 0 else IMAGE
    types = {"mm_token_type_ids": (ids == IMAGE).int()} if "mm_token_type_ids" in inputs else {}
    return inputs | {"input_ids": ids} | types


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(
    ("name", "call"),
    [(name, call) for name in ("llava", "llava_next", "qwen2_5_vl") for call in (logits, write)][:-1],
)
def test_placeholders_that_do_not_match_the_features_are_refused(name: str, call: Any, change: int) -> None:
    wrapped = Wrapped(name)
    with pytest.raises(UnsupportedCall, match="placeholders"):
        call(wrapped.model, mismatched(wrapped.inputs, change))
    wrapped.assert_right()


@pytest.mark.parametrize("change", [-1, 1])
def test_where_generate_itself_stumbles_over_placeholders_the_next_call_is_right(change: int) -> None:
    """Qwen counts positions before any forward, and its error is that of transformers."""
    wrapped = Wrapped("qwen2_5_vl")
    with pytest.raises((RuntimeError, StopIteration)):
        write(wrapped.model, mismatched(wrapped.inputs, change))
    wrapped.assert_right()


def test_a_picture_without_placeholders_is_refused(wrapped: Wrapped) -> None:
    ids = torch.randint(3, 180, (1, 9), generator=torch.Generator().manual_seed(0))
    wrong = {"input_ids": ids, "pixel_values": wrapped.inputs["pixel_values"]}
    with pytest.raises(UnsupportedCall, match="placeholders"):
        logits(wrapped.model, wrong)
    wrapped.assert_right()


def test_placeholders_without_a_picture_are_left_to_transformers() -> None:
    """It embeds the placeholder like any word, and so it does under a wrap, which reports that it saw no picture."""
    model = llava()
    given = without(models.inputs(model, ONE), "pixel_values")
    plain = logits(model, given)
    vtprune.wrap(model, "random")
    assert torch.equal(logits(model, given), plain)
    assert model.vtprune.last.segments == ()


def test_features_that_fill_the_prompts_unevenly_are_refused() -> None:
    """Two pictures in all, but one prompt holds one and a half of them: transformers would not notice."""
    wrapped = Wrapped()
    both = models.inputs(wrapped.model, (Prompt(images=((30, 64),), seed=1), Prompt(images=((30, 64),), seed=2)))
    ids = both["input_ids"].clone()
    row = (ids[1] == IMAGE).nonzero()[:, 0]
    ids[1, row[-4:]] = 30
    ids[0, -4:] = IMAGE
    with pytest.raises(UnsupportedCall, match="placeholders"):
        logits(wrapped.model, both | {"input_ids": ids})
    wrapped.assert_right()


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_embeddings_with_placeholders_and_pixels_are_pruned_like_ids(name: str) -> None:
    wrapped = Wrapped(name)
    by_ids, kept = logits(wrapped.model, wrapped.inputs), kept_of(wrapped.model.vtprune.last)
    embeds = wrapped.model.get_input_embeddings()(wrapped.inputs["input_ids"]).detach()
    given = without(wrapped.inputs, "input_ids") | {"inputs_embeds": embeds}
    assert torch.equal(logits(wrapped.model, given), by_ids)
    assert kept_of(wrapped.model.vtprune.last) == kept


def test_generate_from_embeddings_and_pixels_writes_the_same(wrapped: Wrapped) -> None:
    embeds = wrapped.model.get_input_embeddings()(wrapped.inputs["input_ids"]).detach()
    given = without(wrapped.inputs, "input_ids") | {"inputs_embeds": embeds}
    assert write(wrapped.model, given).tolist() == wrapped.expected.tokens.tolist()
    assert kept_of(wrapped.model.vtprune.last) == wrapped.expected.kept


def test_embeddings_that_may_hide_pictures_are_refused(wrapped: Wrapped) -> None:
    """The features are merged already, and nobody can tell where."""
    model = wrapped.model
    embeds = model.get_input_embeddings()(wrapped.inputs["input_ids"]).detach()
    with pytest.raises(UnsupportedCall, match="input_ids"):
        logits(model, {"inputs_embeds": embeds, "attention_mask": wrapped.inputs["attention_mask"]})
    with pytest.raises(UnsupportedCall, match="input_ids"):
        write(model, {"inputs_embeds": embeds})
    wrapped.assert_right()


def test_embeddings_without_placeholders_next_to_pixels_are_refused(wrapped: Wrapped) -> None:
    embeds = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedCall, match="placeholders"):
        logits(wrapped.model, {"inputs_embeds": embeds, "pixel_values": wrapped.inputs["pixel_values"]})
    wrapped.assert_right()


def encoded(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with their picture encoded beforehand."""
    names = [name for name in ("pixel_values", "image_grid_thw") if name in inputs]
    with torch.no_grad():
        output = model.model.get_image_features(**{name: inputs[name] for name in names}, return_dict=True)
    return without(inputs, "pixel_values") | {"mm_encoder_outputs": {"image": output}}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_features_encoded_before_wrapping_are_refused(name: str) -> None:
    model = models.build(name)
    inputs = models.inputs(model, ONE)
    early = encoded(model, inputs)
    wrapped = Wrapped(name)
    for call in (logits, write):
        with pytest.raises(UnsupportedCall, match="while wrapped"):
            call(wrapped.model, copy.copy(early))
    wrapped.assert_right()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_features_encoded_while_wrapped_are_pruned_like_pixels(name: str) -> None:
    wrapped = Wrapped(name)
    given = encoded(wrapped.model, wrapped.inputs)
    assert torch.equal(logits(wrapped.model, given), logits(wrapped.model, wrapped.inputs))
    assert kept_of(wrapped.model.vtprune.last) == wrapped.expected.kept
    assert write(wrapped.model, encoded(wrapped.model, wrapped.inputs)).tolist() == wrapped.expected.tokens.tolist()


def test_features_encoded_under_a_method_without_probes_lack_evidence() -> None:
    model = llava()
    inputs = models.inputs(model, ONE)
    with vtprune.pruning(model, "random"):
        given = encoded(model, inputs)
    expected = expect(model, inputs, "fastervlm")
    with vtprune.pruning(model, "fastervlm"):
        with pytest.raises(MissingEvidence, match="pixels"):
            logits(model, given)
        assert_answers(model, inputs, expected)


def test_encoding_a_picture_outside_a_call_does_not_reach_the_next_one(wrapped: Wrapped) -> None:
    other = models.inputs(wrapped.model, OTHER)
    encoded(wrapped.model, other)
    wrapped.assert_right()
    text = models.inputs(wrapped.model, TEXT)
    encoded(wrapped.model, other)
    logits(wrapped.model, text)
    assert wrapped.model.vtprune.last.segments == ()


def test_encoding_a_picture_under_a_wrap_gives_the_same_features() -> None:
    model = llava()
    pixels = models.inputs(model, ONE)["pixel_values"]
    with torch.no_grad():
        plain = model.get_image_features(pixel_values=pixels, return_dict=True)
        as_tuple = model.get_image_features(pixel_values=pixels, return_dict=False)
        vtprune.wrap(model, "fastervlm")
        found = model.get_image_features(pixel_values=pixels, return_dict=True)
        found_tuple = model.get_image_features(pixel_values=pixels, return_dict=False)
    assert torch.equal(torch.cat(list(found.pooler_output)), torch.cat(list(plain.pooler_output)))
    assert torch.equal(found.last_hidden_state, plain.last_hidden_state)
    assert type(found) is type(plain)
    assert type(found_tuple) is type(as_tuple) is tuple
    assert torch.equal(found_tuple[0], as_tuple[0])


def test_a_model_that_encodes_where_nobody_listens_is_refused() -> None:
    """Pixels came in and no encoder was heard: pruning nothing in silence would be the worst answer."""

    class Whispering(LlavaModel):
        def forward(self, *args: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
            output = type(self).get_image_features(self, pixel_values=pixel_values, return_dict=True)
            return super().forward(*args, **{**kwargs, "mm_encoder_outputs": {"image": output}})

    model = llava()
    inputs = models.inputs(model, ONE)
    plain = logits(model, inputs)
    model.model.__class__ = Whispering
    assert torch.equal(logits(model, inputs), plain)
    vtprune.wrap(model, "random")
    with pytest.raises(UnsupportedCall):
        logits(model, inputs)
    vtprune.unwrap(model)
    assert torch.equal(logits(model, inputs), plain)


def test_a_pruned_cache_after_unwrap_is_refused_in_forward_and_generate() -> None:
    model = vtprune.wrap(llava(), "random")
    inputs = models.inputs(model, ONE)
    cache = DynamicCache()
    written = model.generate(**inputs, past_key_values=cache, max_new_tokens=STEPS)
    vtprune.unwrap(model)
    plain = logits(model, inputs)
    with pytest.raises(UnsupportedCall, match="unwrap"):
        logits(model, {"input_ids": WORDS}, past_key_values=cache)
    with pytest.raises(UnsupportedCall, match="unwrap"):
        model.generate(**followed_by(inputs, written), past_key_values=cache, max_new_tokens=STEPS)
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_a_cache_of_another_pruning_is_refused_in_forward_and_generate(method: str) -> None:
    model = vtprune.wrap(llava(), "random")
    inputs = models.inputs(model, ONE)
    cache = DynamicCache()
    written = model.generate(**inputs, past_key_values=cache, max_new_tokens=STEPS)
    vtprune.unwrap(model)
    expected = expect(model, inputs, method)
    vtprune.wrap(model, method)
    with pytest.raises(UnsupportedCall, match="another pruning"):
        logits(model, {"input_ids": WORDS}, past_key_values=cache)
    with pytest.raises(UnsupportedCall, match="another pruning"):
        model.generate(**followed_by(inputs, written), past_key_values=cache, max_new_tokens=STEPS)
    assert_answers(model, inputs, expected)


def test_a_pruned_cache_in_another_model_is_refused() -> None:
    model, other = vtprune.wrap(llava(), "random"), llava(seed=1)
    inputs = models.inputs(model, ONE)
    cache = prefilled(model, inputs)
    with pytest.raises(UnsupportedCall, match="unwrap"):
        logits(other, {"input_ids": WORDS}, past_key_values=cache)
    with vtprune.pruning(other, "random"), pytest.raises(UnsupportedCall, match="another pruning"):
        logits(other, {"input_ids": WORDS}, past_key_values=cache)
    assert hooks_of(other) == []


def test_a_pruned_cache_is_refused_outside_even_after_a_call_that_failed_inside() -> None:
    model = vtprune.wrap(llava(), "random")
    inputs = models.inputs(model, ONE)
    cache = prefilled(model, inputs)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.language_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        logits(model, {"input_ids": WORDS}, past_key_values=cache)
    handle.remove()
    vtprune.unwrap(model)
    with pytest.raises(UnsupportedCall, match="unwrap"):
        logits(model, {"input_ids": WORDS}, past_key_values=cache)


def test_a_pruned_cache_that_was_reset_serves_any_model() -> None:
    model = vtprune.wrap(llava(), "random")
    inputs = models.inputs(model, ONE)
    cache = prefilled(model, inputs)
    vtprune.unwrap(model)
    plain = logits(model, inputs)
    cache.reset()
    assert torch.equal(logits(model, inputs, past_key_values=cache), plain)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_pruned_cache_continues_like_the_original(copier: Any) -> None:
    model = vtprune.wrap(llava(), "random")
    cache = prefilled(model, models.inputs(model, ONE))
    twin = copier(cache)
    first = logits(model, {"input_ids": WORDS}, past_key_values=cache)
    assert torch.equal(logits(model, {"input_ids": WORDS}, past_key_values=twin), first)


def test_a_pruned_cache_can_be_cropped_back_to_the_prompt() -> None:
    model = vtprune.wrap(llava(), "random")
    cache = prefilled(model, models.inputs(model, ONE))
    first = logits(model, {"input_ids": WORDS}, past_key_values=cache)
    cache.crop(-WORDS.shape[1])
    torch.testing.assert_close(logits(model, {"input_ids": WORDS}, past_key_values=cache), first, rtol=0, atol=1e-6)


def test_a_cache_of_an_unsupported_class_is_refused(wrapped: Wrapped) -> None:
    class Quantised(DynamicCache):
        """Stands for any cache that stores in its own way."""

    for call in (logits, write):
        cache = Quantised()
        with pytest.raises(UnsupportedCall, match="Quantised"):
            call(wrapped.model, wrapped.inputs, past_key_values=cache)
        assert cache.get_seq_length() == 0
    wrapped.assert_right()


def test_a_cache_filled_without_pruning_can_be_continued_under_it() -> None:
    """Nothing was cut before, so nothing is wrong: text first, then a picture."""
    model = llava()
    inputs = models.inputs(model, ONE)
    cache = DynamicCache()
    logits(model, {"input_ids": WORDS}, past_key_values=cache)
    vtprune.wrap(model, "random")
    mask = torch.ones(1, WORDS.shape[1] + inputs["input_ids"].shape[1], dtype=torch.long)
    logits(model, inputs | {"attention_mask": mask}, past_key_values=cache)
    assert model.vtprune.last.kept == 4
    assert cache.get_seq_length() == mask.shape[1]


def test_a_call_that_runs_out_of_memory_in_the_encoder_leaves_the_next_right(wrapped: Wrapped) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    for part in (wrapped.model.model.vision_tower, wrapped.model.model.multi_modal_projector):
        handle = part.register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            logits(wrapped.model, wrapped.inputs)
        handle.remove()
        wrapped.assert_right()
