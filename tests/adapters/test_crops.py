"""Crops that were stitched: a budget per part is one of every crop, wherever padding was taken off."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import vtprune
from tests import models
from tests.integration.common import logits
from tests.models import Prompt
from vtprune.adapters import family_of
from vtprune.adapters.base import Encoding
from vtprune.adapters.packing import crop_ends

SIZES = [(30, 64), (60, 64), (30, 92), (92, 20), (9, 64), (64, 64), (64, 40)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def packed(name: str, size: tuple[int, int], **options: Any) -> tuple[Any, list[int]]:
    """The parts of a picture, and the crop that each token of the last one shows, by transformers' own packing."""
    model = models.build(name, **options)
    inputs = models.inputs(model, (Prompt(images=(size,), seed=1),))
    with torch.no_grad():
        features = model.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        ).pooler_output
    encoding = Encoding(
        kind="image",
        lengths=tuple(len(entry) for entry in features),
        stacked=False,
        sizes=tuple(map(tuple, inputs["image_sizes"].tolist())),
        pixels=tuple(inputs["pixel_values"].shape),
    )
    family = family_of(model.config)
    parts = family.parts(model.model, encoding)[0]
    crops, patches = inputs["pixel_values"].shape[1], parts[0].tokens
    shown = torch.arange(float(crops))[:, None, None].expand(crops, patches, 1)
    rows = family.rows(model.model, shown, encoding)[0][:, 0]
    tokens = rows[parts[0].stop :]
    return parts, tokens[~tokens.isnan()].round().int().tolist()


@every_size
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_crops_end_where_transformers_stitched_them(name: str, size: tuple[int, int]) -> None:
    parts, shown = packed(name, size)
    stitched = parts[-1]
    rows, columns = stitched.crops
    grid = np.array(shown).reshape(stitched.grid)
    assert (rows[0], rows[-1]) == (0, stitched.grid[0])
    assert (columns[0], columns[-1]) == (0, stitched.grid[1])
    found = [
        set(grid[top:bottom, left:right].ravel().tolist())
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]
    assert all(len(own) == 1 for own in found)
    assert len(set.union(*found)) == len(found) == len(set(shown))


@every_size
def test_a_budget_per_part_is_one_of_every_crop(size: tuple[int, int]) -> None:
    model = vtprune.wrap(models.build("llava_next"), "divprune", keep=3, per="part")
    logits(model, models.inputs(model, (Prompt(images=(size,), seed=1),)))
    segment = model.vtprune.last.segments[0]
    parts, shown = packed("llava_next", size)
    first = parts[0].tokens
    kept = segment.keep.tolist()
    assert sum(token < first for token in kept) == 3
    count = {crop: shown.count(crop) for crop in set(shown)}
    taken = [shown[token - first] for token in kept if token >= first]
    assert {crop: taken.count(crop) for crop in count} == {crop: min(3, n) for crop, n in count.items()}


def test_ends_by_hand() -> None:
    """Two crops of 24: whole; of 36 left, 6 are off both ends; all scaled to a third; a crop of nothing but padding."""
    assert crop_ends(24, 2, 48, 48) == (0, 24, 48)
    assert crop_ends(24, 2, 36, 36) == (0, 18, 36)
    assert crop_ends(24, 2, 36, 12) == (0, 6, 12)
    assert crop_ends(24, 3, 20, 20) == (0, 20)
    assert crop_ends(24, 1, 10, 10) == (0, 10)


def test_crops_of_different_pictures_are_stacked_and_told_apart() -> None:
    """A batch keeps of every picture what it keeps alone, merged tokens in their crops too."""
    model = vtprune.wrap(models.build("llava_next"), "visionzip", keep=4, per="part", contextual=0.5)
    prompts = [Prompt(images=(size,), seed=seed) for seed, size in enumerate([(60, 64), (30, 64), (64, 64)])]
    alone = []
    for prompt in prompts:
        logits(model, models.inputs(model, (prompt,)))
        alone.append(model.vtprune.last.segments[0])
    logits(model, models.inputs(model, tuple(prompts)))
    for one, other in zip(alone, model.vtprune.last.segments):
        assert one.keep.tolist() == other.keep.tolist()
        assert one.into.tolist() == other.into.tolist()
        assert one.sizes.tolist() == [one.into.tolist().count(token) for token in one.keep.tolist()]
