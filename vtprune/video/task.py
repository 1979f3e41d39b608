"""A job of video question answering as a value: what decides on its answers, and the model it is done with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vtprune._checks import check_whole
from vtprune._loading import choose_device, load_model, quiet_transformers, versions
from vtprune.adapters import family_of
from vtprune.api import pruning
from vtprune.calibration import quick_fingerprint
from vtprune.errors import InvalidOption, MissingEvidence
from vtprune.runtime.evidence import readings_of
from vtprune.seam import find_base
from vtprune.video.answering import Answerer, Score
from vtprune.video.decoupling import decouple_by_model
from vtprune.video.frames import Frames
from vtprune.video.prompting import takes_clips
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
        return {**{name: getattr(self, name) for name in names}, **self.parameters}

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
        return Answerer(
            model=model,
            processor=processor,
            method=self.method,
            options=options,
            pipeline=pipeline,
            max_new_tokens=self.max_new_tokens,
            batch=self.batch,
            instruction=self.instruction,
            score=self._scorer(model, processor) if self.best is not None or "frames" in pipeline.asked else None,
            best=self.best,
        )

    def settings(self, answerer: Answerer) -> dict[str, Any]:
        """What the header of the answers says: all that they depend on, with the pipeline and the weights."""
        stored = self.to_dict()
        for name in ("device", "batch", "timeout", "method", "parameters", "debias", "calibration"):
            stored.pop(name)
        model: Any = answerer.model
        weights = {
            "weights": quick_fingerprint(find_base(model)),
            "dtype": str(model.dtype),
            "device": model.device.type,
        }
        return {**stored, **weights, "pipeline": answerer.pipeline.to_dict(), "versions": versions()}

    def _scorer(self, model: Any, processor: Any) -> Score:
        plain: dict[str, Scoring] = {"yes": "yes", "change": "change"}
        by = plain.get(self.scoring) or ImageText.of(self.scoring, device=str(model.device))

        def score(frames: Frames, questions: Sequence[str]) -> Tensor:
            ask = self.asked and by == "yes"
            things = [decouple_by_model(model, processor, question) for question in questions] if ask else None
            return score_questions(model, processor, frames, questions, by=by, things=things, batch=self.batch)

        return score
