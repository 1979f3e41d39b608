"""Processors of every video family, built in process for the tiny models of `tests.models`: no file, no download.

They are those of transformers, told of 32-pixel frames; their tokenizer knows words at the ids the models expect.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
import transformers
from tokenizers import pre_tokenizers
from tokenizers import processors as post_processors
from torch import nn

from tests import models
from tests.models import (
    BOS,
    EOS,
    IMAGE,
    MERGE,
    PAD,
    PINPOINTS,
    QWEN_PATCH,
    SIDE,
    TEMPORAL,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
)
from vtprune.tiny.training.export import chat_template

FAMILIES = (
    "video_llava",
    "llava_next_video",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
)
JOINING = tuple(name for name in FAMILIES if name in models.QWEN)
"""Families that make one part of two frames."""

_SPECIAL = {
    PAD: "<pad>",
    BOS: "<s>",
    EOS: "</s>",
    3: "<unk>",
    IMAGE: "<image>",
    VIDEO: "<video>",
    VISION_START: "<vision_start>",
    VISION_END: "<vision_end>",
}
_WORDS = "user assistant frame seconds yes no what color is the circle there a square red number shown"
_KNOWN = (*"<>.:?0123456789", *_WORDS.split())
_PATCH = 8
"""Of the towers that are no Qwen-VL and no InternVL."""
_SQUARE = {"height": SIDE, "width": SIDE}
_SHORT = {"shortest_edge": SIDE}


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A tiny random model and its processor."""

    name: str
    model: nn.Module
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer


@functools.cache
def host(name: str) -> Host:
    """A model of two decoder layers, fp32, that writes words only."""
    model = models.build(name)
    models.settle_generation(model, [*_SPECIAL])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hints that torchvision would be faster
        return Host(name=name, model=model, processor=_BUILDERS[name]())


def tokenizer() -> Any:
    """One id a word, digits one by one."""
    ids = {word: 4 + place for place, word in enumerate(_KNOWN)} | {word: place for place, word in _SPECIAL.items()}
    ids |= {f"w{place}": place for place in range(4 + len(_KNOWN), VOCAB) if place not in _SPECIAL}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.post_processor = post_processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    named = {
        "image_token": "<image>",
        "video_token": "<video>",
        "context_image_token": "<image>",
        **dict.fromkeys(("vision_start_token", "start_image_token"), "<vision_start>"),
        **dict.fromkeys(("vision_end_token", "end_image_token"), "<vision_end>"),
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
        padding_side="left",
    )


def _llava(kind: str, pictures: Any, clips: Any) -> Any:
    """Of a tower with a CLS token, which is left out."""
    return getattr(transformers, kind)(
        image_processor=pictures,
        video_processor=clips,
        tokenizer=tokenizer(),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
    )


def _video_llava() -> Any:
    pictures = transformers.VideoLlavaImageProcessor(size=_SHORT, crop_size=_SQUARE)
    return _llava(
        "VideoLlavaProcessor", pictures, transformers.VideoLlavaVideoProcessor(size=_SHORT, crop_size=_SQUARE)
    )


def _llava_next_video() -> Any:
    pictures = transformers.LlavaNextImageProcessor(size=_SHORT, crop_size=_SQUARE, image_grid_pinpoints=PINPOINTS)
    clips = transformers.LlavaNextVideoVideoProcessor(size=_SQUARE, crop_size=_SQUARE)
    return _llava("LlavaNextVideoProcessor", pictures, clips)


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=PINPOINTS),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=_SQUARE),
        tokenizer=tokenizer(),
        num_image_tokens=(SIDE // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat_template(),
    )


def _qwen(kind: str, clips: str) -> Callable[[], Any]:
    def build() -> Any:
        area = {"shortest_edge": SIDE**2, "longest_edge": 64 * SIDE**2}
        sizes = {"patch_size": QWEN_PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL, "size": area}
        return getattr(transformers, kind)(
            image_processor=transformers.Qwen2VLImageProcessor(**sizes),
            video_processor=getattr(transformers, clips)(**sizes),
            tokenizer=tokenizer(),
            chat_template=chat_template("<vision_start>", "<vision_end>"),
        )

    return build


def _internvl() -> Any:
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=_SQUARE),
        video_processor=transformers.InternVLVideoProcessor(size=_SQUARE),
        tokenizer=tokenizer(),
        image_seq_length=(SIDE // QWEN_PATCH // 2) ** 2,
        chat_template=chat_template(),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "video_llava": _video_llava,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "internvl": _internvl,
}
