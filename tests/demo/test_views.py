"""Pictures of panes: those of `vtprune.viz`, of what was kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.demo.common import ask, clip, host, picture
from vtprune.demo import drawing
from vtprune.demo.drawing import board, board_scale, token_under, views_of
from vtprune.demo.media import Media, read_upload
from vtprune.demo.panes import VIEWS
from vtprune.demo.running import run
from vtprune.errors import InvalidOption
from vtprune.tiny import QUESTION
from vtprune.viz import Box, cells_of, heatmap, overlay, strip, with_bar


def test_overlays_are_those_of_the_report_on_what_the_encoder_sees() -> None:
    outcome = host().answer(ask(methods=("visionzip", "divprune")))
    pane, shown = outcome.panes[0], picture().pictures[0]
    assert pane.report is not None and list(pane.pictures) == ["kept", "stages", "groups", "scores", "debiased"]
    for name, options in (("kept", {}), ("stages", {"stages": True}), ("groups", {"groups": True})):
        drawn = overlay(pane.report, shown, framing=outcome.framing, **options)
        assert np.array_equal(np.asarray(pane.pictures[name]), np.asarray(drawn)), name
    assert [name for name, _ in pane.colours] == ["dominant", "contextual"]
    assert "groups" not in outcome.panes[1].pictures and "merged nothing" in outcome.panes[1].missing["groups"]


def test_every_view_is_there_or_missing_with_a_reason() -> None:
    outcome = host().answer(ask(methods=("vispruner", "attention_sink")))
    for pane in outcome.panes:
        assert set(pane.pictures) | set(pane.missing) == set(VIEWS)
        assert not set(pane.pictures) & set(pane.missing)
        assert pane.missing["strip"] == "there is one picture, and no frames"


def test_pictures_are_drawn_when_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A visitor is remembered for an hour, with reports and without pictures of them."""
    count = []
    monkeypatch.setattr(drawing, "overlay", lambda *given, **named: count.append(1) or overlay(*given, **named))
    pane = host().answer(ask()).panes[0]
    assert "kept" in pane.pictures and len(pane.pictures) == len(list(pane.pictures)) and not count
    first, again = pane.pictures["kept"], pane.pictures.get("kept")
    assert len(count) == 2 and again is not first and np.array_equal(np.asarray(first), np.asarray(again))
    assert pane.pictures.get("strip") is None and len(count) == 2


def test_what_cannot_be_drawn_is_told_before_it_is_looked_at() -> None:
    report = host().answer(ask()).panes[2].report
    assert report is not None
    with pytest.raises(InvalidOption):
        views_of(report, picture(), Box(10, 0, 10, 48))


def labels_of(media: Media, parts: int) -> tuple[str, ...]:
    """Numbers of the frames of each part, and when the first is shown."""
    count = len(media.pictures)
    each = -(-count // parts)
    starts = range(0, count, each)
    ends = [min(start + each, count) for start in starts]
    names = [f"#{start + 1}" if end == start + 1 else f"#{start + 1}-{end}" for start, end in zip(starts, ends)]
    return tuple(f"{name}  {media.times[start]:.1f} s" for name, start in zip(names, starts))


@pytest.mark.parametrize(("frames", "name"), [(4, "qwen2_5_vl"), (3, "qwen2_5_vl"), (3, "llava_next_video")])
def test_clips_have_a_strip_even_where_frames_do_not_come_out_even(frames: int, name: str) -> None:
    outcome = host(name).answer(ask(media=clip(frames)))
    pane = outcome.panes[0]
    assert pane.error == "" and pane.report is not None
    parts = len(pane.report.segments[0].parts)
    shown = [*clip(frames).pictures, clip(frames).pictures[-1]][: -(-frames // parts) * parts]
    labels = labels_of(clip(frames), parts)
    drawn = strip(pane.report, shown, framing=outcome.framing, height=128, columns=4, labels=labels)
    assert np.array_equal(np.asarray(pane.pictures["strip"]), np.asarray(drawn))
    kept = overlay(pane.report, shown, framing=outcome.framing, columns=4, labels=labels)
    assert np.array_equal(np.asarray(pane.pictures["kept"]), np.asarray(kept))


def test_frames_are_four_a_row_in_every_view() -> None:
    pane = host("llava_next_video").answer(ask(media=clip(8), methods=("visionzip", "random"))).panes[0]
    assert {"kept", "stages", "groups", "scores", "strip"} <= set(pane.pictures)
    for view, drawn in pane.pictures.items():
        assert 4 * 128 <= drawn.width <= 4 * 140 and drawn.height > 2 * 128, view


def test_frames_without_seconds_have_numbers() -> None:
    media = replace(clip(), times=())
    report = host("llava_next_video").answer(ask(media=clip())).panes[2].report
    assert report is not None
    drawn = views_of(report, media, None).pictures["kept"]
    expected = overlay(report, list(clip().pictures), columns=4, labels=["#1", "#2", "#3", "#4"])
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_heat_maps_are_those_of_the_scores() -> None:
    own, asked = host(), ask(methods=("fastervlm", "random"), debiaser="trend")
    pane = own.answer(asked).panes[0]
    again = run(own.model, own.processor, asked, own._inputs(picture(), QUESTION), "fastervlm", longest=1)
    assert again.scored is not None and again.scored.scores is not None and again.scored.debiased is not None
    for name, scores in (("scores", again.scored.scores), ("debiased", again.scored.debiased)):
        drawn = with_bar(heatmap(scores[0], again.report, picture().pictures[0]), scores[0], again.scored.names[name])
        assert np.array_equal(np.asarray(pane.pictures[name]), np.asarray(drawn)), name
    assert not np.array_equal(np.asarray(pane.pictures["scores"]), np.asarray(pane.pictures["debiased"]))


def test_the_board_marks_forced_tokens_where_their_cells_are() -> None:
    outcome = host().answer(ask())
    assert outcome.segment is not None
    scale, size = board_scale(picture()), picture().size
    plain = np.asarray(board(picture(), outcome)).astype(int)
    drawn = board(picture(), outcome, forced_in={17}, forced_out={200})
    assert drawn.size == (size[0] * scale, size[1] * scale)
    changed = (np.asarray(drawn) != plain).any(axis=2)
    cells = cells_of(outcome.segment, size, outcome.framing)
    for token, least in ((17, 0.3), (200, 0.9)):
        left, top, right, bottom = (round(side * scale) for side in cells[token])
        assert changed[top:bottom, left:right].mean() > least
        changed[top:bottom, left:right] = False
    assert not changed.any()


@pytest.mark.parametrize("method", ["vtprune", "pyramiddrop"])
def test_forced_patches_are_marked_in_what_is_kept_and_in_stages_of_panes_that_heed_them(method: str) -> None:
    outcome = host().answer(ask(methods=(method, "random"), keep=0.5, forced_in=(17,), forced_out=(200,)))
    pane, unpruned = outcome.panes[0], outcome.unpruned
    assert pane.report is not None and unpruned is not None and unpruned.report is not None
    for view, stages in (("kept", False), ("stages", True)):
        options = {"stages": stages, "framing": outcome.framing}
        drawn = overlay(pane.report, picture().pictures[0], forced_in=[17], forced_out=[200], **options)
        assert np.array_equal(np.asarray(pane.pictures[view]), np.asarray(drawn)), view
    plain = overlay(unpruned.report, picture().pictures[0], framing=outcome.framing)
    assert np.array_equal(np.asarray(unpruned.pictures["kept"]), np.asarray(plain))


def test_forced_patches_of_clips_are_marked_in_strips() -> None:
    asked = ask(media=clip(), forced_in=(3,), forced_out=(200,))
    outcomes = [host("llava_next_video").answer(one) for one in (asked, replace(asked, forced_in=(), forced_out=()))]
    drawn, plain = (outcome.panes[0].pictures["strip"] for outcome in outcomes)
    expected = strip(
        outcomes[0].panes[0].report,
        list(clip().pictures),
        framing=outcomes[0].framing,
        height=128,
        columns=4,
        labels=labels_of(clip(), 4),
        forced_in=[3],
        forced_out=[200],
    )
    assert np.array_equal(np.asarray(drawn), np.asarray(expected)) and drawn.size == plain.size


def test_a_board_without_an_outcome_is_the_picture() -> None:
    scale = board_scale(picture())
    assert np.array_equal(np.asarray(board(picture()))[::scale, ::scale], np.asarray(picture().pictures[0]))


def test_clicks_mean_the_token_whose_cell_they_are_in() -> None:
    wide = read_upload(Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 200, 3)).astype(np.uint8)))
    for name in ("llava", "qwen2_5_vl", "llava_next_video"):
        outcome = host(name).answer(ask(media=wide))
        segment = outcome.segment
        assert segment is not None
        sizes = [part.tokens for part in segment.parts]
        largest = sizes.index(max(sizes))
        own = range(sum(sizes[:largest]), sum(sizes[: largest + 1]))
        cells = cells_of(segment, wide.size, outcome.framing)
        for token in own:
            left, top, right, bottom = cells[token]
            assert token_under(outcome, (left + right) / 2, (top + bottom) / 2) == token, name


def test_clicks_on_frames_mean_tokens_of_these_frames() -> None:
    outcome = host("qwen2_5_vl").answer(ask(media=clip()))
    assert outcome.segment is not None
    first, second = outcome.segment.parts
    found = [token_under(outcome, 1, 1, frame=frame) for frame in range(4)]
    assert found == [0, 0, first.tokens, first.tokens] and second.tokens == first.tokens


def test_large_pictures_are_drawn_smaller_in_the_same_places() -> None:
    plain = np.zeros((1400, 1000, 3), np.uint8) + 200
    media, framing = read_upload(plain), Box(0, 200, 1000, 1200)
    report = host().answer(ask(media=media)).panes[2].report
    assert report is not None
    drawn = np.asarray(views_of(report, media, framing).pictures["kept"])
    assert drawn.shape == (896, 640, 3)
    bright = (drawn == 200).all(axis=2)
    inside = set(report.segments[0].keep.tolist())
    for token, (left, top, right, bottom) in enumerate(cells_of(report.segments[0], media.size, framing)):
        x, y = (left + right) / 2 * 0.64, (top + bottom) / 2 * 0.64
        assert bright[int(y), int(x)] == (token in inside), token
    assert not bright[:127].any() and not bright[770:].any()
