"""Calibrations: what is fitted, what a file brings to a method, and for which model it is taken."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import vtprune
from tests import models
from tests.models import Prompt
from vtprune.adapters import family_of
from vtprune.adapters.base import no_tower
from vtprune.calibration import FEW, Calibration, Setting, Trend, quick_fingerprint
from vtprune.catalog import build
from vtprune.cli import main
from vtprune.errors import InvalidOption
from vtprune.eval.calibrating import cubic_of, exponential_of, inflections_of, resampled

PLACES = np.linspace(0, 1, 128)
SETTINGS = tuple(
    Setting(
        keep=keep,
        kept=16 * keep,
        shares=(1.2 * keep, keep, 0.8 * keep),
        threshold=threshold,
        recycled=0.25,
        cosine=0.9,
        published=0.8,
        trials=3,
    )
    for keep, threshold in ((0.5, 5.0), (0.125, 7.0))
)


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
        pictures=64,
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
    made(llava, settings=SETTINGS).write(path)
    assert Calibration.read(path) == made(llava, settings=SETTINGS)
    assert json.loads(path.read_text())["pictures"] == 64


def test_a_file_from_before_settings_were_searched_has_none(llava, path):
    old = json.loads(path.read_text())
    del old["settings"]
    path.write_text(json.dumps({**old, "format": 1}))
    assert Calibration.read(path) == made(llava)
    with pytest.raises(InvalidOption, match="'vflowopt' uses nothing of it"):
        vtprune.wrap(llava, "vflowopt", keep=0.5, calibration=path)
    path.write_text(json.dumps({**old, "format": 3}))
    with pytest.raises(InvalidOption, match=r"format 3, this version reads 1 and 2.*vtprune calibrate"):
        vtprune.wrap(llava, "fastv", keep=0.6, debias=True, calibration=path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shares": [0.3, 0.4, 0.2]},
        {"shares": [0.3, 0.2]},
        {"shares": 0.3},
        {"threshold": 0.0},
        {"recycled": 1.0},
        {"keep": 1.0},
        {"kept": 0.0},
        {"cosine": float("nan")},
        {"more": 1},
    ],
    ids=str,
)
def test_settings_that_the_method_does_not_take_are_refused(llava, path, wrong):
    made(llava, settings=SETTINGS).write(path)
    data = json.loads(path.read_text())
    data["settings"][1].update(wrong)
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidOption, match="cannot be read"):
        Calibration.read(path)


@pytest.mark.parametrize(
    ("method", "constants"),
    [
        ("fastv", [(0.0,)]),  # the last token, in the layer before the cut in front of layer 1
        ("pyramiddrop", [(2.0,), (3.0,), (5.0,)]),  # in layers 2, 3 and 5 themselves, of which 5 was not measured
        ("sparsevlm", [(0.5,), (2.5,)]),  # raters are text; two of its three points fall on layer 1
    ],
)
def test_every_drop_point_gets_the_constants_of_the_layer_it_looks_at(llava, path, method, constants):
    with vtprune.pruning(llava, method, keep=0.6, debias=True, calibration=path) as pruner:
        stages = [pruner.pipeline.inside[number] for number in pruner._deep.schedule.stages]
    found = [stage.picks[0].debiasers[0].constants for stage in stages]
    assert found == [constant if constant != (5.0,) else None for constant in constants]


def test_what_was_not_measured_each_picture_tells_itself(llava, path):
    """Massive heads, attention that is divided and weighted words have other trends than the mean."""
    with vtprune.pruning(llava, "adaptinfer", keep=0.6, debias=True, calibration=path) as pruner:
        assert all(stage.picks[0].debiasers[0].constants is None for stage in pruner.pipeline.inside)
    with pytest.raises(InvalidOption, match="uses nothing of it"):
        vtprune.wrap(llava, "sparsevlm_plus", keep=0.6, debias=True, calibration=path)


def test_parts_of_a_scorer_know_their_trends(llava, path):
    """Of TransPrune the attention of text in the layer behind each cut; what layers change has no trend."""
    with vtprune.pruning(llava, "transprune", keep=0.6, debias=True, calibration=path) as pruner:
        scorers = [pick.scorer for stage in pruner.pipeline.inside for pick in stage.picks]
    assert {scorer.second.debiaser.constants for scorer in scorers if hasattr(scorer.second, "debiaser")} > {None}
    assert not any(hasattr(scorer.first, "debiaser") for scorer in scorers)


def test_other_weights_behind_the_same_embeddings_are_another_model(path):
    """As of a fine-tuned model whose embeddings were frozen."""
    other = models.build("llava", layers=6)
    for name, weight in other.named_parameters():
        if "embed_tokens" not in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    with pytest.raises(InvalidOption, match="another model"):
        vtprune.wrap(other, "fastv", keep=0.6, debias=True, calibration=path)


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


@pytest.mark.parametrize(
    ("keep", "number"), [(0.5, 0), (0.9, 0), (0.26, 0), (0.25, 0), (0.24, 1), (0.01, 1), (8, 0), (5, 0), (3, 1), (1, 1)]
)
@pytest.mark.filterwarnings("ignore:keep=1 keeps a single token")
def test_vflowopt_gets_the_settings_found_for_the_nearest_budget(llava, path, keep, number):
    """By ratio: 0.25 lies in the middle of 0.125 and 0.5, and of 2 and 8 tokens of 16 each 4."""
    made(llava, settings=SETTINGS).write(path)
    with vtprune.pruning(llava, "vflowopt", keep=keep, calibration=path) as pruner:
        assert pruner.pipeline == build("vflowopt", SETTINGS[number].parameters)


def test_the_settings_hold_the_average_and_can_be_overruled(llava, path):
    made(llava, settings=SETTINGS).write(path)
    inputs = models.inputs(llava, (Prompt(images=((32, 32),), seed=1),))
    with torch.no_grad(), vtprune.pruning(llava, "vflowopt", keep=0.5, calibration=path) as pruner:
        llava(**inputs)
        assert abs(pruner.last.average - 8) <= 0.5
        assert pruner.pipeline.before == 0.6
    with vtprune.pruning(llava, "vflowopt", keep=0.5, calibration=path, threshold=3.0) as pruner:
        assert pruner.pipeline == build("vflowopt", {**SETTINGS[0].parameters, "threshold": 3.0})
    with vtprune.pruning(llava, "vflowopt", keep=0.5, calibration=path, debias=True) as pruner:
        assert (pruner.method, pruner.pipeline.before) == ("vflowopt+recency", 0.6)
    with pytest.raises(InvalidOption, match="one of mine"):
        vtprune.wrap(models.build("llava", layers=6, seed=1), "vflowopt", keep=0.5, calibration=path)


def test_a_pipeline_has_its_parameters_already(llava, path):
    made(llava, settings=SETTINGS).write(path)
    for method in ("vflowopt", "adaptinfer", "information_horizon"):
        with pytest.raises(InvalidOption, match="uses nothing of it"):
            vtprune.wrap(llava, build(method), keep=0.5, calibration=path)


def test_a_file_of_few_pictures_warns_once(llava, path):
    made(llava, pictures=FEW - 1).write(path)
    with pytest.warns(UserWarning) as caught:
        vtprune.wrap(llava, "fastv", keep=0.6, debias=True, calibration=path)
    (warning,) = caught
    assert f"mine.json' was measured on {FEW - 1} pictures" in str(warning.message)
    assert warning.filename == __file__
    llava(**models.inputs(llava, (Prompt(images=((32, 32),), seed=1),)))
    vtprune.unwrap(llava)
    made(llava, pictures=FEW).write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtprune.wrap(llava, "fastv", keep=0.6, debias=True, calibration=path)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (
            "information_horizon",
            {"keep": 0.9},
            r"reaches .* to 0.6667. Its horizon came from the calibration: take a smaller keep, or pass horizon=...",
        ),
        (
            "adaptinfer",
            {"keep": 0.1},
            r"reaches 0.1667 to 1. Its points came from the calibration: take a larger keep, or pass points=...",
        ),
        (
            "information_horizon",
            {"keep": 0.3, "deep": 0.8},
            r"above deep=0.8, below 1. Of the calibration: horizon=0.66.*; pass your own, or leave yours out",
        ),
    ],
)
def test_errors_tell_what_came_from_the_calibration(llava, path, method, options, says):
    with pytest.raises(InvalidOption, match=says):
        vtprune.wrap(llava, method, **options, calibration=path)
    assert "vtprune" not in llava.__dict__


def test_so_does_one_that_comes_with_the_prompt(llava, path):
    vtprune.wrap(llava, "adaptinfer", keep=2, calibration=path)
    with pytest.raises(
        InvalidOption, match=r"that is 3 at least. Its points came from .* a larger keep, or pass points"
    ):
        llava(**models.inputs(llava, (Prompt(images=((32, 32),), seed=1),)))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("information_horizon", {"keep": 0.9, "horizon": 0.667}),
        ("adaptinfer", {"keep": 0.1, "points": (0.5, 0.7, 0.9)}),
        ("information_horizon", {"keep": 0.9, "horizon": 0.1, "deep": 0.5}),
        ("adaptinfer", {"keep": 0.6, "pints": (0.5, 0.7, 0.9)}),
    ],
)
def test_what_was_given_is_not_blamed_on_the_calibration(llava, path, method, options):
    with pytest.raises(InvalidOption) as caught:
        vtprune.wrap(llava, method, **options, calibration=path)
    assert "calibration" not in str(caught.value)


def test_another_model_is_told_before_a_budget_out_of_reach(path):
    with pytest.raises(InvalidOption, match="one of mine"):
        vtprune.wrap(models.build("llava", layers=6, seed=1), "adaptinfer", keep=0.1, calibration=path)


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
    arguments = ["--samples", "3", "--batch", "3", "--keep", "0.25", "0.5", "0.25", "--trials", "2"]
    assert main(["calibrate", *arguments, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "attention shifts in front of layers" in told
    assert "3 pictures are few" in told
    assert "vflowopt, keep 0.5: cosine 0.9" in told
    data = json.loads(out.read_text())
    assert (data["model"], data["pictures"], data["depth"], len(data["trends"])) == ("tiny:llava", 3, 8, 14)
    assert [(own["keep"], own["trials"]) for own in data["settings"]] == [(0.25, 2), (0.5, 2)]
    assert all(own["cosine"] >= own["published"] > 0.9 for own in data["settings"])
    model, _ = vtprune.load_tiny("llava")
    with pytest.warns(UserWarning, match="measured on 3 pictures"):
        vtprune.wrap(model, "fastv", keep=0.5, debias=True, calibration=out)


@pytest.fixture
def without_evidence(monkeypatch):
    monkeypatch.setattr("vtprune.api.family_of", lambda config: dataclasses.replace(family_of(config), tower=no_tower))


@pytest.mark.usefixtures("without_evidence")
def test_a_model_that_does_not_bear_the_method_is_measured_without_it(tmp_path, capsys):
    """Unless the search was asked for, which is refused before any work."""
    out = tmp_path / "tiny.json"
    asked = ["calibrate", "--samples", "1", "--out", str(out)]
    assert main([*asked, "--trials", "4"]) == 2
    assert "'vflowopt' needs" in capsys.readouterr().err
    assert not out.exists()
    assert main(asked) == 0
    assert "warning: no settings of vflowopt are searched: method 'vflowopt' needs" in capsys.readouterr().err
    assert Calibration.read(out).settings == ()


@pytest.mark.parametrize(
    ("arguments", "trouble"),
    [
        (["--keep", "1.0"], "--keep 1.0: expected a share of the tokens above 0 and below 1"),
        (["--keep", "0.5", "64"], "--keep 64: expected a share of the tokens"),
        (["--keep", "lots"], "--keep lots: expected a share such as 0.25"),
        (["--trials", "-1"], "--seed and --trials: expected 0 or more"),
        (["--seed", "-1"], "--seed and --trials: expected 0 or more"),
    ],
)
def test_the_command_names_what_is_wrong_with_a_search(tmp_path, capsys, arguments, trouble):
    assert main(["calibrate", *arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert trouble in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "trouble"),
    [("", "no questions"), ("{}\n", "line 1"), ('{"image": "none.png", "question": "what ?"}\n', "none.png")],
)
def test_the_command_names_what_is_wrong_with_the_data(tmp_path, capsys, lines, trouble):
    (tmp_path / "in.jsonl").write_text(lines)
    code = main(["calibrate", "--data", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.json")])
    assert code != 0
    assert trouble in capsys.readouterr().err
