"""Vision encoders by themselves, of transformers, timm and open_clip: wrapped, counted, unwrapped, refused."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import vtprune
from tests.fidelity import loops_encoder as loops
from tests.integration.common import fingerprint
from tests.models import randomise, vision_config
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel

METHODS = ("tome", "flowcut", "mustdrop_vision", "zero_tprune")
SIDE, PATCHES, BLOCKS, HEADS = 32, 64, 4, 4


def _clip() -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**_settings("clip_vision_model")))


def _siglip() -> nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**_settings("siglip_vision_model")))


def _vit(kind: str = "ViT") -> nn.Module:
    sizes = {"hidden_size": 32, "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=SIDE, patch_size=4)
    return getattr(transformers, f"{kind}Model")(config)


def _whole_clip() -> nn.Module:
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    vision = _settings("clip_vision_model")
    config = transformers.CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 40}, projection_dim=16)
    return transformers.CLIPModel(config)


def _settings(model_type: str) -> dict[str, Any]:
    settings = vision_config(model_type, num_hidden_layers=BLOCKS, patch_size=4)
    return {name: value for name, value in settings.items() if name != "model_type"}


def _timm(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    small = {"img_size": SIDE, "patch_size": 4, "depth": BLOCKS, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
    return timm.create_model(name, pretrained=False, **{**small, **options})


def _timm_without_cls() -> nn.Module:
    return _timm("vit_base_patch16_siglip_224")


def _open_clip(**vision: Any) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    settings = {"image_size": SIDE, "layers": BLOCKS, "width": 32, "head_width": 8, "patch_size": 4, **vision}
    text = {"context_length": 16, "vocab_size": 40, "width": 32, "heads": 4, "layers": 2}
    return open_clip.CLIP(embed_dim=16, vision_cfg=settings, text_cfg=text)


def _open_clip_visual() -> nn.Module:
    return _open_clip().visual


MAKERS = {
    "clip": _clip,
    "siglip": _siglip,
    "timm": _timm,
    "timm_without_cls": _timm_without_cls,
    "open_clip": _open_clip,
    "open_clip_visual": _open_clip_visual,
    "vit": _vit,
    "dinov2": functools.partial(_vit, "Dinov2"),
    "whole_clip": _whole_clip,
}
NORMS = ("norm1", "ln_1", "layer_norm1", "layernorm_before")
WITHOUT_CLS = ("siglip", "timm_without_cls")


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MAKERS[name]().float().eval()
    randomise(model)
    return model


shared = functools.cache(fresh)


def pixels(pictures: int = 2) -> Tensor:
    return torch.randn(pictures, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def seen(model: nn.Module, given: Tensor) -> Tensor:
    """The embedding of every picture."""
    return embedding(model, given)


def embedding(model: nn.Module, given: Tensor) -> Tensor:
    """The same, to be differentiated."""
    names = ("encode_image", "get_image_features")
    encode = next((getattr(model, name) for name in names if hasattr(model, name)), model)
    output = encode(given)
    return output if isinstance(output, Tensor) else output.pooler_output


def blocks_of(model: Any) -> nn.ModuleList:
    trunk = getattr(model, "visual", model)
    if hasattr(trunk, "transformer"):
        return trunk.transformer.resblocks
    if hasattr(trunk, "blocks"):
        return trunk.blocks
    root = getattr(trunk, "vision_model", trunk)
    encoder = getattr(root, "encoder", root)
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


@torch.no_grad()
def hidden_of(model: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the first block and what comes out of the last one, (B, n, D), a CLS token first."""
    caught: list[Tensor] = []
    blocks = blocks_of(model)
    handles = [
        blocks[0].register_forward_pre_hook(lambda module, args: caught.append(args[0])),
        blocks[-1].register_forward_hook(lambda module, args, output: caught.append(output)),
    ]
    try:
        seen(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return caught[0], caught[1]


@torch.no_grad()
def attended(block: Any, hidden: Tensor, first: int) -> tuple[Tensor, loops.Block]:
    """What comes out of a block for one picture (1, n, D), and queries, keys and values by its weights."""
    normed = next(getattr(block, name) for name in NORMS if hasattr(block, name))(hidden)
    attention = next(getattr(block, name) for name in ("attn", "self_attn", "attention") if hasattr(block, name))
    if hasattr(attention, "qkv"):
        parts = attention.qkv(normed).chunk(3, dim=-1)
    elif hasattr(attention, "in_proj_weight"):
        parts = nn.functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    else:
        parts = tuple(getattr(attention, name)(normed) for name in ("q_proj", "k_proj", "v_proj"))
    heads = [part[0].unflatten(1, (HEADS, -1)).transpose(0, 1).double().numpy() for part in parts]
    out = block(hidden, None) if hasattr(block, "self_attn") else block(hidden)
    out = out[0] if isinstance(out, tuple) else out
    patches, scale = out[0, first:].double().numpy(), heads[0].shape[-1] ** -0.5
    made = loops.Block(query=heads[0], key=heads[1], value=heads[2], scale=scale, first=first, patches=patches)
    return out, made


every_case = pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in MAKERS for method in METHODS if method != "flowcut" or name not in WITHOUT_CLS],
)


@every_case
@pytest.mark.parametrize(("keep", "k"), [(0.3, 19), (0.1, 6), (7, 7), (63, 63)])
def test_exactly_the_budget_is_left(name: str, method: str, keep: float | int, k: int) -> None:
    """By the report, and by the sequence that comes out."""
    model = shared(name)
    with vtprune.pruning(model, method, keep=keep) as pruner:
        assert pruner.last is None
        _, hidden = hidden_of(model, pixels())
        report = model.vtprune.last
        assert hidden.shape[1] == k + (name not in WITHOUT_CLS)
        assert report.counts[-1] == k
        assert len(report.counts) == BLOCKS
        assert report.keep.shape == report.sizes.shape == (2, k)
        assert (report.keep.diff(dim=1) > 0).all()
        assert report.summary().startswith(f"{method}: kept {2 * k} of {2 * PATCHES} patches of 2 pictures")


@every_case
def test_it_is_an_encoder_pruned_by_hand(name: str, method: str) -> None:
    """Block after block by the loops, from queries, keys and values that are made here of the weights."""
    model = shared(name)
    with vtprune.pruning(model, method, keep=19) as pruner:
        begin, end = hidden_of(model, pixels(1))
        kept = pruner.last.keep[0].tolist()
    first, walk, hidden = int(name not in WITHOUT_CLS), loops.Walk(PATCHES), begin
    for number, count in enumerate(loops.counts_of(method, PATCHES, 19, BLOCKS)):
        out, block = attended(blocks_of(model)[number], hidden, first)
        rows = walk.advance(block.patches, loops.cut_of(method, walk, block, count, number))
        hidden = torch.cat([out[:, :first], torch.from_numpy(rows).float()[None]], dim=1)
    assert kept == walk.alive
    torch.testing.assert_close(end, hidden, atol=1e-4, rtol=1e-4)


@every_case
def test_the_report_accounts_for_every_patch(name: str, method: str) -> None:
    """Every patch is in one that stays or lost; sizes count those, all 64 where everything merges."""
    model = shared(name)
    with vtprune.pruning(model, method, keep=0.3) as pruner:
        seen(model, pixels())
        report = pruner.last
    for keep, into, sizes in zip(report.keep.tolist(), report.into.tolist(), report.sizes.tolist()):
        assert [into[patch] for patch in keep] == keep
        assert sizes == [into.count(patch) for patch in keep]
        assert sum(sizes) + into.count(-1) == PATCHES
        assert method != "tome" or sum(sizes) == PATCHES
        assert method in ("tome", "mustdrop_vision") or sizes == [1.0] * 19


@every_case
@pytest.mark.parametrize("keep", [1.0, 10_000])
def test_keeping_everything_changes_no_bit(name: str, method: str, keep: float | int) -> None:
    model = shared(name)
    plain = seen(model, pixels())
    with vtprune.pruning(model, method, keep=keep):
        assert torch.equal(seen(model, pixels()), plain)


@every_case
def test_unwrapping_leaves_nothing_behind(name: str, method: str) -> None:
    model = fresh(name)
    plain, before = seen(model, pixels()), fingerprint(model)
    assert vtprune.wrap(model, method, keep=0.3) is model
    assert not torch.allclose(seen(model, pixels()), plain)
    assert vtprune.unwrap(model) is model
    assert fingerprint(model) == before
    assert torch.equal(seen(model, pixels()), plain)


@every_case
def test_a_batch_is_its_pictures_alone(name: str, method: str) -> None:
    model, given = shared(name), pixels(3)
    with vtprune.pruning(model, method, keep=0.3) as pruner:
        together = seen(model, given)
        kept = pruner.last.keep.tolist()
        for number in range(3):
            alone = seen(model, given[number : number + 1])
            assert pruner.last.keep.tolist() == kept[number : number + 1]
            torch.testing.assert_close(alone, together[number : number + 1], atol=1e-4, rtol=1e-4)


@every_case
def test_gradients_reach_the_pixels_of_what_was_merged_or_kept(name: str, method: str) -> None:
    model, given = shared(name), pixels(1).requires_grad_()
    with vtprune.pruning(model, method, keep=0.3):
        embedding(model, given).sum().backward()
    assert given.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MAKERS)
def test_what_an_encoder_alone_refuses(name: str) -> None:
    model = fresh(name)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=r"'fastervlm' prunes in front .*: tome, flowcut, mustdrop_vision, zero"):
        vtprune.wrap(model, "fastervlm")
    with pytest.raises(InvalidOption, match="keep"):
        vtprune.wrap(model, "tome", keep=0)
    if name in WITHOUT_CLS:
        with pytest.raises(UnsupportedModel, match="by the CLS token"):
            vtprune.wrap(model, "flowcut")
    assert fingerprint(model) == before
    vtprune.wrap(model, "tome")
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UnsupportedCall, match="cannot be copied or pickled"):
            refused(model)
    with pytest.raises(UnsupportedModel, match="wrapped already"):
        vtprune.wrap(model, "tome")
    vtprune.unwrap(model)
    with pytest.raises(UnsupportedModel, match="not wrapped"):
        vtprune.unwrap(model)
    assert torch.equal(seen(copy.deepcopy(model), pixels()), seen(model, pixels()))


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_maps_of_the_patches_between_blocks_are_refused(name: str) -> None:
    model = fresh(name)
    visual = getattr(model, "visual", model)
    mine = visual.__dict__["get_intermediate_layers"] = lambda given: "of the user"
    before = model.forward_intermediates(pixels())
    with vtprune.pruning(model, "tome", keep=0.3):
        for part in (model, visual):
            with pytest.raises(UnsupportedCall, match="unwrap"):
                part.forward_intermediates(pixels())
    assert type(model.forward_intermediates(pixels())) is type(before)
    assert visual.get_intermediate_layers is mine


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "2 tokens in front"),
        ("vit_medium_patch16_reg4_gap_256", {}, "4 tokens in front"),
        ("vit_little_patch16_reg1_gap_256", {}, "no CLS token"),
        ("vit_small_patch16_rope_224", {}, "depends on where patches are"),
        ("eva02_tiny_patch14_224", {}, "depends on where patches are"),
        ("beit_base_patch16_224", {}, "depends on where patches are"),
        ("vit_relpos_small_patch16_224", {}, "depends on where patches are"),
        ("cait_xxs24_224", {}, "of another kind"),
        ("vit_tiny_patch16_224", {"block_fn": "parallel"}, "of another kind"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_timm_models_that_would_be_read_wrongly_are_refused(
    name: str, options: dict[str, Any], why: str, method: str
) -> None:
    if options:
        options = {"block_fn": pytest.importorskip("timm.models.vision_transformer").ParallelScalingBlock}
    model = _timm(name, **options)
    with pytest.raises(UnsupportedModel, match=why):
        vtprune.wrap(model, method)
    assert "vtprune" not in model.__dict__


def test_too_few_blocks_for_a_budget_are_an_error_and_no_lasting_one() -> None:
    """Halved four times, 64 patches are 4."""
    model = shared("clip")
    with vtprune.pruning(model, "tome", keep=3), pytest.raises(InvalidOption, match="leaves 4 patches at least, not 3"):
        seen(model, pixels())
    with vtprune.pruning(model, "tome", keep=4) as pruner:
        seen(model, pixels())
        assert pruner.last.counts == (32, 16, 8, 4)


def test_a_compiled_encoder_is_refused() -> None:
    """Hooks added now would be ignored."""
    model = fresh("clip")
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match="wrap first, then compile"):
        vtprune.wrap(model, "tome", keep=0.5)


@pytest.mark.parametrize(
    "option", [{"per": "part"}, {"positions": "keep"}, {"history": 3}, {"on_report": print}], ids=str
)
def test_options_that_mean_nothing_to_an_encoder_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="nothing else"):
        vtprune.wrap(fresh("clip"), "tome", keep=0.5, **option)
