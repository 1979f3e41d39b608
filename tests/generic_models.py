"""Tiny random-weight models of classes no family was written for: one image in each of two prompts, left padded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.models import (
    BOS,
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
    WORDS,
    settle_generation,
    text_config,
    vision_config,
)

PROMPTS = 2
MARKED = ("mm_token_type_ids",)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Config of a class and the tensors its images come in.

    `types`: names of the inputs that mark its placeholders. `length`: tokens of an image, where `get_image_features`
    does not tell.
    """

    text: dict[str, Any] | None
    vision: dict[str, Any]
    pixels: Callable[[], dict[str, Tensor]]
    top: dict[str, Any] = field(default_factory=dict)
    types: tuple[str, ...] = ()
    length: int | None = None

    def config(self, name: str) -> Any:
        ids = {"image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO}
        marks = {
            "boi_token_index": VISION_START,
            "eoi_token_index": VISION_END,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        }
        known = set(inspect.signature(type(AutoConfig.for_model(name)).__init__).parameters)
        tokens = {key: value for key, value in {**ids, **marks}.items() if key in known}
        parts = {"vision_config": self.vision} | ({"text_config": self.text} if self.text else {})
        return AutoConfig.for_model(name, **parts, **tokens, **self.top)


def build_generic(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch for `model(**inputs)` and `model.generate(**inputs)`."""
    spec = SPECS[name]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(spec.config(name)).float().eval()
    strengthen(model)
    settle_generation(model, [IMAGE, VIDEO, VISION_START, VISION_END])
    pixels = spec.pixels()
    length = spec.length or _image_length(model, pixels)
    return model, _prompts(length, types=spec.types) | pixels


@torch.no_grad()
def strengthen(model: nn.Module) -> None:
    """Draw the matrices wider than the default, so that logits differ enough to compare."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.copy_(torch.randn_like(weight) * (0.3 if "embed" in name else weight.shape[1] ** -0.5))


@torch.no_grad()
def _image_length(model: nn.Module, pixels: dict[str, Tensor]) -> int:
    method = getattr(model, "model", model).get_image_features
    known = inspect.signature(method).parameters
    pooled = method(**{key: value for key, value in pixels.items() if key in known}).pooler_output
    entries = [pooled] if torch.is_tensor(pooled) else pooled
    return sum(entry.shape[:-1].numel() for entry in entries) // PROMPTS


def _prompts(length: int, *, types: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for extra in range(PROMPTS):
        before, after = (torch.randint(*WORDS, (n,), generator=generator).tolist() for n in (3, 4 + extra))
        padding = [PAD] * (PROMPTS - 1 - extra)
        rows.append([*padding, BOS, *before, VISION_START, *[IMAGE] * length, VISION_END, *after])
    ids = torch.tensor(rows)
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    return batch | {name: (ids == IMAGE).int() for name in types}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _stacked() -> dict[str, Tensor]:
    return {"pixel_values": _noise(PROMPTS, 3, SIDE, SIDE)}


def _nested() -> dict[str, Tensor]:
    """Families with a tile axis: (prompts, tiles, 3, height, width)."""
    return {"pixel_values": _noise(PROMPTS, 3, 3, SIDE, SIDE)}


def _sized() -> dict[str, Tensor]:
    return _stacked() | {"image_sizes": torch.tensor([[SIDE, SIDE]] * PROMPTS)}


def _crops() -> dict[str, Tensor]:
    return {"pixel_values": _noise(PROMPTS, 3, 3, SIDE, SIDE), "image_sizes": torch.tensor([[30, 64]] * PROMPTS)}


def _gridded(temporal: int = TEMPORAL) -> dict[str, Tensor]:
    side = SIDE // QWEN_PATCH
    return {
        "pixel_values": _noise(PROMPTS * side**2, 3 * temporal * QWEN_PATCH**2),
        "image_grid_thw": torch.tensor([[1, side, side]] * PROMPTS),
    }


def _unfolded() -> dict[str, Tensor]:
    """Patches kept as (patches, 3, height, width)."""
    side = SIDE // QWEN_PATCH
    return {
        "pixel_values": _noise(PROMPTS * side**2, 3, QWEN_PATCH, QWEN_PATCH),
        "image_grid_thw": torch.tensor([[1, side, side]] * PROMPTS),
    }


def _video_llama() -> dict[str, Tensor]:
    return _gridded(1) | {"image_merge_sizes": torch.tensor([MERGE] * PROMPTS)}


def _naflex() -> dict[str, Tensor]:
    side = SIDE // QWEN_PATCH
    return {
        "pixel_values": _noise(PROMPTS, side**2, 3 * QWEN_PATCH**2),
        "spatial_shapes": torch.tensor([[side, side]] * PROMPTS),
        "pixel_attention_mask": torch.ones(PROMPTS, side**2, dtype=torch.long),
    }


def _placed() -> dict[str, Tensor]:
    """Patches with the column and row of each."""
    side = SIDE // QWEN_PATCH
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1).flatten(0, 1)
    return {
        "pixel_values": _noise(PROMPTS, side**2, 3 * QWEN_PATCH**2),
        "image_position_ids": at.expand(PROMPTS, -1, -1).contiguous(),
    }


def _mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}


def _vit(model_type: str, **more: Any) -> dict[str, Any]:
    """A tower in the manner of Qwen2-VL."""
    sizes = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    patches = {"patch_size": QWEN_PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": TEMPORAL}
    return {"model_type": model_type, **sizes, **patches, **more}


_text = functools.partial(text_config, layers=2)
_siglip = functools.partial(vision_config, "siglip_vision_model", vision_use_head=False)
_clip = functools.partial(vision_config, "clip_vision_model")
_glm_text = functools.partial(_text, rope_parameters=_mrope([2, 3, 3], partial_rotary_factor=1.0))
_linear = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": _mrope([3, 3, 2], mrope_interleaved=True, partial_rotary_factor=1.0),
}
_cohere2 = {"head_dim": 16, "sliding_window": 4096, "layer_types": ["full_attention"] * 2}

SPECS: dict[str, Spec] = {
    "aya_vision": Spec(
        text=_text("cohere2", **_cohere2),
        vision=_siglip(),
        pixels=_stacked,
        top={"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "downsample_factor": 2},
    ),
    "cohere2_vision": Spec(
        text=_text("cohere2", **_cohere2), vision=_siglip(), pixels=_stacked, top={"alignment_intermediate_size": 64}
    ),
    "deepseek_vl": Spec(text=_text("llama"), vision=_siglip(), pixels=_stacked),
    "ernie4_5_vl_moe": Spec(
        text=_text(
            "ernie4_5_vl_moe_text",
            moe_intermediate_size=[32, 32],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
            rope_parameters=_mrope([3, 3, 2]),
        ),
        vision=_vit("ernie4_5_vl_moe_vision", in_channels=3),
        pixels=functools.partial(_gridded, 1),
        types=("mm_token_type_ids", "moe_mm_token_type_ids"),
    ),
    "exaone4_5": Spec(
        text=_text("exaone4", layer_types=["full_attention"] * 2),
        vision=_vit("exaone4_5_vision", num_key_value_heads=2, window_size=16, fullatt_block_indexes=[1]),
        pixels=_gridded,
    ),
    "gemma3": Spec(
        text=_text("gemma3_text", head_dim=16, layer_types=["sliding_attention", "full_attention"]),
        vision=_siglip(patch_size=QWEN_PATCH),
        pixels=_stacked,
        top={"mm_tokens_per_image": 16},
    ),
    "gemma4": Spec(
        text=_text(
            "gemma4_text",
            head_dim=16,
            global_head_dim=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=200,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision={
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": QWEN_PATCH,
            "pooling_kernel_size": 2,
            "default_output_length": 16,
            "position_embedding_size": 64,
        },
        pixels=_placed,
        top={"audio_config": None},
        types=MARKED,
    ),
    "glm4v": Spec(
        text=_glm_text("glm4v_text"), vision=_vit("glm4v_vision", image_size=SIDE), pixels=_gridded, types=MARKED
    ),
    "glm46v": Spec(
        text=_glm_text("glm4v_text"), vision=_vit("glm4v_vision", image_size=SIDE), pixels=_gridded, types=MARKED
    ),
    "glm_ocr": Spec(
        text=_glm_text("glm_ocr_text", head_dim=16),
        vision=_vit("glm_ocr_vision", image_size=SIDE),
        pixels=_gridded,
        types=MARKED,
    ),
    "got_ocr2": Spec(
        text=_text("qwen2"),
        vision=vision_config(
            "got_ocr2_vision",
            image_size=128,
            patch_size=8,
            mlp_dim=48,
            output_channels=16,
            window_size=4,
            global_attn_indexes=[2],
        ),
        pixels=lambda: {"pixel_values": _noise(PROMPTS, 3, 128, 128)},
    ),
    "granite4_vision": Spec(
        text=_text("granite4_vision_text"),
        vision=_clip(hidden_size=64),
        pixels=_crops,
        top={
            "image_grid_pinpoints": PINPOINTS,
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[-2, 0]],
            "spatial_target_layers": [0, 1, 1, 1],
            "qformer_config": {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64},
        },
        length=14,
    ),
    "hunyuan_vl": Spec(
        text=_text("hunyuan_vl_text", head_dim=16, rope_parameters=_mrope([2, 2, 2, 2])),
        vision=_vit("hunyuan_vl_vision", num_attention_heads=2, num_hidden_layers=2, text_hidden_size=64),
        pixels=functools.partial(_gridded, 1),
        types=MARKED,
    ),
    "idefics2": Spec(
        text=_text("mistral"),
        vision=vision_config("idefics2_vision"),
        pixels=_nested,
        top={
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 8,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            }
        },
    ),
    "idefics3": Spec(
        text=_text("llama"), vision=vision_config("idefics3_vision"), pixels=_nested, top={"scale_factor": 2}
    ),
    "lfm2_vl": Spec(
        text=_text("lfm2", layer_types=["conv", "full_attention"]),
        vision=vision_config("siglip2_vision_model", patch_size=QWEN_PATCH, num_patches=64, vision_use_head=False),
        pixels=_naflex,
        top={"projector_hidden_size": 48},
    ),
    "lighton_ocr": Spec(text=_text("qwen3", head_dim=16), vision=vision_config("pixtral", head_dim=8), pixels=_sized),
    "llama4": Spec(
        text=_text(
            "llama4_text", head_dim=16, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=4096
        ),
        vision=vision_config(
            "llama4_vision_model",
            patch_size=QWEN_PATCH,
            vision_output_dim=64,
            projector_input_dim=64,
            projector_output_dim=64,
            intermediate_size=128,
        ),
        pixels=_stacked,
        length=16,
    ),
    "mistral3": Spec(text=_text("mistral"), vision=vision_config("pixtral", head_dim=8), pixels=_sized),
    "ovis2": Spec(
        text=_text("qwen2"),
        vision=vision_config("ovis2_vision", vocab_size=32, hidden_stride=1),
        pixels=_stacked,
        top={"visual_indicator_token_ids": [181, 182, 183, 184, 185], "vocab_size": 200, "hidden_size": 64},
    ),
    "paddleocr_vl": Spec(
        text=_text("paddleocr_vl_text", head_dim=16, rope_parameters=_mrope([2, 3, 3])),
        vision=vision_config("paddleocr_vl_vision", patch_size=QWEN_PATCH, spatial_merge_size=MERGE),
        pixels=_unfolded,
        types=MARKED,
    ),
    "paligemma": Spec(text=_text("gemma", head_dim=16), vision=_siglip(), pixels=_stacked, top={"projection_dim": 64}),
    "qianfan_ocr": Spec(
        text=_text("qwen3", head_dim=16),
        vision=vision_config("qianfan_ocr_vision", patch_size=QWEN_PATCH, layer_scale_init_value=1.0),
        pixels=_stacked,
    ),
    "qwen3_5": Spec(
        text=_text("qwen3_5_text", **_linear),
        vision=_vit("qwen3_5_vision", num_position_embeddings=64),
        pixels=_gridded,
        types=MARKED,
    ),
    "smolvlm": Spec(
        text=_text("llama"), vision=vision_config("smolvlm_vision"), pixels=_nested, top={"scale_factor": 2}
    ),
    "video_llama_3": Spec(
        text=_text("qwen2"), vision=vision_config("video_llama_3_vision", patch_size=QWEN_PATCH), pixels=_video_llama
    ),
    "vipllava": Spec(text=_text("llama"), vision=_clip(), pixels=_stacked, top={"vision_feature_layers": [-2, -3]}),
}
