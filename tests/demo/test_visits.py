"""What a user does, step by step; no step changes what another user has."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.demo.common import clip, host, kept, picture
from tests.video import processors
from vtprune.demo.drawing import board, board_scale
from vtprune.demo.media import Media
from vtprune.demo.photo_host import PhotoHost
from vtprune.demo.session import Host
from vtprune.demo.visiting import Visit
from vtprune.errors import InvalidOption
from vtprune.report import DROPPED, PROTECTED
from vtprune.tiny import QUESTION
from vtprune.types import Budget
from vtprune.viz import cells_of
from vtprune.viz.marks import IN


def centre(visit: Visit, token: int) -> tuple[float, float]:
    """The middle of a token on the board."""
    assert visit.media is not None and visit.outcome is not None and visit.outcome.segment is not None
    cell = cells_of(visit.outcome.segment, visit.media.size, visit.outcome.framing)[token]
    scale = board_scale(visit.media)
    return (cell.left + cell.right) / 2 * scale, (cell.top + cell.bottom) / 2 * scale


@pytest.fixture
def visit() -> Visit:
    return Visit().showing(picture(), host()).asked(host(), QUESTION)


def test_the_live_count_is_that_of_the_budget() -> None:
    visit = Visit().showing(picture(), host())
    for keep in (0.01, 0.11, 0.25, 0.999, 1.0, 7, 1000):
        assert visit.tokens(keep) == (Budget(keep=keep).resolve(256), 256)
    assert Visit().tokens(0.25) == (0, 0)
    with pytest.raises(InvalidOption, match="keep"):
        visit.tokens(0.0)


def test_the_count_is_what_is_kept(visit: Visit) -> None:
    assert visit.outcome is not None
    for pane in visit.outcome.panes:
        assert pane.numbers is not None and (pane.numbers.kept, pane.numbers.tokens) == visit.tokens(0.25)


def test_a_click_forces_a_token_and_another_lets_it_go(visit: Visit) -> None:
    forced = visit.clicked(*centre(visit, 37), to="in").clicked(*centre(visit, 90), to="out")
    assert (forced.forced_in, forced.forced_out) == ({37}, {90})
    turned = forced.clicked(*centre(visit, 37), to="out")
    assert (turned.forced_in, turned.forced_out) == (frozenset(), {37, 90})
    assert forced.clicked(*centre(visit, 37), to="in").forced_in == frozenset()
    assert (forced.freed().forced_in, forced.freed().forced_out) == (frozenset(), frozenset())
    assert (visit.forced_in, visit.forced_out) == (frozenset(), frozenset())


def test_forced_tokens_are_heeded_in_the_next_answer(visit: Visit) -> None:
    assert visit.outcome is not None
    own = kept(visit.outcome.panes[0].report)[0]
    dropped = next(token for token in range(256) if token not in own)
    again = visit.clicked(*centre(visit, dropped), to="in").clicked(*centre(visit, own[0]), to="out")
    outcome = again.asked(host(), QUESTION).outcome
    assert outcome is not None and outcome.ask.forced_in == (dropped,) and outcome.ask.forced_out == (own[0],)
    for pane in outcome.panes:
        assert dropped in kept(pane.report)[0] and own[0] not in kept(pane.report)[0]


def test_another_picture_forgets_what_was_forced(visit: Visit) -> None:
    other = visit.clicked(5, 5, to="in").showing(picture(), host())
    assert (other.forced_in, other.outcome, other.count) == (frozenset(), None, 256)


def test_clicks_need_an_answer_and_a_patch(visit: Visit) -> None:
    with pytest.raises(InvalidOption, match="compare first, then click"):
        Visit().showing(picture(), host()).clicked(5, 5, to="in")
    with pytest.raises(InvalidOption, match="does not see this part"):
        visit.clicked(-5, 5, to="in")


def test_patches_can_be_let_go_where_no_pane_could_answer() -> None:
    """All panes failed, and nothing new is known of patches: what was known before still is."""
    tower = PhotoHost(source="tiny:llava")
    seen = Visit().showing(picture(), tower).asked(tower, "")
    x, y = centre(seen, 7)
    out = seen.clicked(x, y, to="out").asked(tower, "", keep=1.0)
    assert out.outcome is not None and all(pane.error for pane in out.outcome.panes) and not out.outcome.segments
    free = out.clicked(x, y, to="out")
    assert free.forced_out == frozenset() and free.tokens(0.25) == (64, 256)


def frames_for(name: str, frames: int) -> tuple[Host, Visit]:
    """A host of a family, without training, and a visit that begins with a clip."""
    own = processors.host(name)
    tower = Host(model=own.model, processor=own.processor, name=name, max_new_tokens=2)
    shown = Media(
        name="clip",
        pictures=tuple(Image.new("RGB", (32, 32), (60 * number, 90, 30)) for number in range(frames)),
        kind="video",
        times=tuple(map(float, range(frames))),
        duration=float(frames),
    )
    return tower, Visit().showing(shown, tower)


@pytest.mark.parametrize("name", ["internvl", "llava_next_video"])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_count_is_that_of_every_family(name: str, frames: int) -> None:
    """Also where frames are pictures of their own, and of a clip of one frame."""
    tower, begun = frames_for(name, frames)
    seen = begun.asked(tower, "what color", keep=0.3)
    assert seen.outcome is not None and not [pane.error for pane in seen.outcome.panes if pane.error]
    numbers = seen.outcome.panes[2].numbers
    assert numbers is not None and seen.tokens(0.3) == (numbers.kept, numbers.tokens)


@pytest.mark.parametrize("name", ["internvl", "llava_next_video"])
def test_patches_of_any_frame_can_be_forced(name: str) -> None:
    """Tokens are counted through all frames, whether they are pictures of their own or parts of one clip."""
    tower, begun = frames_for(name, 3)
    seen = begun.asked(tower, "what color", keep=0.5)
    assert seen.known is not None
    whole = sum(segment.n for segment in seen.known.segments)
    of_each, scale = whole // 3, board_scale(seen.known.ask.media)
    forced = seen.clicked(1, 1, to="in", frame=1).clicked(32 * scale - 1, 32 * scale - 1, to="out", frame=2)
    assert (forced.forced_in, forced.forced_out) == ({of_each}, {whole - 1})
    outcome = forced.asked(tower, "what color", keep=0.5).outcome
    assert outcome is not None and not [pane.error for pane in outcome.panes if pane.error]
    for pane in outcome.panes:
        assert pane.report is not None
        flags = torch.cat([segment.stages for segment in pane.report.segments])
        assert flags[of_each] == PROTECTED and flags[whole - 1] == DROPPED
    framed = [np.asarray(board(seen.known.ask.media, outcome, forced_in=forced.forced_in, frame=f)) for f in range(3)]
    assert [bool((pixels == IN).all(axis=2).any()) for pixels in framed] == [False, True, False]


def test_a_question_needs_a_picture() -> None:
    with pytest.raises(InvalidOption, match="there is no picture"):
        Visit().asked(host(), QUESTION)


def test_users_at_once_share_nothing_but_the_model() -> None:
    shown: dict[str, Any] = {"one": (picture(), "vtprune", 0.25, 3), "other": (clip(), "temporal", 0.5, 200)}
    own = host("qwen2_5_vl")

    def steps(name: str) -> Visit:
        media, method, keep, token = shown[name]
        visit = Visit().showing(media, own).asked(own, QUESTION, methods=(method, "divprune"), keep=keep)
        visit = visit.clicked(*centre(visit, token % 256), to="in")
        return visit.asked(own, QUESTION, methods=(method, "divprune"), keep=keep)

    alone = {name: steps(name) for name in shown}
    together: dict[str, Visit] = {}
    threads = [
        threading.Thread(target=lambda name: together.update({name: steps(name)}), args=(name,)) for name in shown
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, visit in together.items():
        assert visit.forced_in == alone[name].forced_in and visit.outcome is not None
        expected = alone[name].outcome
        assert expected is not None
        for pane, before in zip(visit.outcome.panes, expected.panes, strict=True):
            assert (pane.answer, kept(pane.report)) == (before.answer, kept(before.report)), name
