"""A job of video question answering as a value: what decides on its answers, and the model it is done with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from vtprune._checks import check_whole
from vtprune._loading import choose_device, load_model, quiet_transformers, versions
from vtprune.adapters import family_of
from vtprune.api import pruning
from vtprune.catalog import build, describe
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.runtime.evidence import readings_of
from vtprune.seam import find_base
from vtprune.types import Budget
from vtprune.video.answering import Answerer, Score
from vtprune.video.decoupling import decouple_by_model
from vtprune.video.frames import Frames
from vtprune.video.identity import configuration_of, processing_of, weights_of
from vtprune.video.prompting import check_words, takes_clips
from vtprune.video.reader import check_backend, check_request
from vtprune.video.relevance import Scoring, score_questions
from vtprune.video.sampling import Sampling, Uniform
from vtprune.video.sampling import from_dict as sampling_from_dict
from vtprune.video.similarity import ImageText

CANDIDATES = 4
"""Frames that are scored for each that is shown, where frames are chosen by the question."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that answers depend on, plain enough to be sent to other machines: see `to_dict`.

    `sampling` chooses frames without the question; with `best` it chooses candidates, and the best so many by the
    scores are shown. `scoring` makes these, and those of methods that read scores of frames: `"yes"`, `"change"`, or
    what `ImageText.of` takes; with `asked` the things to look for are those the language model names itself.

    Raises:
        InvalidOption: for values out of range, unknown methods, and options of scores where nothing reads any.
    """

    model: str = "tiny:llava_next_video"
    method: str = "vtprune"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keep: float | int = 0.25
    per: Literal["image", "part", "prompt"] = "image"
    positions: str = "auto"
    backend: str = "auto"
    debias: str | None = None
    calibration: str | None = None
    sampling: Sampling = field(default_factory=lambda: Uniform(8))
    best: int | None = None
    scoring: str = "yes"
    asked: bool = False
    reader: str = "auto"
    on_truncated: Literal["warn", "raise"] = "warn"
    timeout: float = 60.0
    max_new_tokens: int = 16
    instruction: str = ""
    batch: int = 8
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least=least)
        if self.best is not None:
            check_whole("best", self.best, least=1)
        if "seed" in self.parameters:
            raise InvalidOption("seed is an option of its own: expected it there, and not among the parameters")
        Budget(keep=self.keep, per=self.per)
        check_backend(self.reader)
        check_request(self.sampling, self.on_truncated)
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, Real) or not 0 < self.timeout < float("inf"):
            raise InvalidOption(f"timeout={self.timeout!r}: expected seconds above 0")
        if self.asked and self.scoring != "yes":
            raise InvalidOption(f"asked=True with scoring={self.scoring!r}: only scoring='yes' looks for things")
        if (self.asked or self.scoring != "yes") and not self.scores:
            raise InvalidOption(
                f"scoring={self.scoring!r}, asked={self.asked}: method {self.method!r} reads no scores of frames, and "
                "they do not choose the frames either; leave it out, or take quota or sampling by the question"
            )

    @property
    def scores(self) -> bool:
        """Whether anything reads scores of frames."""
        return self.best is not None or "frames" in build(self.method, dict(self.parameters)).needs

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "parameters": dict(self.parameters), "sampling": self.sampling.to_dict()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Task:
        """The task that `to_dict` stored."""
        return cls(**{**stored, "sampling": sampling_from_dict(stored["sampling"])})

    @property
    def options(self) -> dict[str, Any]:
        """What `pruning` is asked for beside the method."""
        names = ("keep", "per", "positions", "backend", "debias", "calibration")
        seeded = {"seed": self.seed} if "seed" in describe(self.method).parameters else {}
        return {**{name: getattr(self, name) for name in names}, **seeded, **self.parameters}

    def load(self) -> Answerer:
        """The model, ready to answer.

        Raises:
            VtpruneError: where the model does not load, is not for clips, or cannot be pruned like this.
        """
        quiet_transformers()
        torch.manual_seed(self.seed)
        model, processor = load_model(self.model, choose_device(self.device))
        if not takes_clips(processor):
            raise InvalidOption(f"{self.model}: its processor takes no clips; expected a model for video")
        check_words(processor, self.instruction, name="instruction")
        options = self.options
        if "video" not in family_of(find_base(model).config).kinds and self.per == "image":
            options["per"] = "prompt"  # its clips are pictures in a row
        with pruning(model, self.method, **options) as pruner:
            pipeline = pruner.pipeline
        others = pipeline.asked - {"frames"} - readings_of(pipeline).keys()
        if others:
            raise MissingEvidence(
                f"method {self.method!r} reads {', '.join(sorted(others))}: this job cannot give that"
            )
        by = self._scoring(model.device)
        return Answerer(
            model=model,
            processor=processor,
            method=self.method,
            options=options,
            pipeline=pipeline,
            max_new_tokens=self.max_new_tokens,
            batch=self.batch,
            instruction=self.instruction,
            score=None if by is None else self._scorer(model, processor, by),
            scorer=by.identity if isinstance(by, ImageText) else "",
            best=self.best,
        )

    def settings(self, answerer: Answerer) -> dict[str, Any]:
        """What the header of the answers says: all that they depend on, with the pipeline and what tells models apart.

        The model stands there by its weights, not by its name: a directory may be called anything.
        """
        stored = self.to_dict()
        for name in ("model", "device", "batch", "timeout", "method", "parameters", "debias", "calibration"):
            stored.pop(name)
        model: Any = answerer.model
        return {
            **stored,
            "scoring": answerer.scorer or self.scoring,
            "weights": weights_of(model),
            "configuration": configuration_of(model),
            "processor": processing_of(answerer.processor),
            "generation": model.generation_config.to_diff_dict(),
            "dtype": str(model.dtype),
            "device": model.device.type,
            "pipeline": answerer.pipeline.to_dict(),
            "versions": versions(),
        }

    def _scoring(self, device: Any) -> Scoring | None:
        plain: dict[str, Scoring] = {"yes": "yes", "change": "change"}
        if not self.scores:
            return None
        return plain.get(self.scoring) or ImageText.of(self.scoring, device=str(device))

    def _scorer(self, model: Any, processor: Any, by: Scoring) -> Score:
        def score(frames: Frames, questions: Sequence[str]) -> Tensor:
            things = [decouple_by_model(model, processor, question) for question in questions] if self.asked else None
            return score_questions(model, processor, frames, questions, by=by, things=things, batch=self.batch)

        return score
