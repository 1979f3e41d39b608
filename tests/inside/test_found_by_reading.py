"""What a hostile reading found: each of these was wrong once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import vtprune
from tests import models
from tests.inside.common import model_of
from tests.models import Prompt
from vtprune.adapters import family_of
from vtprune.errors import InvalidOption
from vtprune.inside.layers import Passage
from vtprune.inside.stacks import Entry
from vtprune.inside.walk import Walk
from vtprune.runtime.encoder import encode_once
from vtprune.schedule import Schedule
from vtprune.seam import find_base
from vtprune.stages.spread import SpatialSpread
from vtprune.types import Budget, Ordinal, Part, VisualTokens


def chat(model, first, later, **options):
    """Logits of two turns and two more words, on one cache."""
    cache, found = None, []
    with torch.no_grad():
        for inputs in (first, later):
            ids = inputs["input_ids"]
            past = 0 if cache is None else cache.get_seq_length()
            mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long)
            out = model(**{**inputs, "attention_mask": mask}, past_key_values=cache, use_cache=True, **options)
            cache = out.past_key_values
            found.append(out.logits[:, -1])
        for _ in range(2):
            length = cache.get_seq_length()
            mask = torch.ones(len(ids), length + 1, dtype=torch.long)
            out = model(
                input_ids=torch.full((len(ids), 1), 7), attention_mask=mask, past_key_values=cache, use_cache=True
            )
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1)


def test_padding_behind_a_cut_is_remembered_over_a_later_picture():
    """Prompts of one length with one and two pictures: rows differ behind the cut only, and the next turn is even."""
    model = model_of("llava")
    one, two = Prompt(images=((32, 32),), seed=1), Prompt(images=((32, 32), (32, 32)), seed=2)
    lengths = [models.inputs(model, (prompt,))["input_ids"].shape[1] for prompt in (one, two)]
    one = Prompt(images=((32, 32),), seed=1, text_after=one.text_after + lengths[1] - lengths[0])
    again = Prompt(images=((32, 32),), seed=3)
    with vtprune.pruning(model, "fastv", keep=0.6):
        both = chat(model, models.inputs(model, (one, two)), models.inputs(model, (again, again)))
        for row, prompt in enumerate((one, two)):
            alone = chat(model, models.inputs(model, (prompt,)), models.inputs(model, (again,)))
            assert (both[row] - alone[0]).abs().max() < 1e-4


def test_places_far_apart_keep_their_distances():
    """Sixteen parts of 8 x 8: four of five tokens of the last one, spread from its corner on, lie in its corners."""
    parts = tuple(Part(start=64 * n, stop=64 * n + 64, kind="frame", grid=(8, 8)) for n in range(16))
    tokens = VisualTokens(features=torch.zeros(1, 1024, 1), parts=parts, ordinals=(Ordinal(segment=0),))
    scores = torch.full((1, 1024), float("-inf"))
    scores[0, 960:] = 0
    scores[0, 960] = 1
    chosen = SpatialSpread()(tokens, scores, 4, None)[0].tolist()
    assert set(chosen) == {960, 960 + 7, 960 + 56, 960 + 63}


def test_a_longer_chat_on_the_same_pictures_asks_its_own_question():
    """Pictures encoded once, the whole chat again without a cache: the last question decides, as if encoded anew."""
    model = model_of("llava")
    prompt = Prompt(images=((32, 32),), seed=1)
    inputs = models.inputs(model, (prompt,))
    inner = find_base(model)
    shared = encode_once(model, inner, family_of(inner.config), inputs, readings={})
    more = torch.arange(5, 15)[None]
    longer = {
        name: torch.cat([inputs[name], more if name == "input_ids" else torch.ones_like(more)], dim=1)
        for name in ("input_ids", "attention_mask")
    }
    with torch.no_grad(), vtprune.pruning(model, "fastv", keep=0.6) as pruner:
        given = shared()
        model(**given)
        first = pruner.last.segments[0].keep.tolist()
        model(**{**given, **longer})
        second = pruner.last.segments[0].keep.tolist()
        model(**{**inputs, **longer})
        fresh = pruner.last.segments[0].keep.tolist()
    assert second == fresh != first


def test_nothing_of_a_prefill_is_held_by_a_cycle():
    model = model_of("llava")
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(weakref.ref(kwargs["inputs_embeds"])), with_kwargs=True, prepend=True
    )
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), vtprune.pruning(model, "fastv", keep=0.6):
            for _ in range(3):
                model(**models.inputs(model, (Prompt(images=((32, 32),), seed=1),)))
        assert [reference() for reference in seen] == [None] * 3
    finally:
        gc.enable()
        hook.remove()


def test_a_number_of_tokens_is_taken_where_it_can_be_and_told_where_not():
    horizon = Schedule.of(((0.5, 0.25), (0.75, 0.0)), depth=28)
    assert horizon.counts(16, Budget(keep=64))[:2] == (16, 16)
    with pytest.raises(InvalidOption, match=r"keep=64 of 2880 tokens .* 180 at least"):
        Schedule.of(((0.0625, 0.5),), depth=32).counts(2880, Budget(keep=64))


def test_a_calibration_that_nothing_uses_is_refused(tmp_path):
    from tests.test_calibration import made

    model = model_of("llava")
    made(model).write(tmp_path / "mine.json")
    for method, options in (("divprune", {}), ("fastv", {}), ("fastv", {"keep": 1.0, "debias": True})):
        with pytest.raises(InvalidOption, match="uses nothing of it"):
            vtprune.wrap(model, method, **{"keep": 0.6, **options}, calibration=tmp_path / "mine.json")
    half = models.build("llava", layers=6).to(torch.bfloat16)
    made(models.build("llava", layers=6)).write(tmp_path / "half.json")
    vtprune.wrap(half, "fastv", keep=0.6, debias=True, calibration=tmp_path / "half.json")


def test_a_mask_for_flash_attention_is_not_cut_again():
    """Behind a cut that leaves the longest row as it was, the mask says which keys are real, as it was made."""
    real = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    whole = torch.ones(2, 6, dtype=torch.bool)
    rows, none = torch.tensor([[5], [5]]), torch.zeros(2, 6, dtype=torch.long)
    entry = Entry(valid=whole, lengths=(6, 6), left_padded=True, rows=rows, real=rows > 0)
    walk = Walk(stages=(), layers=(1,), depth=6, entry=entry, stacks=[])
    walk.index = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 4, 5]])
    walk.valid, walk.lengths, walk.slots, walk.stored, walk.widths = real, [(6, 4)], [none], [real], [6]
    model = model_of("llava")
    with vtprune.pruning(model, "fastv", keep=0.6) as pruner:
        cutter = pruner._deep.cutter
        cutter._implementation = "flash_attention_2"
        cutter.begin(Passage(walk=walk, cached=(0,)))
        tables = torch.zeros(1, 6, 8), torch.zeros(1, 6, 8)
        given = {"attention_mask": whole.long(), "position_embeddings": tables, "other": torch.arange(12).view(2, 6)}
        _, changed = cutter._enter(2, model.model.language_model.layers[2], (torch.zeros(2, 6, 4),), given)
        cutter.end()
    assert torch.equal(changed["attention_mask"].bool(), real)
    assert changed["other"].tolist() == [[0, 1, 2, 3, 4, 5], [6, 6, 6, 7, 10, 11]]
