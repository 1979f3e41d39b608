"""4-D masks: from classes that build them for pictures (Gemma 3, PaliGemma), and from a user, on a pruned cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import vtprune
from tests import models
from tests.contracts.cases import assert_close, model_of
from tests.generic_models import SPECS, build_generic, strengthen
from tests.integration.test_cache_limits import assert_unchanged, stored
from tests.models import BOS, IMAGE, VISION_END, VISION_START, Prompt
from vtprune.errors import UnsupportedCall

NAMES = ("gemma3", "paligemma")
SIDE, TOKENS = 32, 16
LENGTHS = (4, 6, 3)
FIRST_ID = {"gemma3": 0, "paligemma": 1}


@functools.cache
def built(name: str) -> nn.Module:
    return build_generic(name)[0]


@functools.cache
def narrow() -> nn.Module:
    """Gemma 3 with a window of 8 tokens in its first layer."""
    spec = SPECS["gemma3"]
    spec = dataclasses.replace(spec, text={**(spec.text or {}), "sliding_window": 8})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(spec.config("gemma3")).float().eval()
    strengthen(model)
    return model


def words(length: int, seed: int) -> list[int]:
    return torch.randint(*models.WORDS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def with_picture(seed: int, *, past: int = 0) -> dict[str, Tensor]:
    """A question about one picture, `past` tokens into the chat."""
    row = [BOS, *words(3, seed), VISION_START, *[IMAGE] * TOKENS, VISION_END, *words(5, seed + 1)]
    ids = torch.tensor([row])
    types = torch.cat([torch.zeros(1, past, dtype=torch.long), (ids == IMAGE).long()], dim=1)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(1, past + len(row), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "pixel_values": pixels}


def text(length: int, seed: int, *, past: int = 0) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([words(length, seed)]),
        "attention_mask": torch.ones(1, past + length, dtype=torch.long),
    }


@torch.no_grad()
def forward(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    return model(**inputs, use_cache=True, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_gets_a_square_mask(name: str) -> None:
    """The premise of this file."""
    seen: list[Any] = []
    model = built(name)
    record = lambda module, args, call: seen.append(call["attention_mask"])  # noqa: E731
    handle = model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    forward(model, with_picture(1))
    handle.remove()
    mask = seen[0]["full_attention"] if isinstance(seen[0], dict) else seen[0]
    assert mask.ndim == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_new_picture_on_a_pruned_cache_is_refused_and_the_chat_goes_on(name: str) -> None:
    model, first = built(name), with_picture(1)
    length = first["input_ids"].shape[1]
    with vtprune.pruning(model, "random", keep=0.5):
        expected = forward(model, text(5, 3, past=length), past_key_values=forward(model, first).past_key_values).logits
        cache = forward(model, first).past_key_values
        before = stored(cache)
        for past in (length, 0):
            with pytest.raises(UnsupportedCall, match="4-D mask") as refusal:
                forward(model, with_picture(2, past=past), past_key_values=cache)
            assert "fresh cache" in str(refusal.value)
            assert_unchanged(cache, before)
        assert_close(forward(model, text(5, 3, past=length), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("name", NAMES)
def test_text_turns_are_those_of_the_shortened_prompt(name: str, positions: str) -> None:
    """Three turns against transformers alone, whose first call is cut where its language model begins."""
    model, first = built(name), with_picture(1)
    ids = first["input_ids"][0]
    with vtprune.pruning(model, "random", keep=0.5, positions=positions) as pruner:
        out = forward(model, first)
        got, past, kept = [out.logits[0, -1]], len(ids), (ids != IMAGE)
        kept[(ids == IMAGE).nonzero()[pruner.last.segments[0].keep, 0]] = True
        for seed, length in enumerate(LENGTHS):
            out = forward(model, text(length, seed, past=past), past_key_values=out.past_key_values)
            past += length
            got.append(out.logits[0, -1])
    expected = by_hand(model, name, first, kept.nonzero()[:, 0], compact=positions == "compact")
    assert kept.sum() == len(ids) - TOKENS // 2
    assert_close(torch.stack(got), torch.stack(expected))


@torch.no_grad()
def by_hand(model: nn.Module, name: str, first: dict[str, Tensor], kept: Tensor, *, compact: bool) -> list[Tensor]:
    """Last logits of the prompt and of each text turn; `compact` numbers the kept tokens without gaps."""
    prompt = first["input_ids"].shape[1]
    ids = torch.arange(len(kept)) if compact else kept
    start = int(FIRST_ID[name])

    def cut(module: nn.Module, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        masks = call["attention_mask"]
        square = masks if isinstance(masks, dict) else {"": masks}
        short = {kind: mask[:, :, kept][..., kept] for kind, mask in square.items()}
        call["attention_mask"] = short if isinstance(masks, dict) else short[""]
        return args, call | {"inputs_embeds": call["inputs_embeds"][:, kept], "position_ids": ids[None] + start}

    lm = model.model.language_model
    handle = lm.register_forward_pre_hook(cut, with_kwargs=True)
    out = forward(model, first)
    handle.remove()
    logits, cache, next_id = [out.logits[0, -1]], out.past_key_values, (len(kept) if compact else prompt) + start
    for seed, length in enumerate(LENGTHS):
        embeds = model.get_input_embeddings()(text(length, seed)["input_ids"])
        at = torch.arange(next_id, next_id + length)[None]
        hidden = lm(inputs_embeds=embeds, position_ids=at, past_key_values=cache).last_hidden_state
        logits.append(model.lm_head(hidden)[0, -1])
        next_id += length
    return logits


def test_a_picture_after_text_that_left_the_sliding_window_is_refused() -> None:
    model = narrow()
    with vtprune.pruning(model, "random", keep=0.5):
        cache = forward(model, text(30, 4)).past_key_values
        before = stored(cache)
        with pytest.raises(UnsupportedCall, match="sliding window"):
            forward(model, with_picture(2, past=30), past_key_values=cache)
        assert_unchanged(cache, before)


def test_a_picture_after_text_within_the_window_is_pruned() -> None:
    """The refusal above is about the window alone."""
    model = built("gemma3")
    with vtprune.pruning(model, "random", keep=0.5) as pruner:
        cache = forward(model, text(30, 4)).past_key_values
        out = forward(model, with_picture(2, past=30), past_key_values=cache)
    assert out.logits.isfinite().all()
    assert pruner.last.kept == TOKENS // 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_users_square_mask_on_a_pruned_cache_is_refused(family: str, dtype: torch.dtype) -> None:
    model = model_of(family)
    inputs = models.inputs(model, (Prompt(images=((SIDE, SIDE),), seed=1),))
    question = torch.tensor([[5, 6, 7, 8]])
    with vtprune.pruning(model, "random", keep=0.25):
        expected = forward(
            model, {"input_ids": question}, past_key_values=forward(model, inputs).past_key_values
        ).logits
        cache = forward(model, inputs).past_key_values
        before = stored(cache)
        for past in (cache.get_seq_length(), cache.physical_length()):
            seen = torch.ones(1, 1, 4, past + 4, dtype=torch.bool).tril(past)
            mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
            with pytest.raises(UnsupportedCall, match="4-D mask"):
                forward(model, {"input_ids": question, "attention_mask": mask}, past_key_values=cache)
            assert_unchanged(cache, before)
        assert_close(forward(model, {"input_ids": question}, past_key_values=cache).logits, expected)
