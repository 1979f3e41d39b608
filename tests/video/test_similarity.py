"""Similarity of pictures and a text against models run by hand: open_clip, CLIP and SigLIP, all of random weights."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
)

from tests import models
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.tiny.clips import draw_clip
from vtprune.tiny.scenes import DEVELOPMENT
from vtprune.tiny.words import BEGIN, END, PAD, VOCABULARY_SIZE, build_tokenizer
from vtprune.video.identity import weights_of
from vtprune.video.relevance import score_frames
from vtprune.video.similarity import ImageText

SIDE, CONTEXT = 32, 16
TEXT = "is there a red circle ?"
LOOSE = {"atol": 1e-5, "rtol": 1e-4}
ARCHITECTURE = "vtprune-test"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def pictures(count: int = 5) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in draw_clip(DEVELOPMENT[5]).frames[-count:]]


def by_vectors() -> ImageText:
    """Pictures by their size, texts by their length."""
    return ImageText(
        name="by hand",
        embed_pictures=lambda batch: torch.tensor([picture.size for picture in batch], dtype=torch.float64),
        embed_text=lambda words: torch.tensor([[float(len(words)), 0.0]]),
    )


def test_cosines_by_hand() -> None:
    clip = [Image.new("RGB", size) for size in ((3, 4), (12, 5), (8, 6), (7, 24))]
    (found,) = by_vectors()(clip, ["why ?"])
    assert found.tolist() == pytest.approx([3 / 5, 12 / 13, 8 / 10, 7 / 25])
    assert found.dtype == torch.float32
    for batch in (1, 3):
        assert torch.equal(by_vectors()(clip, ["what ?"], batch=batch)[0], found)


def test_pictures_are_embedded_in_batches_and_once_for_all_texts() -> None:
    asked: list[int] = []

    def embed(batch: Any) -> Tensor:
        asked.append(len(batch))
        return torch.ones(len(batch), 2)

    def text(words: str) -> Tensor:
        asked.append(-1)
        return torch.ones(1, 2)

    ImageText(name="counting", embed_pictures=embed, embed_text=text)(pictures(), [TEXT, "why ?"], batch=2)
    assert asked == [-1, -1, 2, 2, 1]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights of a tiny architecture of open_clip, which knows it by name."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    config = tmp_path / f"{ARCHITECTURE}.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    known = dict(open_clip.factory._MODEL_CONFIGS)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    models.randomise(model)
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    return path


@torch.no_grad()
def test_open_clip_by_hand(weights: Path) -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(ARCHITECTURE, pretrained=str(weights))
    model.eval()
    (words,) = model.encode_text(open_clip.get_tokenizer(ARCHITECTURE)([TEXT]))
    expected = [
        cosine_similarity(model.encode_image(preprocess(picture)[None])[0], words, dim=0) for picture in pictures()
    ]
    found = ImageText.of_open_clip(ARCHITECTURE, weights)
    assert found.name == "open_clip vtprune-test"
    torch.testing.assert_close(found(pictures(), [TEXT])[0], torch.stack(expected), **LOOSE)
    torch.testing.assert_close(found(pictures(), [TEXT], batch=2)[0], torch.stack(expected), **LOOSE)
    assert not found(pictures(), [TEXT]).requires_grad
    grey = [picture.convert("L") for picture in pictures()]
    assert found(grey, [TEXT, TEXT]).shape == (2, 5)
    assert found.identity == ImageText.of_open_clip(ARCHITECTURE, str(weights)).identity
    assert found.identity.startswith(weights_of(model))
    with torch.no_grad():
        model.visual.proj.mul_(1.5)
    assert not found.identity.startswith(weights_of(model))


def test_open_clip_scores_frames(weights: Path) -> None:
    made = ImageText.of_open_clip(ARCHITECTURE, str(weights))
    (cosines,) = made(pictures(), [TEXT])
    found = score_frames(torch.nn.Identity(), None, pictures(), TEXT, by=made)
    assert (found.min(), found.max()) == (0.0, 1.0)
    torch.testing.assert_close(found, (cosines - cosines.min()) / (cosines.max() - cosines.min()))


def test_open_clip_that_does_not_load_is_told(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"'ViT-B-32': expected weights, by path or tag, or an hf-hub: name"):
        ImageText.of_open_clip("ViT-B-32")
    with pytest.raises(VtpruneError, match="open_clip cannot load 'no-such-model'"):
        ImageText.of_open_clip("no-such-model", weights)
    with pytest.raises(VtpruneError, match=r"open_clip cannot load 'vtprune-test' with .*absent\.pt"):
        ImageText.of_open_clip(ARCHITECTURE, tmp_path / "absent.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(VtpruneError, match="open_clip cannot load"):
        ImageText.of_open_clip(ARCHITECTURE, damaged)
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(3)}, other)
    with pytest.raises(VtpruneError, match="open_clip cannot load"):
        ImageText.of_open_clip(ARCHITECTURE, other)


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'vtprune\[clip\]'"):
        ImageText.of_open_clip("ViT-B-32", "openai")


@functools.cache
def of_transformers(kind: str) -> tuple[Any, Any]:
    """A random CLIP or SigLIP and a processor."""
    text = {**SMALL, "vocab_size": VOCABULARY_SIZE, "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    config, model_class = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    torch.manual_seed(0)
    model = model_class(config(text_config=text, vision_config=vision)).eval()
    models.randomise(model)
    size = {"height": SIDE, "width": SIDE}
    pictures_in = CLIPImageProcessor(size=size, crop_size=size)
    return model, CLIPProcessor(image_processor=pictures_in, tokenizer=build_tokenizer("</s>"))


@torch.no_grad()
def by_hand(kind: str, **padding: Any) -> Tensor:
    """(T,) the model's own comparison, one picture at a time, without its scale and bias."""
    model, processor = of_transformers(kind)
    found = []
    for picture in pictures():
        inputs = processor(text=[TEXT], images=[picture], return_tensors="pt", **padding)
        logits = model(**inputs).logits_per_image[0, 0]
        found.append((logits - getattr(model, "logit_bias", torch.zeros(1))[0]) / model.logit_scale.exp())
    return torch.stack(found).reshape(-1)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_models_of_transformers_by_hand(kind: str) -> None:
    expected = by_hand(kind, padding="max_length", max_length=CONTEXT)
    made = ImageText.of_transformers(*of_transformers(kind))
    assert made.name == {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]
    for batch in (1, 2, 16):
        torch.testing.assert_close(made(pictures(), [TEXT], batch=batch)[0], expected, **LOOSE)
    assert len(set(expected.tolist())) == len(expected)


def test_padding_matters_to_siglip_only() -> None:
    """It reads the last token, whatever that is."""
    torch.testing.assert_close(by_hand("clip"), by_hand("clip", padding="max_length", max_length=CONTEXT), **LOOSE)
    padded = by_hand("siglip", padding="max_length", max_length=CONTEXT)
    assert not torch.allclose(by_hand("siglip"), padded, atol=1e-3)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_long_questions_are_cut(kind: str) -> None:
    made = ImageText.of_transformers(*of_transformers(kind))
    assert torch.isfinite(made(pictures(1), [" ".join([TEXT] * 20)])).all()


def test_models_in_half_precision_score_in_single() -> None:
    model, processor = of_transformers("clip")
    whole = ImageText.of_transformers(model, processor)(pictures(), [TEXT])
    half = ImageText.of_transformers(copy.deepcopy(model).bfloat16(), processor)(pictures(), [TEXT])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0.05)
