"""The untrained models: classes of transformers, small."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtprune.tiny.scenes import SIZE
from vtprune.tiny.words import BEGIN, END, IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY_SIZE

if TYPE_CHECKING:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaForConditionalGeneration,
        LlavaNextVideoForConditionalGeneration,
        Qwen2_5_VLForConditionalGeneration,
    )

WIDTH = 128
HEADS = 4
PATCH = 8
DECODER_LAYERS = 8
TOWER_LAYERS = 6
FRAME_STRIDE = 2
"""Cells of a frame that become one token, along one side."""
QWEN_PATCH = 4
MERGE = 2
QWEN_WIDTH = 64
"""Of the tower: it has four times as many patches as tokens."""
ROPE_THETA = 5e5
"""High, so that more than half of the rotary pairs turn slowly enough to match words over hundreds of tokens."""
MROPE_THETA = 10.0
"""Low, so that rows and columns of a small grid turn their rotary pairs far enough to be told apart."""
MROPE_SECTIONS = [8, 4, 4]
"""Half of the pairs for time, which is one and the same for all tokens of a picture: these match words to tokens."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": DECODER_LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}


def build_llava() -> LlavaForConditionalGeneration:
    """LLaVA-1.5 with a CLIP tower of 16 x 16 patches and a Llama of eight layers; weights from torch's generator."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=_clip_tower(),
        text_config=_llama(),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    reset_linears(model)
    place_positions(model.model.vision_tower)
    return model


def build_llava_next_video() -> LlavaNextVideoForConditionalGeneration:
    """LLaVA-NeXT-Video with the tower, the projector and the language model of `build_llava`, to be loaded from one."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config=_clip_tower(),
        text_config=_llama(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[SIZE, SIZE]],
        spatial_pool_stride=FRAME_STRIDE,
        image_seq_length=(SIZE // PATCH) ** 2,
        video_seq_length=(SIZE // PATCH // FRAME_STRIDE) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaNextVideoForConditionalGeneration(config)


def build_qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with 256 tokens for a scene: four patches a token, windows of 4 x 4 tokens in two layers of three."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "hidden_size": QWEN_WIDTH,
        "intermediate_size": 3 * QWEN_WIDTH,
        "depth": TOWER_LAYERS,
        "num_heads": 2,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 4 * MERGE * QWEN_PATCH,
        "fullatt_block_indexes": [2, 5],
        "out_hidden_size": WIDTH,
    }
    rope = {"rope_type": "default", "rope_theta": MROPE_THETA, "mrope_section": MROPE_SECTIONS}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    reset_linears(model)
    return model


def _llama() -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})


def _clip_tower() -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )


ENDS_BRANCH = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "attn.proj.weight")


def reset_linears(model: nn.Module) -> None:
    """Initial weights by fan-in: the usual 0.02 is made for models thirty times as wide."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "position" in name:
            continue
        ends_branch = name.endswith(ENDS_BRANCH)
        fan_in = weight[0].numel()
        scale = 0.08 * math.sqrt(fan_in) if "embed_tokens" in name else 0.5 if ends_branch else 1.0
        nn.init.normal_(weight, std=scale / math.sqrt(fan_in))


def place_positions(tower: nn.Module) -> None:
    """Begin with sines and cosines of row and column, so that places need not be learnt one by one."""
    table = next(weight for name, weight in tower.named_parameters() if "position_embedding" in name)
    with torch.no_grad():
        table[1:] = 0.3 * _waves(int(math.sqrt(len(table) - 1)), table.shape[1])


def _waves(side: int, width: int) -> Tensor:
    rates = 100 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angles = [axis.reshape(-1, 1) * rates for axis in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
