"""The models that are trained here: LLaVA on pictures, LLaVA-NeXT-Video on clips, Qwen2.5-VL on pictures."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vtprune.tiny.loading import load_tiny_model
from vtprune.tiny.scenes import SIZE
from vtprune.tiny.training.aids import IdealTokens, Probes, ThingReadings
from vtprune.tiny.training.aligned import AlignedText
from vtprune.tiny.training.batches import ClipSource
from vtprune.tiny.training.models import (
    FRAME_STRIDE,
    MERGE,
    PATCH,
    QWEN_PATCH,
    WIDTH,
    build_llava,
    build_llava_next_video,
    build_qwen2_5_vl,
)
from vtprune.tiny.training.student import Sight, Student


def normalized(pixels: Tensor) -> Tensor:
    """Bytes as towers want them, (..., 3, size, size)."""
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=pixels.device)[..., None, None]
    return (pixels / 255 - mean) / std


class _ClipTowerStudent(Student):
    """A CLIP tower with a projector of two linears."""

    @property
    def tower(self) -> Any:
        return self.vlm.model.vision_tower

    @property
    def projector(self) -> Any:
        return self.vlm.model.multi_modal_projector

    def project(self, cells: Tensor) -> Tensor:
        return self.projector(cells)

    def scale_projector(self, given: float, wanted: float) -> None:
        self.projector.linear_1.weight.div_(given)
        self.projector.linear_2.weight.mul_(wanted)

    def cell_positions(self, count: int) -> Tensor:
        return torch.arange(count)[None]

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of B views: the layer that goes to the projector, CLS first, and the CLS token at the end."""
        output = self.tower(normalized(pixels), output_hidden_states=True)
        return output.hidden_states[self.vlm.config.vision_feature_layer], output.pooler_output


class LlavaStudent(_ClipTowerStudent):
    """LLaVA, with a text tower that will be aligned to its vision tower."""

    patch = PATCH

    def __init__(self) -> None:
        super().__init__()
        self.vlm = build_llava()
        self.probes = Probes(WIDTH, self.side, overview=True)
        self.ideal = IdealTokens(self.side, self.language.embed_tokens.weight.detach(), placed=True)
        self.aligned = AlignedText()

    @property
    def post_norm(self) -> nn.Module:
        """What the tower applies to its last hidden state."""
        return next(module for name, module in self.tower.named_modules() if name.endswith("post_layernorm"))

    def look(self, pixels: Tensor) -> Sight:
        features, last = self.features(pixels[:, 0])
        return Sight(cells=features[:, 1:], whole=features[:, 0], last=last)


class VideoStudent(_ClipTowerStudent):
    """LLaVA-NeXT-Video, which begins with the weights of the bundled LLaVA and pools the cells of every frame.

    The stage that fits the projector rescales it first, as it does with a new one.
    """

    patch = PATCH * FRAME_STRIDE
    source = ClipSource

    def __init__(self) -> None:
        super().__init__()
        self.vlm = build_llava_next_video()
        found = self.vlm.load_state_dict(load_tiny_model("llava").state_dict(), strict=False)
        assert (found.missing_keys, found.unexpected_keys) == (["model.image_newline"], [])
        self.ideal = IdealTokens(self.side, self.language.embed_tokens.weight.detach(), placed=True)

    def look(self, pixels: Tensor) -> Sight:
        features, _ = self.features(pixels.flatten(0, 1))
        grids = features[:, 1:].transpose(1, 2).unflatten(2, (SIZE // PATCH, SIZE // PATCH))
        pooled = avg_pool2d(grids, FRAME_STRIDE).flatten(2).transpose(1, 2)
        return Sight(cells=pooled.unflatten(0, pixels.shape[:2]).flatten(1, 2))


class QwenStudent(Student):
    """Qwen2.5-VL: patches in windows, merged two by two, and M-RoPE in place of positions in the tower."""

    patch = QWEN_PATCH * MERGE
    before = "<s> user : <vision_start>"
    behind = "<vision_end>"
    compacts = False

    def __init__(self) -> None:
        super().__init__()
        self.vlm = build_qwen2_5_vl()
        width = self.vlm.config.vision_config.hidden_size * MERGE**2
        self.probes = Probes(width, self.side, overview=False)
        self.ideal = IdealTokens(self.side, self.language.embed_tokens.weight.detach(), placed=False)
        self.places.extend(nn.Linear(WIDTH, self.side) for _ in range(2))
        self.things = ThingReadings(self.side)
        for block in self.vlm.model.visual.blocks:
            block.attn.forward = partial(attend_at_once, block.attn)

    @property
    def tower(self) -> nn.Module:
        visual = self.vlm.model.visual
        return nn.ModuleList([visual.patch_embed, visual.blocks])

    @property
    def projector(self) -> Any:
        return self.vlm.model.visual.merger

    def project(self, cells: Tensor) -> Tensor:
        merged = self.projector(cells.flatten(0, 1).unflatten(1, (MERGE**2, -1)).flatten(0, 1))
        return merged.unflatten(0, cells.shape[:2])

    def scale_projector(self, given: float, wanted: float) -> None:
        self.projector.mlp[2].weight.mul_(wanted)

    def cell_positions(self, count: int) -> Tensor:
        cell = torch.arange(count)
        return torch.stack([torch.zeros_like(cell), cell // self.side, cell % self.side])

    def look(self, pixels: Tensor) -> Sight:
        visual = self.vlm.model.visual
        across = SIZE // QWEN_PATCH
        grids = torch.tensor([[1, across, across]], device=pixels.device).expand(len(pixels), -1)
        output = visual(patchify(normalized(pixels[:, 0])), grids)
        units = output.last_hidden_state.unflatten(0, (-1, MERGE**2)).flatten(1)
        return Sight(cells=units[self._raster(grids)].unflatten(0, (len(pixels), -1)))

    def _raster(self, grids: Tensor) -> Tensor:
        """Where the cells of all pictures, row by row, are among the units that the tower sorts into windows."""
        from transformers.vision_utils import get_vision_window_index

        window = self.vlm.config.vision_config.window_size
        order, _ = get_vision_window_index(grids, spatial_merge_size=MERGE, window_size=window, patch_size=QWEN_PATCH)
        return order.argsort()


def patchify(pixels: Tensor) -> Tensor:
    """Pictures, (B, 3, size, size), as Qwen2.5-VL takes them: patches of one picture twice, unit by unit, flat."""
    across = SIZE // QWEN_PATCH // MERGE
    grid = pixels.unflatten(3, (across, MERGE, QWEN_PATCH)).unflatten(2, (across, MERGE, QWEN_PATCH))
    patches = grid.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).flatten(0, 4).flatten(1)


def attend_at_once(
    attention: Any,
    hidden: Tensor,
    *,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: int | None = None,
) -> Tensor:
    """What attention over windows gives, in one call instead of one a window; they must have one length."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    lengths = cu_seqlens.diff()
    assert (lengths == lengths[0]).all()
    query, key, value = attention.qkv(hidden).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    windows = (part.unflatten(0, (len(lengths), -1)).transpose(1, 2) for part in (query, key, value.to(query)))
    mixed = scaled_dot_product_attention(*windows)
    return attention.proj(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
