"""A model in training, with what only training needs: probes on the tower's tokens and the ideal tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vtprune.tiny.scenes import COLORS, NUMBERS, PLACES, SHAPES, SIZE
from vtprune.tiny.training.aligned import AlignedText
from vtprune.tiny.training.concepts import HUES, PEERS, WHATS, Cells
from vtprune.tiny.training.models import PATCH, WIDTH, build_llava
from vtprune.tiny.training.packing import PREFIX, Blocks, block_mask
from vtprune.tiny.words import WORD_IDS

COMBINATIONS = len(COLORS) * len(SHAPES) + 10
"""What a whole picture can hold: every shape in every colour, and every digit."""


@dataclass(frozen=True, eq=False)
class Sight:
    """Of B pictures: `cells`, B x N x width, `whole`, B x width, before the projector; `last`, `whole` one layer on."""

    cells: Tensor
    whole: Tensor
    last: Tensor


class Probes(nn.Module):
    """Linear readings of what the tower knows of every cell and of the whole picture."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.what = nn.Linear(WIDTH, WHATS)
        self.hue = nn.Linear(WIDTH, HUES)
        self.peers = nn.Linear(WIDTH, PEERS)
        self.centre = nn.Linear(WIDTH, 1)
        self.row = nn.Linear(WIDTH, side)
        self.column = nn.Linear(WIDTH, side)
        self.whole = nn.Linear(WIDTH, COMBINATIONS)
        self.last = nn.Linear(WIDTH, COMBINATIONS)


class IdealTokens(nn.Module):
    """The token of a perfect tower and projector: the sum of what, which colour, how many, where.

    They begin as the embeddings of the words that name them, so that question and picture speak alike from the start.
    """

    def __init__(self, side: int, words: Tensor) -> None:
        super().__init__()
        self.side = side
        self.sums = nn.Linear(WHATS + HUES + PEERS + 2 * side + 1, WIDTH, bias=False)
        with torch.no_grad():
            self.sums.weight.copy_(_spell(side, words))

    def forward(self, cells: Cells, index: Tensor) -> Tensor:
        """Tokens of the cells with those indices, (B, K, width); unsure cells count as empty."""
        classes = (
            (cells.what, WHATS),
            (cells.hue, HUES),
            (cells.peers, PEERS),
            (index // self.side, self.side),
            (index % self.side, self.side),
        )
        facts = [one_hot(label.clamp(min=0), count).float() for label, count in classes]
        return self.sums(torch.cat([*facts, cells.centre[..., None]], dim=-1))


def _spell(side: int, words: Tensor) -> Tensor:
    def embed(*names: str) -> Tensor:
        return words[[WORD_IDS[name] for name in names]]

    corners = embed(*PLACES)
    ramp = torch.linspace(-0.3, 0.3, side)[:, None]
    ramp = ramp + 0.2 * ramp.sign()
    down = corners[2] + corners[3] - corners[0] - corners[1]
    right = corners[1] + corners[3] - corners[0] - corners[2]
    digits = embed(*"0123456789")
    centre = 0.06 * torch.randn(1, WIDTH)
    empty = 0.06 * torch.randn(3, WIDTH)
    names = (embed(*SHAPES), digits, empty[1:2], embed(*COLORS), empty[2:], embed(*NUMBERS[1:]))
    parts = (empty[:1], *names, ramp * down, ramp * right, centre)
    return torch.cat(parts).T


class LlavaStudent(nn.Module):
    """LLaVA and its training aids."""

    patch = PATCH

    def __init__(self) -> None:
        super().__init__()
        self.vlm = build_llava()
        self.side = SIZE // PATCH
        self.probes = Probes(self.side)
        self.ideal = IdealTokens(self.side, self.language.embed_tokens.weight.detach())
        self.aligned = AlignedText()

    @property
    def tower(self) -> Any:
        return self.vlm.model.vision_tower

    @property
    def post_norm(self) -> nn.Module:
        """What the tower applies to its last hidden state."""
        return next(module for name, module in self.tower.named_modules() if name.endswith("post_layernorm"))

    @property
    def projector(self) -> Any:
        return self.vlm.model.multi_modal_projector

    @property
    def language(self) -> Any:
        return self.vlm.model.language_model

    def parts(self, names: tuple[str, ...]) -> list[nn.Module]:
        """Modules by attribute name."""
        return [getattr(self, name) for name in names]

    def look(self, pixels: Tensor) -> Sight:
        """Run the tower on bytes, (B, 3, size, size)."""
        colors = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=pixels.device)
        mean, std = colors[:, :, None, None]
        output = self.tower((pixels / 255 - mean) / std, output_hidden_states=True)
        features = output.hidden_states[self.vlm.config.vision_feature_layer]
        return Sight(cells=features[:, 1:], whole=features[:, 0], last=output.pooler_output)

    def read(self, tokens: Tensor, index: Tensor, blocks: Blocks, compact: bool) -> Tensor:
        """Hidden states of the blocks, (B, T, width), behind the visual tokens of the cells `index`, (B, K).

        `compact`: number the kept tokens without gaps; otherwise they keep the positions they had among all.
        """
        rows, kept = index.shape
        before = torch.tensor(PREFIX, device=index.device).expand(rows, -1)
        start = before.shape[1]
        shown = torch.arange(kept, device=index.device).expand(rows, -1) if compact else index
        end = start + (kept if compact else self.side**2)
        order = torch.arange(start, device=index.device).expand(rows, -1)
        embed = self.language.embed_tokens
        output = self.language(
            inputs_embeds=torch.cat([embed(before), tokens, embed(blocks.ids)], dim=1),
            attention_mask=block_mask(blocks.block, start + kept),
            position_ids=torch.cat([order, shown + start, blocks.offset + end], dim=1),
            use_cache=False,
        )
        return output.last_hidden_state[:, start + kept :]

    def words(self, hidden: Tensor) -> Tensor:
        """Logits, in fp32."""
        return self.vlm.lm_head(hidden).float()
