"""What questions ask to be seen: by rules, by a plan that a model wrote, and of drawn scenes."""

from __future__ import annotations

import builtins
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtprune
from vtprune.tiny.candidates import candidates
from vtprune.tiny.scenes import COLORS, SHAPES
from vtprune.video.decoupling import decouple, decouple_by_model, things_of_plan

NAMED = {
    "how many children are in the video": ("children",),
    "what is the boy in blue holding in his hand": ("boy", "blue", "hand"),
    "where are the two men sitting while playing the guitar": ("men", "guitar"),
    "what does the white dog do after going to the cushion": ("white dog", "cushion"),
    "what did the lady do before she threw the ball at the dog": ("lady", "ball", "dog"),
    "is the person in black jumping rope": ("person", "black", "rope"),
    "does the man with a hat have a beard": ("man", "hat", "beard"),
    "what is behind the man in the first frame": ("man",),
    "What is the man in the red coat carrying?": ("man", "red coat"),
    "How many dogs run past the fountain?": ("dogs", "fountain"),
    "How long does the man stir the soup?": ("man", "soup"),
    "What color is the first car that passes the traffic light?": ("car", "traffic light"),
    "How many people are wearing the king's ring?": ("people", "king's ring"),
    "What\u2019s the old man\u2019s café called?": ("old man's café",),
    "Is there a cat, a dog or a cat on the table?": ("cat", "dog", "table"),
}
OF_EVENTS = (
    "why did the boy pick up one present from the group of them and move to the sofa",
    "how does the man in the red shirt react when the baby falls",
    "what happened after the woman threw the frisbee",
    "Summarize the key steps c takes to prepare the dough",
    "Taking into account all the actions performed by c, what can you deduce about the primary objective?",
    "What is the relationship between the two people in the kitchen?",
    "What is shown in this video?",
    "视频里有几只狗",
    "?!",
    "",
)
PLAN = "Step 1: yes\nStep 2: ['Dog', 'joy', 'red ball']\nStep 3: ['Dog', 'red ball']"
HOSTILE = {
    "no list": "Step 1: yes\nStep 3: a dog and a ball",
    "null": "Step 1: no\nStep 2: null\nStep 3: null",
    "not asked for": "Step 1: no\nStep 3: ['dog']",
    "no first step": "Step 3: ['dog']",
    "code": "Step 1: yes\nStep 3: [__import__('os').system('touch /tmp/owned')]",
    "a call": "Step 1: yes\nStep 3: [open('owned', 'w'), 'dog']",
    "a comprehension": "Step 1: yes\nStep 3: ['dog' for _ in range(9 ** 9)]",
    "a formatted string": "Step 1: yes\nStep 3: [f'{exit()}']",
    "a product": "Step 1: yes\nStep 3: ['dog' * 999999999]",
    "a power": "Step 1: yes\nStep 3: [9 ** 9 ** 9]",
    "lists in lists": "Step 1: yes\nStep 3: [[['dog']]]",
    "what cannot be hashed": "Step 1: yes\nStep 3: [{ {} }]",
    "brackets without end": "Step 1: yes\nStep 3: " + "[" * 100_000,
    "parentheses in parentheses": "Step 1: yes\nStep 3: [" + "(" * 900 + ")" * 900 + "]",
    "minuses": "Step 1: yes\nStep 3: [" + "-" * 1900 + "1]",
    "a huge string": "Step 1: yes\nStep 3: ['" + "dog" * 100_000 + "']",
    "a huge text": "step 3 " * 100_000,
    "a long run of blanks": "step" + " " * 200_000 + "1: yes",
    "a null byte": "Step 1: yes\nStep 3: ['dog\0']",
    "an open string": "Step 1: yes\nStep 3: ['dog]",
    "numbers": "Step 1: yes\nStep 3: [1, 2.5, None, True, b'dog', ('dog',)]",
    "blanks": "Step 1: yes\nStep 3: ['', '  ']",
}


@pytest.mark.parametrize("question", NAMED)
def test_things_that_a_question_names(question: str) -> None:
    assert decouple(question) == NAMED[question]


@pytest.mark.parametrize("question", OF_EVENTS)
def test_a_question_about_events_names_nothing(question: str) -> None:
    assert decouple(question) == ()


@pytest.mark.parametrize("mark", ["A.", "(B)", "c)", "4:"])
def test_options_and_instructions_name_nothing(mark: str) -> None:
    text = (
        f"Which of these does the waiter carry?\n{mark} a cup\nAnswer with the option's letter from the given choices."
    )
    assert decouple(text) == ("waiter",)
    assert decouple(f"{text}\n{mark}cup") == ("waiter", *decouple(f"{mark}cup"))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_any_text_can_be_taken_apart(text: str) -> None:
    things = decouple(text)
    assert len(set(things)) == len(things) and all(thing.strip() == thing != "" for thing in things)


def test_a_plan_is_read() -> None:
    assert things_of_plan(PLAN) == ("dog", "red ball")
    assert things_of_plan(f"Let me think.\n{PLAN}\nDone.") == ("dog", "red ball")
    assert things_of_plan("step 1 : YES step 3 :['a', \"b's\", 'a', ' c ']") == ("a", "b's", "c")


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_hostile_plan_is_run_or_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, run in ((builtins, "eval"), (builtins, "exec"), (builtins, "open"), (os, "system")):
        monkeypatch.setattr(module, run, lambda *_, **__: pytest.fail("something was run"))
    assert things_of_plan(HOSTILE[name]) == ()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="[](){}'\",\\:* -+0dogf\n\0", max_size=60))
def test_any_plan_ends_in_things_or_in_nothing(inside: str) -> None:
    found = things_of_plan(f"step 1: yes step 3: [{inside}]")
    assert all(isinstance(thing, str) and thing for thing in found)


class Writer:
    """A language model that writes a plan, with the tokenizer and the processor that go with it."""

    device = torch.device("cpu")

    def __init__(self, plan: str, chat_template: str | None = "a template") -> None:
        self.plan, self.chat_template = plan, chat_template
        self.asked: list[str] = []
        self.tokenizer = self

    def apply_chat_template(self, chat: Any, **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        ((part,),) = [message["content"] for message in chat]
        return f"user: {part['text']} assistant:"

    def __call__(self, texts: list[str], return_tensors: str) -> Any:
        self.asked += texts
        inputs = {"input_ids": torch.zeros(1, 7, dtype=torch.long)}
        return SimpleNamespace(to=lambda device: inputs)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options == {"max_new_tokens": 160, "do_sample": False}
        return torch.cat([input_ids, torch.ones(1, 3, dtype=torch.long)], dim=1)

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        assert ids.tolist() == [1, 1, 1] and skip_special_tokens
        return self.plan


@pytest.mark.parametrize("template", [True, False])
def test_a_model_is_asked_for_a_plan(template: bool) -> None:
    writer = Writer(PLAN, "a template" if template else None)
    question = "Who holds {the} ball?"
    assert decouple_by_model(writer, writer, question) == ("dog", "red ball")
    (text,) = writer.asked
    assert f"Question about a video: {question}\n" in text
    assert text.startswith("user: ") == text.endswith(" assistant:") == template


def test_a_model_that_writes_no_plan_names_nothing_wrapped_or_not() -> None:
    model, processor = vtprune.load_tiny("llava")
    assert decouple_by_model(model, processor, "is there a red circle ?", max_new_tokens=3) == ()
    with vtprune.pruning(model, "vtprune", keep=0.25):
        assert decouple_by_model(model, processor, "is there a red circle ?", max_new_tokens=3) == ()


def test_candidates_by_hand() -> None:
    assert candidates("is there a red circle ?") == ("red circle",)
    assert candidates("Is there a RED circle?") == ("red circle",)
    assert candidates("what shape is red ?") == tuple(f"red {shape}" for shape in SHAPES)
    assert candidates("where is the cross ?") == tuple(f"{color} cross" for color in COLORS)
    assert candidates("how many hearts ?") == tuple(f"{color} heart" for color in COLORS)
    both = candidates("is the ring left of the star ?")
    assert both == tuple(f"{color} {shape}" for shape in ("ring", "star") for color in COLORS)
    assert candidates("what number is shown ?") == candidates("") == ()
