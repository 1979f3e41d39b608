"""How near patches are to a question, in the space of a CLIP model: evidence for `using(relevance=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import InvalidOption

_NOT_THE_QUESTION = ("<image>", "<video>", "\nAnswer the question using a single word or phrase.")


@torch.no_grad()
def text_relevance(
    clip: Any, tokenizer: Any, pixel_values: Tensor, questions: Sequence[str], *, layer: int = -2
) -> Tensor:
    """Cosine (B, N) between each of N patches of a picture and the question about it.

    Patches are read after the block that LLaVA takes its features from, through the last norm and the projection of the
    model. Longer questions are cut into segments of the length the text tower takes, and relevance is their mean.
    In CLIP the patches that show what a text is about lie far from it: CDPruner turns the sign (arXiv 2506.10967).

    Args:
        clip: a `CLIPModel` of transformers, or a CLIP of open_clip with a vision transformer.
        tokenizer: the tokenizer of that model.
        pixel_values: (B, 3, H, W), normalised as the model wants them. The grid of patches must be that of the tokens.
        questions: one for each picture.
        layer: of the hidden states of the vision tower.

    Raises:
        InvalidOption: where pictures and questions differ in number.
    """
    if pixel_values.ndim != 4 or len(pixel_values) != len(questions):
        raise InvalidOption(f"pixel_values {tuple(pixel_values.shape)}: expected (B, 3, H, W), B={len(questions)}")
    transformers_like = hasattr(clip, "vision_model")
    patches = _patches(clip, pixel_values, layer) if transformers_like else _open_patches(clip, pixel_values, layer)
    embed = _text if transformers_like else _open_text
    rows = []
    for own, question in zip(normalize(patches.float(), dim=-1), questions, strict=True):
        segments = normalize(embed(clip, tokenizer, _cleaned(question)).float(), dim=-1)
        rows.append((own @ segments.T).mean(dim=1))
    return torch.stack(rows)


def _cleaned(question: str) -> str:
    for text in _NOT_THE_QUESTION:
        question = question.replace(text, "")
    return question.strip()


def _patches(clip: Any, pixel_values: Tensor, layer: int) -> Tensor:
    vision = clip.vision_model
    states = vision(pixel_values=pixel_values, output_hidden_states=True).hidden_states[layer]
    projected: Tensor = clip.visual_projection(vision.post_layernorm(states[:, 1:]))
    return projected


def _text(clip: Any, tokenizer: Any, question: str) -> Tensor:
    """Embeddings (segments, width)."""
    longest = clip.config.text_config.max_position_embeddings
    made = tokenizer(
        question,
        truncation=True,
        max_length=longest,
        return_overflowing_tokens=True,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    ).to(clip.device)
    output = clip.get_text_features(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
    embedded: Tensor = output if torch.is_tensor(output) else output.pooler_output
    return embedded


def _open_patches(clip: Any, pixel_values: Tensor, layer: int) -> Tensor:
    visual = clip.visual
    block = layer - 1 if layer > 0 else layer
    found = visual.forward_intermediates(
        pixel_values, indices=[block], output_fmt="NLC", normalize_intermediates=True, intermediates_only=True
    )
    projected: Tensor = found["image_intermediates"][0] @ visual.proj
    return projected


def _open_text(clip: Any, tokenizer: Any, question: str) -> Tensor:
    """Embeddings (segments, width). Words are cut in halves until a segment fits."""
    ids = tokenizer([question]).to(next(clip.parameters()).device)
    words = question.split()
    if bool(ids[0, -1] != 0) and len(words) > 1:
        middle = len(words) // 2
        halves = (" ".join(words[:middle]), " ".join(words[middle:]))
        return torch.cat([_open_text(clip, tokenizer, half) for half in halves])
    embedded: Tensor = clip.encode_text(ids)
    return embedded
