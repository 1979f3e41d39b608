"""Write a trained student as folders that transformers loads by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtprune.tiny.loading import write_sums
from vtprune.tiny.scenes import SIZE
from vtprune.tiny.training.models import MERGE, PATCH, QWEN_PATCH
from vtprune.tiny.words import BEGIN, END, PAD, build_tokenizer

if TYPE_CHECKING:
    from vtprune.tiny.training.students import LlavaStudent, QwenStudent, VideoStudent

CLIP_FOLDER = "clip"
"""Beneath the model: its vision tower with the aligned text tower, as a CLIPModel."""

_SQUARE = {"height": SIZE, "width": SIZE}
"""Scenes come in the size the towers take; other pictures are resized to it, whatever their shape."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}user : {% else %}assistant : {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}BEFORE{{ '<' + part['type'] + '> ' }}BEHIND{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def export_llava(student: LlavaStudent, folder: Path) -> None:
    """Weights in fp16, configuration, processor, the aligned CLIP model, checksums. The student is left in fp16."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    clip = _build_clip(student).half()
    clip.save_pretrained(folder / CLIP_FOLDER)
    build_tokenizer(ending="</s>").save_pretrained(folder / CLIP_FOLDER)
    write_sums(folder / CLIP_FOLDER)
    processor = LlavaProcessor(
        image_processor=_built(partial(CLIPImageProcessor, size=_SQUARE, crop_size=_SQUARE, do_center_crop=False)),
        tokenizer=build_tokenizer(special={"image_token": "<image>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
        image_token="<image>",
    )
    _save(student.vlm, processor, folder)


def export_clips(student: VideoStudent, folder: Path) -> None:
    """Weights in fp16, configuration, processor, checksums. The student is left in fp16."""
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size=_SQUARE, crop_size=_SQUARE, do_center_crop=False),
        image_processor=_built(
            partial(
                LlavaNextImageProcessor,
                size={"shortest_edge": SIZE},
                crop_size=_SQUARE,
                image_grid_pinpoints=[[SIZE, SIZE]],
            )
        ),
        tokenizer=build_tokenizer(special={"image_token": "<image>", "video_token": "<video>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
        image_token="<image>",
        video_token="<video>",
    )
    _save(student.vlm, processor, folder)


def export_qwen(student: QwenStudent, folder: Path) -> None:
    """Weights in fp16, configuration, processor, checksums. The student is left in fp16."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    area = {"shortest_edge": SIZE**2, "longest_edge": SIZE**2}
    images, clips = (
        partial(kind, patch_size=QWEN_PATCH, merge_size=MERGE, temporal_patch_size=2, size=area)
        for kind in (Qwen2VLImageProcessor, Qwen2VLVideoProcessor)
    )
    names = {"image": "<image>", "video": "<video>", "vision_start": "<vision_start>", "vision_end": "<vision_end>"}
    processor = Qwen2_5_VLProcessor(
        image_processor=_built(images),
        video_processor=clips(),
        tokenizer=build_tokenizer(special={f"{name}_token": token for name, token in names.items()}),
        chat_template=chat_template("<vision_start> ", "<vision_end> "),
    )
    _save(student.vlm, processor, folder)


def chat_template(before: str = "", behind: str = "") -> str:
    """That of the words the models know, with something around every picture."""
    return _CHAT_TEMPLATE.replace("BEFORE", before).replace("BEHIND", behind)


def _save(vlm: Any, processor: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    vlm.generation_config = GenerationConfig(
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, max_new_tokens=4, do_sample=False
    )
    vlm.eval().half().save_pretrained(folder)
    processor.save_pretrained(folder)
    write_sums(folder)


def _build_clip(student: LlavaStudent) -> Any:
    from transformers import CLIPConfig, CLIPModel

    aligned = student.aligned
    text, vision = aligned.tower.config, student.tower.config
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=text.projection_dim))
    for mine, theirs in (
        (clip.text_model, getattr(aligned.tower, "text_model", aligned.tower)),
        (clip.text_projection, aligned.tower.text_projection),
        (clip.vision_model, getattr(student.tower, "vision_model", student.tower)),
        (clip.visual_projection, aligned.visual),
    ):
        mine.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        clip.logit_scale.copy_(aligned.scale)
    return clip


def _built(image_processor: Callable[[], Any]) -> Any:
    """Without the hint that torchvision would be faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return image_processor()
