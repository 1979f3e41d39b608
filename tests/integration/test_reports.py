"""Reports: one for every prefill, remembered as asked, and storable as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vtprune
from tests import models
from tests.integration.common import CLIPS_OF, ONE, OTHER, TEXT, kept_of, llava, logits, write
from vtprune import PruneReport

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl")


def test_before_the_first_call_there_is_no_report() -> None:
    model = vtprune.wrap(llava(), "random")
    assert model.vtprune.last is None
    assert list(model.vtprune.history) == []


def test_every_prefill_is_handed_to_the_receiver_once() -> None:
    reports: list[PruneReport] = []
    model = vtprune.wrap(llava(), "random", on_report=reports.append)
    for prompts in (ONE, None, TEXT):
        write(model, models.inputs(model, prompts))
        assert model.vtprune.last is reports[-1]
    assert [len(report.segments) for report in reports] == [1, 3, 0]


def test_the_history_holds_as_many_as_asked_oldest_first() -> None:
    reports: list[PruneReport] = []
    model = vtprune.wrap(llava(), "random", on_report=reports.append, history=3)
    for prompts in (ONE, OTHER, None, ONE):
        logits(model, models.inputs(model, prompts))
    assert len(reports) == 4
    assert [id(report) for report in model.vtprune.history] == [id(report) for report in reports[1:]]


def test_one_report_is_remembered_by_default() -> None:
    model = vtprune.wrap(llava(), "random")
    for prompts in (ONE, None):
        logits(model, models.inputs(model, prompts))
    assert [len(report.segments) for report in model.vtprune.history] == [3]


def test_without_history_the_receiver_still_gets_reports() -> None:
    reports: list[PruneReport] = []
    model = vtprune.wrap(llava(), "random", on_report=reports.append, history=0)
    logits(model, models.inputs(model, ONE))
    assert len(reports) == 1
    assert list(model.vtprune.history) == []
    assert model.vtprune.last is None


def test_a_failed_call_leaves_no_report() -> None:
    model = vtprune.wrap(llava(), "random")
    inputs = models.inputs(model, ONE)
    logits(model, inputs)
    good = model.vtprune.last
    with pytest.raises(vtprune.VtpruneError), model.vtprune.using(protect=[[99]]):
        logits(model, inputs)
    assert model.vtprune.last is good


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["vtprune", "random"])
def test_a_report_is_storable_and_adds_up(name: str, method: str, tmp_path: Path) -> None:
    model = vtprune.wrap(models.build(name), method)
    inputs = models.inputs(model)
    logits(model, inputs)
    report = model.vtprune.last
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["method"] == method
    assert stored["family"] == name
    assert stored["tokens"] == sum(segment["n"] for segment in stored["segments"])
    assert stored["kept"] == sum(segment["k"] for segment in stored["segments"])
    assert [segment["keep"] for segment in stored["segments"]] == kept_of(report)
    assert stored["length_before"] == inputs["attention_mask"].sum(1).tolist()
    removed = sum(stored["length_before"]) - sum(stored["length_after"])
    assert removed == stored["tokens"] - stored["kept"]
    for segment in stored["segments"]:
        grids = [part["grid"][0] * part["grid"][1] for part in segment["parts"]]
        assert sum(grids) == segment["n"]
        assert len(segment["keep"]) == len(segment["taken"]) == segment["k"]
    path = tmp_path / "reports.jsonl"
    report.write_jsonl(path)
    report.write_jsonl(str(path))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [stored, stored]


@pytest.mark.parametrize("name", CLIPS_OF)
def test_a_report_of_clips_is_storable(name: str) -> None:
    model = vtprune.wrap(models.build(name), "vtprune")
    logits(model, models.inputs(model, kind="video"))
    stored = json.loads(json.dumps(model.vtprune.last.to_dict()))
    assert {segment["kind"] for segment in stored["segments"]} == {"video"}
    assert {part["kind"] for segment in stored["segments"] for part in segment["parts"]} == {"frame"}


def test_kv_bytes_saved_are_those_missing_from_the_cache() -> None:
    model = llava()
    inputs = models.inputs(model, ONE)

    def stored() -> int:
        layers = model(**inputs, use_cache=True).past_key_values.layers
        return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))

    full = stored()
    vtprune.wrap(model, "random")
    pruned = stored()
    assert full - pruned == model.vtprune.last.kv_bytes_saved > 0


def test_seconds_are_measured_for_every_part_of_a_prefill() -> None:
    model = vtprune.wrap(llava(), "vtprune")
    logits(model, models.inputs(model, ONE))
    seconds = model.vtprune.last.seconds
    assert {"encode", "layout", "select", "cut", "prefill"} <= set(seconds)
    assert all(value > 0 for value in seconds.values())


def test_the_summary_counts_tokens_pictures_and_separators() -> None:
    model = vtprune.wrap(models.build("llava_next"), "random")
    logits(model, models.inputs(model))
    report = model.vtprune.last
    summary = report.summary()
    assert f"kept {report.kept} of {report.tokens} tokens" in summary
    assert f"{report.separators} separators" in summary
    assert "3 pictures" in summary


def test_the_report_says_which_attention_stands_for_importance() -> None:
    sources = {}
    for name in ("llava", "llava_onevision"):
        model = vtprune.wrap(models.build(name), "fastervlm")
        logits(model, models.inputs(model, ONE))
        sources[name] = model.vtprune.last.importance
        vtprune.wrap(vtprune.unwrap(model), "divprune")
        logits(model, models.inputs(model, ONE))
        assert model.vtprune.last.importance is None
    assert sources == {"llava": "cls_attention", "llava_onevision": "received_attention"}
