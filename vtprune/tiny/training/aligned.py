"""A text tower in the space of the vision tower, so that methods that ask for CLIP relevance have evidence offline."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vtprune.tiny.training.models import HEADS, WIDTH, reset_linears
from vtprune.tiny.words import BEGIN, END, PAD, VOCABULARY_SIZE, encode

SPACE = 64
LONGEST = 64


class AlignedText(nn.Module):
    """A CLIP text tower and the projection of the vision tower into the space they share."""

    def __init__(self) -> None:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        super().__init__()
        config = CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            max_position_embeddings=LONGEST,
            projection_dim=SPACE,
            pad_token_id=PAD,
            bos_token_id=BEGIN,
            eos_token_id=END,
        )
        self.tower = CLIPTextModelWithProjection(config)
        reset_linears(self.tower)
        self.visual = nn.Linear(WIDTH, SPACE, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def embed(self, texts: list[str]) -> Tensor:
        """Unit vectors, (texts, space)."""
        ids = [encode(f"<s> {text} </s>")[:LONGEST] for text in texts]
        width = max(map(len, ids))
        padded = torch.tensor([row + [PAD] * (width - len(row)) for row in ids], device=self.bias.device)
        return normalize(self.tower(padded).text_embeds.float(), dim=-1)
