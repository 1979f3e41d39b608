"""Scenes and clips: the same for ever, answerable, and apart where they must be."""

import hashlib
import itertools

import numpy as np
import pytest

from vtprune.tiny.clips import FRAMES, ask_clip, ask_frame, draw_clip
from vtprune.tiny.drawing import Stream, digit_mask, shape_mask
from vtprune.tiny.scenes import (
    COLORS,
    DEVELOPMENT,
    KINDS,
    NUMBERS,
    PLACES,
    PLURALS,
    SHAPES,
    SIZE,
    TEST,
    TRAIN,
    Question,
    Scene,
    ask,
    draw_scene,
)
from vtprune.tiny.words import VOCABULARY, WORD_IDS, encode

SCENES_64 = "f8550e2e52af80e7"
CLIPS_8 = "96f2ce7ec69f88b6"
QUESTIONS_64 = "3dd5d20dfe62f479"


def digest(*chunks: bytes) -> str:
    return hashlib.sha256(b"".join(chunks)).hexdigest()[:16]


def asked(seed: int) -> list[Question]:
    return ask(draw_scene(seed), Stream(seed))


def test_64_scenes_are_what_they_always_were():
    assert digest(*(draw_scene(seed).pixels.tobytes() for seed in range(64))) == SCENES_64


def test_8_clips_are_what_they_always_were():
    assert digest(*(draw_clip(seed).frames.tobytes() for seed in range(8))) == CLIPS_8


def test_questions_of_64_scenes_are_what_they_always_were():
    assert digest(*(f"{q.text} {q.answer}\n".encode() for seed in range(64) for q in asked(seed))) == QUESTIONS_64


def test_random_integers_follow_the_published_mixer():
    """First outputs of SplitMix64 from state 1234567, as its reference program prints them."""
    stream = Stream(0)
    stream._counter = 1234567
    assert [int(word) for word in stream.words(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_a_stream_does_not_depend_on_how_it_is_cut():
    whole, cut = Stream(5), Stream(5)
    assert whole.integers(0, 1000, 10).tolist() == [*cut.integers(0, 1000, 4), *cut.integers(0, 1000, 6)]


def test_seed_ranges_are_disjoint():
    ranges = sorted((TRAIN, DEVELOPMENT, TEST), key=lambda seeds: seeds.start)
    assert all(first.stop <= second.start for first, second in itertools.pairwise(ranges))


@pytest.mark.parametrize("seed", range(20))
def test_a_thing_lies_within_its_box_and_owns_its_pixels(seed):
    scene = draw_scene(seed)
    assert 1 <= len(scene.things) <= 6
    for i, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        outside = np.ones((SIZE, SIZE), dtype=bool)
        outside[top:bottom, left:right] = False
        assert (scene.owner == i).any()
        assert not (scene.owner[outside] == i).any()


@pytest.mark.parametrize("seed", range(20))
def test_shapes_have_the_colour_they_are_said_to_have(seed):
    scene = draw_scene(seed)
    for i, thing in enumerate(scene.things):
        if thing.color:
            painted = scene.pixels[scene.owner == i].astype(int)
            assert np.abs(painted - COLORS[thing.color]).max() <= 14


def test_things_cover_about_a_tenth_of_the_patches():
    touched = [(draw_scene(seed).coverage(8).max(axis=0) > 0).mean() for seed in range(200)]
    assert 0.07 < np.mean(touched) < 0.13


def test_coverage_adds_up_to_the_painted_pixels():
    scene = draw_scene(3)
    assert scene.coverage(8).sum() * 64 == pytest.approx((scene.owner >= 0).sum())


def check_answer(scene: Scene, question: Question) -> None:
    """Answer by looking at the things, written apart from the generator."""
    words = question.text.split()
    shapes = [thing.shape for thing in scene.things]
    match question.kind:
        case "color":
            assert [t.color for t in scene.things if t.shape == words[-2]] == [question.answer]
        case "shape":
            assert [t.shape for t in scene.things if t.color == words[-2]] == [question.answer]
        case "number":
            assert [str(t.digit) for t in scene.things if t.digit is not None] == [question.answer]
        case "exist":
            there = any((t.color, t.shape) == (words[-3], words[-2]) for t in scene.things)
            assert there == (question.answer == "yes")
        case "count":
            assert NUMBERS[shapes.count(SHAPES[PLURALS.index(words[-2])])] == question.answer
        case "where":
            (thing,) = [t for t in scene.things if t.shape == words[-2]]
            vertical, horizontal = "top" if thing.y < SIZE / 2 else "bottom", "left" if thing.x < SIZE / 2 else "right"
            assert question.answer == vertical + horizontal
        case "left":
            first, second = (next(t for t in scene.things if t.shape == name) for name in (words[2], words[-2]))
            assert (first.x < second.x) == (question.answer == "yes")
        case _:
            raise AssertionError(question.kind)


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_every_answer_is_right_and_about_what_it_names(seed):
    for number in range(seed, seed + 10):
        scene = draw_scene(number)
        for question in ask(scene, Stream(number)):
            check_answer(scene, question)
            assert all(0 <= i < len(scene.things) for i in question.about)


def test_every_kind_is_asked_and_no_answer_is_always_right():
    questions = [question for seed in range(300) for question in asked(seed)]
    for kind in KINDS:
        answers = [question.answer for question in questions if question.kind == kind]
        commonest = max(map(answers.count, set(answers)))
        assert len(answers) > 50
        assert commonest / len(answers) < 0.62


def test_every_word_is_known():
    for seed in range(100):
        for question in asked(seed):
            assert all(word in WORD_IDS for word in f"{question.text} {question.answer}".split())
            assert len(encode(question.answer)) == 1
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert set(PLACES) <= set(VOCABULARY)


def test_shapes_and_digits_differ_from_one_another():
    for masks in ([shape_mask(name, 6) for name in SHAPES], [digit_mask(digit) for digit in range(10)]):
        differences = [(a != b).mean() for i, a in enumerate(masks) for b in masks[:i]]
        assert min(differences) > 0.05


@pytest.mark.parametrize("seed", range(20))
def test_in_a_clip_one_thing_stays_and_the_others_pass(seed):
    clip = draw_clip(seed)
    spans = [clip.frames_with(i) for i in range(len(clip.things))]
    assert sum(len(span) == FRAMES for span in spans) == 1
    assert all(1 <= len(span) <= 2 or len(span) == FRAMES for span in spans)
    assert all(span == list(range(span[0], span[-1] + 1)) for span in spans)


@pytest.mark.parametrize("seed", range(20))
def test_questions_of_clips_and_of_their_frames_are_answered_rightly(seed):
    clip = draw_clip(seed)
    whole = Scene(pixels=clip.frames[0], things=clip.things, owner=clip.owner.max(axis=0))
    for question in ask_clip(clip, Stream(seed)):
        assert question.kind != "count"
        check_answer(whole, question)
    for t in range(FRAMES):
        for question in ask_frame(clip, t, Stream(seed)):
            assert question.kind == "exist"
            check_answer(clip.frame(t), question)


def test_a_frame_shows_the_things_of_the_clip_that_are_there():
    clip = draw_clip(0)
    for t in range(FRAMES):
        scene = clip.frame(t)
        assert set(scene.things) == {thing for i, thing in enumerate(clip.things) if t in clip.frames_with(i)}
        for i, thing in enumerate(scene.things):
            assert ((scene.owner == i) == (clip.owner[t] == clip.things.index(thing))).all()
