"""Clips and questions as inputs of a model: what its processor makes of frames that were chosen already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vtprune._prompts import prompt_text
from vtprune.errors import InvalidOption, UnsupportedCall
from vtprune.types import Modality

_TICKS = 1000
"""Frames a second of the clock that processors are told times by: times of variable frame rates fit no real one."""
_TROUBLES = (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError)

Pictures = Sequence[Image.Image]


def takes_clips(processor: Any) -> bool:
    """Whether a processor takes clips; others get a frame as a picture."""
    return getattr(processor, "video_processor", None) is not None


def check_words(processor: Any, text: str, *, name: str = "question") -> None:
    """Raise `InvalidOption` for a text that holds a word which stands for pictures in prompts."""
    words = [getattr(processor, f"{kind}_token", None) or f"<{kind}>" for kind in ("image", "video")]
    held = [word for word in words if word in text]
    if held:
        raise InvalidOption(f"the {name} holds {held[0]!r}, which stands for pictures in prompts: write it otherwise")


def clip_inputs(
    processor: Any,
    clips: Sequence[Pictures],
    questions: Sequence[str],
    *,
    times: Sequence[Sequence[float]] | None = None,
    durations: Sequence[float] | None = None,
) -> Any:
    """What the processor makes of a clip (its frames, at times in seconds) and a question for each row, padded left.

    Raises:
        UnsupportedCall: where the processor does not take this.
    """
    kind: Modality = "video" if takes_clips(processor) else "image"
    visual: dict[str, Any] = {"images": [own[0] for own in clips]}
    if kind == "video":
        seconds = times or [range(len(own)) for own in clips]
        lengths = durations or [own[-1] + 1 for own in seconds]
        fewest = getattr(processor.video_processor, "temporal_patch_size", None) or 1
        shown = [_at_least(fewest, own) for own in clips]
        rows = zip(shown, seconds, lengths, strict=True)
        told = [_told(own, _at_least(fewest, at), length) for own, at, length in rows]
        visual = {"videos": shown, "video_metadata": told, "do_sample_frames": False}
    elif any(len(own) != 1 for own in clips):
        raise UnsupportedCall(f"{type(processor).__name__} takes no clips: choose a model that does")
    text = [prompt_text(processor, question, kind) for question in questions]
    try:
        return processor(**visual, text=text, return_tensors="pt", padding=True, padding_side="left")
    except _TROUBLES as error:
        raise UnsupportedCall(f"the processor does not take these frames and questions: {error}") from error


def _at_least(count: int, values: Sequence[Any]) -> list[Any]:
    """The last one again where there are fewer: Qwen3-VL refuses a clip of fewer frames than it joins."""
    found = list(values)
    return found + found[-1:] * (count - len(found))


def _told(pictures: Pictures, times: Sequence[float], duration: float) -> dict[str, Any]:
    """When the frames are shown, as `VideoMetadata` wants it."""
    return {
        "total_num_frames": max(1, round(duration * _TICKS)),
        "fps": float(_TICKS),
        "duration": float(duration),
        "frames_indices": [round(time * _TICKS) for time in times],
        "width": pictures[0].width,
        "height": pictures[0].height,
        "video_backend": "vtprune",
    }
