"""What evidence is called: one name for one thing to read, whatever its parameters."""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests import models
from tests.integration.common import ONE, kept_of, llava
from vtprune.catalog import build
from vtprune.errors import InvalidOption
from vtprune.readings import Reading
from vtprune.stages.rules import ClsOrReceived, EncoderFeatures, PageRank, SinkRows
from vtprune.stages.sensitivity import ProbedSensitivity


def test_names_tell_parameters_and_places_apart() -> None:
    made = [
        Reading(rule=ClsOrReceived()),
        Reading(rule=ClsOrReceived(), at=0.416),
        Reading(rule=ClsOrReceived(), at=0.417),
        Reading(rule=ClsOrReceived(), since=0.417),
        Reading(rule=SinkRows(threshold=1.5)),
        Reading(rule=SinkRows(threshold=2.5)),
        Reading(rule=PageRank(steps=3)),
        Reading(rule=ProbedSensitivity(seed=0)),
        Reading(rule=ProbedSensitivity(seed=1)),
    ]
    assert len({reading.name for reading in made}) == len(made)
    assert [made[i].name for i in (0, 1, 3, 4)] == [
        "importance",
        "importance@0.416",
        "importance@0.417+",
        "sink_attention(threshold=1.5)",
    ]


def test_two_settings_of_one_method_are_compared_by_their_own_evidence() -> None:
    """Encoded once, each reads what it would read alone."""
    model = llava()
    inputs = models.inputs(model, ONE)
    settings = [build("zoo_prune", {"probes": 1, "seed": seed}) for seed in (0, 1)]
    alone = []
    for pipeline in settings:
        with vtprune.pruning(model, pipeline, keep=4) as pruner, torch.no_grad():
            model(**inputs)
            alone.append(kept_of(pruner.last))
    rows = vtprune.compare(model, inputs, settings, [4], max_new_tokens=1)
    assert [kept_of(row.report) for row in rows[1:]] == alone
    assert alone[0] != alone[1]


def test_blocks_of_a_tower() -> None:
    reading = Reading(rule=ClsOrReceived(), since=2 / 3)
    assert list(reading.blocks(24, 22)) == list(range(16, 23))
    assert list(Reading(rule=ClsOrReceived()).blocks(24, 22)) == [22]
    assert list(Reading(rule=ClsOrReceived(), at=1.0).blocks(24, 22)) == [23]
    assert list(Reading(rule=ClsOrReceived(), at=0.375).blocks(24, 22)) == [9]
    assert list(Reading(rule=ClsOrReceived(), since=1.0).blocks(6, 4)) == [4]


@pytest.mark.parametrize("given", [{"at": 1.5}, {"since": -0.1}, {"at": True}, {"at": 0.1, "since": 0.2}], ids=str)
def test_places_that_are_none_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(InvalidOption):
        Reading(rule=ClsOrReceived(), **given)


def test_what_is_read_at_the_projector_has_no_block() -> None:
    with pytest.raises(InvalidOption, match="not taken from a block"):
        Reading(rule=EncoderFeatures(), at=0.5)
