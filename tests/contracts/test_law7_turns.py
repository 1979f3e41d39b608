"""Law 7: a chat goes on from the pruned cache, with and without new pictures, as if it had been built by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts import caches, oracle
from tests.contracts.cases import (
    CACHING,
    LEAVING,
    PIPELINES,
    STEPS,
    TOLERANCE,
    Answer,
    Case,
    Kept,
    answer,
    assert_close,
    candidate_positions,
    cells,
    choices,
    distance,
    edits_of,
    kept_tokens,
    whole,
)
from tests.contracts.dense import Merge
from tests.contracts.edits import Told
from tests.models import Prompt

pytestmark = pytest.mark.law("7 turns")

Turns = Sequence[tuple[Prompt, ...]]
WORDS = (Prompt(text_before=4, seed=71), Prompt(text_before=4, seed=72))
RAGGED_WORDS = (Prompt(text_before=4, seed=73), Prompt(text_before=7, seed=74))
PICTURES = {
    "image": (Prompt(images=((60, 64),), seed=75), Prompt(images=((30, 64), (60, 64)), seed=76)),
    "video": (Prompt(clips=((32, 32, 4),), seed=77), Prompt(clips=((32, 32, 4), (32, 32, 4)), seed=78)),
}
WHOLE = ("input_ids", "attention_mask", "mm_token_type_ids")
GRIDS = ("image_grid_thw", "video_grid_thw")


@dataclass
class Conversation:
    """One row, unpadded, on the reference's side: what was said, what it looks like merged, and what was kept."""

    case: Case
    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    pieces: list[oracle.Merged] = field(default_factory=list)
    grids: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    turns: list[tuple[int, int, Prompt]] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    since: list[int] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)

    def say(self, inputs: dict[str, Tensor], prompt: Prompt) -> None:
        """A prompt of one row."""
        ids = inputs["input_ids"][0].tolist()
        self.turns.append((len(self.ids), len(self.ids) + len(ids), prompt))
        self.ids += ids
        self.written += [False] * len(ids)
        self.types += inputs["mm_token_type_ids"][0].tolist() if "mm_token_type_ids" in inputs else [0] * len(ids)
        for name in GRIDS:
            self.grids.setdefault(name, []).extend(inputs.get(name, ()))

    def keep(self, kept: Kept, piece: oracle.Merged) -> None:
        """What stays of the last prompt, and all of it for the language model."""
        cached = max(0, len(self.kept) - 1)  # the last word of a reply enters with the next prompt
        places = range(cached, len(self.kept) + len(kept.positions))
        self.merges += [one.placed(places) for one in kept.merges]
        self.kept += [len(self.ids) - piece.embeds.shape[1] + position for position in kept.positions]
        self.depths += kept.depths
        self.stored += kept.stored
        self.since += [len(self.kept)] * len(kept.positions)
        self.pieces.append(piece)

    def reply(self, tokens: list[int]) -> None:
        """What the model said: all of it is kept."""
        self.kept += range(len(self.ids), len(self.ids) + len(tokens))
        self.depths += [self.case.layers] * len(tokens)
        self.stored += [self.case.layers] * len(tokens)
        self.since += [len(self.kept)] * len(tokens)
        self.ids += tokens
        self.written += [True] * (len(tokens) - 1) + [False]  # the last word is told with the next prompt
        self.types += [0] * len(tokens)
        embeds = self.case.model.get_input_embeddings()(torch.tensor([tokens])).detach()
        self.pieces.append(oracle.Merged(embeds=embeds, positions=torch.empty(1, 0)))

    def positions(self) -> Tensor:
        """Ids (1 or 3, L) of the whole conversation: a count, or what transformers compute for all its pictures."""
        if not self.case.mrope:
            return torch.arange(len(self.ids))[None]
        grids = {name: torch.stack(rows) for name, rows in self.grids.items() if rows}
        types = torch.tensor([self.types]).int()
        return self.case.model.model.get_rope_index(torch.tensor([self.ids]), mm_token_type_ids=types, **grids)[0][:, 0]

    def whole(self) -> oracle.Merged:
        """All of it, unpruned."""
        return oracle.join(self.pieces, self.positions())


@dataclass(frozen=True)
class Turn:
    """A reply, the reports of its prefill, and per row the unpruned conversation before it, what is kept, and where
    its pictures are if the method changes attention to them.

    `since` says for every token of a row from which on it is only seen where it is stored; `ids` are the prompts.
    """

    reply: Answer
    reports: list[Any]
    rows: list[tuple[oracle.Merged, Kept, Told | None]]
    since: list[list[int]]
    ids: list[list[int]]


@dataclass
class Chat:
    """A batch of conversations with a wrapped model, on one cache."""

    case: Case
    pruner: Any
    rows: list[Conversation]
    so_far: dict[str, Tensor] = field(default_factory=dict)
    cache: Any = None

    def turn(self, prompts: tuple[Prompt, ...]) -> Turn:
        """One more prompt of every row, and the model's reply."""
        alone = [self.case.inputs((prompt,)) for prompt in prompts]
        for conversation, inputs, prompt in zip(self.rows, alone, prompts, strict=True):
            conversation.say(inputs, prompt)
        fresh = self.case.inputs(prompts)
        self._append({name: fresh[name] for name in WHOLE if name in fresh})
        given: dict[str, Any] = {**fresh, **self.so_far}
        if self.cache is not None:
            given["past_key_values"] = self.cache
            if self.case.mrope and any(name in fresh for name in GRIDS):
                given["position_ids"] = self._positions()
        self.pruner.history.clear()
        with self.case.using(self.pruner, prompts):
            reply = answer(self.case.model, given)
        reports = list(self.pruner.history)
        before, since = [], []
        for row, conversation in enumerate(self.rows):
            ids = alone[row]["input_ids"][0].tolist()
            full = [self.case.layers] * len(ids)
            kept = Kept(positions=list(range(len(ids))), depths=full, stored=full)
            if reports:
                kept = kept_tokens(self.case, reports[0], row, ids)
            conversation.keep(kept, whole(self.case, prompts[row], kept.positions))
            so_far = Kept(
                positions=list(conversation.kept),
                depths=list(conversation.depths),
                stored=list(conversation.stored),
                merges=tuple(conversation.merges),
            )
            told = edits_of(self.case, conversation.ids, conversation.turns, conversation.written)
            before.append((conversation.whole(), so_far, told))
            since.append(list(conversation.since))
            conversation.reply(reply.tokens[row].tolist())
        self.cache = reply.cache
        said = torch.zeros_like(reply.tokens)
        heard = {"input_ids": reply.tokens, "attention_mask": said + 1, "mm_token_type_ids": said.int()}
        self._append({name: heard[name] for name in self.so_far})
        return Turn(reply, reports, before, since, [inputs["input_ids"][0].tolist() for inputs in alone])

    def _append(self, more: dict[str, Tensor]) -> None:
        for name, values in more.items():
            self.so_far[name] = torch.cat([self.so_far[name], values], dim=1) if name in self.so_far else values

    def _positions(self) -> Tensor:
        """(4, B, L) for the padded batch: with new pictures on a cache, transformers cannot compute them alone."""
        mask = self.so_far["attention_mask"]
        ids = torch.zeros(3, *mask.shape, dtype=torch.long)
        for row, conversation in enumerate(self.rows):
            ids[:, row, mask[row].bool()] = conversation.positions()
        return torch.cat([(mask.cumsum(dim=1) - 1).clamp(min=0)[None], ids])


def talk(case: Case, turns: Turns, **options: Any) -> list[Turn]:
    """The turns of a chat under one wrap."""
    with case.pruned(**options) as pruner:
        chat = Chat(case, pruner, [Conversation(case) for _ in turns[0]])
        return [chat.turn(prompts) for prompts in turns]


def check(case: Case, turns: Turns, positions: str) -> list[Turn]:
    """Every reply of the chat against the reference."""
    done = talk(case, turns, positions=positions)
    if case.method in CACHING:
        for row in range(len(turns[0])):
            check_caches(case, row, done)
        return done
    for turn in done:
        for row, (before, kept, told) in enumerate(turn.rows):
            tokens, logits = oracle.decode(
                case.model,
                before,
                kept.positions,
                steps=STEPS,
                compact=positions == "compact",
                forbidden=case.forbidden,
                depths=kept.depths,
                later=kept.stored,
                since=turn.since[row],
                merges=kept.merges,
                edits=told,
            )
            assert_close(turn.reply.logits[row], logits)
            assert turn.reply.tokens[row].tolist() == tokens
    return done


def check_caches(case: Case, row: int, done: list[Turn]) -> None:
    """Every reply to one row against caches that are rewritten by hand, turn after turn."""
    reference, heard = caches.Reference(case.model, mass=case.settings.get("mass")), 0
    for turn in done:
        so_far, *_ = turn.rows[row]
        ids = turn.ids[row]
        found = candidate_positions(case, turn.reports[0], row, ids) if turn.reports else []
        before = so_far.embeds.shape[1] - len(ids) - heard
        reference.show([[before + place for place in places] for _, places in found], case.keep)
        tokens, logits = reference.decode(so_far, steps=STEPS, forbidden=case.forbidden, after=heard)
        assert_close(turn.reply.logits[row], logits)
        assert turn.reply.tokens[row].tolist() == tokens
        heard = so_far.embeds.shape[1] + STEPS - 1


def pictures(turn: Turn) -> int:
    """How many pictures and clips the reports of a turn name."""
    return sum(len(report.segments) for report in turn.reports)


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_words_then_new_pictures_in_a_left_padded_batch(case: Case, positions: str) -> None:
    done = check(case, (case.prompts, WORDS, PICTURES[case.kind]), positions)
    assert not case.batch["attention_mask"].all()
    assert [pictures(turn) for turn in done] == [3, 0, 3]
    assert done[2].reports[0].average < done[2].reports[0].tokens or case.keep == 1.0


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_pictures_turn_after_turn_in_one_row(case: Case, positions: str) -> None:
    turns = tuple((prompt,) for prompt in (case.prompts[0], *PICTURES[case.kind]))
    done = check(case, turns, positions)
    assert [pictures(turn) for turn in done] == [1, 1, 2]


@cells()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_padding_between_the_turns(case: Case, positions: str) -> None:
    check(case, (case.prompts, RAGGED_WORDS), positions)


@cells()
@torch.no_grad()
def test_the_whole_chat_at_once_keeps_the_same_tokens(case: Case) -> None:
    """A choice depends on the picture's place in the conversation, not on the turn in which it was cached."""
    first = case.prompts[0]
    turns = ((first,), (replace(first, seed=first.seed + 8),))
    done = talk(case, turns)
    asked, asked_again = (case.inputs(prompts) for prompts in turns)
    replied = done[0].reply.tokens
    words = {"input_ids": replied, "attention_mask": torch.ones_like(replied)}
    words["mm_token_type_ids"] = torch.zeros_like(replied).int()
    pixels = {name: torch.cat([asked[name], asked_again[name]]) for name in asked if name not in WHOLE}
    spoken = {name: torch.cat([asked[name], words[name], asked_again[name]], dim=1) for name in WHOLE if name in asked}
    with case.pruned() as pruner, case.using(pruner, (*turns[0], *turns[1]), as_one=True):
        case.model(**pixels, **spoken)
        at_once = pruner.last
    expected = [choice for turn in done for choice in choices(turn.reports[0], 0)]
    assert len(choices(at_once, 0)) == 2
    if case.method in (*LEAVING, *CACHING):
        return  # whether a picture leaves, or which head stores what, the last question decides
    if PIPELINES[case.method].glances:
        # The last question decides, and at once there is no other: as many tokens go as far, but not the same ones.
        assert list(map(sorted, choices(at_once, 0))) == list(map(sorted, expected))
    else:
        assert choices(at_once, 0) == expected


@cells()
def test_the_first_turn_is_remembered(case: Case) -> None:
    """The comparison is sensitive: another picture in the first turn changes the reply to the second."""
    first = case.prompts[0]
    other = replace(first, seed=first.seed + 8)
    replies = [talk(case, ((prompt,), (WORDS[0],)))[1].reply for prompt in (first, other)]
    assert distance(replies[0].logits, replies[1].logits) > 1000 * TOLERANCE
