"""What becomes of questions, as records: tokens kept of every frame, answers compared, errors in a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vtprune.errors import VtpruneError
from vtprune.report import DROPPED, PruneReport, SegmentReport
from vtprune.video.frames import Frames
from vtprune.video.journal import Record
from vtprune.video.questions import Question


def kept_of_parts(report: PruneReport, segment: SegmentReport) -> list[float]:
    """Tokens kept of every part of a clip, on average over decoder layers."""
    if segment.depths is not None:
        shares = segment.depths.float() / report.layers
    elif segment.cached is not None:
        shares = segment.cached.float() / report.layers
    else:
        shares = (segment.stages > DROPPED).float()
    counts = [float(own.sum()) for own in shares.cpu().split([part.tokens for part in segment.parts])]
    return [int(count) if count.is_integer() else round(count, 3) for count in counts]


def plain(text: str) -> str:
    """What counts of an answer: small letters, without punctuation at the ends."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'()")


def judged(record: Record, expected: str | None) -> Record:
    """The record beside another expected answer."""
    known = expected is not None and record.answer is not None
    correct = plain(record.answer or "") == plain(expected or "") if known else None
    return replace(record, expected=expected, correct=correct)


def blank(question: Question, frames: Frames | None, seconds: Mapping[str, float]) -> Record:
    """A record of what is known before there is an answer."""
    shown = () if frames is None else tuple(frames.indices.tolist())
    return Record(
        id=question.id,
        video=question.video,
        question=question.question,
        expected=question.answer,
        frames=shown,
        times=() if frames is None else tuple(round(time, 6) for time in frames.times.tolist()),
        reader="" if frames is None else frames.backend,
        warnings=() if frames is None else frames.warnings,
        seconds={name: round(value, 6) for name, value in seconds.items()},
    )


def failed(
    question: Question, error: BaseException, frames: Frames | None = None, seconds: Mapping[str, float] | None = None
) -> Record:
    """The record of a question without an answer."""
    return replace(blank(question, frames, seconds or {}), error=plainly(error))


def plainly(error: BaseException) -> str:
    """An error in one line, with its kind where it is none of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, VtpruneError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
