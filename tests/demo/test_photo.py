"""Patches of a photo that methods keep on a tower by itself: evidence, choices and reports against loops by hand."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.demo.photo_towers import BLOCKS, MAKERS, REGISTERS, ROWS, WITHOUT_CLS, build, by_hand, photo
from vtprune import viz
from vtprune.catalog import build as pipeline_of
from vtprune.catalog import list_methods
from vtprune.demo.photo import choose, methods
from vtprune.demo.seen import Seen
from vtprune.demo.towers import Tower
from vtprune.errors import InvalidOption, UnsupportedCall, UnsupportedModel
from vtprune.pipeline import Pipeline
from vtprune.readings import Reading
from vtprune.stages.rules import ClsOrReceived
from vtprune.types import Groups, Ordinal, Part, Selection, VisualTokens

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
shared = functools.cache(build)


@functools.cache
def seen_by(name: str) -> Seen:
    return shared(name).look(photo())


def hooks_of(tower: Tower) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tower.model.modules())


@pytest.mark.parametrize("name", MAKERS)
def test_evidence_is_that_of_eager_attention(name: str) -> None:
    tower, seen = shared(name), seen_by(name)
    pixels, box = tower.prepare(photo())
    expected = by_hand(name, tower, pixels)
    tokens = seen.tokens
    assert tower.grid == ((ROWS // 2, ROWS) if name == "timm_wide" else (ROWS, ROWS))
    assert tokens.parts == (Part(start=0, stop=tower.grid[0] * tower.grid[1], kind="image", grid=tower.grid),)
    assert (tower.registers, tower.has_cls) == (REGISTERS.get(name, 0), name not in WITHOUT_CLS)
    assert (seen.registers, seen.has_cls, seen.box) == (tower.registers, tower.has_cls, box)
    torch.testing.assert_close(tokens.features, expected.features, **CLOSE)
    torch.testing.assert_close(tokens.evidence["importance"], expected.importance(), **CLOSE)
    torch.testing.assert_close(tokens.evidence["received_attention"], expected.received(), **CLOSE)
    assert ("cls_attention" in tokens.evidence) == tower.has_cls
    assert torch.equal(tokens.evidence["encoder_features"], tokens.features)
    assert not any(found.requires_grad for found in (tokens.features, *tokens.evidence.values()))
    middle = seen.read(Reading(rule=ClsOrReceived(), at=0.375))
    torch.testing.assert_close(middle, expected.importance(int(0.375 * BLOCKS)), **CLOSE)
    late = seen.read(Reading(rule=ClsOrReceived(), since=0.5))
    torch.testing.assert_close(late, expected.importance(2) + expected.importance(3), **CLOSE)


def test_keys_are_those_of_the_last_block() -> None:
    tower, seen = shared("clip"), seen_by("clip")
    with torch.no_grad():
        states = tower.model(tower.prepare(photo())[0], output_hidden_states=True).hidden_states[-2]
        layer = tower.probes[-1].block
        keys = layer.self_attn.k_proj(layer.layer_norm1(states)).unflatten(-1, (4, -1)).mean(dim=2)[:, 1:]
    torch.testing.assert_close(seen.tokens.evidence["keys"], keys, **CLOSE)


def tokens_by_hand(name: str) -> VisualTokens:
    tower = shared(name)
    found = by_hand(name, tower, tower.prepare(photo())[0])
    part = Part(start=0, stop=ROWS * ROWS, kind="image", grid=(ROWS, ROWS))
    evidence = {"importance": found.importance(), "importance@0.375": found.importance(int(0.375 * BLOCKS))}
    return VisualTokens(features=found.features, parts=(part,), ordinals=(Ordinal(segment=0),), evidence=evidence)


@pytest.mark.parametrize("name", ["clip", "siglip", "registers", "timm_registers", "open_clip"])
@pytest.mark.parametrize("method", ["vtprune", "divprune", "fastervlm", "hiprune", "scope", "random"])
def test_the_choice_is_that_of_the_pipeline(name: str, method: str) -> None:
    expected = pipeline_of(method).run(tokens_by_hand(name), 7)
    report = choose(seen_by(name), method, 0.11)
    (segment,) = report.segments
    assert segment.keep.tolist() == expected.keep[0].tolist()
    assert segment.taken.tolist() == expected.taken[0].tolist()
    assert (report.method, report.family, report.kept, report.tokens) == (method, "photo", 7, 64)


def test_the_best_by_cls_attention() -> None:
    scores = seen_by("clip").tokens.evidence["importance"][0]
    report = choose(seen_by("clip"), "fastervlm", 5)
    assert report.segments[0].keep.tolist() == sorted(scores.topk(5).indices.tolist())
    assert report.importance == "cls_attention"
    assert choose(seen_by("siglip"), "fastervlm", 5).importance == "received_attention"
    assert choose(seen_by("clip"), "divprune", 5).importance is None


def test_a_report_without_a_language_model() -> None:
    report = choose(seen_by("clip"), "vtprune", 0.25)
    assert (report.length_before, report.length_after, report.kv_bytes_saved, report.layers) == ((), (), 0, 0)
    assert (report.flops_before, report.flops_after, report.positions) == (0, 0, "none")
    assert {"encode", "select"} <= report.seconds.keys()
    assert report.to_dict()["kept"] == 16
    assert "vtprune on photo: kept 16 of 64 tokens of 1 picture" in report.summary()


def test_what_takes_dropped_patches_over() -> None:
    (segment,) = choose(seen_by("clip"), "visionzip", 10).segments
    pipeline, tokens = pipeline_of("visionzip"), seen_by("clip").tokens
    selection = pipeline.run(tokens, 10)
    merged = pipeline.merge(tokens, selection)
    assert merged is not None and segment.into is not None
    kept = selection.keep[0].tolist()
    assert segment.into.tolist() == [kept[i] if i >= 0 else -1 for i in merged.into[0].tolist()]
    assert segment.sizes.tolist() == [segment.into.tolist().count(i) for i in kept]
    assert segment.merged == 54 == sum(segment.sizes.tolist()) - 10
    assert choose(seen_by("clip"), "fastervlm", 10).segments[0].into is None


def test_patches_that_nothing_takes_over() -> None:
    """A merger that takes in the first ten patches only, into the first kept one."""

    def first_ten(tokens: VisualTokens, selection: Selection) -> Groups:
        scores = torch.zeros(1, tokens.features.shape[1])
        return Groups(into=torch.where(torch.arange(scores.shape[1]) < 10, 0, -1)[None], weights=scores)

    (segment,) = choose(seen_by("clip"), replace(pipeline_of("fastervlm"), merger=first_ten), 5).segments
    kept = segment.keep.tolist()
    assert segment.into is not None
    expected = [i if i in kept else kept[0] if i < 10 else -1 for i in range(64)]
    assert segment.into.tolist() == expected
    assert segment.sizes.tolist() == [expected.count(i) for i in kept]


@pytest.mark.parametrize("name", ["clip", "siglip", "registers", "timm_registers_only"])
def test_every_method_chooses_or_says_why_not(name: str) -> None:
    found = methods(shared(name))
    assert [method for method, _ in found] == list_methods()
    able = [method for method, reason in found if not reason]
    assert {"vtprune", "divprune", "fastervlm", "hiprune", "visionzip", "dart", "random", "uniform", "pool"} <= set(
        able
    )
    for method, reason in found:
        if reason:
            with pytest.raises(InvalidOption, match=method) as raised:
                choose(seen_by(name), method, 0.25)
            assert reason in str(raised.value)
        else:
            report = choose(seen_by(name), method, 0.25)
            assert report.adaptive or report.kept == 16, method
    told = dict(found)
    assert "question" in told["cdpruner"]
    assert "between layers" in told["fastv"] and "cache" in told["look_m"] and "attention" in told["blindsight"]
    assert "inside the encoder" in told["tome"] and "frames" in told["quota"] and "projector" in told["zoo_prune"]
    registers = REGISTERS.get(name, 0)
    why = f"it would take the {registers} registers of this tower for patches" if registers else ""
    assert told["vflowopt_select"] == told["fopru_rank"] == why


def test_seeds_parameters_and_budgets() -> None:
    seen = seen_by("clip")
    draws = [choose(seen, "random", 16, seed=seed).segments[0].keep.tolist() for seed in (0, 1, 1)]
    assert draws[0] != draws[1] == draws[2]
    assert choose(seen, "random", 16, seed=5, parameters={"seed": 1}).segments[0].keep.tolist() == draws[1]
    assert choose(seen, "fastervlm", 16, seed=3).kept == 16
    by_importance = choose(seen, "vtprune", 16, parameters={"lam": 1.0}).segments[0].keep.tolist()
    assert by_importance == choose(seen, "fastervlm", 16).segments[0].keep.tolist()
    assert choose(seen, "vtprune", 1.0).kept == choose(seen, "vtprune", 1000).kept == 64
    own = choose(seen, pipeline_of("fastervlm"), 16)
    assert own.segments[0].keep.tolist() == by_importance
    with pytest.raises(InvalidOption, match="did you mean 'lam'"):
        choose(seen, "vtprune", parameters={"lamb": 1.0})
    with pytest.raises(InvalidOption, match="did you mean 'divprune'"):
        choose(seen, "divprun")
    with pytest.raises(InvalidOption, match="keep=0"):
        choose(seen, "vtprune", 0)


def test_an_adaptive_pipeline_keeps_what_it_counts() -> None:
    def three(tokens: VisualTokens, k: int) -> Tensor:
        return torch.full((1,), 3)

    report = choose(seen_by("clip"), replace(pipeline_of("fastervlm"), counter=three), 0.5)
    assert (report.kept, report.adaptive) == (3, True)


def forcing(protect: list[int], forbid: list[int]) -> Seen:
    seen = seen_by("clip")
    banned = torch.zeros(1, 64, dtype=torch.bool)
    banned[0, forbid] = True
    evidence = {**seen.tokens.evidence, "protect": torch.tensor([protect], dtype=torch.long), "forbid": banned}
    return replace(seen, tokens=replace(seen.tokens, evidence=evidence))


def test_forced_patches() -> None:
    worst = seen_by("clip").tokens.evidence["importance"][0].argsort()
    in_, out = worst[:2].tolist(), worst[-2:].tolist()
    (segment,) = choose(forcing(in_, out), "fastervlm", 5).segments
    assert segment.keep.tolist() == sorted([*in_, *worst[-5:-2].tolist()])
    assert [segment.keep.tolist()[i] for i in range(5) if segment.taken[i] == -1] == sorted(in_)
    for keep, protect, forbid in ((2, [1, 2, 3], []), (60, [], list(range(5)))):
        with pytest.raises(InvalidOption, match=f"{keep} patches are to be kept, but {len(protect)} are forced in"):
            choose(forcing(protect, forbid), "fastervlm", keep)


def test_what_is_not_finite_is_refused() -> None:
    seen = seen_by("clip")
    tokens = replace(seen.tokens, features=seen.tokens.features * float("nan"))
    with pytest.raises(UnsupportedCall, match="NaN"):
        choose(replace(seen, tokens=tokens), "divprune", 0.25)


@pytest.mark.parametrize("name", ["clip", "timm", "open_clip"])
def test_looking_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = build(name)
    pixels, _ = tower.prepare(photo())
    attending = getattr(getattr(tower.model, "config", None), "_attn_implementation", None)
    with torch.no_grad():
        before = tower.encode(pixels)
        own = [dict(module.__dict__).keys() for module in tower.model.modules()]
        tower.look(photo())
        assert torch.equal(tower.encode(pixels), before)
    assert hooks_of(tower) == 0
    assert [dict(module.__dict__).keys() for module in tower.model.modules()] == own
    assert getattr(getattr(tower.model, "config", None), "_attn_implementation", None) == attending
    last = tower.probes[-1].block
    monkeypatch.setattr(last, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tower.look(photo())
    assert hooks_of(tower) == 0
    monkeypatch.undo()
    assert torch.equal(tower.look(photo()).tokens.features, before)


def test_threads_do_not_hear_each_other() -> None:
    """Hooks hear whoever runs the tower, so that one photo is looked at after the other."""
    tower = build("dinov2")
    pictures = [photo(width) for width in (40, 48, 56)]
    alone = [tower.look(picture).tokens for picture in pictures]
    inside, most, here = [0], [0], set[int]()
    changed = threading.Condition()

    def arrive() -> None:
        with changed:
            here.add(threading.get_ident())
            changed.notify_all()

    class Door:
        """The lock of a tower, that tells who stands in front of it."""

        def __enter__(self) -> None:
            arrive()
            tower.one_at_a_time.acquire()

        def __exit__(self, *error: object) -> None:
            tower.one_at_a_time.release()

    def slowly(pixels: Tensor) -> Tensor:
        """Nobody leaves before all are inside, or in front of the door."""
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        arrive()
        with changed:
            assert changed.wait_for(lambda: len(here) == len(pictures), timeout=60)
        features = tower.encode(pixels)
        inside[0] -= 1
        return features

    slow = replace(tower, encode=slowly, one_at_a_time=Door())  # type: ignore[arg-type]
    found: dict[int, Seen] = {}

    def look(number: int) -> None:
        found[number] = slow.look(pictures[number])

    threads = [threading.Thread(target=look, args=(number,)) for number in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    for number, tokens in enumerate(alone):
        assert len(found[number].attentions) == BLOCKS
        assert torch.equal(found[number].tokens.evidence["importance"], tokens.evidence["importance"])


def test_a_tower_of_another_grid_is_refused() -> None:
    tower = build("clip")
    with pytest.raises(UnsupportedModel, match=r"made 63 patches.*expected 8 x 8"):
        replace(tower, encode=lambda pixels: torch.zeros(1, 63, 8)).look(photo())


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (128, 64)])
def test_the_overlay_shows_what_was_kept(width: int, height: int) -> None:
    """One bright cell of a dark photo that is not square: kept alone, it is the one that stays bright."""
    tower = shared("clip")
    cell = min(width, height) // ROWS
    left, top = (width - ROWS * cell) // 2, (height - ROWS * cell) // 2
    values = np.zeros((height, width, 3), dtype=np.uint8)
    row, column = 5, 2
    values[top + row * cell : top + (row + 1) * cell, left + column * cell : left + (column + 1) * cell] = (
        250,
        240,
        20,
    )
    picture = Image.fromarray(values)
    seen = tower.look(picture)
    pixels, _ = tower.prepare(picture)
    brightness = pixels[0].mean(dim=0).unflatten(0, (ROWS, -1)).unflatten(2, (ROWS, -1)).mean(dim=(1, 3))
    assert divmod(int(brightness.argmax()), ROWS) == (row, column)
    assert seen.picture.size == (ROWS * cell, ROWS * cell)
    report = choose(seen, _keeping(row * ROWS + column), 1)
    drawn = np.asarray(viz.overlay(report, seen.picture, upscale=1)).astype(int)
    assert viz.cells_of(report.segments[0], picture.size, seen.box.corners)[row * ROWS + column] == (
        left + column * cell,
        top + row * cell,
        left + (column + 1) * cell,
        top + (row + 1) * cell,
    )
    yellow = (
        (np.abs(drawn - np.array([250, 240, 20])).sum(axis=2) == 0).reshape(ROWS, cell, ROWS, cell).all(axis=(1, 3))
    )
    assert np.argwhere(yellow).tolist() == [[row, column]]


def _keeping(token: int) -> Pipeline:
    class Only:
        needs: frozenset[str] = frozenset()

        def __call__(self, tokens: VisualTokens) -> Tensor:
            return (torch.arange(tokens.features.shape[1]) == token).float()[None]

    pipeline = pipeline_of("fastervlm")
    return replace(pipeline, picks=(replace(pipeline.picks[0], scorer=Only()),))
