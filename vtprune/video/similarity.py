"""Similarity of pictures and a text, by a model trained for that: open_clip, or CLIP and SigLIP of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from vtprune._loading import explained, is_local
from vtprune._torchvision import heal
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.video.identity import configuration_of, processing_of, weights_of

_OPEN_CLIP = "open_clip:"
_TROUBLES = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageText:
    """A pair of encoders: `embed_pictures` gives (T, C) of a batch of pictures, `embed_text` (1, C) of a text.

    `identity` tells models of one name apart.
    """

    name: str
    embed_pictures: Callable[[Sequence[Image.Image]], Tensor]
    embed_text: Callable[[str], Tensor]
    identity: str = ""

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], *, batch: int = 16) -> Tensor:
        """Cosines (Q, T) of Q texts and T pictures, in fp32 on the host; each is embedded once."""
        words = torch.cat([self.embed_text(text) for text in texts])
        rows = [self.embed_pictures(pictures[start : start + batch]) for start in range(0, len(pictures), batch)]
        return (normalize(words.float(), dim=-1) @ normalize(torch.cat(rows).float(), dim=-1).T).cpu()

    @classmethod
    def of(cls, source: str, *, device: Any = "cpu") -> ImageText:
        """By name: `"open_clip:ARCHITECTURE:WEIGHTS"`, `"open_clip:hf-hub:NAME"`, or a directory or hub id of a CLIP.

        Raises:
            BackendUnavailable: without open_clip.
            VtpruneError: where it does not load.
        """
        if not source.startswith(_OPEN_CLIP):
            return cls.of_transformers(*_loaded(source, device))
        architecture, _, weights = source.removeprefix(_OPEN_CLIP).partition(":")
        if architecture == "hf-hub":
            return cls.of_open_clip(f"hf-hub:{weights}", device=device)
        return cls.of_open_clip(architecture, weights or None, device=device)

    @classmethod
    def of_open_clip(cls, architecture: str, weights: str | Path | None = None, *, device: Any = "cpu") -> ImageText:
        """A model of open_clip: an architecture (`"ViT-B-32"`, or `"hf-hub:..."`), and weights by path or tag.

        Raises:
            BackendUnavailable: without open_clip.
            VtpruneError: where it does not load.
        """
        try:
            import open_clip
        except ImportError as error:
            raise BackendUnavailable("similarity by open_clip needs it: pip install 'vtprune[clip]'") from error
        given = None if weights is None else str(weights)
        if given is None and not architecture.startswith("hf-hub:"):
            raise InvalidOption(f"open_clip {architecture!r}: expected weights, by path or tag, or an hf-hub: name")
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=given, device=device)
            tokenizer = open_clip.get_tokenizer(architecture)
        except _TROUBLES as error:
            raise VtpruneError(f"open_clip cannot load {architecture!r} with {given!r}: {error}") from error
        model.eval()

        def pictures(batch: Sequence[Image.Image]) -> Tensor:
            made = torch.stack([preprocess(picture.convert("RGB")) for picture in batch])
            found: Tensor = model.encode_image(made.to(device))
            return found

        def text(words: str) -> Tensor:
            found: Tensor = model.encode_text(tokenizer([words]).to(device))
            return found

        told = f"{weights_of(model)} {preprocess}"
        return cls(name=f"open_clip {architecture}", embed_pictures=pictures, embed_text=text, identity=told)

    @classmethod
    def of_transformers(cls, model: Any, processor: Any) -> ImageText:
        """A CLIP or SigLIP of transformers with its processor."""

        def pictures(batch: Sequence[Image.Image]) -> Tensor:
            made = processor(images=list(batch), return_tensors="pt").to(model.device, model.dtype)
            return _embedded(model.get_image_features(**made))

        def text(words: str) -> Tensor:
            # SigLIP was trained on texts padded to the end; CLIP does not look behind the end of a text.
            longest = model.config.text_config.max_position_embeddings
            options = {"padding": "max_length", "truncation": True, "max_length": longest}
            made = processor(text=[words], return_tensors="pt", **options).to(model.device)
            return _embedded(model.get_text_features(**made))

        told = f"{weights_of(model)} {configuration_of(model)} {processing_of(processor)}"
        return cls(name=type(model).__name__, embed_pictures=pictures, embed_text=text, identity=told)


def _loaded(source: str, device: Any) -> tuple[Any, Any]:
    local = is_local(source)
    heal()
    from transformers import AutoModel, AutoProcessor

    with explained(f"cannot load {source!r}"):
        model = AutoModel.from_pretrained(source, local_files_only=local).to(device).eval()
        return model, AutoProcessor.from_pretrained(source, local_files_only=local)


def _embedded(output: Any) -> Tensor:
    found: Tensor = output if torch.is_tensor(output) else output.pooler_output
    return found
