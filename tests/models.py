"""Tiny random-weight models of every family and inputs for them, built in process: no processor, no download.

Pictures are seeded by their prompt, so a prompt has the same pixels and words alone and in a batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.image_processing_utils import select_best_resolution

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, VOCAB = 0, 1, 2, 190, 191, 192, 193, 200
WORDS = (3, 180)
IMAGE_FAMILIES = (
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "internvl",
)
VIDEO_FAMILIES = tuple(name for name in IMAGE_FAMILIES if name not in ("llava", "llava_next", "internvl"))
QWEN = tuple(name for name in IMAGE_FAMILIES if name.startswith("qwen"))
ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
SIDE, QWEN_PATCH, MERGE, TEMPORAL = 32, 4, 2, 2
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt: words, then every image (height, width) and clip (height, width, frames) followed by words.

    `seed` fixes words and pixels. Families with crops use 32-pixel crops, so sizes such as (30, 64), (60, 64) and
    (30, 92) make the crop grids 1x2, 2x2 and 1x3; Qwen rounds sizes to multiples of 8.
    """

    images: tuple[tuple[int, int], ...] = ()
    clips: tuple[tuple[int, int, int], ...] = ()
    text_before: int = 3
    text_between: int = 2
    text_after: int = 4
    seed: int = 0


ONE_AND_TWO = (Prompt(images=((30, 64),), seed=1), Prompt(images=((60, 64), (30, 92)), text_after=6, seed=2))
CLIPS = (Prompt(clips=((32, 32, 4),), seed=3), Prompt(clips=((32, 32, 4), (32, 32, 4)), text_after=6, seed=4))


def build(name: str, layers: int = 2, *, seed: int = 0, **options: Any) -> nn.Module:
    """A model of the family, fp32, in eval mode; `options` go to the config (`tower="siglip"`: the tower of llava)."""
    config = AutoConfig.for_model(name, **_config(name, layers, options))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    randomise(model)
    settle_generation(model, [IMAGE, VIDEO, VISION_START, VISION_END])
    return model


def settle_generation(model: nn.Module, forbidden: Sequence[int]) -> None:
    """Greedy decoding that never writes a placeholder."""
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    generation.suppress_tokens = [PAD, *forbidden]
    generation.do_sample = False


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights large enough that attention is peaked and that losing a token moves the logits."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.add_(torch.randn_like(weight) * 0.05)
        elif "embed" in name or "token" in name:
            weight.copy_(torch.randn_like(weight))
        else:
            weight.copy_(torch.randn_like(weight) * 1.3 / math.sqrt(weight[0].numel()))


def inputs(
    family: str | nn.Module, prompts: Sequence[Prompt] | None = None, kind: Literal["image", "video"] = "image"
) -> dict[str, Tensor]:
    """What a processor would return for the prompts, left padded; a model in place of a name counts its own tokens."""
    name = family if isinstance(family, str) else family.config.model_type
    model = _reference(name) if isinstance(family, str) else family
    prompts = (ONE_AND_TWO if kind == "image" else CLIPS) if prompts is None else prompts
    images = [_Picture(size=size, seed=p.seed * 100 + i) for p in prompts for i, size in enumerate(p.images)]
    clips = [_Picture(size=size, seed=p.seed * 100 + 50 + i) for p in prompts for i, size in enumerate(p.clips)]
    batch: dict[str, Tensor] = {}
    lengths: dict[str, list[int]] = {"image": [], "video": []}
    if images:
        multiple = [len(p.images) for p in prompts]
        batch |= _image_tensors(name, images, multiple)
        lengths["image"] = _image_lengths(name, model, batch, images)
    if clips:
        batch |= _clip_tensors(name, clips)
        lengths["video"] = _clip_lengths(name, model, batch)
    iterators = {kind: iter(numbers) for kind, numbers in lengths.items()}
    grids = iter(batch["video_grid_thw"].tolist()) if "video_grid_thw" in batch else iter(())
    rows = [_tokens(name, prompt, iterators, grids) for prompt in prompts]
    return batch | _padded(rows, types=name in QWEN)


@functools.cache
def _reference(name: str) -> nn.Module:
    return build(name, layers=1)


@dataclass(frozen=True, kw_only=True)
class _Picture:
    size: tuple[int, ...]
    seed: int

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed))

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        unit = QWEN_PATCH * MERGE
        h, w = (max(1, round(side / unit)) * MERGE for side in self.size[:2])
        return (self.size[2] // TEMPORAL if len(self.size) == 3 else 1, h, w)

    @property
    def crops(self) -> int:
        height, width = select_best_resolution(self.size, PINPOINTS)
        return 1 + (height // SIDE) * (width // SIDE)

    @property
    def tiles(self) -> int:
        tiles = math.ceil(self.size[0] / SIDE) * math.ceil(self.size[1] / SIDE)
        return tiles + (tiles > 1)


def _image_tensors(name: str, images: list[_Picture], multiple: list[int]) -> dict[str, Tensor]:
    if name in QWEN:
        return _qwen_tensors(images, "pixel_values", "image_grid_thw")
    if name == "internvl":
        return {"pixel_values": torch.cat([image.pixels(image.tiles, 3, SIDE, SIDE) for image in images])}
    if name not in ANYRES:
        return {"pixel_values": torch.stack([image.pixels(3, SIDE, SIDE) for image in images])}
    counts = [image.crops for image in images]
    sizes = torch.tensor([image.size for image in images])
    batch = {"image_sizes": sizes}
    if name == "llava_onevision":
        counts = [image.crops if n == 1 else 1 for image, n in zip(images, (n for n in multiple for _ in range(n)))]
        batch["batch_num_images"] = torch.tensor(multiple)
    pixels = torch.zeros(len(images), max(counts), 3, SIDE, SIDE)
    for row, (image, count) in enumerate(zip(images, counts)):
        pixels[row, :count] = image.pixels(count, 3, SIDE, SIDE)
    return batch | {"pixel_values": pixels}


def _clip_tensors(name: str, clips: list[_Picture]) -> dict[str, Tensor]:
    if name in QWEN:
        return _qwen_tensors(clips, "pixel_values_videos", "video_grid_thw")
    return {"pixel_values_videos": torch.stack([clip.pixels(clip.size[2], 3, SIDE, SIDE) for clip in clips])}


def _qwen_tensors(pictures: list[_Picture], pixels: str, grid: str) -> dict[str, Tensor]:
    width = 3 * TEMPORAL * QWEN_PATCH**2
    patches = [picture.pixels(math.prod(picture.grid_thw), width) for picture in pictures]
    return {pixels: torch.cat(patches), grid: torch.tensor([picture.grid_thw for picture in pictures])}


@torch.no_grad()
def _image_lengths(name: str, model: nn.Module, batch: dict[str, Tensor], images: list[_Picture]) -> list[int]:
    if name in QWEN:
        return [math.prod(image.grid_thw) // MERGE**2 for image in images]
    if name == "internvl":
        tokens = round((SIDE // QWEN_PATCH * model.config.downsample_ratio) ** 2)
        return [image.tiles * tokens for image in images]
    return [len(entry) for entry in model.get_image_features(**batch).pooler_output]


@torch.no_grad()
def _clip_lengths(name: str, model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    if name in QWEN:
        return (batch["video_grid_thw"].prod(-1) // MERGE**2).tolist()
    pixels = batch["pixel_values_videos"]
    pooled = model.model.get_video_features(pixel_values_videos=pixels).pooler_output
    return [pooled.shape[:-1].numel() // len(pixels)] * len(pixels)


def _tokens(name: str, prompt: Prompt, lengths: dict[str, Any], grids: Any) -> list[int]:
    generator = torch.Generator().manual_seed(prompt.seed)

    def words(count: int) -> list[int]:
        return torch.randint(*WORDS, (count,), generator=generator).tolist()

    row = [BOS, *words(prompt.text_before)]
    total = len(prompt.images) + len(prompt.clips)
    for number in range(total):
        clip = number >= len(prompt.images)
        count = next(lengths["video" if clip else "image"])
        frames = next(grids)[0] if clip and name in QWEN else 1
        pieces = frames if clip and name.startswith("qwen3") else 1
        for _ in range(pieces):
            placeholders = [VIDEO if clip else IMAGE] * (count // pieces)
            row += [*(words(2) if pieces > 1 else ()), VISION_START, *placeholders, VISION_END]
        row += words(prompt.text_after if number == total - 1 else prompt.text_between)
    return row


def _padded(rows: list[list[int]], *, types: bool) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if types:
        batch["mm_token_type_ids"] = ((ids == IMAGE) + 2 * (ids == VIDEO)).int()
    return batch


def text_config(model_type: str, layers: int, **more: Any) -> dict[str, Any]:
    """A tiny language model as a config dict: width 64, 4 heads of 16, 2 of keys and values."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **more,
    }


def vision_config(model_type: str, **more: Any) -> dict[str, Any]:
    """A tiny CLIP or SigLIP tower as a config dict: 32-pixel pictures, 4x4 patches, 3 layers."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        **more,
    }


def _config(name: str, layers: int, options: dict[str, Any]) -> dict[str, Any]:
    tower = options.pop("tower", "siglip" if name == "llava_onevision" else "clip")
    if name in QWEN:
        config = _qwen_config(name, layers)
    elif name == "internvl":
        config = {
            "vision_config": vision_config(
                "internvl_vision",
                patch_size=QWEN_PATCH,
                use_qk_norm=True,
                norm_type="rms_norm",
                layer_scale_init_value=1.0,
            ),
            "text_config": text_config("qwen2", layers),
            "tie_word_embeddings": False,
            "image_token_id": IMAGE,
        }
    else:
        config = {
            "vision_config": vision_config(f"{tower}_vision_model", vision_use_head=False),
            "text_config": text_config("qwen2" if name == "llava_onevision" else "llama", layers),
            "image_token_index": IMAGE,
        }
        if name in VIDEO_FAMILIES:
            config["video_token_index"] = VIDEO
        if name in ANYRES:
            config["image_grid_pinpoints"] = PINPOINTS
    return config | options


def _qwen_config(name: str, layers: int) -> dict[str, Any]:
    section = [3, 3, 2] if name.startswith("qwen3") else [2, 3, 3]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    text = text_config(f"{name}_text", layers, rope_parameters=rope)
    vision = {
        "depth": 3,
        "num_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": 64,
    }
    if name == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64}
    if name == "qwen2_5_vl":
        vision |= {"window_size": 2 * MERGE * QWEN_PATCH, "fullatt_block_indexes": [0, 1]}
    if name.startswith("qwen3"):
        rope["mrope_interleaved"] = True
        text |= {"head_dim": 16}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    if name == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def units_of_parts(parts: Any) -> list[list[int]]:
    """Tokens, separators left out, of every part, and of every crop of those that were stitched: a plain loop."""
    found: list[list[int]] = []
    first = 0
    for part in parts:
        height, width = part.grid
        rows, columns = part.crops if len(part.crops[0]) > 1 else ((0, height), (0, width))
        for top, bottom in itertools.pairwise(rows):
            for left, right in itertools.pairwise(columns):
                found.append([first + r * width + c for r in range(top, bottom) for c in range(left, right)])
        first += height * width
    return found
