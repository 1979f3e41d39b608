"""Methods that prune inside the vision encoder of a VLM: against a tower run by hand, and in every kind of call."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts import oracle
from tests.eval.common import batch_of
from tests.eval.common import llava as subject
from tests.fidelity import loops_encoder as loops
from tests.integration.common import (
    FORBIDDEN,
    STEPS,
    assert_answers,
    expect,
    fingerprint,
    kept_of,
    logits,
    write,
)
from tests.models import IMAGE, VIDEO, Prompt
from vtprune.adapters import family_of
from vtprune.catalog import build
from vtprune.errors import MissingEvidence, UnsupportedCall, UnsupportedModel
from vtprune.eval.arms import arm_of
from vtprune.eval.questions import draw_items
from vtprune.runtime.encoder import encode_once
from vtprune.runtime.evidence import readings_of

METHODS = ("tome", "flowcut", "mustdrop_vision", "zero_tprune")
PLACES = (("llava", "image"), ("video_llava", "image"), ("video_llava", "video"))
REFUSING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_next", "llava_next_video", "llava_onevision")
PATCHES, BLOCKS, FRAMES = 64, 4, 4
PROMPTS = {
    "image": (Prompt(images=((32, 32),), seed=1), Prompt(images=((32, 32),), text_after=7, seed=9)),
    "video": (Prompt(clips=((32, 32, FRAMES),), seed=3), Prompt(clips=((32, 32, FRAMES),), text_after=7, seed=4)),
}

every_method = pytest.mark.parametrize("method", METHODS)
every_place = pytest.mark.parametrize(("name", "kind"), PLACES, ids=lambda value: value)


def fresh(name: str, tower: str = "clip") -> nn.Module:
    """A tiny model whose features come after four blocks on 64 patches."""
    vision = models.vision_config(
        f"{tower}_vision_model", vision_use_head=False, num_hidden_layers=BLOCKS + 1, patch_size=4
    )
    return models.build(name, vision_config=vision)


shared = functools.cache(fresh)


def rows_of(model: nn.Module, kind: Any) -> list[dict[str, Tensor]]:
    return [models.inputs(model, (prompt,), kind) for prompt in PROMPTS[kind]]


@torch.no_grad()
def walked(tower: Any, pixels: Tensor, method: str, k: int) -> tuple[Tensor, loops.Walk]:
    """Hidden states (1 + k, D) of one picture, CLS first, block after block, pruned by the loops."""
    hidden, walk = tower.pre_layrnorm(tower.embeddings(pixels[None])), loops.Walk(PATCHES)
    for number, count in enumerate(loops.counts_of(method, PATCHES, k, BLOCKS)):
        layer = tower.encoder.layers[number]
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        query, key, value = (
            projection(normed)[0].unflatten(1, (attention.num_heads, -1)).transpose(0, 1).double().numpy()
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        hidden = layer(hidden, None)
        patches = hidden[0, 1:].double().numpy()
        block = loops.Block(query=query, key=key, value=value, scale=attention.scale, first=1, patches=patches)
        rows = walk.advance(patches, loops.cut_of(method, walk, block, count, number))
        hidden = torch.cat([hidden[:, :1], torch.from_numpy(rows).float()[None]], dim=1)
    return hidden[0], walk


def by_hand(
    model: Any, row: dict[str, Tensor], kind: str, method: str, keep: float | int
) -> tuple[Any, list[int], Any]:
    """The prompt with what a hand-run tower makes of its pictures, the positions that stay, and the kept tokens."""
    inner = model.model
    clip = kind == "video"
    tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.video_tower if clip else inner.image_tower
    pixels = row["pixel_values_videos"][0] if clip else row["pixel_values"]
    least = keep if isinstance(keep, int) else math.ceil(keep * PATCHES) if clip else math.floor(keep * PATCHES + 0.5)
    total = len(pixels) * PATCHES
    k = keep if isinstance(keep, int) else math.floor(keep * total + 0.5)
    visual = (row["input_ids"][0] == (VIDEO if clip else IMAGE)).nonzero()[:, 0].tolist()
    every = [walked(tower, picture, method, least) for picture in pixels]
    chosen = sorted(loops.best(np.concatenate([walk.worth() for _, walk in every]), k))
    rows = {i * (PATCHES + 1): hidden[0] for i, (hidden, _) in enumerate(every)} if clip else {}
    for token in chosen:
        hidden, walk = every[token // PATCHES]
        place = token + 1 + token // PATCHES if clip else token
        rows[place] = hidden[1 + walk.alive.index(token % PATCHES)]
    at = [visual[place] for place in sorted(rows)]
    with torch.no_grad():
        projected = inner.multi_modal_projector(torch.stack([rows[place] for place in sorted(rows)])[None])
    kept = sorted(set(range(row["input_ids"].shape[1])) - set(visual) | set(at))
    return oracle.replaced(oracle.merge(model, row), at, projected), kept, chosen


@pytest.mark.parametrize("keep", [0.3, 20])
@every_method
@every_place
def test_it_is_a_tower_pruned_by_hand(name: str, kind: str, method: str, keep: float | int) -> None:
    """What the language model gets, and what it answers."""
    model = shared(name)
    row, caught = rows_of(model, kind)[0], []
    prompt, kept, chosen = by_hand(model, row, kind, method, keep)
    expected, _ = oracle.decode(model, prompt, kept, steps=STEPS, compact=True, forbidden=[*FORBIDDEN, models.EOS])
    with vtprune.pruning(model, method, keep=keep) as pruner:
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        try:
            written = write(model, row)
        finally:
            handle.remove()
        assert kept_of(pruner.last) == [chosen]
    torch.testing.assert_close(caught[0], prompt.embeds[:, kept], atol=1e-4, rtol=1e-4)
    assert written[0].tolist() == expected


@every_method
@every_place
def test_the_report_says_which_token_took_over_which(name: str, kind: str, method: str) -> None:
    """Every token of a picture is in one that stays, or lost; sizes count them, as the loops do."""
    model = shared(name)
    row = rows_of(model, kind)[0]
    with vtprune.pruning(model, method, keep=0.3) as pruner:
        write(model, row)
        segment = pruner.last.segments[0]
    keep, into, sizes = segment.keep.tolist(), segment.into.tolist(), segment.sizes.tolist()
    assert [into[token] for token in keep] == keep
    assert sizes == [into.count(token) for token in keep]
    assert set(into) == {*keep, -1} if -1 in into else set(into) == set(keep)
    assert segment.merged == sum(sizes) - len(keep)
    assert (segment.merged > 0) == (method in ("tome", "mustdrop_vision"))
    if kind == "image":
        inner = model.model
        tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.image_tower
        _, walk = walked(tower, row["pixel_values"][0], method, segment.k)
        assert keep == walk.alive
        assert [[token for token in range(PATCHES) if into[token] == place] for place in keep] == walk.holds


@pytest.mark.parametrize("keep", [0.1, 0.5, 7, 63])
@every_method
@every_place
def test_exactly_the_budget_is_kept(name: str, kind: str, method: str, keep: float | int) -> None:
    model = shared(name)
    n = PATCHES * (FRAMES if kind == "video" else 1)
    k = keep if isinstance(keep, int) else math.floor(keep * n + 0.5)
    with vtprune.pruning(model, method, keep=keep) as pruner:
        for row in rows_of(model, kind):
            write(model, row)
            assert [(segment.n, segment.k) for segment in pruner.last.segments] == [(n, k)]


@every_method
@pytest.mark.parametrize("per", ["part", "prompt"])
def test_budgets_of_frames_and_prompts_are_exact(method: str, per: Any) -> None:
    """Two pictures, or four frames, of 19 each, or of 38 and 77 together."""
    pictures = Prompt(images=((32, 32), (32, 32)), seed=6)
    for name, kind, prompt in (("llava", "image", pictures), ("video_llava", "video", PROMPTS["video"][0])):
        model = shared(name)
        with vtprune.pruning(model, method, keep=0.3, per=per) as pruner:
            write(model, models.inputs(model, (prompt,), kind))
            parts = 2 if kind == "image" else FRAMES
            assert pruner.last.kept == (parts * 19 if per == "part" else math.floor(0.3 * parts * PATCHES + 0.5))


@every_method
def test_of_a_clip_that_may_keep_few_tokens_every_frame_keeps_some(method: str) -> None:
    """Not only the first ones, although each frame has as many left in the encoder as the whole clip may keep."""
    model = shared("video_llava")
    with vtprune.pruning(model, method, keep=4 * FRAMES) as pruner:
        write(model, rows_of(model, "video")[0])
        (kept,) = kept_of(pruner.last)
    assert [sum(token // PATCHES == frame for token in kept) for frame in range(FRAMES)] == [4] * FRAMES


@pytest.mark.parametrize("keep", [1.0, 10_000])
@every_method
@every_place
def test_keeping_everything_changes_no_bit(name: str, kind: str, method: str, keep: float | int) -> None:
    model = shared(name)
    row = rows_of(model, kind)[0]
    plain = logits(model, row)
    with vtprune.pruning(model, method, keep=keep):
        assert torch.equal(logits(model, row), plain)


@every_method
@every_place
def test_unwrapping_leaves_nothing_behind(name: str, kind: str, method: str) -> None:
    model = fresh(name)
    row = rows_of(model, kind)[0]
    plain, before = logits(model, row), fingerprint(model)
    with vtprune.pruning(model, method, keep=0.3):
        assert not torch.equal(logits(model, row), plain)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, row), plain)


@every_method
def test_a_model_may_be_wrapped_before_its_first_call(method: str) -> None:
    """Transformers puts hooks of its own on the blocks at the first call, which must see what is left."""
    new, used = fresh("llava"), shared("llava")
    row = rows_of(used, "image")[0]
    logits(used, row)
    with vtprune.pruning(new, method, keep=0.3), vtprune.pruning(used, method, keep=0.3):
        assert torch.equal(logits(new, row), logits(used, row))


@every_method
@every_place
def test_a_batch_is_its_rows_alone_and_calls_do_not_see_each_other(name: str, kind: Any, method: str) -> None:
    model = shared(name)
    together = models.inputs(model, PROMPTS[kind], kind)
    rows = rows_of(model, kind)
    with vtprune.pruning(model, method, keep=0.3) as pruner:
        alone = [(write(model, row).tolist(), kept_of(pruner.last)) for row in rows]
        assert alone[0][1] != alone[1][1], "the pictures differ"
        assert write(model, together).tolist() == alone[0][0] + alone[1][0]
        assert kept_of(pruner.last) == alone[0][1] + alone[1][1]
        again = [(write(model, row).tolist(), kept_of(pruner.last)) for row in rows]
        assert again == alone


@every_method
def test_what_is_gone_cannot_be_brought_back(method: str) -> None:
    """Tokens forced in would be projections of nothing: it says so, and goes on."""
    model = shared("llava")
    row = rows_of(model, "image")[0]
    expected = expect(model, row, method, keep=0.3)
    with vtprune.pruning(model, method, keep=0.3) as pruner:
        for evidence in ({"protect": [[0]]}, {"forbid": [[0]]}, {"survivors": [torch.rand(PATCHES)]}):
            with pruner.using(**evidence), pytest.raises(UnsupportedCall, match="inside the encoder"):
                write(model, row)
        assert_answers(model, row, expected)


@pytest.mark.parametrize("name", REFUSING)
@every_method
def test_families_that_stitch_or_merge_are_refused(name: str, method: str) -> None:
    model = _built(name)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=f"'{method}' prunes inside the encoder"):
        vtprune.wrap(model, method)
    assert fingerprint(model) == before


_built = functools.cache(models.build)


def test_without_a_cls_token_flowcut_is_refused_and_the_others_work() -> None:
    model = fresh("llava", "siglip")
    with pytest.raises(UnsupportedModel, match=r"by the CLS token, and the image encoder of LlavaModel .* has none"):
        vtprune.wrap(model, "flowcut")
    row = rows_of(model, "image")[0]
    for method in set(METHODS) - {"flowcut"}:
        assert len(expect(model, row, method, keep=0.3).kept[0]) == 19


@every_method
def test_features_encoded_elsewhere_are_refused(method: str) -> None:
    """Whole ones, those of another method or budget, and cut ones where nothing is cut; its own are taken."""
    model = shared("llava")
    row = rows_of(model, "image")[0]
    family, readings = family_of(model.config), readings_of(build(method))
    whole = encode_once(model, model.model, family, row, readings=readings)
    other = METHODS[METHODS.index(method) - 1]
    rest = {name: value for name, value in row.items() if name != "pixel_values"}
    encoded = {}
    for key, wrapped, keep in (("own", method, 0.3), ("method", other, 0.3), ("budget", method, 0.5)):
        with vtprune.pruning(model, wrapped, keep=keep), torch.no_grad():
            encoded[key] = {
                **rest,
                "mm_encoder_outputs": {"image": model.model.get_image_features(row["pixel_values"])},
            }
    expected = expect(model, row, method, keep=0.3)
    with vtprune.pruning(model, method, keep=0.3):
        for given in (whole(), encoded["method"], encoded["budget"]):
            with pytest.raises(MissingEvidence, match="inside the encoder"):
                write(model, given)
        assert_answers(model, encoded["own"], expected)
    for plain, keep in (("divprune", 0.3), (method, 1.0)):
        with vtprune.pruning(model, plain, keep=keep), pytest.raises(MissingEvidence, match="inside the encoder"):
            write(model, encoded["own"])


def test_compare_and_the_arms_of_an_evaluation_take_them() -> None:
    model = shared("llava")
    row = rows_of(model, "image")[0]
    rows = vtprune.compare(model, row, METHODS, [0.3], max_new_tokens=STEPS)
    assert [(own.method, own.kept) for own in rows] == [("identity", PATCHES), *((method, 19) for method in METHODS)]
    for own in rows[1:]:
        assert kept_of(own.report) == expect(model, row, own.method, keep=0.3).kept
    batch = batch_of(subject(), draw_items("test", 0, 2))
    for method in METHODS:
        answers = arm_of(method)(batch, 0.5)
        assert answers.kept == (8,) * len(batch.items)
        assert all(answers.words)
