"""Processors of towers: pixels are theirs, and those that do not fit are a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.demo import photo_towers
from tests.demo.photo_towers import SIDE, photo
from vtprune.demo.towers import Tower, of_transformers
from vtprune.errors import VtpruneError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"do_normalize": False, "image_mean": None, "image_std": None},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2},
        {"resample": 0},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_processor_whatever_it_leaves_out(options: dict[str, Any]) -> None:
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}, **options)
    tower = of_transformers("vit", photo_towers.of_transformers("ViT"), processor)
    picture = photo(SIDE, SIDE)
    expected = processor(images=picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tower.prepare(picture)[0], expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": {"shortest_edge": 56}, "do_center_crop": False, "crop_size": None}, "expected height and width"),
        ({"size": {"shortest_edge": 56}, "do_center_crop": False}, "expected height and width"),
        ({"crop_size": {"height": 3, "width": 56}}, "no patch fits"),
        ({"crop_size": {"height": -56, "width": 56}}, "no patch fits"),
        ({"resample": 99}, "cannot load"),
        ({"image_mean": None}, "image_mean=None: expected three numbers"),
        ({"image_mean": [0.5]}, "expected three numbers"),
        ({"image_mean": "grey"}, "expected three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "expected no 0"),
        ({"rescale_factor": None}, "cannot load"),
        ({"rescale_factor": "much"}, "cannot load"),
        ({"rescale_factor": 0}, "cannot load"),
    ],
    ids=str,
)
def test_a_stored_processor_that_does_not_fit_is_a_sentence(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    photo_towers.of_transformers("Dinov2", image_size=56).save_pretrained(tmp_path)
    transformers.BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
        tmp_path
    )
    assert Tower.load(str(tmp_path)).framing.size == (56, 56)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    with pytest.raises(VtpruneError, match=words) as caught:
        Tower.load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"patch_size": 0}, {"patch_size": "a"}, {"num_attention_heads": 0}], ids=str)
def test_a_stored_model_that_does_not_fit_is_a_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    photo_towers.of_transformers("Dinov2", image_size=56).save_pretrained(tmp_path)
    transformers.BitImageProcessor().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(VtpruneError):
        Tower.load(str(tmp_path))
