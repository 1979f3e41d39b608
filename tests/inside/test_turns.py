"""A chat goes on from a cache whose layers are of different length, as the dense model goes on from all it was told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.contracts.cases import Answer, answer, assert_close
from tests.contracts.dense import Merge, hidden
from tests.inside.common import (
    BUDGETS,
    DEEP,
    EXITS,
    LAYERS,
    ONE,
    STEPS,
    TOLERANCE,
    WHOLE,
    assert_same,
    dense,
    lengths,
    merges,
    model_of,
    pruned,
    reach,
    run,
    stored,
)
from tests.models import ONE_AND_TWO, QWEN, Prompt
from vtprune.errors import UnsupportedCall

SIZE = (30, 64)
FIRST = (Prompt(images=(SIZE,), seed=1), Prompt(images=(SIZE, SIZE), seed=2, text_after=6))
WORDS = (Prompt(text_before=4, seed=73), Prompt(text_before=7, seed=74))
PICTURES = (Prompt(images=(SIZE, SIZE), seed=75), Prompt(images=(SIZE,), seed=76, text_after=7))
TURNS = {
    "words": (FIRST, WORDS),
    "a picture": (FIRST, PICTURES),
    "words, a picture, words": (FIRST, WORDS, PICTURES, WORDS[::-1]),
    "one row": (FIRST[:1], PICTURES[:1], WORDS[1:]),
    "words first": (WORDS, PICTURES, FIRST[::-1]),
}
families = pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "llava eager"])


def known(family):
    """The model; behind its name the attention it runs."""
    return model_of(*family.split())


@dataclass
class Chat:
    """A batch of conversations on one cache: all ids so far, how far each token went, the pictures of every row.

    `counted`: Qwen was told ids of a second picture, and transformers then know no more where to go on.
    """

    family: str
    pruner: Any
    so_far: dict[str, Tensor] = field(default_factory=dict)
    reached: Tensor | None = None
    merged: list[list[Merge]] = field(default_factory=list)
    pictures: list[list[dict[str, Tensor]]] = field(default_factory=list)
    cache: Any = None
    counted: bool = False

    def whole(self) -> dict[str, Tensor]:
        """What transformers get of everything at once: the pictures of the first row come first."""
        told = [picture for row in self.pictures for picture in row]
        return {**self.so_far, **{name: torch.cat([one[name] for one in told]) for one in told[:1] for name in one}}

    def turn(self, prompts: tuple[Prompt, ...], **mode: Any) -> tuple[Answer, dict[str, Tensor], Tensor, Any]:
        """The reply, and for the reference all that was told before it, how far that went and what merged."""
        model = known(self.family)
        fresh = models.inputs(model, prompts)
        self._say(fresh)
        self.pictures = self.pictures or [[] for _ in prompts]
        for row, prompt in zip(self.pictures, prompts, strict=True):
            alone = models.inputs(model, (prompt,))
            row += [{name: alone[name] for name in alone if name not in WHOLE}] if prompt.images else []
        given = {**fresh, **self.so_far}
        if self.cache is not None:
            given["past_key_values"] = self.cache
            self.counted |= any(prompt.images for prompt in prompts)
            if self.family in QWEN and self.counted:
                given["position_ids"] = self._positions()
        cached = 0 if self.cache is None else self.cache.get_seq_length()
        self.pruner.history.clear()
        reply = answer(model, given, steps=STEPS, **mode)
        ids = self.so_far["input_ids"]
        self.merged = self.merged or [[] for _ in prompts]
        if any(prompt.images for prompt in prompts):
            new = merges(self.pruner.last, self.so_far["attention_mask"], cached)
            self.merged = [old + more for old, more in zip(self.merged, new, strict=True)]
            self.reached = reach(self.pruner.last, ids, self.reached)
        else:
            assert not any(report.segments for report in self.pruner.history)
            seen = torch.empty(len(ids), 0, dtype=torch.long) if self.reached is None else self.reached
            self.reached = torch.nn.functional.pad(seen, (0, ids.shape[1] - seen.shape[1]), value=LAYERS)
        told = self.whole(), self.reached, self.merged
        self.cache = reply.cache
        said = torch.zeros_like(reply.tokens)
        self._say({"input_ids": reply.tokens, "attention_mask": said + 1, "mm_token_type_ids": said.int()})
        return reply, *told

    def forget(self, count: int) -> None:
        """The last tokens of every row; the cache has not seen the very last one."""
        self.cache.crop(1 - count)
        self.so_far = {name: values[:, :-count] for name, values in self.so_far.items()}
        self.reached = self.reached[:, : self.so_far["input_ids"].shape[1]]

    def _say(self, more: dict[str, Tensor]) -> None:
        for name in self.so_far or [name for name in WHOLE if name in more]:
            self.so_far[name] = (
                torch.cat([self.so_far[name], more[name]], dim=1) if self.so_far.get(name) is not None else more[name]
            )

    def _positions(self) -> Tensor:
        """(4, B, L): with new pictures on a cache, transformers cannot compute them alone."""
        told = self.whole()
        names = ("image_grid_thw", "mm_token_type_ids", "attention_mask")
        ids, _ = known(self.family).model.get_rope_index(told["input_ids"], **{name: told[name] for name in names})
        return torch.cat([(told["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)[None], ids])


@families
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("method", [*DEEP, "information_horizon"])
def test_replies_are_those_of_the_dense_model_told_everything_at_once(method, family, turns):
    with pruned(known(family), method, positions="keep") as pruner:
        chat = Chat(family, pruner)
        done = [chat.turn(prompts) for prompts in TURNS[turns]]
    for reply, told, reached, merged in done:
        assert_same(reply, dense(known(family), told, reached, merged))
    if "one" in turns:
        assert stored(chat.cache) == lengths(reached, told["attention_mask"], STEPS)


@families
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_where_no_word_decides_the_whole_chat_at_once_replies_alike(family, turns, positions):
    """VFlowOpt looks at the encoder alone, so that a choice does not depend on the turn in which it was made."""
    with pruned(known(family), "vflowopt", positions=positions) as pruner:
        chat = Chat(family, pruner)
        done = [chat.turn(prompts) for prompts in TURNS[turns]]
        for reply, told, *_ in done:
            assert_same(reply, answer(known(family), told, steps=STEPS, use_cache=False))


@families
@pytest.mark.parametrize("method", DEEP)
@pytest.mark.parametrize("count", [1, 3, STEPS + 2])
def test_what_was_written_can_be_forgotten(method, family, count):
    """The reply, and the last words of the question too: all layers lose the same tokens."""
    with pruned(known(family), method) as pruner:
        chat = Chat(family, pruner)
        chat.turn(FIRST)
        before = stored(chat.cache)
        chat.forget(count)
        assert stored(chat.cache) == [length + 1 - count for length in before]
        done = [chat.turn(WORDS), chat.turn(PICTURES)]
    for reply, told, reached, merged in done:
        assert_same(reply, dense(known(family), told, reached, merged))


@pytest.mark.parametrize("method", BUDGETS)
def test_a_picture_that_was_cut_cannot_be_forgotten(method):
    with pruned(model_of("llava"), method) as pruner:
        chat = Chat("llava", pruner)
        chat.turn(FIRST)
        before = stored(chat.cache)
        with pytest.raises(UnsupportedCall, match="reaches into a picture"):
            chat.forget(STEPS + 6)
        assert stored(chat.cache) == before


@families
@pytest.mark.parametrize("method", DEEP)
@torch.no_grad()
def test_a_loop_written_by_hand_needs_no_mask(method, family):
    """One word at a time, then several in one call."""
    model = known(family)
    inputs = models.inputs(model, ONE)
    words = torch.tensor([[20, 21, 22, 23, 24]])
    with pruned(model, method) as pruner:
        out = model(**inputs, use_cache=True)
        steps = [out.logits[:, -1:]]
        for some in (words[:, :1], words[:, 1:2], words[:, 2:]):
            steps.append(model(input_ids=some, past_key_values=out.past_key_values).logits)
        reached = reach(pruner.last, inputs["input_ids"])
        merged = merges(pruner.last, inputs["attention_mask"])
    ids = torch.cat([inputs["input_ids"], words], dim=1)
    told = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        told["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5))
    with hidden(model, reached, merged):
        expected = model(**told).logits[:, -6:]
    assert (torch.cat(steps, dim=1) - expected).abs().max() < TOLERANCE


CHOICES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("method", BUDGETS)
@torch.no_grad()
def test_rows_of_the_cache_may_be_chosen_anew(method, choice):
    """The rows differ in what is padding, in front of every drop point and behind it: all of that moves with them."""
    model, (change, rows) = model_of("llava"), CHOICES[choice]
    inputs = models.inputs(model, ONE_AND_TWO)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    words = {
        "input_ids": torch.tensor([[7], [9]]),
        "attention_mask": mask,
        "position_ids": mask.sum(dim=1)[:, None] - 1,
    }
    with pruned(model, method):
        first, second = (answer(model, inputs, steps=1).cache for _ in range(2))
        expected = model(**words, past_key_values=first).logits
        change(second)
        got = model(**{name: values[rows] for name, values in words.items()}, past_key_values=second).logits
    assert (expected[0] - expected[1]).abs().max() > 100 * TOLERANCE
    assert_close(got, expected[rows])


@pytest.mark.parametrize("method", DEEP)
def test_the_first_turn_is_remembered(method):
    """The comparisons are sensitive: another picture in the first turn changes the second reply."""
    replies = []
    for seed in (1, 9):
        with pruned(model_of("llava"), method) as pruner:
            chat = Chat("llava", pruner)
            chat.turn((Prompt(images=(SIZE,), seed=seed),))
            replies.append(chat.turn(WORDS[:1])[0])
    assert (replies[0].logits - replies[1].logits).abs().max() > 100 * TOLERANCE
    kept = run(model_of("llava"), method, models.inputs("llava", ONE)).report.kept
    assert (kept > 0) == (method not in EXITS)
