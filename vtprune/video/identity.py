"""What tells models and processors apart, so that answers of two of them do not come together in one file."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_PIECE = 1 << 22
"""Numbers that are summed at once."""
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""The golden ratio of 64 bits: its multiples are spread evenly."""
_WORDING = ("chat_template", "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")


@torch.no_grad()
def weights_of(model: nn.Module) -> str:
    """A hash of names, shapes and all numbers of all weights, as bfloat16 has them: the same in that and in float32."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        sums = [_checksum(piece) for piece in weight.detach().reshape(-1).split(_PIECE)]
        digest.update(f"{name} {tuple(weight.shape)} {sums}".encode())
    return digest.hexdigest()[:16]


def _checksum(piece: Tensor) -> int:
    """A sum of the bits of numbers, each with a factor of its own: odd, so that no change of a number goes unseen."""
    bits = piece.to(torch.bfloat16).view(torch.int16).long()
    factors = torch.arange(len(bits), device=bits.device).mul_(_FACTOR).bitwise_or_(1)
    return int(bits.mul_(factors).sum())


def configuration_of(model: Any) -> str:
    """A hash of the settings that a model computes by, without names, versions and precision."""
    stored = model.config.to_dict()
    return _hashed(_without(stored, ("_name_or_path", "transformers_version", "dtype", "torch_dtype")))


def processing_of(processor: Any) -> str:
    """A hash of all that a processor makes inputs by: its settings, its words and its chat template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    described = [
        processor.to_dict() if hasattr(processor, "to_dict") else type(processor).__name__,
        {name: getattr(processor, name, None) for name in _WORDING},
        getattr(tokenizer, "chat_template", None),
        _words_of(tokenizer),
        {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
    ]
    return _hashed(described)


def _hashed(described: Any) -> str:
    text = json.dumps(described, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without(stored: Any, names: tuple[str, ...]) -> Any:
    """Settings without those of some names, at any depth."""
    if not isinstance(stored, dict):
        return stored
    return {str(name): _without(value, names) for name, value in stored.items() if name not in names}


def _words_of(tokenizer: Any) -> dict[str, Any]:
    """How text becomes ids, without what the last call asked for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: dict[str, Any] = tokenizer.get_vocab()
        return vocabulary
    stored: dict[str, Any] = json.loads(backend.to_str())
    return {name: value for name, value in stored.items() if name not in ("padding", "truncation")}
