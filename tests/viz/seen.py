"""Which tokens a model sees a white thing with, by the pixels that its processor makes and not by `vtprune.viz`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from torch import Tensor, nn

import vtprune
from tests import models
from tests.models import MERGE, QWEN_PATCH, SIDE
from tests.video import processors
from vtprune._prompts import prompt_text
from vtprune.adapters import FAMILIES
from vtprune.adapters.base import Encoding
from vtprune.report import PruneReport
from vtprune.tiny.training.export import chat_template
from vtprune.video.prompting import clip_inputs

SQUARE, SHORT = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
WAYS: dict[str, dict[str, Any]] = {
    "stretched": {"size": SQUARE, "do_center_crop": False},
    "cropped": {"size": SHORT, "crop_size": SQUARE},
    "padded": {"size": SQUARE, "do_center_crop": False, "do_pad": True},
    "cropped beyond the edges": {"size": {"shortest_edge": SIDE // 2}, "crop_size": SQUARE},
}
"""What LLaVA processors do to pictures, by the name of the way."""


def scene(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A white thing on black; `box`: left, top and, exclusive, right and bottom."""
    picture = Image.new("RGB", size)
    left, top, right, bottom = box
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return picture


@functools.cache
def host(name: str) -> tuple[nn.Module, Any]:
    """A tiny random model and its processor; `name` is that of a family, and for llava of a way ("llava padded")."""
    family, _, way = name.partition(" ")
    if family in processors.FAMILIES:
        known = processors.host(family)
        return known.model, known.processor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "llava":
            kind, pictures = transformers.LlavaProcessor, transformers.LlavaImageProcessor(**WAYS[way])
        else:
            pictures = transformers.LlavaNextImageProcessor(
                size=SHORT, crop_size=SQUARE, image_grid_pinpoints=models.PINPOINTS
            )
            kind = transformers.LlavaNextProcessor
        processor = kind(
            image_processor=pictures,
            tokenizer=processors.tokenizer(),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat_template(),
        )
    return models.build(family), processor


def encode(processor: Any, shown: Image.Image | Sequence[Image.Image]) -> dict[str, Tensor]:
    """The inputs for a picture, or for a clip where its frames are given."""
    if isinstance(shown, Image.Image):
        text = prompt_text(processor, "is there a circle ?", "image")
        return dict(processor(images=shown, text=text, return_tensors="pt"))
    return dict(clip_inputs(processor, [list(shown)], ["is there a circle ?"]))


def chosen(model: nn.Module, batch: dict[str, Tensor]) -> PruneReport:
    """The report of a call that keeps exactly the tokens of which the thing covers at least half."""
    whole = prefill(model, batch, "random", keep=1.0)
    tokens = [at_least_half(shares).tolist() for shares in shares_of(model, batch, whole)]
    assert all(tokens), "the thing is smaller than a token"
    return keeping(model, batch, tokens, whole.tokens)


def keeping(model: nn.Module, batch: dict[str, Tensor], tokens: list[list[int]], of: int) -> PruneReport:
    """The report of a call that keeps these tokens of every picture, of so many in all."""
    with vtprune.pruning(model, "random", keep=sum(map(len, tokens)) / of, per="prompt") as pruner:
        with pruner.using(protect=[tokens if len(tokens) > 1 else tokens[0]]):
            model.generate(**batch, max_new_tokens=1)
        report = pruner.last
    assert [segment.keep.tolist() for segment in report.segments] == tokens
    return report


def prefill(model: nn.Module, batch: dict[str, Tensor], method: str, **options: Any) -> PruneReport:
    with vtprune.pruning(model, method, **options) as pruner:
        model.generate(**batch, max_new_tokens=1)
        return pruner.last


def at_least_half(shares: Tensor) -> Tensor:
    return (shares[~shares.isnan()] >= 0.5 - 1e-3).nonzero()[:, 0]


def shares_of(model: nn.Module, batch: dict[str, Tensor], report: PruneReport) -> list[Tensor]:
    """Share of white in what every token of every segment was made of; NaN at separators."""
    name = model.config.model_type
    kind = "video" if "pixel_values_videos" in batch else "image"
    (pixels,) = (values for key, values in batch.items() if key.startswith("pixel_values"))
    white = (pixels > 0.5 * pixels.max()).float()
    if name in models.QWEN:
        return [white.mean(-1).view(-1, MERGE**2).mean(-1)]
    patch = QWEN_PATCH if name == "internvl" else 8
    squares = white.flatten(0, -4).mean(1).unfold(1, patch, patch).unfold(2, patch, patch)
    raw = squares.flatten(3).mean(-1).flatten(1)[..., None]
    lengths = tuple(segment.parts[-1].stop for segment in report.segments)
    sizes = tuple(map(tuple, batch["image_sizes"].tolist())) if "image_sizes" in batch else ()
    if name in ("internvl", "video_llava"):
        lengths = tuple(part.stop - part.start for segment in report.segments for part in segment.parts)
    encoding = Encoding(
        kind=kind,
        lengths=lengths,
        stacked=name not in models.ANYRES,
        sizes=sizes,
        pixels=tuple(pixels.shape),
        pictures_per_prompt=(1,) if name == "llava_onevision" and kind == "image" else None,
    )
    rows = [entry[:, 0] for entry in FAMILIES[name].rows(model.model, raw, encoding)]
    return list(torch.cat(rows).split([segment.parts[-1].stop for segment in report.segments]))


def iou(shown: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """How well the True ones of a mask (H, W) and a box agree."""
    left, top, right, bottom = box
    inside = np.zeros_like(shown)
    inside[top:bottom, left:right] = True
    return float((shown & inside).sum() / (shown | inside).sum())


def kept_pixels(drawn: Image.Image, picture: Image.Image) -> np.ndarray:
    """Where an overlay leaves a picture of pure black and white as it is."""
    same: np.ndarray = (np.asarray(drawn) == np.asarray(picture)).all(axis=2)
    return same
