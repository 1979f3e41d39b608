"""A wrapped model cannot be copied by accident, and saving it writes what it would write unwrapped."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import vtprune
from tests import models
from tests.integration.common import ONE, assert_answers, expect, fingerprint, hooks_of, llava, write
from vtprune.errors import UnsupportedCall

COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda thing: torch.save(thing, io.BytesIO()),
}
HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda model: model,
    "base": lambda model: model.model,
    "language_model": lambda model: model.model.language_model,
    "vision_tower": lambda model: model.model.vision_tower,
    "handle": lambda model: model.vtprune,
}
SHARING = (("copy", "language_model"), ("copy", "vision_tower"))
CONTAINERS: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda model: [model],
    "module list": lambda model: nn.ModuleList([model]),
    "list of the handle": lambda model: [model.vtprune],
}


@pytest.mark.parametrize(
    ("copier", "holder"),
    [pair for pair in itertools.product(COPIERS, HOLDERS) if pair not in SHARING],
)
def test_copying_a_wrapped_model_or_a_hooked_part_is_refused(copier: str, holder: str) -> None:
    model = vtprune.wrap(llava(), "fastervlm")
    with pytest.raises(UnsupportedCall, match="unwrap"):
        COPIERS[copier](HOLDERS[holder](model))
    twin = llava()
    inputs = models.inputs(twin, ONE)
    assert_answers(model, inputs, expect(twin, inputs, "fastervlm"))


@pytest.mark.parametrize("holder", ["language_model", "vision_tower"])
def test_a_shallow_copy_of_a_part_shares_its_hooks_and_loses_them_on_unwrap(holder: str) -> None:
    model = vtprune.wrap(llava(), "fastervlm")
    twin = copy.copy(HOLDERS[holder](model))
    assert hooks_of(twin)
    vtprune.unwrap(model)
    assert hooks_of(twin) == []


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copying_what_holds_a_wrapped_model_is_refused(copier: str, container: str) -> None:
    model = vtprune.wrap(llava(), "fastervlm")
    with pytest.raises(UnsupportedCall, match="unwrap"):
        COPIERS[copier](CONTAINERS[container](model))


def test_an_unwrapped_model_can_be_copied_again() -> None:
    model = vtprune.unwrap(vtprune.wrap(llava(), "fastervlm"))
    inputs = models.inputs("llava", ONE)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert [hooks_of(twin) for twin in twins] == [[], []]
    plain = write(model, inputs).tolist()
    assert [write(twin, inputs).tolist() for twin in twins] == [plain, plain]


def test_state_dict_and_parameters_are_those_of_the_unwrapped_model() -> None:
    model = llava()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()], [name for name, _ in model.named_modules()]
    vtprune.wrap(model, "vtprune")
    write(model, models.inputs(model, ONE))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert ([name for name, _ in model.named_parameters()], [name for name, _ in model.named_modules()]) == names


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_save_pretrained_writes_the_same_files(name: str, tmp_path: Path) -> None:
    model = models.build(name)
    model.save_pretrained(tmp_path / "plain")
    vtprune.wrap(model, "vtprune")
    write(model, models.inputs(model, ONE))
    model.save_pretrained(tmp_path / "wrapped")
    plain, wrapped = (
        {file.name: file.read_bytes() for file in (tmp_path / kind).iterdir()} for kind in ("plain", "wrapped")
    )
    assert wrapped == plain
    assert not any(b"vtprune" in content for content in wrapped.values())


def test_a_model_saved_while_wrapped_loads_unwrapped_and_can_be_wrapped(tmp_path: Path) -> None:
    model = llava()
    inputs = models.inputs(model, ONE)
    expected = expect(model, inputs, "vtprune")
    vtprune.wrap(model, "vtprune").save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    models.settle_generation(loaded, [models.IMAGE, models.VIDEO, models.VISION_START, models.VISION_END])
    assert hooks_of(loaded) == []
    assert not hasattr(loaded, "vtprune")
    assert_answers(vtprune.wrap(loaded, "vtprune"), inputs, expected)


def test_moving_a_wrapped_model_to_another_dtype_keeps_it_wrapped() -> None:
    model = vtprune.wrap(llava(), "fastervlm")
    before = set(fingerprint(model)[""])
    model.to(torch.bfloat16)
    write(model, models.inputs(model, ONE))
    assert model.vtprune.last.kept == 4
    assert set(fingerprint(model)[""]) == before
