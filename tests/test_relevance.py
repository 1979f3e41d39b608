"""Relevance to a question against one computed by hand, by a CLIP of transformers and by one of open_clip."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vtprune
from tests import models
from tests.fidelity import loops
from tests.integration.common import kept_of, write
from tests.models import Prompt
from vtprune.errors import InvalidOption
from vtprune.relevance import text_relevance
from vtprune.tiny.loading import load_tiny_clip

QUESTIONS = ("what color is the cross ?", "where is the red circle ?")
WORDS = " ".join(QUESTIONS).split()
SIDE, PATCHES, LONGEST = 128, 256, 64


@functools.cache
def bundled() -> tuple[Any, Any]:
    return load_tiny_clip("llava")


def pixels(pictures: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(pictures, 3, side, side, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def patches_by_hand(clip: Any, given: Tensor, layer: int) -> Tensor:
    """(B, N, width): block after block, up to that of which `hidden_states[layer]` is the output."""
    vision = clip.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(given))
    blocks = list(vision.encoder.layers)
    for block in blocks[: len(blocks) + 1 + layer]:
        hidden = block(hidden, None)
    return clip.visual_projection(vision.post_layernorm(hidden[:, 1:]))


@torch.no_grad()
def text_by_hand(clip: Any, words: list[int]) -> Tensor:
    """(width,) of one segment between its marks, without padding."""
    config = clip.config.text_config
    ids = torch.tensor([[config.bos_token_id, *words, config.eos_token_id]])
    return clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state[:, -1])[0]


def cosines(patches: Tensor, segments: list[Tensor]) -> Tensor:
    """(N,) mean over segments."""
    return sum(cosine_similarity(patches, segment[None], dim=1) for segment in segments) / len(segments)


def words_of(question: str) -> list[int]:
    return bundled()[1](question, add_special_tokens=False).input_ids


@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_the_bundled_clip_by_hand(layer: int) -> None:
    clip, tokenizer = bundled()
    patches = patches_by_hand(clip, pixels(), layer)
    expected = [cosines(own, [text_by_hand(clip, words_of(q))]) for own, q in zip(patches, QUESTIONS)]
    found = text_relevance(clip, tokenizer, pixels(), QUESTIONS, layer=layer)
    assert found.shape == (2, PATCHES)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert not found.requires_grad


def test_the_block_of_llava_is_the_one_by_default() -> None:
    clip, tokenizer = bundled()
    found = text_relevance(clip, tokenizer, pixels(), QUESTIONS)
    assert torch.equal(found, text_relevance(clip, tokenizer, pixels(), QUESTIONS, layer=-2))
    assert not torch.allclose(found, text_relevance(clip, tokenizer, pixels(), QUESTIONS, layer=-1))


def test_a_long_question_is_the_mean_of_its_segments() -> None:
    """150 words in segments of 62 between two marks: 62, 62 and 26. One of 62 is a single segment still."""
    clip, tokenizer = bundled()
    (patches,) = patches_by_hand(clip, pixels(1), -2)
    for count in (62, 63, 150):
        question = " ".join(WORDS[i % len(WORDS)] for i in range(count))
        words = words_of(question)
        assert len(words) == count
        segments = [text_by_hand(clip, words[at : at + LONGEST - 2]) for at in range(0, count, LONGEST - 2)]
        found = text_relevance(clip, tokenizer, pixels(1), [question])
        torch.testing.assert_close(found[0], cosines(patches, segments), atol=1e-5, rtol=1e-4)


def test_what_is_no_question_is_left_out() -> None:
    clip, tokenizer = bundled()
    wrapped = f"<image>\n {QUESTIONS[0]} \nAnswer the question using a single word or phrase."
    assert torch.equal(
        text_relevance(clip, tokenizer, pixels(1), [wrapped]), text_relevance(clip, tokenizer, pixels(1), QUESTIONS[:1])
    )


def test_each_picture_has_its_own_question_whatever_the_batch() -> None:
    clip, tokenizer = bundled()
    together = text_relevance(clip, tokenizer, pixels(), [" ".join(WORDS * 6), QUESTIONS[1]])
    alone = text_relevance(clip, tokenizer, pixels()[1:], QUESTIONS[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)
    swapped = text_relevance(clip, tokenizer, pixels(), QUESTIONS[::-1])
    assert not torch.allclose(swapped, text_relevance(clip, tokenizer, pixels(), QUESTIONS))


@pytest.mark.parametrize(
    ("given", "questions"), [(pixels(2), QUESTIONS[:1]), (pixels(1)[0], QUESTIONS[:1]), (pixels(1)[None], QUESTIONS)]
)
def test_pictures_and_questions_must_match(given: Tensor, questions: tuple[str, ...]) -> None:
    with pytest.raises(InvalidOption, match=rf"expected \(B, 3, H, W\), B={len(questions)}"):
        text_relevance(*bundled(), given, questions)


def test_it_is_evidence_for_cdpruner() -> None:
    """One row of scores for each prompt, one score for each token; the best in minus the cosine comes first."""
    vision = models.vision_config("clip_vision_model", vision_use_head=False, patch_size=2)
    model = models.build("llava", vision_config=vision)
    row = models.inputs(model, (Prompt(images=((32, 32),), seed=1),))
    relevance = text_relevance(*bundled(), pixels(1), QUESTIONS[:1])
    with vtprune.pruning(model, "cdpruner", keep=1.0 / PATCHES) as pruner, pruner.using(relevance=list(relevance)):
        write(model, row)
        assert kept_of(pruner.last) == [[int(relevance[0].argmin())]]


OPEN = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
CONTEXT, START, END = 12, 38, 39


@functools.cache
def open_clip() -> Any:
    made = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    text = {"context_length": CONTEXT, "vocab_size": 40, "width": 32, "heads": 4, "layers": 2}
    clip = made.CLIP(embed_dim=16, vision_cfg=OPEN, text_cfg=text).eval()
    models.randomise(clip)
    return clip


def numbers(words: list[str]) -> list[int]:
    """As the tokenizer of CLIP has it, an exclamation mark is 0, like padding."""
    return [0 if word == "!" else 1 + sum(word.encode()) % 36 for word in words]


def tokenizer(texts: list[str]) -> Tensor:
    """Words between two marks, cut to the context with the end at its end, or filled up with zeros."""
    rows = [[START, *numbers(text.split()), END] for text in texts]
    cut = [row if len(row) <= CONTEXT else [*row[: CONTEXT - 1], END] for row in rows]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in cut])


@torch.no_grad()
def open_patches(clip: Any, given: Tensor, layer: int) -> Tensor:
    visual, caught = clip.visual, []
    block = visual.transformer.resblocks[layer]
    handle = block.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        clip.encode_image(given)
    finally:
        handle.remove()
    return visual.ln_post(caught[0][:, 1:]) @ visual.proj


@torch.no_grad()
def open_text(clip: Any, words: list[str]) -> Tensor:
    return clip.encode_text(tokenizer([" ".join(words)]))[0]


@pytest.mark.parametrize("layer", [-1, -2])
def test_open_clip_by_hand(layer: int) -> None:
    clip = open_clip()
    patches = open_patches(clip, pixels(side=32), layer)
    expected = [cosines(own, [open_text(clip, q.split())]) for own, q in zip(patches, QUESTIONS)]
    found = text_relevance(clip, tokenizer, pixels(side=32), QUESTIONS, layer=layer)
    assert found.shape == (2, 16)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mark", ["?", "!"])
@pytest.mark.parametrize("count", [9, 12, 25])
def test_open_clip_takes_long_questions_in_halves(count: int, mark: str) -> None:
    """Ten words and fewer fit between the marks, so that 25 make four segments: 6, 6, 6 and 7."""
    clip = open_clip()
    words = [*WORDS[:3], mark, *(WORDS * 3)][:count]
    (patches,) = open_patches(clip, pixels(1, side=32), -2)
    found = text_relevance(clip, tokenizer, pixels(1, side=32), [" ".join(words)])[0]
    pieces = {9: (9,), 12: (6, 6), 25: (6, 6, 6, 7)}[count]
    segments = [open_text(clip, words[sum(pieces[:i]) : sum(pieces[: i + 1])]) for i in range(len(pieces))]
    torch.testing.assert_close(found, cosines(patches, segments), atol=1e-5, rtol=1e-4)


def test_the_loop_of_the_cosine_agrees() -> None:
    """That of the other fidelity tests, on one picture."""
    clip, made = bundled()
    (patches,) = patches_by_hand(clip, pixels(1), -2).double().numpy()
    text = text_by_hand(clip, words_of(QUESTIONS[0])).double().numpy()
    found = text_relevance(clip, made, pixels(1), QUESTIONS[:1])[0]
    assert found.tolist() == pytest.approx([loops.cosine(own, text) for own in patches], abs=1e-5)
