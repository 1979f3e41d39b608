"""Small towers of random weights from every library, and what eager attention and plain loops make of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from tests.models import randomise
from vtprune.demo import towers
from vtprune.demo.towers import Tower

SIDE, PATCH, BLOCKS, HEADS, WIDTH = 32, 4, 4, 4, 32
ROWS = SIDE // PATCH
SIZES = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS, "intermediate_size": 64}
PROCESSOR = SimpleNamespace(
    image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], resample=3, crop_size={"height": SIDE, "width": SIDE}
)


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """What the tower makes of pixels: `features` (1, N, D), and attention (1, H, n, n) of every block."""

    features: Tensor
    attentions: tuple[Tensor, ...]
    has_cls: bool
    registers: int

    def importance(self, block: int = -1) -> Tensor:
        """(1, N): the row of the CLS token, or without one the mean of all rows."""
        heads = self.attentions[block].mean(dim=1)
        return (heads[:, 0] if self.has_cls else heads.mean(dim=1))[:, int(self.has_cls) + self.registers :]

    def received(self) -> Tensor:
        """(1, N): the mean of all rows."""
        return self.attentions[-1].mean(dim=(1, 2))[:, int(self.has_cls) + self.registers :]


def _settled(model: nn.Module) -> nn.Module:
    model.float().eval()
    randomise(model)
    return model


def of_transformers(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "image_size": SIDE, "patch_size": PATCH, **options})
    return _settled(getattr(transformers, f"{kind}Model")(config))


def whole_clip() -> nn.Module:
    vision = {**SIZES, "image_size": SIDE, "patch_size": PATCH}
    text = {**SIZES, "num_hidden_layers": 1, "vocab_size": 40}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    return _settled(transformers.CLIPModel(config))


def of_timm(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    small = {"img_size": SIDE, "patch_size": PATCH, "depth": BLOCKS, "embed_dim": WIDTH, "num_heads": HEADS}
    torch.manual_seed(0)
    return _settled(timm.create_model(name, pretrained=False, **{**small, "num_classes": 5, **options}))


def of_open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": SIDE, "layers": BLOCKS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    text = {"context_length": 16, "vocab_size": 40, "width": 32, "heads": 4, "layers": 2}
    torch.manual_seed(0)
    return _settled(open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))


MAKERS = {
    "clip": lambda: towers.of_transformers("clip", of_transformers("CLIPVision"), PROCESSOR),
    "whole_clip": lambda: towers.of_transformers("whole_clip", whole_clip(), PROCESSOR),
    "siglip": lambda: towers.of_transformers("siglip", of_transformers("SiglipVision"), PROCESSOR),
    "vit": lambda: towers.of_transformers("vit", of_transformers("ViT"), PROCESSOR),
    "dinov2": lambda: towers.of_transformers("dinov2", of_transformers("Dinov2", image_size=56), PROCESSOR),
    "registers": lambda: towers.of_transformers(
        "registers", of_transformers("Dinov2WithRegisters", num_register_tokens=3), PROCESSOR
    ),
    "timm": lambda: towers.of_timm("timm", of_timm()),
    "timm_registers": lambda: towers.of_timm("timm_registers", of_timm("vit_small_patch14_reg4_dinov2")),
    "timm_without_cls": lambda: towers.of_timm("timm_without_cls", of_timm("vit_base_patch16_siglip_224")),
    "timm_registers_only": lambda: towers.of_timm(
        "timm_registers_only", of_timm(class_token=False, reg_tokens=2, global_pool="avg")
    ),
    "timm_wide": lambda: towers.of_timm("timm_wide", of_timm(img_size=(16, 32))),
    "open_clip": lambda: towers.of_open_clip("open_clip", of_open_clip()),
}
REGISTERS = {"registers": 3, "timm_registers": 4, "timm_registers_only": 2}
WITHOUT_CLS = ("siglip", "timm_without_cls", "timm_registers_only")


def build(name: str) -> Tower:
    return MAKERS[name]()


@torch.no_grad()
def by_hand(name: str, tower: Tower, pixels: Tensor) -> ByHand:
    """The same without vtprune: eager attention of transformers, and products of queries and keys elsewhere."""
    has_cls, registers = name not in WITHOUT_CLS, REGISTERS.get(name, 0)
    if isinstance(tower.model, transformers.PreTrainedModel):
        model = copy.deepcopy(tower.model)
        model.set_attn_implementation("eager")
        output = model(pixel_values=pixels, output_attentions=True)
        hidden, attentions = output.last_hidden_state, tuple(output.attentions)
    elif hasattr(tower.model, "blocks"):
        hidden = tower.model.forward_features(pixels)
        attentions = tuple(_of_timm_block(block, given) for block, given in _inputs(tower.model.blocks, tower, pixels))
    else:
        attentions, hidden = _of_open_clip(tower, pixels)
    features = hidden[:, int(has_cls) + registers :]
    return ByHand(features=features, attentions=attentions, has_cls=has_cls, registers=registers)


def _inputs(blocks: Any, tower: Tower, pixels: Tensor) -> list[tuple[nn.Module, Tensor]]:
    caught: list[tuple[nn.Module, Tensor]] = []
    handles = [block.register_forward_pre_hook(lambda own, args: caught.append((own, args[0]))) for block in blocks]
    try:
        tower.model(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _of_timm_block(block: Any, given: Tensor) -> Tensor:
    joint = block.attn.qkv(block.norm1(given)).reshape(1, given.shape[1], 3, HEADS, -1)
    query, key = (joint[:, :, number].transpose(1, 2) for number in range(2))
    query, key = block.attn.q_norm(query), block.attn.k_norm(key)
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)


def _of_open_clip(tower: Tower, pixels: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    visual: Any = tower.model
    found = []
    for block, given in _inputs(visual.transformer.resblocks, tower, pixels):
        inputs = block.ln_1(given)
        found.append(block.attn(inputs, inputs, inputs, need_weights=True, average_attn_weights=False)[1])
        last = block(given)
    return tuple(found), visual.ln_post(last)


def photo(width: int = 48, height: int = 40) -> Image.Image:
    """Blurred noise in colour."""
    values = torch.randint(0, 256, (6, 7, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BICUBIC)
