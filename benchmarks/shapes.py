"""Models with random weights in the shapes of known ones, and a prompt with one picture for each.

Names of transformers are looked up when they are used: what they import needs `heal` to have been called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE = 5
WORDS = (10, 4000)
TEXT_BEFORE, TEXT_AFTER = 20, 40
CROP_SIDE, CROPS = 24, 2
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a prompt, by their numbers.

    `visual` are the placeholders of the picture, separators included; `square` says that any square number of them
    will do. `config` makes the config, `picture` what a processor makes of the picture. Weights are drawn as
    transformers does it, or just filled in (`filled`), which is quick. `methods` and `keep` are measured if nothing
    else is asked for; `bounded` says that bounds were stated for this shape.
    """

    name: str
    hidden: int
    layers: int
    vision_layers: int
    visual: int
    config: Callable[[Shape], Any]
    picture: Callable[[Shape, torch.Generator], dict[str, Tensor]]
    square: bool = False
    filled: bool = True
    bounded: bool = True
    methods: tuple[str, ...] = ("vtprune", "divprune", "fastervlm")
    keep: tuple[float, ...] = (0.11,)


def small_config(shape: Shape) -> Any:
    """LLaVA of 24 x 24 patches with heads of 64."""
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8}
    text = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    return transformers.LlavaConfig(vision_config=_clip(shape, vision), text_config=text, image_token_index=IMAGE)


def llava_config(shape: Shape) -> Any:
    """LLaVA-1.5-7B: CLIP-L/336 and Vicuna."""
    return transformers.LlavaConfig(
        vision_config=_clip(shape, CLIP_L), text_config=_vicuna(shape), image_token_index=IMAGE
    )


def next_config(shape: Shape) -> Any:
    """LLaVA-NeXT-7B: the same of crops."""
    return transformers.LlavaNextConfig(
        vision_config=_clip(shape, CLIP_L), text_config=_vicuna(shape), image_token_index=IMAGE
    )


def qwen_config(shape: Shape) -> Any:
    """Qwen2.5-VL-7B: windows in all but a few blocks of the tower, M-RoPE and grouped keys in the language model."""
    heads = shape.hidden // 128
    whole = [block for block in (7, 15, 23, 31) if block < shape.vision_layers] or [shape.vision_layers - 1]
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.hidden * 37 // 7,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 7),
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": whole,
        "out_hidden_size": shape.hidden,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 1
    )


def _clip(shape: Shape, numbers: dict[str, int]) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        **numbers, num_hidden_layers=shape.vision_layers, image_size=336, patch_size=14
    )


def _vicuna(shape: Shape) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 43 // 16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 128,
        vocab_size=32064,
        max_position_embeddings=4096,
    )


def square_picture(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """One picture of 336 x 336."""
    return {"pixel_values": torch.randn(1, 3, 336, 336, generator=generator)}


def cropped_picture(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """One picture of 672 x 672: a thumbnail and four crops."""
    pixels = torch.randn(1, 1 + CROPS**2, 3, 336, 336, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[336 * CROPS, 336 * CROPS]])}


def patched_picture(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """One square picture as patches, four to a token."""
    side = 2 * math.isqrt(shape.visual)
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}


SMALL = Shape(
    name="small",
    hidden=512,
    layers=8,
    vision_layers=8,
    visual=576,
    config=small_config,
    picture=square_picture,
    filled=False,
    bounded=False,
    methods=("vtprune", "fastervlm", "divprune", "random"),
    keep=(0.5, 0.25, 0.11),
)
LLAVA = Shape(
    name="llava-1.5-7b",
    hidden=4096,
    layers=32,
    vision_layers=24,
    visual=CROP_SIDE**2,
    config=llava_config,
    picture=square_picture,
)
LLAVA_NEXT = replace(
    LLAVA,
    name="llava-next-7b",
    visual=CROP_SIDE**2 + CROPS * CROP_SIDE * (CROPS * CROP_SIDE + 1),
    config=next_config,
    picture=cropped_picture,
)
QWEN = Shape(
    name="qwen2.5-vl-7b",
    hidden=3584,
    layers=28,
    vision_layers=32,
    visual=4096,
    config=qwen_config,
    picture=patched_picture,
    square=True,
)
SHAPES = {shape.name: shape for shape in (SMALL, LLAVA, LLAVA_NEXT, QWEN)}


@torch.no_grad()
def build_model(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, in eval mode."""
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    if not shape.filled:
        return transformers.AutoModelForImageTextToText.from_config(shape.config(shape)).eval().to(device, dtype)
    with no_init_weights(), torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(shape.config(shape), dtype=dtype)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, 0.02)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


def build_inputs(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One prompt with one picture: `input_ids`, and what the encoder gets."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(*WORDS, (1, TEXT_BEFORE + TEXT_AFTER), generator=generator)
    placeholders = torch.full((1, shape.visual), IMAGE)
    ids = torch.cat([words[:, :TEXT_BEFORE], placeholders, words[:, TEXT_BEFORE:]], dim=1)
    picture = {name: value.to(device) for name, value in shape.picture(shape, generator).items()}
    picture["pixel_values"] = picture["pixel_values"].to(dtype)
    return {"input_ids": ids.to(device), **picture}


def build_positions(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`position_ids` (3, 1, L) of M-RoPE, which `generate` makes in front of the prefill; nothing for other models."""
    if "image_grid_thw" not in inputs:
        return {}
    ids = inputs["input_ids"]
    types = (ids == IMAGE).int()
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=inputs["image_grid_thw"])
    return {"position_ids": positions}
