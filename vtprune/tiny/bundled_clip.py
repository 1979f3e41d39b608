"""The bundled clip and its questions: a drawn clip of the development split, stored as a video of eight seconds."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from vtprune.errors import BackendUnavailable
from vtprune.tiny.clips import Clip, ask_clip, draw_clip
from vtprune.tiny.drawing import Stream
from vtprune.tiny.scenes import DEVELOPMENT

HOME = Path(__file__).parent / "video"
CLIP = HOME / "clip.mp4"
QUESTIONS = HOME / "questions.jsonl"
_NUMBER = 7
_RATE = 8
"""Frames a second; each frame of the drawn clip is shown for one."""


def drawn() -> Clip:
    """The clip as it was drawn."""
    return draw_clip(DEVELOPMENT[_NUMBER])


def write_bundled_clip(folder: Path = HOME) -> None:
    """Write the clip (H.264) and the questions.

    Raises:
        BackendUnavailable: without PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise BackendUnavailable("writing a clip needs PyAV: pip install 'vtprune[video]'") from error
    clip = drawn()
    folder.mkdir(parents=True, exist_ok=True)
    with av.open(str(folder / CLIP.name), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"crf": "16", "g": str(_RATE)})
        stream.height, stream.width = clip.frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, _RATE)
        for number, pixels in enumerate(np.repeat(clip.frames, _RATE, axis=0)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, _RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    lines = [
        {"id": f"{question.kind}-{number}", "video": CLIP.name, "question": question.text, "answer": question.answer}
        for number, question in enumerate(ask_clip(clip, Stream(~DEVELOPMENT[_NUMBER])))
    ]
    (folder / QUESTIONS.name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
