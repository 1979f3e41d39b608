"""Answers of one pruned model to questions about clips: each clip is encoded once, questions are asked in batches."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Family
from vtprune.api import pruning
from vtprune.errors import VtpruneError
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport
from vtprune.runtime.pruner import Pruner
from vtprune.runtime.sharing import Shared, encode_shared, joined
from vtprune.seam import find_base
from vtprune.video.asking import PIXEL_NAMES, moved, rows_of, stacked
from vtprune.video.frames import Frames
from vtprune.video.journal import Record
from vtprune.video.prompting import check_words
from vtprune.video.questions import Question
from vtprune.video.records import blank, failed, kept_of_parts, plain, plainly
from vtprune.video.relevance import per_part
from vtprune.video.sampling import best_frames

logger = logging.getLogger("vtprune")
Score = Callable[[Frames, Sequence[str]], Tensor]
"""Scores (Q, T) of frames by questions about them."""


class DeviceLost(VtpruneError):
    """The device does nothing any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipAsked:
    """A clip and all questions about it."""

    frames: Frames
    questions: tuple[Question, ...]


@dataclass(kw_only=True, eq=False)
class _Row:
    """A prompt: a question, the frames of a clip it is asked about, and what both became."""

    clip: ClipAsked
    question: Question
    frames: Frames
    scores: Tensor | None
    seconds: dict[str, float]
    inputs: dict[str, Any] = field(default_factory=dict)
    shared: Shared | None = None


@dataclass(kw_only=True, eq=False)
class Answerer:
    """Answers from the tokens that a method leaves, greedily, and else as the model's generation settings say.

    `method` and `options` are those of `pruning`, `pipeline` what they make. `batch` questions are asked at once, fewer
    where they do not fit the memory. `score` gives scores of frames where the method reads them, or where only the
    `best` so many frames are shown; `scorer` tells its weights apart. `instruction` is put behind every question.
    """

    model: nn.Module
    processor: Any
    method: str | Pipeline
    options: Mapping[str, Any]
    pipeline: Pipeline
    max_new_tokens: int
    batch: int = 8
    instruction: str = ""
    score: Score | None = None
    scorer: str = ""
    best: int | None = None
    _fitting: dict[tuple[str, int], int] = field(default_factory=dict, init=False, repr=False)
    """Questions at once, for shapes and sizes of which `batch` did not fit the memory."""

    def __call__(self, clips: Sequence[ClipAsked]) -> Iterator[list[Record]]:
        """A record for every question, as batches are answered; what fails costs its own answer only.

        Raises:
            DeviceLost: where the device fails, and every other answer would with it.
        """
        rows: list[_Row] = []
        refused: list[Record] = []
        for clip in clips:
            clip, unfit = self._checked(clip)
            refused += unfit
            try:
                rows += self._rows(clip)
            except Exception as error:  # whatever it was, it costs this clip and not the run
                self._check_device(error)
                seconds = {"decode": clip.frames.seconds}
                refused += [failed(question, error, clip.frames, seconds) for question in clip.questions]
        base = find_base(self.model)
        with pruning(self.model, self.method, **self.options) as pruner:
            encoded = list(self._encoded(rows, refused, base, pruner.family))
            if refused:
                yield refused
            ready = sorted(encoded, key=lambda row: (_shape(row), _length(row)))
            for shape, alike in itertools.groupby(ready, key=_shape):
                left = list(alike)
                while left:
                    most = self._fitting.get((shape, _size(left[0])), self.batch)
                    now, left = left[:most], left[most:]
                    try:
                        yield self._answered(now, pruner)
                    except DeviceLost as error:
                        # Noted, so that the next run gets past it.
                        if len(now) == 1:
                            yield [failed(now[0].question, error, now[0].frames, now[0].seconds)]
                        raise

    def _checked(self, clip: ClipAsked) -> tuple[ClipAsked, list[Record]]:
        """The clip with the questions that can be asked, and errors for the others."""
        fine: list[Question] = []
        refused: list[Record] = []
        for question in clip.questions:
            try:
                check_words(self.processor, question.question)
                fine.append(question)
            except VtpruneError as error:
                refused.append(failed(question, error, clip.frames, {"decode": clip.frames.seconds}))
        return replace(clip, questions=tuple(fine)), refused

    def _rows(self, clip: ClipAsked) -> list[_Row]:
        """A row for each question about a clip; their frames are scored together."""
        if not clip.questions:
            return []
        begin, frames = time.perf_counter(), clip.frames
        scores: Sequence[Tensor | None] = [None] * len(clip.questions)
        if self.score is not None:
            scores = self.score(frames, [question.question for question in clip.questions]).unbind()
        seconds = {"decode": frames.seconds, "score": (time.perf_counter() - begin) / len(clip.questions)}
        rows = [
            _Row(clip=clip, question=question, frames=frames, scores=own, seconds=dict(seconds))
            for question, own in zip(clip.questions, scores, strict=True)
        ]
        return rows if self.best is None else [_best_of(row, self.best) for row in rows]

    def _encoded(self, rows: Sequence[_Row], records: list[Record], base: nn.Module, family: Family) -> Iterator[_Row]:
        """The rows with inputs; those that show the same frames are prepared and encoded together."""
        alike: dict[Any, list[_Row]] = {}
        for row in rows:
            alike.setdefault((id(row.clip), row.frames.indices.tobytes()), []).append(row)
        for group in alike.values():
            try:
                self._encode(group, base, family)
            except Exception as error:  # as above
                self._check_device(error)
                records += [failed(row.question, error, row.frames, row.seconds) for row in group]
                continue
            yield from group

    def _encode(self, group: Sequence[_Row], base: nn.Module, family: Family) -> None:
        begin, frames = time.perf_counter(), group[0].frames
        texts = [f"{row.question.question} {self.instruction}".strip() for row in group]
        times = frames.times.tolist()
        made = rows_of(self.processor, frames.pictures, texts, times=times, duration=frames.duration)
        shared, _ = encode_shared(base, family, moved(made[0], self.model))
        seconds = time.perf_counter() - begin
        for row, inputs in zip(group, made, strict=True):
            row.inputs = {name: value for name, value in inputs.items() if name not in PIXEL_NAMES}
            row.shared = shared
            row.seconds["encode"] = seconds

    def _answered(self, rows: Sequence[_Row], pruner: Pruner) -> list[Record]:
        """The rows together, or in halves where that fails, down to single ones."""
        try:
            return self._generate(rows, pruner)
        except Exception as error:  # as above
            self._check_device(error)
            if len(rows) == 1:
                return [failed(rows[0].question, error, rows[0].frames, rows[0].seconds)]
            full = _is_want_of_memory(error)
        # Outside of the handler: its traceback would hold the tensors of the batch that was too large.
        half = (len(rows) + 1) // 2
        if full:
            self._fitting[_shape(rows[0]), _size(rows[0])] = half
            logger.warning("%s questions at once do not fit the memory: going on with %s", len(rows), half)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return [*self._answered(rows[:half], pruner), *self._answered(rows[half:], pruner)]

    def _check_device(self, error: Exception) -> None:
        """Raise `DeviceLost` where the device does nothing any more: every further answer would be an error."""
        model: Any = self.model
        device: torch.device = model.device
        if device.type == "cpu" or isinstance(error, VtpruneError):
            return
        try:
            torch.ones(1, device=device).cpu()
        except torch.OutOfMemoryError:
            return
        except Exception as last:  # backends raise what they like where there is no device
            raise DeviceLost(
                f"the device {device} failed ({plainly(error)}): what was answered is noted, run it again to go on; "
                "where it fails again, one question at a time (--batch 1) gets past that which does it"
            ) from last

    def _generate(self, rows: Sequence[_Row], pruner: Pruner) -> list[Record]:
        begin = time.perf_counter()
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        inputs = moved(stacked([row.inputs for row in rows], tokenizer.pad_token_id), self.model)
        inputs["mm_encoder_outputs"] = joined([row.shared for row in rows if row.shared is not None])
        with pruner.using(**self._evidence(rows, pruner)):
            model: Any = self.model
            mode = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
            written = model.generate(**inputs, max_new_tokens=self.max_new_tokens, **mode)
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        report = pruner.last
        assert report is not None
        seconds = (time.perf_counter() - begin) / len(rows)
        return [
            self._record(row, number, text, report, seconds)
            for number, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]

    def _evidence(self, rows: Sequence[_Row], pruner: Pruner) -> dict[str, list[Any]]:
        """Scores of parts for every prompt, where the method reads them."""
        if "frames" not in self.pipeline.asked:
            return {}
        given = [per_part(row.scores, self.model) for row in rows if row.scores is not None]
        if "video" in pruner.family.kinds:
            return {"frames": given}
        return {"frames": [[score[None] for score in own] for own in given]}

    def _record(self, row: _Row, number: int, text: str, report: PruneReport, seconds: float) -> Record:
        segments = [segment for segment in report.segments if segment.row == number]
        answer, expected = text.strip(), row.question.answer
        return replace(
            blank(row.question, row.frames, {**row.seconds, "answer": seconds}),
            answer=answer,
            correct=None if expected is None else plain(answer) == plain(expected),
            kept=tuple(count for segment in segments for count in kept_of_parts(report, segment)),
            tokens=sum(segment.n for segment in segments),
            backend=report.backend,
        )


def _best_of(row: _Row, count: int) -> _Row:
    """The row with the frames that score best."""
    assert row.scores is not None
    chosen = best_frames(row.scores.numpy(), min(count, len(row.scores)))
    return replace(row, frames=row.frames.taking(chosen), scores=row.scores[torch.from_numpy(chosen)])


def _shape(row: _Row) -> str:
    """Rows of equal shape can be asked together."""
    assert row.shared is not None
    return repr(row.shared.shape)


def _length(row: _Row) -> int:
    """Of the prompt: those that are padded to one length should differ little."""
    ids: Tensor = row.inputs["input_ids"]
    return ids.shape[1]


def _size(row: _Row) -> int:
    """Of the prompt, roughly: one more where it is twice as long."""
    return _length(row).bit_length()


def _is_want_of_memory(error: Exception) -> bool:
    """On a CPU torch raises a plain `RuntimeError`."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in ("can't allocate memory", "out of memory"))
