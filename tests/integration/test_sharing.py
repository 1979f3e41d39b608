"""A clip is encoded once for several questions: each row is what it would be alone, and the clip is encoded no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.integration.common import CLIPS_OF, hooks_of, kept_of, logits, write
from tests.models import Prompt
from vtprune.adapters import family_of
from vtprune.errors import UnsupportedCall
from vtprune.runtime.sharing import Shared, encode_shared, joined

CLIP = Prompt(clips=((32, 32, 4),), seed=3)
OTHER = Prompt(clips=((32, 32, 4),), seed=4, text_after=6)
PICTURE = Prompt(images=((30, 64),), seed=5)
PIXELS = ("pixel_values", "pixel_values_videos")
METHODS = ("vtprune", "random", "temporal", "quota", "pyramiddrop")
CASES = [(family, CLIP, OTHER) for family in CLIPS_OF] + [
    (family, PICTURE, replace(PICTURE, seed=6)) for family in ("llava", "llava_next", "llava_onevision", "internvl")
]


def asked(prompt: Prompt, words: int) -> Prompt:
    """The same picture with another question: words behind it are drawn last."""
    return replace(prompt, text_after=words)


def shared_of(model: nn.Module, family: str, prompt: Prompt) -> Shared:
    kind = "video" if prompt.clips else "image"
    return encode_shared(model.model, family_of(model.config), models.inputs(family, (prompt,), kind))[0]


def batch_of(family: str, prompts: list[Prompt], clips: list[Shared]) -> dict[str, Any]:
    kind = "video" if prompts[0].clips else "image"
    inputs = models.inputs(family, prompts, kind)
    rest = {name: value for name, value in inputs.items() if name not in PIXELS}
    return {**rest, "mm_encoder_outputs": joined(clips)}


def frames_of(method: str, model: nn.Module, family: str, prompts: list[Prompt]) -> dict[str, list[Tensor]]:
    """Scores of parts, other ones for every question, where a method reads them."""
    if method != "quota":
        return {}
    with vtprune.pruning(model, "identity", keep=1.0) as pruner:
        logits(model, models.inputs(family, prompts, "video" if prompts[0].clips else "image"))
        counts = [len(segment.parts) for segment in pruner.last.segments]
    return {"frames": [torch.arange(n).roll(prompt.text_after).float() for n, prompt in zip(counts, prompts)]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "one", "other"), CASES, ids=[f"{c[0]}-{len(c[1].clips)}" for c in CASES])
def test_rows_that_share_a_clip_are_those_alone(method: str, family: str, one: Prompt, other: Prompt) -> None:
    model = models.build(family)
    prompts = [asked(one, 4), asked(other, 5), asked(one, 7), asked(one, 4)]
    kind = "video" if one.clips else "image"
    scores = frames_of(method, model, family, prompts)
    alone = []
    with vtprune.pruning(model, method, keep=0.5) as pruner:
        for number, prompt in enumerate(prompts):
            with pruner.using(**{name: [rows[number]] for name, rows in scores.items()}):
                written = write(model, models.inputs(family, (prompt,), kind)).tolist()[0]
            alone.append((written, kept_of(pruner.last)[0]))
        first, second = shared_of(model, family, one), shared_of(model, family, other)
        batch = batch_of(family, prompts, [first, second, first, first])
        again = patch.object(type(model.model), f"get_{kind}_features", side_effect=AssertionError("encoded again"))
        with again, pruner.using(**scores):
            written = write(model, batch).tolist()
        assert list(zip(written, kept_of(pruner.last))) == alone


@pytest.mark.parametrize("family", ["llava", "video_llava"])
def test_what_was_pruned_inside_the_encoder_is_shared_as_well(family: str) -> None:
    model = models.build(family)
    one = PICTURE if family == "llava" else CLIP
    kind = "video" if one.clips else "image"
    prompts = [asked(one, 4), asked(one, 7)]
    with vtprune.pruning(model, "flowcut", keep=0.5) as pruner:
        alone = []
        for prompt in prompts:
            alone.append((write(model, models.inputs(family, (prompt,), kind)).tolist()[0], kept_of(pruner.last)[0]))
        shared = shared_of(model, family, one)
        written = write(model, batch_of(family, prompts, [shared] * 2)).tolist()
        assert list(zip(written, kept_of(pruner.last))) == alone


def test_beams_over_shared_clips() -> None:
    model = models.build("llava_next_video")
    prompts = [asked(CLIP, 4), asked(OTHER, 5)]
    with vtprune.pruning(model, "vtprune", keep=0.5):
        plain = write(model, models.inputs("llava_next_video", prompts, "video"), num_beams=2)
        clips = [shared_of(model, "llava_next_video", prompt) for prompt in (CLIP, OTHER)]
        assert torch.equal(write(model, batch_of("llava_next_video", prompts, clips), num_beams=2), plain)


def test_without_pixels_there_is_nothing_to_share() -> None:
    model = models.build("llava")
    inputs = models.inputs("llava", (PICTURE,))
    with vtprune.pruning(model, "vtprune"), pytest.raises(UnsupportedCall, match="no pixels"):
        encode_shared(model.model, family_of(model.config), {"input_ids": inputs["input_ids"]})


def test_clips_of_other_sizes_tell_themselves_apart() -> None:
    model = models.build("video_llava")
    longer = Prompt(clips=((32, 32, 8),), seed=3)
    with vtprune.pruning(model, "vtprune"):
        shapes = [shared_of(model, "video_llava", prompt).shape for prompt in (CLIP, OTHER, longer)]
    assert shapes[0] == shapes[1] != shapes[2]


def test_unpruned_is_the_model_as_it_was() -> None:
    model = models.build("llava_next_video")
    row = models.inputs("llava_next_video", (CLIP,), "video")
    plain, clean = logits(model, row), hooks_of(model)
    with vtprune.pruning(model, "vtprune", keep=0.25) as pruner:
        short = logits(model, row)
        report = pruner.last
        with pytest.raises(KeyError), vtprune.unpruned(model) as inside:
            assert inside is model and hooks_of(model) == clean and not hasattr(model, "vtprune")
            assert torch.equal(logits(model, row), plain)
            raise KeyError
        assert pruner.last is report and model.vtprune is pruner
        assert torch.equal(logits(model, row), short) and not torch.equal(short, plain)
    with vtprune.unpruned(model):
        assert torch.equal(logits(model, row), plain)
    assert hooks_of(model) == clean
