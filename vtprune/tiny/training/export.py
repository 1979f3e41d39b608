"""Write a trained student as folders that transformers loads by itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtprune.tiny.loading import write_sums
from vtprune.tiny.scenes import SIZE
from vtprune.tiny.training.models import PATCH
from vtprune.tiny.words import BEGIN, END, PAD, build_tokenizer

if TYPE_CHECKING:
    from vtprune.tiny.training.student import LlavaStudent

CLIP_FOLDER = "clip"
"""Beneath the model: its vision tower with the aligned text tower, as a CLIPModel."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}user : {% else %}assistant : {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}{{ '<' + part['type'] + '> ' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def export_llava(student: LlavaStudent, folder: Path) -> None:
    """Weights in fp16, configuration, processor, the aligned CLIP model, checksums. The student is left in fp16."""
    from transformers import GenerationConfig, LlavaProcessor

    student.eval()
    student.vlm.generation_config = GenerationConfig(
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, max_new_tokens=4, do_sample=False
    )
    clip = _build_clip(student)
    for model, target in ((student.vlm, folder), (clip, folder / CLIP_FOLDER)):
        model.half().save_pretrained(target)
    tokenizer = build_tokenizer(ending="</s>")
    tokenizer.save_pretrained(folder / CLIP_FOLDER)
    LlavaProcessor(
        image_processor=_image_processor(),
        tokenizer=build_tokenizer(special={"image_token": "<image>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    for finished in (folder, folder / CLIP_FOLDER):
        write_sums(finished)


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


def _image_processor() -> Any:
    """Scenes come in the size the tower takes; other pictures are resized to it, whatever their shape."""
    from transformers import CLIPImageProcessor

    side = {"height": SIZE, "width": SIZE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CLIPImageProcessor(do_resize=True, size=side, do_center_crop=False, crop_size=side)
