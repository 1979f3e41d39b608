"""Training under a wrap: gradients flow through the cut, labels keep their length, the loss is of the short prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts import oracle
from tests.integration.common import kept_positions, llava, logits
from tests.models import BOS, IMAGE, ONE_AND_TWO, PAD

PARTS = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.layers", "lm_head")


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """Every word is a label; pictures, padding and the first token (which only padding could predict) are not."""
    ids = inputs["input_ids"]
    return ids.masked_fill((ids == IMAGE) | (ids == PAD) | (ids == BOS), -100)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.train()
    model.zero_grad()
    output = model(**inputs, labels=labels_of(inputs), use_cache=False)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


@pytest.mark.parametrize("method", ["vtprune", "fastervlm", "divprune", "random"])
def test_gradients_reach_every_part(method: str) -> None:
    model = vtprune.wrap(llava(), method)
    _, found = train_step(model, models.inputs(model))
    for part in PARTS:
        assert any(part in name and bool(grad.abs().sum() > 0) for name, grad in found.items()), part


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_logits_keep_the_length_of_the_labels(name: str) -> None:
    model = vtprune.wrap(models.build(name), "vtprune").train()
    inputs = models.inputs(model)
    output = model(**inputs, labels=labels_of(inputs))
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    assert model.vtprune.last.kept < model.vtprune.last.tokens
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def short_loss(model: nn.Module, inputs: dict[str, Tensor], kept: list[list[int]]) -> Tensor:
    """Cross entropy over the shortened prompts, each run alone without padding, by transformers alone."""
    labels = labels_of(inputs)
    total, count = torch.zeros(()), 0
    pictures = 0
    for row, places in enumerate(kept):
        real = inputs["attention_mask"][row].bool()
        number = len(models.ONE_AND_TWO[row].images)
        alone = {
            "input_ids": inputs["input_ids"][row, real][None],
            "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
            "pixel_values": inputs["pixel_values"][pictures : pictures + number],
        }
        pictures += number
        prompt = oracle.merge(model, alone)
        positions = oracle.compacted(prompt.positions, places)[0]
        hidden = model.model.language_model(
            inputs_embeds=prompt.embeds[:, places],
            position_ids=positions,
            attention_mask=torch.ones(1, len(places), dtype=torch.long),
        ).last_hidden_state
        target = labels[row, real][places]
        predicted = model.lm_head(hidden[0, :-1])
        total = total + nn.functional.cross_entropy(predicted, target[1:], ignore_index=-100, reduction="sum")
        count += int((target[1:] != -100).sum())
    return total / count


def test_loss_and_gradients_equal_those_of_the_shortened_prompts() -> None:
    model = llava().train()
    inputs = models.inputs(model)
    vtprune.wrap(model, "random", history=1)
    loss, found = train_step(model, inputs)
    report = model.vtprune.last
    vtprune.unwrap(model)
    kept = []
    for row in range(len(inputs["input_ids"])):
        real = inputs["attention_mask"][row].bool()
        kept.append(kept_positions(inputs["input_ids"][row, real], only_row(report, row)))
    model.zero_grad()
    by_hand = short_loss(model, inputs, kept)
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand.detach(), rtol=0, atol=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "layers" in name}
    assert any("language_model" in name for name in wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)


def only_row(report: Any, row: int) -> Any:
    """The report as if only one row had been in the call."""

    class Row:
        segments = tuple(segment for segment in report.segments if segment.row == row)

    return Row


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_keeping_everything_gives_the_very_loss_and_gradients(name: str) -> None:
    model = models.build(name)
    inputs = models.inputs(model)
    plain_loss, plain = train_step(model, inputs)
    vtprune.wrap(model, "vtprune", keep=1.0)
    loss, found = train_step(model, inputs)
    assert torch.equal(loss, plain_loss)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    model = models.build(name)
    inputs = models.inputs(model)
    reports: list[Any] = []
    vtprune.wrap(model, "fastervlm", on_report=reports.append)
    loss, plain = train_step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    again, found = train_step(model, inputs)
    assert len(reports) == 2
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-6)
    assert {name for name in plain if "layers" in name} <= set(found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-6)


def test_training_learns_the_labels_under_pruning() -> None:
    model = vtprune.wrap(llava(), "vtprune")
    inputs = models.inputs(model, ONE_AND_TWO)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(float(train_step(model, inputs)[0]))
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_after_training_equals_a_fresh_wrap() -> None:
    model = vtprune.wrap(llava(), "fastervlm")
    inputs = models.inputs(model)
    before = logits(model, inputs)
    train_step(model, inputs)
    model.eval()
    assert torch.equal(logits(model, inputs), before)
