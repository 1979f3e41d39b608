"""What the law files share: the cells method x family, their models, inputs and the comparison of logits.

A test of a law takes `case` through `cells(...)` and carries `pytest.mark.law`; the count at the end is made of these.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts import oracle
from tests.models import CLIPS, IMAGE_FAMILIES, ONE_AND_TWO, QWEN, VIDEO_FAMILIES, Prompt

Kind = Literal["image", "video"]
METHODS = tuple(vtprune.list_methods())
FAMILIES = IMAGE_FAMILIES
CORE_FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl")
CORE_METHODS = ("random", "fastervlm", "divprune", "vtprune")
NEUTRAL = ("identity",)
"""Methods that refuse any budget but 1.0."""
TOLERANCE = 1e-5
"""Largest difference of fp32 logits, as a share of the largest logit (at least of 1)."""
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method on a family, with pictures or clips."""

    method: str
    family: str
    kind: Kind

    @property
    def core(self) -> bool:
        """In the default selection: every method on three families, every family on four methods."""
        return self.family in CORE_FAMILIES or self.method in CORE_METHODS

    @property
    def keep(self) -> float:
        """A budget that prunes, where the method prunes at all."""
        return 1.0 if self.method in NEUTRAL else 0.4

    @property
    def mrope(self) -> bool:
        """Ids of (t, h, w)."""
        return self.family in QWEN

    @property
    def model(self) -> nn.Module:
        """Shared by all tests of the process: leave it unwrapped."""
        return model_of(self.family)

    @property
    def forbidden(self) -> list[int]:
        """Tokens that decoding never writes."""
        return self.model.generation_config.suppress_tokens

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Two rows of different length, with one and two pictures (or clips)."""
        return ONE_AND_TWO if self.kind == "image" else CLIPS

    @property
    def batch(self) -> dict[str, Tensor]:
        """Both rows, left padded."""
        return self.inputs(self.prompts)

    @property
    def rows(self) -> list[dict[str, Tensor]]:
        """Each row alone, unpadded."""
        return [self.inputs((prompt,)) for prompt in self.prompts]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What a processor would return."""
        return dict(_inputs(self.family, tuple(prompts), self.kind))

    def pruned(self, **options: Any) -> AbstractContextManager[Any]:
        """`vtprune.pruning` of the shared model with this method, at a budget that prunes unless told."""
        return vtprune.pruning(self.model, self.method, **{"keep": self.keep, **options})


def cells(methods: Sequence[str] = METHODS, kinds: Sequence[Kind] = ("image", "video")) -> pytest.MarkDecorator:
    """Parametrise a test over method x family; what is not in the default selection is marked `matrix`."""
    every = [
        Case(method=method, family=family, kind=kind)
        for family in FAMILIES
        for kind in kinds
        if kind == "image" or family in VIDEO_FAMILIES
        for method in methods
    ]
    marks = {True: (), False: (pytest.mark.matrix,)}
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=f"{c.method}-{c.family}-{c.kind}", marks=marks[c.core]) for c in every]
    )


PRUNING_METHODS = tuple(method for method in METHODS if method not in NEUTRAL)


def fresh_model(family: str) -> nn.Module:
    """A tiny model of the family, which never stops early; always with the same weights."""
    model = models.build(family, layers=2)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def model_of(family: str) -> nn.Module:
    """The model of the family that the tests of a process share."""
    return fresh_model(family)


@functools.cache
def _inputs(family: str, prompts: tuple[Prompt, ...], kind: Kind) -> dict[str, Tensor]:
    return models.inputs(model_of(family), prompts, kind)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """New tokens (B, steps) and raw logits (B, steps, V) of a generation, its full sequences and its cache."""

    tokens: Tensor
    logits: Tensor
    sequences: Tensor
    cache: Any


def answer(model: nn.Module, inputs: dict[str, Any], *, steps: int = STEPS, **mode: Any) -> Answer:
    """Greedy unless told otherwise."""
    out = model.generate(**inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **mode)
    return Answer(
        tokens=out.sequences[:, inputs["input_ids"].shape[1] :],
        logits=torch.stack(out.logits, dim=1),
        sequences=out.sequences,
        cache=out.past_key_values,
    )


@functools.cache
def unpruned(family: str, kind: Kind) -> Answer:
    """The answer of the model that was never wrapped to its batch."""
    case = Case(method="identity", family=family, kind=kind)
    return answer(case.model, case.batch)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest expected logit (at least of 1)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Logits that agree within `TOLERANCE`."""
    assert distance(actual, expected) <= TOLERANCE


def placeholders(model: nn.Module) -> set[int]:
    """Token ids of pictures and clips."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    return {getattr(model.config, name, None) for name in names} - {None}


def kept_positions(case: Case, report: Any, row: int, ids: Sequence[int]) -> list[int]:
    """Prompt positions that a report says are kept, for the unpadded ids of a row: text, separators and choices."""
    wanted = placeholders(case.model)
    visual = [position for position, token in enumerate(ids) if token in wanted]
    kept = [position for position, token in enumerate(ids) if token not in wanted]
    first = 0
    for segment in report.segments:
        if segment.row != row:
            continue
        positions = visual[first : first + segment.parts[-1].stop]
        first += len(positions)
        separators = {offset for part in segment.parts for offset in part.separators}
        candidates = [position for offset, position in enumerate(positions) if offset not in separators]
        kept += [positions[offset] for offset in separators]
        kept += [candidates[index] for index in segment.keep.tolist()]
    assert first == len(visual), "the report must account for every placeholder"
    return sorted(kept)


def choices(report: Any, row: int) -> list[list[int]]:
    """Kept indices of every picture of a row."""
    return [segment.keep.tolist() for segment in report.segments if segment.row == row]


def by_hand(
    case: Case, inputs: dict[str, Tensor], kept: list[int], *, compact: bool, steps: int = STEPS
) -> tuple[list[int], Tensor]:
    """Tokens and logits of one unpadded row, by the oracle."""
    prompt = oracle.merge(case.model, inputs)
    return oracle.decode(case.model, prompt, kept, steps=steps, compact=compact, forbidden=case.forbidden)
