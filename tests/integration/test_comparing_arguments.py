"""What `compare` and `wrap` take in place of lists and Python numbers, and how often a comparison encodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

import vtprune
from tests import models
from tests.integration.common import ONE, expect, kept_of, llava, logits
from tests.integration.test_compare import counted, tower
from tests.integration.test_ecosystem import lora
from vtprune.errors import InvalidOption
from vtprune.pipeline import Pipeline

KEEPS = (0.5, 3)


def arms(rows: list[vtprune.Comparison]) -> list[tuple[str, float | int]]:
    return [(row.method, row.keep) for row in rows]


def compared(model: nn.Module, *args: Any, **options: Any) -> list[vtprune.Comparison]:
    return vtprune.compare(model, models.inputs(model, ONE), *args, max_new_tokens=2, **options)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_single_budget_is_a_list_of_one(keep: float | int) -> None:
    model = llava()
    rows = compared(model, ["random", "uniform"], keep)
    assert arms(rows) == [("identity", 1.0), ("random", keep), ("uniform", keep)]
    assert kept_of(rows[1].report) == expect(model, models.inputs(model, ONE), "random", keep=keep).kept


def test_a_single_method_is_a_list_of_one() -> None:
    assert arms(compared(llava(), "random", KEEPS)) == [("identity", 1.0), ("random", 0.5), ("random", 3)]


def test_a_single_pipeline_is_a_list_of_one() -> None:
    uniform: Pipeline = vtprune.wrap(llava(), "uniform").vtprune.pipeline
    assert arms(compared(llava(), uniform, 0.5)) == [("identity", 1.0), ("uniform", 0.5)]


def test_a_single_unknown_method_is_named_whole() -> None:
    with pytest.raises(InvalidOption, match="did you mean 'random'"):
        compared(llava(), "randon", 0.5)


def test_no_methods_give_the_unpruned_row_alone() -> None:
    model = llava()
    rows = compared(model, [])
    assert arms(rows) == [("identity", 1.0)]
    assert rows[0].kept == rows[0].tokens > 0
    assert not hasattr(model, "vtprune")


def test_no_budgets_give_the_unpruned_row_alone() -> None:
    assert arms(compared(llava(), ["random"], [])) == [("identity", 1.0)]


@pytest.mark.parametrize("history", [0, 1, 3])
def test_a_comparison_works_whatever_the_history(history: int) -> None:
    model = llava()
    rows = compared(model, ["random"], [0.5], history=history)
    assert arms(rows) == [("identity", 1.0), ("random", 0.5)]
    assert kept_of(rows[1].report) == expect(model, models.inputs(model, ONE), keep=0.5).kept


def test_a_receiver_of_reports_gets_those_of_the_rows() -> None:
    seen: list[vtprune.PruneReport] = []
    rows = compared(llava(), ["random"], [0.5], on_report=seen.append)
    assert [id(report) for report in seen] == [id(row.report) for row in rows]


NUMBERS: dict[str, tuple[Any, int]] = {
    "int64": (np.int64(3), 3),
    "int32": (np.int32(5), 5),
    "float32": (np.float32(0.5), 8),
    "float64": (np.float64(0.5), 8),
    "float16": (np.float16(0.25), 4),
    "an element of an array": (np.array([2, 4])[1], 4),
    "a whole": (np.float32(1.0), 16),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_numpy_are_budgets(number: str) -> None:
    keep, expected = NUMBERS[number]
    model = vtprune.wrap(llava(), "random", keep=keep)
    logits(model, models.inputs(model, ONE))
    assert (model.vtprune.last.kept, model.vtprune.last.tokens) == (expected, 16)
    assert arms(compared(vtprune.unwrap(model), ["random"], keep))[1:] == [("random", keep)]


@pytest.mark.parametrize(
    "keep", [np.int64(0), np.int64(-2), np.float32(0), np.float32(1.5), np.float32("nan"), np.bool_(True)], ids=repr
)
def test_numbers_of_numpy_out_of_range_are_refused(keep: Any) -> None:
    with pytest.raises(InvalidOption, match="keep"):
        vtprune.wrap(llava(), "random", keep=keep)


def test_a_model_with_adapters_encodes_once_too() -> None:
    adapted = lora(llava())
    inputs = models.inputs("llava")
    wanted = [expect(adapted, inputs, method, keep=0.5) for method in ("fastervlm", "vtprune")]
    with counted(tower(adapted.get_base_model())) as calls:
        rows = vtprune.compare(adapted, inputs, ["fastervlm", "vtprune"], [0.5], max_new_tokens=4)
    assert len(calls) == 1
    assert [kept_of(row.report) for row in rows[1:]] == [found.kept for found in wanted]
    assert [row.answer[:, :4].tolist() for row in rows[1:]] == [found.tokens[:, :4].tolist() for found in wanted]


def test_a_base_model_with_adapters_encodes_once_too() -> None:
    adapted = lora(llava())
    with counted(tower(adapted.get_base_model())) as calls:
        rows = vtprune.compare(adapted.get_base_model(), models.inputs("llava"), "fastervlm", 0.5, max_new_tokens=2)
    assert len(calls) == 1
    assert rows[1].kept < rows[1].tokens
