"""The bundled models see as well as their cards say, and pruning does to them what doing it by hand does."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune.eval.questions import OBJECT_SHARE, Item, coverage, draw_items, judged
from vtprune.eval.runner import evaluate
from vtprune.eval.subject import Subject
from vtprune.tiny import list_tiny, load_tiny, load_tiny_clip
from vtprune.tiny.clips import CLIP_KINDS, FRAMES, ask_frame, draw_clip
from vtprune.tiny.drawing import Stream
from vtprune.tiny.loading import tiny_folder
from vtprune.tiny.scenes import KINDS, TEST
from vtprune.tiny.words import WORD_IDS
from vtprune.types import Part

QUESTIONS = 200
RIGHT = {"llava": 197, "llava_next_video": 195, "qwen2_5_vl": 183}
"""Of the first questions about test scenes or clips, as counted when the weights were put here."""
FRAMES_RIGHT = 186
"""Of the questions about single frames."""
CLIPS = ("llava_next_video",)
DOCS = Path(__file__).parents[2] / "docs"
GRID = Part(kind="image", grid=(16, 16), start=0, stop=256)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def subject(name: str) -> Subject:
    model, processor = load_tiny(name)
    return Subject(model=model, processor=processor)


@functools.cache
def items_for(name: str) -> tuple[Item, ...]:
    return draw_items("test", 0, 40, "video" if name in CLIPS else "image")[:QUESTIONS]


def card_row(name: str, kind: str) -> dict[str, str]:
    with (DOCS / f"accuracy-{name}.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if (row["method"], row["kind"]) == ("identity", kind)]
    return row


def test_every_bundled_model_is_held_to_its_card():
    assert list(RIGHT) == list_tiny()


@pytest.mark.parametrize("name", RIGHT)
def test_it_answers_as_its_card_says(name):
    items = items_for(name)
    (result,) = evaluate(subject(name), items, [("identity", 1.0)], batch=25)
    right = sum(word == judged(item.question.answer) for word, item in zip(result.words, items))
    assert len(items) == QUESTIONS
    assert abs(right - RIGHT[name]) <= 2
    row = card_row(name, "all")
    assert float(row["low"]) - 0.02 <= right / QUESTIONS <= float(row["high"]) + 0.02


@pytest.mark.parametrize("name", RIGHT)
def test_the_card_tells_the_figures_of_the_table(name):
    card = (tiny_folder(name) / "CARD.md").read_text()
    for kind in (*(CLIP_KINDS if name in CLIPS else KINDS), "all but count", "all"):
        row = card_row(name, kind)
        figure = f"{100 * float(row['accuracy']):.1f} %"
        line = next(line for line in card.splitlines() if line.startswith(f"| {kind} | "))
        assert figure in line, (kind, figure, line)


def frame_items() -> tuple[Item, ...]:
    """Is it there? Asked of one frame of each of a hundred test clips."""
    drawn = [(seed, draw_clip(seed), seed % FRAMES) for seed in TEST[:100]]
    return tuple(
        Item(modality="video", number=i, seed=seed, views=(clip.frame(t),), other=(clip.frame(t),), question=question)
        for i, (seed, clip, t) in enumerate(drawn)
        for question in ask_frame(clip, t, Stream(~seed))
    )


def test_single_frames_tell_what_is_in_them():
    items = frame_items()
    (result,) = evaluate(subject("llava_next_video"), items, [("identity", 1.0)], batch=25)
    right = sum(word == item.question.answer for word, item in zip(result.words, items))
    assert abs(right - FRAMES_RIGHT) <= 2
    assert f"{FRAMES_RIGHT} of {len(items)}" in (tiny_folder("llava_next_video") / "CARD.md").read_text()


def question_inputs(name: str, item: Item) -> dict[str, Tensor]:
    return subject(name).inputs([item], [item.views])


def visual_features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    given = {key: inputs[key] for key in ("pixel_values", "image_grid_thw", "pixel_values_videos") if key in inputs}
    encode = model.model.get_video_features if "pixel_values_videos" in given else model.model.get_image_features
    return torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in encode(**given).pooler_output])


def full_positions(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Ids of the whole prompt, (rows of ids, L)."""
    if "image_grid_thw" not in inputs:
        return torch.arange(inputs["input_ids"].shape[1])[None]
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    return model.model.get_rope_index(**{key: inputs[key] for key in names})[0][:, 0]


def closed(positions: Tensor, stays: Tensor) -> Tensor:
    """Ids moved down by the number of smaller ids that nobody has any more."""
    gone = set(positions.flatten().tolist()) - set(positions[:, stays].flatten().tolist())
    return torch.tensor([[i - sum(other < i for other in gone) for i in row] for row in positions[:, stays].tolist()])


@torch.no_grad()
def by_hand(model: nn.Module, inputs: dict[str, Tensor], kept: Tensor, compact: bool) -> Tensor:
    """Logits of the next token from a prompt that holds the kept tokens alone, put together here."""
    ids = inputs["input_ids"][0]
    visual = ((ids == WORD_IDS["<image>"]) | (ids == WORD_IDS["<video>"])).nonzero()[:, 0]
    embeds = model.get_input_embeddings()(ids)
    embeds[visual] = visual_features(model, inputs)
    stays = torch.ones(len(ids), dtype=torch.bool)
    stays[visual] = False
    stays[visual[kept]] = True
    positions = full_positions(model, inputs)
    positions = closed(positions, stays) if compact else positions[:, stays]
    given = positions[:, None] if len(positions) > 1 else positions
    output = model.model.language_model(inputs_embeds=embeds[stays][None], position_ids=given)
    return model.lm_head(output.last_hidden_state[0, -1])


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("keep", [0.25, 0.05])
@pytest.mark.parametrize("name", RIGHT)
def test_pruning_loses_nothing_against_a_prompt_shortened_by_hand(name, positions, keep):
    model = subject(name).model
    for item in items_for(name)[::25]:
        inputs = question_inputs(name, item)
        with torch.no_grad(), vtprune.pruning(model, keep=keep, positions=positions) as pruner:
            logits = model(**inputs).logits[0, -1]
            kept = pruner.last.segments[0].keep
        expected = by_hand(model, inputs, kept, positions == "compact")
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RIGHT)
def test_the_test_above_would_notice_wrong_positions(name):
    model, inputs = subject(name).model, question_inputs(name, items_for(name)[0])
    kept = torch.arange(0, 256, 37)
    right, wrong = by_hand(model, inputs, kept, True), by_hand(model, inputs, kept, False)
    assert (right - wrong).abs().max() > 1e-2


def test_the_text_tower_finds_what_a_question_is_about():
    model, tokenizer = load_tiny_clip("llava")
    items = items_for("llava")
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
    pixels = (torch.from_numpy(item.views[0].pixels).permute(2, 0, 1) / 255 - mean[:, None, None]) / std[:, None, None]
    vision = model.vision_model(pixel_values=pixels[None], output_hidden_states=True)
    patches = model.visual_projection(model.vision_model.post_layernorm(vision.hidden_states[-2][0, 1:]))
    text = model.get_text_features(**tokenizer(question, return_tensors="pt"))
    text = getattr(text, "pooler_output", text)
    return nn.functional.cosine_similarity(patches, text, dim=-1)
