"""Shared by the tests of the demo: hosts of the bundled models, and what they are asked about."""

from __future__ import annotations

import functools
from typing import Any

import torch

import vtprune
from vtprune.demo.media import Media, read_upload
from vtprune.demo.panes import Ask
from vtprune.demo.session import Host
from vtprune.tiny import PICTURE, QUESTION
from vtprune.tiny.bundled_clip import drawn

MODELS = ("llava", "llava_next_video", "qwen2_5_vl")


@functools.cache
def host(name: str = "llava") -> Host:
    """A bundled model, which nobody else in this process uses."""
    return Host.load(f"tiny:{name}", "cpu")


@functools.cache
def picture() -> Media:
    return read_upload(PICTURE)


@functools.cache
def clip(frames: int = 4) -> Media:
    """The drawn clip, without a video file."""
    return read_upload(drawn().frames, frames=frames)


def ask(**options: Any) -> Ask:
    return Ask(**{"media": picture(), "question": QUESTION, **options})


def media_of(name: str) -> Media:
    """What a model was made for."""
    return picture() if name == "llava" else clip()


def by_hand(name: str, media: Media, method: Any, evidence: dict[str, Any] | None = None, **options: Any) -> Any:
    """The ids of the answer and the report, by `vtprune.pruning` alone."""
    model, processor = host(name).model, host(name).processor
    kind = {"video": "videos", "image": "images"}[media.kind]
    shown: Any = [list(media.pictures)] if media.kind == "video" else media.pictures[0]
    chat = [{"role": "user", "content": [{"type": media.kind}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    more: dict[str, Any] = {} if media.kind == "image" else {"do_sample_frames": False, "video_metadata": _told(media)}
    inputs = processor(**{kind: shown}, text=text, return_tensors="pt", **more)
    with vtprune.pruning(model, method, **options) as pruner, pruner.using(**(evidence or {})), torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return tuple(written[0, inputs["input_ids"].shape[1] :].tolist()), pruner.last


def _told(media: Media) -> list[dict[str, Any]]:
    """Moments in thousandths of a second, as the processor of a clip gets them."""
    moments = [round(1000 * time) for time in media.times]
    whole = {"total_num_frames": round(1000 * media.duration), "duration": media.duration, "fps": 1000.0}
    return [{**whole, "frames_indices": moments, "width": media.size[0], "height": media.size[1]}]


def kept(report: Any) -> list[list[int]]:
    return [segment.keep.tolist() for segment in report.segments]
