"""Clips for vision-language models: which frames, read exactly, from files that may be broken."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "open_video": "vtprune.video.reader",
    "read_frames": "vtprune.video.reader",
    "Frames": "vtprune.video.frames",
    "Uniform": "vtprune.video.sampling",
    "ByRate": "vtprune.video.sampling",
    "Scenes": "vtprune.video.sampling",
    "Decoders": "vtprune.video.guard",
    "score_frames": "vtprune.video.relevance",
    "score_questions": "vtprune.video.relevance",
    "per_part": "vtprune.video.relevance",
    "Wording": "vtprune.video.relevance",
    "ImageText": "vtprune.video.similarity",
    "decouple": "vtprune.video.decoupling",
    "decouple_by_model": "vtprune.video.decoupling",
    "best_frames": "vtprune.video.sampling",
    "Task": "vtprune.video.task",
    "answer_questions": "vtprune.video.qa",
    "read_questions": "vtprune.video.questions",
}

__all__ = [
    "ByRate",
    "Decoders",
    "Frames",
    "ImageText",
    "Scenes",
    "Task",
    "Uniform",
    "Wording",
    "answer_questions",
    "best_frames",
    "decouple",
    "decouple_by_model",
    "open_video",
    "per_part",
    "read_frames",
    "read_questions",
    "score_frames",
    "score_questions",
]

if TYPE_CHECKING:
    from vtprune.video.decoupling import decouple, decouple_by_model
    from vtprune.video.frames import Frames
    from vtprune.video.guard import Decoders
    from vtprune.video.qa import answer_questions
    from vtprune.video.questions import read_questions
    from vtprune.video.reader import open_video, read_frames
    from vtprune.video.relevance import Wording, per_part, score_frames, score_questions
    from vtprune.video.sampling import ByRate, Scenes, Uniform, best_frames
    from vtprune.video.similarity import ImageText
    from vtprune.video.task import Task


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vtprune.video' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
