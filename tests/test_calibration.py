"""Calibrations: what is fitted, what a file brings to a method, and for which model it is taken."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import vtprune
from tests import models
from vtprune.calibration import Calibration, Trend, quick_fingerprint
from vtprune.cli import main
from vtprune.errors import InvalidOption
from vtprune.eval.calibrating import cubic_of, exponential_of, inflections_of, resampled

PLACES = np.linspace(0, 1, 128)


def made(model, **changes):
    """A calibration of a model with six layers."""
    trends = [
        Trend(rows=rows, layer=layer, exponential=(layer + shift,), cubic=(0.1 * layer, 0.0, shift))
        for rows, shift in (("last", 0.0), ("text", 0.5))
        for layer in range(5)
    ]
    measured = Calibration(
        model="mine",
        fingerprint=quick_fingerprint(model.model),
        data="some",
        pictures=3,
        versions="none",
        depth=6,
        trends=tuple(trends),
        inflections=(1, 2, 4),
        horizon=4,
    )
    return replace(measured, **changes)


@pytest.fixture
def llava():
    return models.build("llava", layers=6)


@pytest.fixture
def path(llava, tmp_path):
    made(llava).write(tmp_path / "mine.json")
    return tmp_path / "mine.json"


def test_a_file_reads_as_it_was_written(llava, path):
    assert Calibration.read(path) == made(llava)


@pytest.mark.parametrize(
    ("method", "constants"),
    [
        ("fastv", [(0.0,)]),  # the last token, in the layer before the cut in front of layer 1
        ("pyramiddrop", [(2.0,), (3.0,), (5.0,)]),  # in layers 2, 3 and 5 themselves, of which 5 was not measured
        ("sparsevlm", [(0.5,), (2.5,)]),  # raters are text; two of its three points fall on layer 1
        ("sparsevlm_plus", [(0.5,), (2.5,)]),  # the same, where attention is divided before
    ],
)
def test_every_drop_point_gets_the_constants_of_the_layer_it_looks_at(llava, path, method, constants):
    with vtprune.pruning(llava, method, keep=0.6, debias=True, calibration=path) as pruner:
        stages = [pruner.pipeline.inside[number] for number in pruner._deep.schedule.stages]
    found = [stage.picks[0].debiasers[0].constants for stage in stages]
    assert found == [constant if constant != (5.0,) else None for constant in constants]


def test_another_form_takes_its_own_constants(llava, path):
    with vtprune.pruning(llava, "pyramiddrop", keep=0.6, debias="cubic", calibration=path) as pruner:
        assert pruner.pipeline.inside[0].picks[0].debiasers[0].constants == (0.2, 0.0, 0.0)


def test_what_was_measured_is_the_default_of_parameters(llava, path):
    with vtprune.pruning(llava, "adaptinfer", keep=0.6, calibration=path) as pruner:
        assert pruner._deep.schedule.layers == (1, 2, 4)
    with vtprune.pruning(llava, "adaptinfer", keep=0.6, calibration=path, points=(0.5, 0.7, 0.9)) as pruner:
        assert pruner._deep.schedule.layers == (3, 4, 5)
    with vtprune.pruning(llava, "information_horizon", keep=0.3, calibration=path) as pruner:
        assert pruner._deep.schedule.layers == (2, 4)
        assert pruner._deep.schedule.shares[-1] == 0


def test_another_model_is_refused(path):
    other = models.build("llava", layers=6, seed=1)
    with pytest.raises(InvalidOption, match="one of mine"):
        vtprune.wrap(other, "fastv", keep=0.6, calibration=path)
    assert "vtprune" not in other.__dict__
    with pytest.raises(InvalidOption, match="one of mine"):
        vtprune.wrap(models.build("llava", layers=5), "fastv", keep=0.6, calibration=path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "trends": [{}]}'])
def test_a_damaged_file_is_refused(llava, tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InvalidOption, match="vtprune calibrate"):
        vtprune.wrap(llava, "fastv", keep=0.6, calibration=path)
    with pytest.raises(InvalidOption, match="cannot be read"):
        vtprune.wrap(llava, "fastv", keep=0.6, calibration=tmp_path / "none.json")


def test_known_trends_are_found():
    noise = np.exp(0.05 * np.random.default_rng(0).normal(size=128))
    assert exponential_of(np.exp(2.3 * PLACES) * noise) == (pytest.approx(2.3, abs=0.05),)
    assert exponential_of(np.exp(-2.3 * PLACES)) == (0.0,)
    cubic = 1 + 1.7 * PLACES - 4.8 * PLACES**2 + 4.9 * PLACES**3
    assert cubic_of(7 * cubic) == pytest.approx((1.7, -4.8, 4.9), abs=1e-6)
    assert cubic_of(PLACES - 0.5) == (0.0, 0.0, 0.0)


def test_curves_of_any_length_are_scaled_to_one():
    for length in (1, 5, 576):
        assert resampled(np.full(length, 3.0)) == pytest.approx(np.full(128, 1 / 128))


def test_attention_that_turns_is_an_inflection():
    """Attention moves to the other end between layers 2 and 3, and a little between 6 and 7 of eight."""
    early, late = np.exp(-3 * PLACES), np.exp(3 * PLACES)
    curves = np.array([early, early, early, late, late, late, late * np.exp(-PLACES)])
    curves /= curves.sum(axis=1, keepdims=True)
    assert inflections_of(curves, 8)[:1] == (4,) or 4 in inflections_of(curves, 8)
    assert set(inflections_of(curves, 8)) >= {4, 7}


def test_the_command_writes_a_file_that_its_model_takes(tmp_path, capsys):
    out = tmp_path / "tiny.json"
    assert main(["calibrate", "--samples", "3", "--batch", "3", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "attention shifts in front of layers" in told
    data = json.loads(out.read_text())
    assert (data["model"], data["pictures"], data["depth"], len(data["trends"])) == ("tiny:llava", 3, 8, 14)
    model, _ = vtprune.load_tiny("llava")
    vtprune.wrap(model, "fastv", keep=0.5, debias=True, calibration=out)


@pytest.mark.parametrize(
    ("lines", "trouble"),
    [("", "no questions"), ("{}\n", "line 1"), ('{"image": "none.png", "question": "what ?"}\n', "none.png")],
)
def test_the_command_names_what_is_wrong_with_the_data(tmp_path, capsys, lines, trouble):
    (tmp_path / "in.jsonl").write_text(lines)
    code = main(["calibrate", "--data", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.json")])
    assert code != 0
    assert trouble in capsys.readouterr().err
