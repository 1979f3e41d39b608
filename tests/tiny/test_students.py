"""The students: what they compute in training is what transformers computes from the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from vtprune.tiny.clips import draw_clip
from vtprune.tiny.drawing import Stream
from vtprune.tiny.scenes import ask, draw_scene
from vtprune.tiny.training.batches import ClipSource
from vtprune.tiny.training.models import MERGE, QWEN_PATCH, build_qwen2_5_vl
from vtprune.tiny.training.packing import pack_questions
from vtprune.tiny.training.student import Shown, Student
from vtprune.tiny.training.students import LlavaStudent, QwenStudent, VideoStudent, normalized, patchify
from vtprune.tiny.words import IMAGE, VIDEO, WORD_IDS, encode

STUDENTS = (LlavaStudent, VideoStudent, QwenStudent)


@pytest.fixture(scope="module", params=STUDENTS, ids=lambda student: student.__name__)
def student(request) -> Student:
    torch.manual_seed(0)
    return request.param().eval()


def pixels_of(student: Student, seed: int) -> Tensor:
    views = draw_clip(seed).views if student.source is ClipSource else (draw_scene(seed),)
    return torch.stack([torch.from_numpy(view.pixels) for view in views]).permute(0, 3, 1, 2)[None]


def as_transformers_takes_it(student: Student, pixels: Tensor, token: int, count: int, text: str) -> dict[str, Tensor]:
    ids = torch.tensor([[*encode(student.before), *[token] * count, *encode(student.behind), *encode(text)]])
    given = normalized(pixels)
    if isinstance(student, QwenStudent):
        grid = torch.tensor([[1, 32, 32]])
        return {
            "input_ids": ids,
            "pixel_values": patchify(given[:, 0]),
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == token).int(),
        }
    name = "pixel_values_videos" if isinstance(student, VideoStudent) else "pixel_values"
    return {"input_ids": ids, name: given if isinstance(student, VideoStudent) else given[:, 0]}


@torch.no_grad()
def test_a_packed_question_gets_the_logits_of_a_prompt_of_its_own(student):
    pixels = pixels_of(student, 5)
    questions = ask(draw_scene(5), Stream(5))[:4]
    tokens = student.project(student.look(pixels).cells)
    count = tokens.shape[1]
    shown = Shown(tokens=tokens, index=torch.arange(count)[None], of=count, compact=False)
    blocks = pack_questions([questions], torch.device("cpu"))
    packed = student.words(student.read(shown, blocks).blocks)[0]
    token = VIDEO if isinstance(student, VideoStudent) else IMAGE
    for number, question in enumerate(questions, start=1):
        inputs = as_transformers_takes_it(student, pixels, token, count, f"{question.text} assistant :")
        single = student.vlm(**inputs).logits[0, -1]
        asked = (blocks.block[0] == number) & (blocks.answer[0] == WORD_IDS[question.answer])
        torch.testing.assert_close(packed[asked][0], single, atol=2e-4, rtol=1e-4)


def test_compact_positions_are_those_of_the_library(student):
    count = student.side**2
    index = torch.arange(0, count, 3)[None]
    offset = torch.arange(5)[None]
    tokens = torch.zeros(1, index.shape[1], 1)
    gaps, none = (
        student.positions(Shown(tokens=tokens, index=index, of=count, compact=compact), offset)
        for compact in (False, True)
    )
    assert gaps.shape == none.shape
    assert none.max() <= gaps.max()
    if not isinstance(student, QwenStudent):
        assert none.flatten().tolist() == list(range(none.shape[-1]))


def test_patches_are_those_of_the_image_processor():
    scene = draw_scene(3)
    processor = Qwen2VLImageProcessorPil(
        patch_size=QWEN_PATCH, merge_size=MERGE, size={"shortest_edge": 128 * 128, "longest_edge": 128 * 128}
    )
    made = processor(images=[scene.pixels], return_tensors="pt")
    mine = patchify(normalized(torch.from_numpy(scene.pixels).permute(2, 0, 1)[None]))
    assert made["image_grid_thw"].tolist() == [[1, 32, 32]]
    torch.testing.assert_close(mine, made["pixel_values"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_in_one_call_is_that_of_transformers():
    torch.manual_seed(0)
    student = QwenStudent()
    theirs = build_qwen2_5_vl().model.visual
    theirs.load_state_dict(student.vlm.model.visual.state_dict())
    pixels = torch.cat([pixels_of(student, seed) for seed in (1, 2)])
    expected = theirs(patchify(normalized(pixels[:, 0])), torch.tensor([[1, 32, 32]] * 2)).pooler_output
    mine = student.project(student.look(pixels).cells).flatten(0, 1)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
