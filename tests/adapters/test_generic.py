"""A sweep over classes no family was written for: pruning works, or is refused with one of our errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests.generic_models import SPECS, build_generic
from tests.models import IMAGE
from vtprune.adapters import family_of
from vtprune.adapters.base import language_model
from vtprune.errors import VtpruneError

NEW_TOKENS = 4
REFUSED = {"granite4_vision", "llama4"}
"""Classes that hide which tokens are visual; every other one is pruned."""
EXTRA = [("ernie4_5_vl_moe", "moe_mm_token_type_ids"), ("gemma4", "per_layer_inputs")]
"""Further inputs (B, L, ...) of the language model."""


@pytest.fixture(params=SPECS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def written(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.generate(**batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)


def test_the_refused_classes_are_swept() -> None:
    assert set(SPECS) >= REFUSED


@pytest.mark.parametrize(("name", "extra"), EXTRA)
def test_further_inputs_per_token_reach_the_language_model_cut_along(name: str, extra: str) -> None:
    model, batch = build_generic(name)
    seen: list[tuple[int, ...]] = []
    lm = language_model(model.model)

    def note(module: nn.Module, args: Any, call: dict[str, Any]) -> None:
        seen.append(tuple(call[extra].shape[:2]))

    with vtprune.pruning(model, "random", keep=0.5) as pruner:
        handle = lm.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(**batch)
        handle.remove()
        assert seen == [(len(batch["input_ids"]), max(pruner.last.length_after))]


def test_runs_unpruned_and_has_the_seam(name: str) -> None:
    model, batch = build_generic(name)
    with torch.no_grad():
        logits = model(**batch).logits
    inner = getattr(model, "model", model)
    assert logits.isfinite().all()
    assert written(model, batch).shape[1] == batch["input_ids"].shape[1] + NEW_TOKENS
    assert hasattr(type(inner), "get_image_features")
    assert language_model(inner) is not None
    assert family_of(model.config).name == "generic"


def test_prunes_or_refuses(name: str, record_property: Callable[[str, object], None]) -> None:
    model, batch = build_generic(name)
    before = written(model, batch)
    try:
        vtprune.wrap(model, "random", keep=0.5)
        pruned = written(model, batch)
    except VtpruneError as error:
        record_property("sweep", (name, f"refused: {type(error).__name__}: {error}"))
        assert name in REFUSED
        return
    assert name not in REFUSED
    kept, total = model.vtprune.last.kept, model.vtprune.last.tokens
    record_property("sweep", (name, f"works: {kept} of {total} tokens kept"))
    assert 0 < kept < total
    assert pruned.shape == before.shape
    vtprune.unwrap(model)
    assert torch.equal(before, written(model, batch))


def test_keeping_all_changes_nothing(name: str) -> None:
    model, batch = build_generic(name)
    before = written(model, batch)
    try:
        vtprune.wrap(model, "random", keep=1.0)
        kept_all = written(model, batch)
    except VtpruneError:
        assert name in REFUSED
        return
    assert torch.equal(before, kept_all)


def test_a_prompt_is_pruned_alike_alone_and_in_a_batch(name: str) -> None:
    model, batch = build_generic(name)
    unpruned = apart(model, batch)
    try:
        vtprune.wrap(model, "random", keep=0.5)
        pruned = apart(model, batch)
    except VtpruneError:
        assert name in REFUSED
        return
    assert pruned < max(1e-4, 4 * unpruned)


@torch.no_grad()
def apart(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """How far the last logits of the second prompt are from those of the prompt alone."""
    return float((model(**batch).logits[1, -1] - model(**second_prompt(batch)).logits[0, -1]).abs().max())


def test_pruned_logits_are_those_of_the_shortened_prompt(name: str) -> None:
    """Kept positions: transformers alone, with everything the language model gets cut to the kept tokens."""
    model, batch = build_generic(name)
    prompt = second_prompt(batch)
    try:
        vtprune.wrap(model, "random", keep=0.5, positions="keep")
        with torch.no_grad():
            pruned = model(**prompt).logits[0, -1]
    except VtpruneError:
        assert name in REFUSED
        return
    visual = (prompt["input_ids"][0] == IMAGE).nonzero()[:, 0]
    kept, first = prompt["input_ids"][0] != IMAGE, 0
    for segment in model.vtprune.last.segments:
        kept[visual[first + segment.keep]] = True
        first += segment.n
    vtprune.unwrap(model)
    torch.testing.assert_close(pruned, shortened(model, prompt, kept.nonzero()[:, 0]), atol=1e-4, rtol=0)


@torch.no_grad()
def shortened(model: nn.Module, prompt: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Last logits of one unpadded prompt whose tokens but the kept ones are cut where the language model begins."""

    def cut(module: nn.Module, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds, positions = call["inputs_embeds"], call.get("position_ids")
        along = {k: v[:, kept] for k, v in call.items() if torch.is_tensor(v) and v.shape[:2] == embeds.shape[:2]}
        positions = torch.arange(embeds.shape[1])[None] if positions is None else positions
        mask = cut_mask(call.get("attention_mask"))
        return args, {**call, **along, "position_ids": positions[..., kept], "attention_mask": mask}

    def cut_mask(mask: Any) -> Any:
        if isinstance(mask, dict):
            return {kind: None if one is None else cut_mask(one) for kind, one in mask.items()}
        if torch.is_tensor(mask) and mask.ndim == 4:
            return mask[:, :, kept][..., kept]
        return torch.ones(1, len(kept), dtype=torch.long)

    handle = language_model(getattr(model, "model", model)).register_forward_pre_hook(cut, with_kwargs=True)
    try:
        return model(**prompt).logits[0, -1]
    finally:
        handle.remove()


def second_prompt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second prompt, which has no padding, with its half of the pixels."""
    return {key: value[len(value) // 2 :] for key, value in batch.items()}
