"""Models to evaluate: a random LLaVA of 16 tokens with the bundled processor, random Qwens, the bundled one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

import vtprune
from tests import models
from vtprune.catalog import build
from vtprune.eval.subject import Batch, Subject
from vtprune.runtime.evidence import readings_of
from vtprune.tiny.loading import tiny_folder

SIDE, PATCH = 128, 32
TOKENS = (SIDE // PATCH) ** 2


def processor() -> Any:
    """The bundled processor, for patches of another size."""
    made = AutoProcessor.from_pretrained(tiny_folder("llava"), local_files_only=True)
    made.patch_size = PATCH
    return made


@functools.cache
def llava() -> Subject:
    """A random LLaVA with a CLIP tower, and real prompts."""
    made = processor()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(made.tokenizer),
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=made.image_token_id)
    model = Llava(config).eval()
    models.randomise(model)
    models.settle_generation(model, [made.image_token_id])
    return Subject(model=model, processor=made)


class QwenProcessor:
    """As far as an evaluation needs one: words by their bytes, pictures by the processor of the library."""

    def __init__(self) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        size = {"shortest_edge": 64, "longest_edge": 1 << 20}
        sizes = {"patch_size": models.QWEN_PATCH, "merge_size": models.MERGE, "temporal_patch_size": models.TEMPORAL}
        self.image_processor = Qwen2VLImageProcessorPil(size=size, **sizes)
        self.image_token = "<picture>"

    def __call__(self, *, images: list[Any], text: list[str], size: Any = None, **_: Any) -> BatchFeature:
        batch = self.image_processor(images=images, return_tensors="pt", **({} if size is None else {"size": size}))
        counts = (batch["image_grid_thw"].prod(-1) // models.MERGE**2).tolist()
        rows = [self._ids(words, count) for words, count in zip(text, counts)]
        return BatchFeature({**batch, **models._padded(rows, types=True)})

    def _ids(self, text: str, count: int) -> list[int]:
        picture = [models.VISION_START, *[models.IMAGE] * count, models.VISION_END]
        return picture + [3 + sum(word.encode()) % 170 for word in text.split() if word != self.image_token]

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return [" ".join(f"w{token}" for token in row) for row in ids.tolist()]


@functools.cache
def qwen(name: str) -> Subject:
    return Subject(model=models.build(name), processor=QwenProcessor())


@functools.cache
def bundled() -> Subject:
    model, made = vtprune.load_tiny("llava")
    return Subject(model=model, processor=made)


def batch_of(subject: Subject, items: Any) -> Batch:
    return Batch(subject=subject, items=tuple(items), readings=readings_of(build("vtprune")))
