"""The untrained models: classes of transformers, small."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtprune.tiny.scenes import SIZE
from vtprune.tiny.words import BEGIN, END, IMAGE, PAD, VOCABULARY_SIZE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

WIDTH = 128
HEADS = 4
PATCH = 8
DECODER_LAYERS = 8
TOWER_LAYERS = 6
ROPE_THETA = 5e5
"""High, so that more than half of the rotary pairs turn slowly enough to match words over hundreds of tokens."""

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
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
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


def reset_linears(model: nn.Module) -> None:
    """Initial weights by fan-in: the usual 0.02 is made for models thirty times as wide."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "position" in name:
            continue
        ends_branch = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight"))
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
