"""A loaded model that several users ask in turn."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vtprune._loading import choose_device, load_model, quiet_transformers
from vtprune._prompts import prompt_text
from vtprune.adapters.base import placeholder_id
from vtprune.demo.choices import Choice, choices_of
from vtprune.demo.drawing import framing_for, views_of
from vtprune.demo.hosting import OnPane, Wanted, check_wanted
from vtprune.demo.media import A_CLIP, Example, Media, check_question, examples
from vtprune.demo.panes import RANDOM, UNPRUNED, Ask, Outcome, Pane, agreement
from vtprune.demo.running import Relevance, Run, run
from vtprune.demo.wording import about, failed, unknown_words
from vtprune.errors import UnsupportedCall, VtpruneError
from vtprune.seam import find_base
from vtprune.types import Modality
from vtprune.video.asking import moved
from vtprune.video.prompting import check_words, clip_inputs, takes_clips
from vtprune.viz import Box

LONGEST, LONGEST_TINY = 64, 4
"""New tokens of an answer; the bundled models say one word."""
_TROUBLES = (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError)


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A model, unwrapped, with its processor. Any number of threads may ask: the model runs for one at a time.

    `relevance` tells of pixels (B, 3, H, W) and B questions how relevant every patch is, (B, N); None where nobody can.
    """

    model: Any
    processor: Any
    name: str
    max_new_tokens: int = LONGEST
    relevance: Relevance | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _preparing: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _choices: dict[Modality, tuple[Choice, ...]] = field(default_factory=dict, init=False, repr=False)
    _warm: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    _places: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Looked up now: while somebody is answered the model is wrapped.
        config = find_base(self.model).config
        kinds: tuple[Modality, ...] = ("image", "video")
        places = (placeholder_id(config, kind) for kind in kinds)
        object.__setattr__(self, "_places", frozenset(place for place in places if place is not None))

    @classmethod
    def load(cls, source: str = "tiny:llava", device: str = "auto") -> Host:
        """Load `tiny:NAME`, a directory or a hub id.

        Raises:
            VtpruneError: for a model or a device that is not there.
        """
        where = choose_device(device)
        quiet_transformers()
        model, processor = load_model(source, where)
        find_base(model)
        length = LONGEST_TINY if source.startswith("tiny:") else LONGEST
        relevance = _relevance(source.removeprefix("tiny:"), where) if source.startswith("tiny:") else None
        return cls(model=model, processor=processor, name=source, max_new_tokens=length, relevance=relevance)

    @property
    def takes_clips(self) -> bool:
        """Whether the model can be shown clips."""
        return takes_clips(self.processor)

    @property
    def takes_questions(self) -> bool:
        """There is a language model."""
        return True

    def examples(self) -> tuple[Example, ...]:
        """Bundled pictures; a clip before them where the model takes clips."""
        found = [one for one in examples() if self.takes_clips or one.name != A_CLIP]
        return tuple(sorted(found, key=lambda one: one.name != A_CLIP))

    def methods(self, kind: Modality = "image") -> tuple[Choice, ...]:
        """Every method, those that this model cannot serve with the reason."""
        if kind not in self._choices:
            with self._lock:
                self._choices[kind] = choices_of(self.model, kind, relevance=self.relevance is not None)
        return self._choices[kind]

    def count(self, media: Media) -> int:
        """Visual tokens in a prompt about a picture or clip, without asking the model.

        Separators, which are always kept, are counted in; `Outcome.tokens` knows better, once there is one.

        Raises:
            UnsupportedCall: where the processor does not take it.
        """
        with self._preparing:
            ids = self._inputs(media, "what is it ?")["input_ids"]
        return sum(int((ids == place).sum()) for place in self._places)

    def answer(self, ask: Ask, on_pane: OnPane | None = None, wanted: Wanted | None = None) -> Outcome:
        """Answer without pruning, by both methods and by `random`; a pane that fails does not take others with it.

        Every pane encodes by itself, so that its seconds are its own. `on_pane` is called with "unpruned", "a", "b" and
        "random" and the pane as each is done, while others may use the model; `wanted` is asked before each.

        Raises:
            Unwanted: where nobody waits any more.
            InvalidOption: for an empty question, or one that holds words which stand for pictures.
            UnsupportedCall: where the processor does not take the picture or clip.
        """
        question = check_question(ask.question)
        check_words(self.processor, question)
        with self._preparing:
            inputs = self._inputs(ask.media, question)
        ask = replace(ask, question=question)
        arms = {"unpruned": UNPRUNED, "a": ask.methods[0], "b": ask.methods[1], "random": RANDOM}
        panes: dict[str, Pane] = {}
        notes = list(ask.media.notes)
        unknown = unknown_words(self.processor, question)
        if unknown:
            notes.append(f"the model does not know these words: {', '.join(unknown)}")
        framing: Box | None = None
        sizes: tuple[int, ...] = ()
        for place, method in arms.items():
            ran = self._run(ask, inputs, method, sizes, wanted)
            if isinstance(ran, Run) and ran.report.segments and not sizes:
                sizes = tuple(segment.n for segment in ran.report.segments)
                framing, trouble = framing_for(self.processor, ask.media, ran.report.segments[0])
                notes += [trouble] if trouble else []
            panes[place] = _pane(ran, method, ask.media, framing, panes.get("unpruned"))
            if on_pane is not None:
                on_pane(place, panes[place])
        unpruned = panes.pop("unpruned")
        return Outcome(
            ask=ask,
            model=self.name,
            unpruned=unpruned,
            panes=tuple(panes.values()),
            framing=framing,
            notes=tuple(notes),
        )

    def _inputs(self, media: Media, question: str) -> dict[str, Any]:
        """What the processor makes of a prompt, on the device of the model."""
        if media.kind == "video":
            if not self.takes_clips:
                raise UnsupportedCall(f"{self.name} takes pictures only: show it one, or load a model for clips")
            shown, lengths = [media.pictures], [media.duration]
            made = clip_inputs(self.processor, shown, [question], times=[media.times], durations=lengths)
            return moved(made, self.model)
        text = prompt_text(self.processor, question)
        try:
            made = self.processor(images=media.pictures[0], text=text, return_tensors="pt")
        except _TROUBLES as error:
            raise UnsupportedCall(f"the processor does not take this picture and question: {error}") from error
        return moved(made, self.model)

    def _run(
        self, ask: Ask, inputs: dict[str, Any], method: str, sizes: Sequence[int], wanted: Wanted | None
    ) -> Run | str:
        """What a method does, or why it fails, in a sentence."""
        with self._lock:
            check_wanted(wanted)
            try:
                if not self._warm.is_set():
                    self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
                    self._warm.set()
                return run(
                    self.model,
                    self.processor,
                    ask,
                    inputs,
                    method,
                    longest=ask.max_new_tokens or self.max_new_tokens,
                    relevance=self.relevance,
                    sizes=sizes,
                )
            except Exception as error:  # whatever it was, it costs this pane and not the others
                return failed(error)


def _pane(ran: Run | str, method: str, media: Media, framing: Any, unpruned: Pane | None) -> Pane:
    """A pane with its pictures, beside the unpruned one where there is one."""
    try:
        card = about(method)
    except VtpruneError as error:
        return Pane(method=method, error=failed(error))
    if isinstance(ran, str):
        return Pane(method=method, line=card.line, paper=card.paper, error=ran)
    try:
        views = views_of(ran.report, media, framing, ran.scored)
    except VtpruneError as error:
        return Pane(method=method, line=card.line, paper=card.paper, error=failed(error))
    known = unpruned is not None and unpruned.answer is not None
    return Pane(
        method=method,
        line=card.line,
        paper=card.paper,
        answer=ran.answer,
        ids=ran.ids,
        same=ran.answer == unpruned.answer if unpruned is not None and known else None,
        agreement=agreement(ran.ids, unpruned.ids) if unpruned is not None and known else None,
        numbers=ran.numbers,
        pictures=views.pictures,
        missing=views.missing,
        colours=ran.colours,
        notes=ran.notes,
        report=ran.report,
    )


def _relevance(name: str, device: Any) -> Relevance | None:
    """That of a bundled model with an aligned text tower; in CLIP relevant patches lie far away, in this one near."""
    from vtprune.relevance import text_relevance
    from vtprune.tiny.loading import TEXT_TOWERS, load_tiny_clip

    if name not in TEXT_TOWERS:
        return None
    clip, tokenizer = load_tiny_clip(name)
    clip.to(device)

    def told(pixels: Tensor, questions: list[str]) -> Tensor:
        return -text_relevance(clip, tokenizer, pixels, questions)

    return told
