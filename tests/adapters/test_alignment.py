"""Every family: scores land on the tokens whose features they belong to, and probes read the tower's own attention."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import models
from tests.models import ANYRES, CLIPS, IMAGE_FAMILIES, ONE_AND_TWO, QWEN, VIDEO_FAMILIES, Prompt
from vtprune.adapters import FAMILIES, family_of
from vtprune.adapters.base import Encoding, Family, Probe, pooled_lengths
from vtprune.adapters.qwen_vl import window_order
from vtprune.errors import UnsupportedCall
from vtprune.types import Modality, Part

SIZES = tuple(
    Prompt(images=(size,), seed=i) for i, size in enumerate([(30, 64), (60, 64), (30, 92), (92, 20), (9, 64)])
)
CASES: dict[str, tuple[str, Modality, tuple[Prompt, ...], dict[str, Any]]] = {
    **{f"{name}-image": (name, "image", ONE_AND_TWO, {}) for name in IMAGE_FAMILIES},
    **{f"{name}-video": (name, "video", CLIPS, {}) for name in VIDEO_FAMILIES},
    **{f"{name}-sizes": (name, "image", SIZES, {}) for name in (*ANYRES, *QWEN, "internvl")},
    "onevision-shrunk": ("llava_onevision", "image", SIZES, {"vision_aspect_ratio": "anyres_max_1"}),
    "qwen2_5_vl-long-clip": ("qwen2_5_vl", "video", (Prompt(clips=((40, 56, 6), (24, 40, 2))),), {}),
    "llava-full": ("llava", "image", ONE_AND_TWO, {"vision_feature_select_strategy": "full"}),
    "llava-siglip": ("llava", "image", ONE_AND_TWO, {"tower": "siglip", "vision_feature_select_strategy": "full"}),
    "llava-cropped": ("llava", "image", ONE_AND_TWO, {"tower": "siglip"}),
    "llava-layers": ("llava", "image", ONE_AND_TWO, {"vision_feature_layer": [-3, -2]}),
    "llava-layer-from-start": ("llava", "image", ONE_AND_TWO, {"vision_feature_layer": 2}),
    "video_llava-full": ("video_llava", "image", ONE_AND_TWO, {"vision_feature_select_strategy": "full"}),
    "next-siglip": ("llava_next", "image", SIZES, {"tower": "siglip", "vision_feature_select_strategy": "full"}),
    "next_video-max": ("llava_next_video", "video", CLIPS, {"spatial_pool_mode": "max"}),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with one batch of pictures, `pixels` and what goes with them."""

    model: nn.Module
    kind: Modality
    batch: dict[str, Tensor]

    @property
    def inner(self) -> nn.Module:
        return self.model.model

    @property
    def family(self) -> Family:
        return family_of(self.model.config)

    @property
    def tower(self) -> nn.Module:
        names = ("visual", f"{self.kind}_tower", "vision_tower")
        return next(module for name in names if (module := getattr(self.inner, name, None)) is not None)

    @property
    def grids(self) -> Tensor | None:
        return self.batch.get(f"{self.kind}_grid_thw")

    @torch.no_grad()
    def encode(self) -> Any:
        method = getattr(self.inner, f"get_{self.kind}_features")
        known = set(inspect.signature(method).parameters)
        return method(**{name: value for name, value in self.batch.items() if name in known})

    def encoding(self, pooled: Any) -> Encoding:
        lengths, stacked = pooled_lengths(pooled)
        pixels = self.batch["pixel_values" if self.kind == "image" else "pixel_values_videos"]
        sizes = self.grids if self.grids is not None else self.batch.get("image_sizes")
        pictures = self.batch.get("batch_num_images")
        return Encoding(
            kind=self.kind,
            lengths=lengths,
            stacked=stacked,
            sizes=() if sizes is None else tuple(map(tuple, sizes.tolist())),
            pixels=tuple(pixels.shape),
            pictures_per_prompt=None if pictures is None else tuple(pictures.tolist()),
        )


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    name, kind, prompts, options = request.param
    model = models.build(name, layers=1, **options)
    counted = model if options else name
    return Case(model=model, kind=kind, batch=models.inputs(counted, prompts, kind))


@contextmanager
def hooked(*hooks: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def painted(case: Case, paint: Callable[[int, int], Tensor]) -> Iterator[None]:
    """The tower outputs `paint(rows, N)` in every channel and the projector averages its channels.

    Towers with a CLS token put -1000 there.
    """
    patches = case.family.tower(case.inner, case.kind)

    def tower(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        rows, n, width = output.last_hidden_state.shape
        scores = paint(rows, n - 1) if patches.has_cls else paint(rows, n)
        if patches.has_cls:
            scores = torch.cat([torch.full((rows, 1), -1000.0), scores], dim=1)
        states = scores[..., None].expand(-1, -1, width).contiguous()
        output.last_hidden_state = states
        output.hidden_states = [states] * 8
        return output

    def block(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return paint(1, len(output))[0][:, None].expand(-1, output.shape[1]).contiguous()

    def projector(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        features = args[0] if args[0].ndim == 3 else args[0].reshape(len(output), -1)
        return features.mean(-1, keepdim=True).expand_as(output)

    if case.grids is not None:
        hooks = [(case.tower.blocks[-1], block), (case.tower.merger, projector)]
    else:
        hooks = [(case.tower, tower), (case.inner.multi_modal_projector, projector)]
    with hooked(*hooks):
        yield


def rows_of(case: Case, raw: Tensor, encoding: Encoding) -> list[Tensor]:
    """Scores of patches (rows, N) as scores of tokens; twice side by side, to see that columns stay apart."""
    both = case.family.rows(case.inner, torch.stack([raw, 2 * raw], dim=-1), encoding)
    for entry in both:
        torch.testing.assert_close(2 * entry[:, 0], entry[:, 1], equal_nan=True)
    return [entry[:, 0] for entry in both]


def separators(parts: tuple[Part, ...]) -> set[int]:
    return {offset for part in parts for offset in part.separators}


def test_scores_land_on_their_tokens(case: Case) -> None:
    painting: list[Tensor] = []

    def paint(rows: int, n: int) -> Tensor:
        painting.append(torch.rand(rows, n, generator=torch.Generator().manual_seed(1)))
        return painting[-1]

    with painted(case, paint):
        pooled = case.encode().pooler_output
    encoding = case.encoding(pooled)
    scores = rows_of(case, painting[-1], encoding)
    parts = case.family.parts(case.inner, encoding)
    assert len(scores) == len(parts) == len(encoding.lengths) == len(pooled)
    for entry, features, packed in zip(scores, pooled, parts):
        assert entry.shape == features.shape[:1]
        assert set(entry.isnan().nonzero().flatten().tolist()) == separators(packed)
        scored = ~entry.isnan()
        torch.testing.assert_close(entry[scored], features[scored, 0], atol=1e-6, rtol=0)


def test_parts_cover_the_entry_in_order(case: Case) -> None:
    encoding = case.encoding(case.encode().pooler_output)
    for packed, length in zip(case.family.parts(case.inner, encoding), encoding.lengths):
        assert [part.start for part in packed] == [0, *(part.stop for part in packed[:-1])]
        assert packed[-1].stop == length
        for part in packed:
            assert set(part.separators) <= set(range(part.start, part.stop))


@pytest.mark.parametrize("axis", ["y", "x"])
def test_grids_are_in_raster_order(case: Case, axis: str) -> None:
    """Coordinates painted on the patches come out as the coordinates of each part's grid."""
    maps: list[Tensor] = []

    def paint(rows: int, n: int) -> Tensor:
        maps.append(coordinates(case, rows, n)[0 if axis == "y" else 1].float())
        return maps[-1]

    with painted(case, paint):
        encoding = case.encoding(case.encode().pooler_output)
    scores = rows_of(case, maps[-1], encoding)
    for entry, packed in zip(scores, case.family.parts(case.inner, encoding)):
        for part in packed:
            if part.grid[0] == 1 < part.grid[1] == part.tokens and "crop" not in part.kind and case.grids is None:
                continue
            grid = entry[torch.from_numpy(part.candidates)].view(part.grid)
            grid = grid if axis == "y" else grid.T
            torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))
            assert (grid[1:] > grid[:-1]).all()


def coordinates(case: Case, rows: int, n: int) -> tuple[Tensor, Tensor]:
    """(y, x) of each patch (rows, n) in the picture its part shows; crops count on from crop to crop."""
    if case.grids is not None:
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        vision = case.model.config.vision_config
        places = get_vision_position_ids(case.grids, vision.spatial_merge_size)
        if hasattr(vision, "window_size"):
            order, _ = get_vision_window_index(
                case.grids, vision.spatial_merge_size, vision.window_size, vision.patch_size
            )
            places = places.view(-1, vision.spatial_merge_size**2, 2)[order].view(-1, 2)
        return places[None, :, 0], places[None, :, 1]
    side = round(n**0.5)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = (axis.flatten().expand(rows, -1).clone() for axis in (y, x))
    if "image_sizes" in case.batch and case.kind == "image":
        for row, (crop_y, crop_x) in enumerate(crop_places(case)):
            y[row] += crop_y * side
            x[row] += crop_x * side
    return y, x


def crop_places(case: Case) -> Iterator[tuple[int, int]]:
    from transformers.image_processing_utils import select_best_resolution

    multiple = case.batch.get("batch_num_images")
    alone = None if multiple is None else [n == 1 for n in multiple.tolist() for _ in range(n)]
    for number, size in enumerate(case.batch["image_sizes"].tolist()):
        yield 0, 0
        if alone is None or alone[number]:
            height, width = select_best_resolution(size, models.PINPOINTS)
            yield from ((i, j) for i in range(height // models.SIDE) for j in range(width // models.SIDE))


def test_probe_reads_the_towers_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = case.encode().pooler_output
    tower = case.family.tower(case.inner, case.kind)
    assert tower is not None
    probe = tower.probe
    raw, features = probed(case, probe)
    assert all(torch.equal(a, b) for a, b in zip(plain, features, strict=True))
    torch.testing.assert_close(raw, eager_scores(case, probe, monkeypatch), atol=1e-5, rtol=0)
    assert raw.std() > 1e-3 * raw.mean()


def probed(case: Case, probe: Probe) -> tuple[Tensor, Any]:
    """Scores (rows, N) as the runtime makes them: hooks on the projections and on the attention call."""
    seen: dict[str, Any] = {}
    results: list[Tensor] = []
    lengths: list[tuple[int, ...]] = []

    def projection(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    def attention(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if probe.fused:
            joint = seen[probe.fused].unflatten(-1, (3, probe.heads, -1))
            query, key = (joint[:, i].transpose(0, 1)[None] for i in range(2))
        else:
            query, key = (seen[name].unflatten(-1, (probe.heads, -1)).transpose(1, 2) for name in ("q", "k"))
        if probe.normalise:
            query, key = probe.normalise(query, key)
        if probe.rotate:
            query, key = probe.rotate(query, key, kwargs)
        logits = query @ key.transpose(-1, -2) * probe.scale
        if probe.segments:
            ends = kwargs["cu_seqlens"][1:]
            owner = torch.bucketize(torch.arange(logits.shape[-1]), ends, right=True)
            weights = logits.masked_fill(owner[:, None] != owner[None], float("-inf")).softmax(-1)
            results.append(weights.mean(1).sum(1) / owner.bincount()[owner])
            lengths.append(tuple(owner.bincount().tolist()))
        else:
            results.append(reduced(logits.softmax(-1), probe))

    names = {probe.fused: probe.fused} if probe.fused else {"q": probe.query, "k": probe.key}
    hooks = [(getattr(probe.attention, path), projection(name)) for name, path in names.items()]
    with hooked(*hooks, (probe.attention, attention)):
        pooled = case.encode().pooler_output
    if probe.segments:
        assert [probe.segments(case.encoding(pooled))] == lengths
    return torch.cat(results), pooled


def reduced(weights: Tensor, probe: Probe) -> Tensor:
    """Attention (B, H, N, N) as a score per patch: the CLS row, or the mean over all rows."""
    mean = weights.mean(1)
    return mean[:, 0, 1:] if probe.has_cls else mean.mean(1)


def eager_scores(case: Case, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same from the weights that transformers' eager attention returns, one block per picture or frame."""
    case.model.set_attn_implementation("eager")
    modeling = importlib.import_module(type(probe.attention).__module__)
    eager, calls = modeling.eager_attention_forward, []

    def record(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, *args, **kwargs)
        if module is probe.attention:
            calls.append(weights)
        return output, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", record)
    case.encode()
    if probe.segments is None:
        return torch.cat([reduced(weights, probe) for weights in calls])
    return torch.cat([reduced(weights, probe) for weights in calls], dim=1)


def test_probe_is_the_layer_that_makes_the_features() -> None:
    """Layers after the probed one do not matter to the features; the probed one does."""
    for name, options in (("llava", {}), ("llava", {"vision_feature_layer": 2}), ("llava_onevision", {})):
        model = models.build(name, layers=1, **options)
        case = Case(model=model, kind="image", batch=models.inputs(name))
        probe = case.family.tower(case.inner, "image").probe
        layers = case.tower.encoder.layers
        number = next(i for i, layer in enumerate(layers) if layer.self_attn is probe.attention)
        before = case.encode().pooler_output
        for later in layers[number + 1 :]:
            later.self_attn.out_proj.weight.data.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(before, case.encode().pooler_output))
        probe.attention.out_proj.weight.data.mul_(2)
        assert not any(torch.equal(a, b) for a, b in zip(before, case.encode().pooler_output))


def test_qwen2_5_reads_the_last_full_block() -> None:
    model = models.build("qwen2_5_vl", layers=1)
    probe = FAMILIES["qwen2_5_vl"].tower(model.model, "image").probe
    assert probe.attention is model.model.visual.blocks[1].attn


@pytest.mark.parametrize("sizes", [[(1, 8, 8), (1, 6, 10)], [(3, 10, 14), (2, 4, 6)]])
def test_window_order_is_that_of_transformers(sizes: list[tuple[int, int, int]]) -> None:
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(torch.tensor(sizes), 2, 24, 4)
    ours = window_order([(t, h // 2, w // 2) for t, h, w in sizes], 3)
    assert order.tolist() == ours.tolist()


def test_a_convolutional_pooler_pools_scores_by_their_mean() -> None:
    """A convolution mixes channels, so there is no score to push through it."""
    raw = torch.rand(8, 16)
    maps = []
    for mode in ("average", "conv"):
        model = models.build("llava_next_video", layers=1, spatial_pool_mode=mode)
        clips = {key: value[:2] for key, value in models.inputs("llava_next_video", kind="video").items()}
        case = Case(model=model, kind="video", batch=clips)
        maps.append(torch.stack(rows_of(case, raw, case.encoding(case.encode().pooler_output))))
    torch.testing.assert_close(*maps)


def test_an_unknown_tower_is_not_read() -> None:
    model = models.build("llava", layers=1)
    model.model.vision_tower.config.model_type = "pixtral"
    assert FAMILIES["llava"].tower(model.model, "image") is None


def test_a_tower_that_gives_its_embedding_is_not_read() -> None:
    model = models.build("llava", layers=1, vision_feature_layer=0)
    assert FAMILIES["llava"].tower(model.model, "image") is None


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "video_llava", "qwen2_vl"])
def test_wrong_lengths_are_refused_with_numbers(name: str) -> None:
    model = models.build(name, layers=1)
    case = Case(model=model, kind="image", batch=models.inputs(name))
    encoding = case.encoding(case.encode().pooler_output)
    wrong = Encoding(**{**vars(encoding), "lengths": tuple(n + 3 for n in encoding.lengths)})
    with pytest.raises(UnsupportedCall, match=str(wrong.lengths[0])):
        case.family.parts(case.inner, wrong)


def test_missing_sizes_are_refused() -> None:
    model = models.build("llava_next", layers=1)
    case = Case(model=model, kind="image", batch=models.inputs("llava_next"))
    encoding = case.encoding(case.encode().pooler_output)
    with pytest.raises(UnsupportedCall, match="image_sizes"):
        case.family.parts(case.inner, Encoding(**{**vars(encoding), "sizes": ()}))


def test_video_llava_clips_are_made_of_frames() -> None:
    encoding = Encoding(kind="video", lengths=(17,) * 8, stacked=True, pixels=(2, 4, 3, 32, 32))
    assert FAMILIES["video_llava"].entries(encoding) == 4


def test_every_model_type_has_one_family() -> None:
    types = [model_type for family in FAMILIES.values() for model_type in family.model_types]
    assert len(types) == len(set(types))
    assert all(key == family.name for key, family in FAMILIES.items())
    assert {family_of(models.build(name, layers=1).config).name for name in IMAGE_FAMILIES} == set(FAMILIES) - {
        "generic"
    }
