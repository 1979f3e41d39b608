"""Settings that authors published: each can be handed to `wrap`, and where there are none it is known why."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from vtprune.catalog import build, describe, list_families, list_methods
from vtprune.types import Budget

WITHOUT_LLAVA = {
    "fopru_rank": "which ratios on which models is not verified",
    "fopru_row": "as fopru_rank",
    "hiprune": "known from a port only, without budgets",
    "todre_select": "LLaVA-NeXT, Qwen2.5-VL and InternVL2",
    "idpruner": "Qwen2.5-VL only",
    "scope": "known from a port only, without budgets",
    "dart": "known from ports only, inside the language model",
    "vflowopt_select": "LLaVA-OneVision only",
    "prumerge_plus": "known from ports and from another paper's baseline only",
    "tome": "image classification",
    "mustdrop_vision": "merges above a threshold; its budgets are those of the stages inside the language model",
    "todre": "as todre_select",
    "dyvte": "its gate decides, there are no budgets",
    "information_horizon": "the shares of its stages are not public",
    "vflowopt": "as vflowopt_select",
    "quota": "LLaVA-Video only, for a clip of 64 frames",
    "zero_tprune": "image classification",
    "blindsight": "Qwen2-VL, Qwen2.5-VL and Gemma 3, by thresholds that are not public",
}
"""Methods of a paper, and why none of its budgets is one for LLaVA-1.5."""


def settings(line: str) -> Iterator[dict[str, Any]]:
    """Every combination of the alternatives in `keep=64 | 32, per="part"`."""
    pairs = [pair.split("=", 1) for pair in line.split(", ")]
    choices = [[(name, ast.literal_eval(value)) for value in values.split(" | ")] for name, values in pairs]
    return map(dict, itertools.product(*choices))


def test_settings_combine_alternatives() -> None:
    found = list(settings('keep=64 | 0.5, per="part"'))
    assert found == [{"keep": 64, "per": "part"}, {"keep": 0.5, "per": "part"}]


@pytest.mark.parametrize("name", list_methods())
def test_every_setting_can_be_built(name: str) -> None:
    card = describe(name)
    assert card.published.keys() <= set(list_families())
    for line in card.published.values():
        for setting in settings(line):
            assert "keep" in setting
            assert setting.keys() <= {"keep", "per", *card.parameters}
            Budget(**{option: setting.pop(option) for option in ("keep", "per") if option in setting})
            build(name, setting)


def test_papers_have_budgets_for_llava_but_for_those_named() -> None:
    cards = [describe(name) for name in list_methods()]
    assert {card.name for card in cards if card.arxiv and "llava" not in card.published} == WITHOUT_LLAVA.keys()
    assert [card.name for card in cards if card.published and not card.arxiv] == []
