"""The bundled models see as well as their cards say, and pruning does to them what doing it by hand does."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vtprune
from vtprune.eval.questions import OBJECT_SHARE, Item, coverage, draw_items, judged
from vtprune.eval.runner import evaluate
from vtprune.eval.subject import Subject
from vtprune.tiny import load_tiny, load_tiny_clip
from vtprune.tiny.loading import tiny_folder
from vtprune.types import Part

QUESTIONS = 200
RIGHT = {"llava": 195}
"""Of the first questions about test scenes, as counted when the weights were put here."""
DOCS = Path(__file__).parents[2] / "docs"
GRID = Part(kind="image", grid=(16, 16), start=0, stop=256)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llava() -> tuple[nn.Module, object]:
    return load_tiny("llava")


@pytest.fixture(scope="module")
def items() -> tuple[Item, ...]:
    return draw_items("test", 0, 40)[:QUESTIONS]


def card_row(name: str, kind: str) -> dict[str, str]:
    with (DOCS / f"accuracy-{name}.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if (row["method"], row["kind"]) == ("identity", kind)]
    return row


def right_answers(model: nn.Module, processor: object, items: tuple[Item, ...]) -> int:
    (result,) = evaluate(Subject(model=model, processor=processor), items, [("identity", 1.0)], batch=25)
    return sum(word == judged(item.question.answer) for word, item in zip(result.words, items))


def test_it_answers_as_its_card_says(llava, items):
    right = right_answers(*llava, items)
    assert abs(right - RIGHT["llava"]) <= 2
    row = card_row("llava", "all")
    assert float(row["low"]) - 0.02 <= right / QUESTIONS <= float(row["high"]) + 0.02


def test_the_card_tells_the_figures_of_the_table():
    card = (tiny_folder("llava") / "CARD.md").read_text()
    for kind in ("color", "shape", "where", "exist", "left", "number", "count", "all but count", "all"):
        row = card_row("llava", kind)
        figure = f"{100 * float(row['accuracy']):.1f} %"
        line = next(line for line in card.splitlines() if line.startswith(f"| {kind} | "))
        assert figure in line, (kind, figure, line)


def prompt(processor, item: Item) -> dict[str, Tensor]:
    text = f"user : <image> {item.question.text} assistant :"
    return processor(images=Image.fromarray(item.scene.pixels), text=text, return_tensors="pt")


@torch.no_grad()
def by_hand(model: nn.Module, inputs: dict[str, Tensor], kept: Tensor, compact: bool) -> Tensor:
    """Logits of the next token from a prompt that holds the kept tokens alone, put together here."""
    ids = inputs["input_ids"][0]
    picture = (ids == model.config.image_token_index).nonzero()[:, 0]
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    embeds = model.get_input_embeddings()(ids)
    embeds[picture] = features
    stays = torch.ones(len(ids), dtype=torch.bool)
    stays[picture] = False
    stays[picture[kept]] = True
    positions = torch.arange(int(stays.sum())) if compact else stays.nonzero()[:, 0]
    output = model.model.language_model(inputs_embeds=embeds[stays][None], position_ids=positions[None])
    return model.lm_head(output.last_hidden_state[0, -1])


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("keep", [0.25, 0.05])
def test_pruning_loses_nothing_against_a_prompt_shortened_by_hand(llava, items, positions, keep):
    model, processor = llava
    for item in items[::10]:
        inputs = prompt(processor, item)
        with torch.no_grad(), vtprune.pruning(model, keep=keep, positions=positions) as pruner:
            logits = model(**inputs).logits[0, -1]
            kept = pruner.last.segments[0].keep
        expected = by_hand(model, inputs, kept, positions == "compact")
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_test_above_would_notice_wrong_positions(llava, items):
    model, processor = llava
    inputs = prompt(processor, items[0])
    kept = torch.arange(0, 256, 4)
    right, wrong = by_hand(model, inputs, kept, True), by_hand(model, inputs, kept, False)
    assert (right - wrong).abs().max() > 1e-2


def test_the_text_tower_finds_what_a_question_is_about(items):
    model, tokenizer = load_tiny_clip("llava")
    asked = [item for item in items if item.question.about]
    assert len(asked) > 100
    hits = [shows(item, relevance(model, tokenizer, item, item.question.text)) for item in asked]
    others = [shows(item, relevance(model, tokenizer, item, other.question.text)) for item, other in mismatched(asked)]
    assert sum(hits) / len(hits) > 0.9
    assert sum(others) / len(others) < 0.6


def shows(item: Item, closeness: Tensor) -> bool:
    """Whether the nearest cell shows a thing that the question is about."""
    cells = coverage(item.views, [GRID])[list(item.question.about)].sum(axis=0)
    return bool(cells[int(closeness.argmax())] >= OBJECT_SHARE)


def mismatched(items: list[Item]) -> list[tuple[Item, Item]]:
    """Every item with one that asks something else."""
    return list(zip(items, items[len(items) // 2 :] + items[: len(items) // 2]))


@torch.no_grad()
def relevance(model: nn.Module, tokenizer: object, item: Item, question: str) -> Tensor:
    """Cosine of every patch with the question, as methods on CLIP compute it: from the second to last layer."""
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (torch.from_numpy(item.scene.pixels).permute(2, 0, 1) / 255 - mean[:, None, None]) / std[:, None, None]
    vision = model.vision_model(pixel_values=pixels[None], output_hidden_states=True)
    patches = model.visual_projection(model.vision_model.post_layernorm(vision.hidden_states[-2][0, 1:]))
    text = model.get_text_features(**tokenizer(question, return_tensors="pt"))
    text = getattr(text, "pooler_output", text)
    return nn.functional.cosine_similarity(patches, text, dim=-1)
