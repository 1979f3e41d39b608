"""The model under test: prompts in, first words out, pictures of a batch encoded once for all arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor, nn

from vtprune._prompts import prompt_text
from vtprune.adapters import family_of
from vtprune.api import pruning
from vtprune.errors import UnsupportedCall
from vtprune.eval.questions import Item, judged
from vtprune.eval.variants import Variants
from vtprune.pipeline import Pipeline
from vtprune.readings import Reading
from vtprune.runtime.encoder import encode_once
from vtprune.seam import find_base
from vtprune.tiny.scenes import Scene
from vtprune.types import Budget, Part
from vtprune.video.asking import moved

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of a batch: the judged `words`, how many tokens were `kept` of each picture, on average over layers, and which.

    `tokens` is None where they are not tokens of that picture as it was, or not the same ones in all layers.
    """

    words: tuple[str, ...]
    kept: tuple[float, ...]
    tokens: tuple[Tensor, ...] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model, its processor, and how it is asked: greedily, each question with the `instruction` behind it.

    `relevance` tells of pixels (B, 3, H, W) and B questions how relevant every token is, (B, N), as CLIP does: little
    where it is. None where there is no text tower to ask. `frames` tells of the pictures of a clip and a question how
    much every part has to do with it, (G,). None about scenes. `variants` says what names of methods with a plus stand
    for.
    """

    model: nn.Module
    processor: Any
    positions: str = "auto"
    max_new_tokens: int = 3
    instruction: str = ""
    relevance: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    frames: Callable[[Sequence[Image.Image], str], Tensor] | None = None
    variants: Variants = field(default_factory=Variants)

    @cached_property
    def base(self) -> nn.Module:
        """The base model, where features meet the prompt."""
        return find_base(self.model)

    def inputs(self, items: Sequence[Item], shown: Sequence[Sequence[Scene]], **options: Any) -> Inputs:
        """What the processor makes of every question with the views shown of its scene or clip, padded on the left.

        Raises:
            UnsupportedCall: where the processor does not take this.
        """
        texts = [f"{item.question.text} {self.instruction}".strip() for item in items]
        modality = items[0].modality
        views = [_pictures(own) for own in shown]
        given = {"videos": views} if modality == "video" else {"images": [own[0] for own in views]}
        try:
            made = self.processor(
                **given,
                text=[prompt_text(self.processor, text, modality) for text in texts],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                **options,
            )
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise UnsupportedCall(f"the processor does not take these pictures and questions: {error}") from error
        return moved(made, self.model)

    def encode(
        self,
        inputs: Inputs,
        *,
        readings: Mapping[str, Reading] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Encode the pictures now: each call of the result gives inputs for one `answer`."""
        family = family_of(self.base.config)
        return encode_once(self.model, self.base, family, inputs, readings=readings or {}, options=options or {})

    def answer(
        self,
        inputs: Inputs,
        method: str | Pipeline,
        keep: float | int,
        *,
        evidence: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[Answers, tuple[Part, ...]]:
        """Answer every prompt with `evidence` for `using`; also tells the parts of the pictures.

        Raises:
            UnsupportedCall: where prompts have not one picture each, or pictures differ in their parts.
        """
        name, options = self.variants.asked(method)
        wrapped = pruning(self.model, name, keep=keep, positions=self.positions, **options)
        with wrapped as pruner, pruner.using(**(evidence or {})):
            mode = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
            written = self.model.generate(**inputs, **mode)  # type: ignore[operator]
            report = pruner.last
        assert report is not None
        texts = self.processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        parts = {segment.parts for segment in report.segments}
        if [segment.row for segment in report.segments] != list(range(len(texts))) or len(parts) != 1:
            raise UnsupportedCall("expected one picture for each prompt, all of them packed in the same way")
        inside = pruner.pipeline.inside or pruner.pipeline.cache
        answers = Answers(
            words=tuple(judged(text) for text in texts),
            kept=tuple(report.average_of(segment) for segment in report.segments),
            tokens=None if inside or report.merged else tuple(one.keep for one in report.segments),
        )
        return answers, parts.pop()


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some questions to a subject. Nothing is prepared or encoded before an arm asks for it."""

    subject: Subject
    items: tuple[Item, ...]
    readings: Mapping[str, Reading] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> Inputs:
        """What the processor makes of the questions and their pictures."""
        return self.subject.inputs(self.items, [item.views for item in self.items])

    @cached_property
    def shared(self) -> Callable[[], Inputs]:
        """Inputs with the pictures encoded; call it once for each run."""
        encoded: Callable[[], Inputs] = self.subject.encode(self.inputs, readings=self.readings)
        return encoded

    @cached_property
    def whole(self) -> tuple[Answers, tuple[Part, ...]]:
        """Answers from all tokens, and the parts of every picture."""
        return self.subject.answer(self.shared(), "identity", 1.0)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What every picture of the batch is packed from."""
        return self.whole[1]

    @property
    def n(self) -> int:
        """Tokens of every picture."""
        return sum(part.tokens for part in self.parts)

    def count(self, keep: float | int) -> int:
        """How many of them a budget leaves."""
        return Budget(keep=keep).resolve(self.n)

    def answer(
        self, method: str | Pipeline, keep: float | int, *, evidence: Mapping[str, Sequence[Any]] | None = None
    ) -> Answers:
        """Answers from the tokens of the pictures that a method keeps, with `evidence` for `using`."""
        evidence = dict(evidence or {})
        pipeline = self.subject.variants.pipeline(method, keep)
        if "relevance" in pipeline.needs and self.subject.relevance is not None:
            evidence["relevance"] = list(self.relevance)
        if "frames" in pipeline.needs and self.subject.frames is not None:
            evidence["frames"] = list(self.frames)
        inputs = self.shared() if pipeline.encoder is None else self.inputs
        return self.subject.answer(inputs, method, keep, evidence=evidence)[0]

    @cached_property
    def relevance(self) -> Tensor:
        """Relevance (B, N) of every token to the question about its picture."""
        assert self.subject.relevance is not None
        return self.subject.relevance(self.inputs["pixel_values"], [item.question.text for item in self.items])

    @cached_property
    def frames(self) -> tuple[Tensor, ...]:
        """Scores (G,) of the parts of every clip by the question about it, asked of the model without pruning."""
        assert self.subject.frames is not None
        return tuple(self.subject.frames(_pictures(item.views), item.question.text) for item in self.items)


def _pictures(views: Sequence[Scene]) -> list[Image.Image]:
    return [Image.fromarray(view.pixels) for view in views]
