"""How much every frame of a clip has to do with a question: evidence for `using(frames=...)`, made before the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vtprune.adapters import family_of
from vtprune.api import unpruned
from vtprune.errors import InvalidOption
from vtprune.runtime.encoder import encode_once
from vtprune.seam import find_base
from vtprune.tiny.candidates import candidates
from vtprune.tiny.words import VOCABULARY
from vtprune.video.asking import PIXEL_NAMES, moved, remembering
from vtprune.video.decoupling import decouple
from vtprune.video.frames import Frames
from vtprune.video.prompting import clip_inputs
from vtprune.video.similarity import ImageText

Scoring = Literal["yes", "change"] | ImageText
Clip = Frames | Sequence[Image.Image] | NDArray[np.uint8]
_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How a model is asked about single frames, after QuoTA (arXiv 2503.08689), in words of our own.

    `objects` holds `{objects}` where one prompt names all things, or `{object}` where each is asked for by itself and
    the highest probability counts. `events` is for questions that name none; with None their frames are all alike.
    `yes` are the ways to write the answer that counts; those that are not one token of a model are left out. `things`
    takes a question apart.
    """

    objects: str = (
        "Does this picture show any of these: {objects}?\nA. yes\nB. no\nAnswer with the letter of the option only."
    )
    events: str | None = (
        "Question: {question}\nDoes this picture hold what is needed to answer the question?\nA. yes\nB. no\n"
        "Answer with the letter of the option only."
    )
    yes: tuple[str, ...] = ("A", " A")
    things: Callable[[str], tuple[str, ...]] = decouple

    def prompts(self, question: str, things: Sequence[str] | None = None) -> tuple[str, ...]:
        """What is asked about each frame; nothing where all frames are alike. `things` are those of the question."""
        if isinstance(things, str):
            raise InvalidOption(f"things={things!r}: expected a list of things, such as [{things!r}]")
        named = self.things(question) if things is None else tuple(things)
        if named and "{object}" in self.objects:
            return tuple(self.objects.replace("{object}", thing) for thing in named)
        if named:
            return (self.objects.replace("{objects}", ", ".join(named)),)
        return () if self.events is None else (self.events.replace("{question}", question),)


TINY = Wording(objects="is there a {object} ?", events=None, yes=("yes",), things=candidates)
"""For the bundled tiny models, which know these words only."""


def score_frames(
    model: nn.Module,
    processor: Any,
    clip: Clip,
    question: str,
    *,
    by: Scoring = "yes",
    things: Sequence[str] | None = None,
    wording: Wording | None = None,
    batch: int = 16,
) -> Tensor:
    """Scores (T,) in [0, 1], fp32 on the host, of the T frames of a clip.

    `"yes"`: the probability with which the model says that a frame shows what the question names, or holds what is
    needed to answer it; one forward for each frame, in batches, as a clip of one frame. `"change"`: how much a frame
    differs from the one before it, without text. An `ImageText`: similarity of frame and question, stretched to [0, 1]
    over the clip. Where nothing tells frames apart all score 1.

    Source: QuoTA, arXiv 2503.08689, whose scorer is another, smaller model: hand in any.

    Args:
        model: a transformers model; where it is wrapped, frames are scored without pruning.
        clip: frames (T, H, W, 3) in 8 bits, pictures, or what `read_frames` gives.
        things: what to look for, in place of what `wording.things` finds in the question; empty asks for events.
        wording: how to ask; by default that of QuoTA, or of the tiny models for one of them.
        batch: frames scored at once.

    Raises:
        InvalidOption: for an empty clip, an unknown `by`, or where no `wording.yes` is one token.
        UnsupportedCall: where the processor does not take the frames.
    """
    named = None if things is None else [things]
    return score_questions(model, processor, clip, [question], by=by, things=named, wording=wording, batch=batch)[0]


def score_questions(
    model: nn.Module,
    processor: Any,
    clip: Clip,
    questions: Sequence[str],
    *,
    by: Scoring = "yes",
    things: Sequence[Sequence[str]] | None = None,
    wording: Wording | None = None,
    batch: int = 16,
) -> Tensor:
    """Scores (Q, T) of the frames of a clip by each of Q questions about it: see `score_frames`.

    By "yes" each frame is encoded once for all of them, and a prompt that several questions lead to is asked once.

    Args:
        things: of every question what to look for.
    """
    pictures = pictures_of(clip)
    if batch < 1:
        raise InvalidOption(f"batch={batch}: expected 1 or more")
    if isinstance(by, ImageText):
        return torch.stack([stretched(own) for own in by(pictures, questions, batch=batch)])
    if by == "change":
        return _change(pictures).expand(len(questions), -1)
    if by != "yes":
        raise InvalidOption(f"by={by!r}: expected 'yes', 'change' or an ImageText")
    wording = wording or (TINY if knows_tiny_words_only(processor) else Wording())
    named: Sequence[Sequence[str] | None] = things or [None] * len(questions)
    asked = [wording.prompts(question, own) for question, own in zip(questions, named, strict=True)]
    prompts = list(dict.fromkeys(prompt for own in asked for prompt in own))
    said = _said_yes(model, processor, pictures, prompts, wording, batch) if prompts else torch.ones(0, len(pictures))
    alike = torch.ones(len(pictures))
    return torch.stack([said[[prompts.index(p) for p in own]].amax(dim=0) if own else alike for own in asked])


def per_part(scores: Tensor, model: nn.Module) -> Tensor:
    """Scores (T,) of frames as those of the parts a model makes of them: Qwen-VL joins two frames, whose mean counts.

    An odd frame at the end is joined with itself, as their processors do.
    """
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    joined = int(getattr(vision, "temporal_patch_size", 1) or 1)
    padded = torch.cat([scores, scores[-1:].expand(-len(scores) % joined)])
    return padded.unflatten(0, (-1, joined)).mean(dim=1)


def pictures_of(clip: Clip) -> list[Image.Image]:
    """The frames of a clip as RGB pictures; raises `InvalidOption` where there are none."""
    if isinstance(clip, Frames):
        found = clip.pictures
    elif isinstance(clip, np.ndarray):
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8:
            raise InvalidOption(f"a clip {clip.shape} of {clip.dtype}: expected frames (T, H, W, 3) of uint8")
        found = [Image.fromarray(frame) for frame in clip]
    else:
        found = list(clip)
    if not found or not all(isinstance(picture, Image.Image) for picture in found):
        raise InvalidOption("expected a clip of one frame or more, as Frames, pictures or an array (T, H, W, 3)")
    return [picture if picture.mode == "RGB" else picture.convert("RGB") for picture in found]


def stretched(scores: Tensor) -> Tensor:
    """Scores between the lowest and the highest of a clip as numbers in [0, 1]; all 1 where they are equal."""
    low, high = scores.min(), scores.max()
    return torch.ones_like(scores) if low == high else (scores - low) / (high - low)


def knows_tiny_words_only(processor: Any) -> bool:
    """Whether a processor is that of one of the bundled tiny models."""
    tokenizer = getattr(processor, "tokenizer", None)
    return tokenizer is not None and tokenizer.get_vocab().keys() == set(VOCABULARY)


def _change(pictures: Sequence[Image.Image]) -> Tensor:
    """Mean difference (T,) of small grey pictures to the one before, over the largest; the first to the second."""
    small = np.stack(
        [np.asarray(picture.convert("L").resize((_SIDE, _SIDE)), dtype=np.float32) for picture in pictures]
    )
    if len(small) == 1:
        return torch.ones(1)
    steps = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2))
    steps = np.concatenate([steps[:1], steps])
    return torch.from_numpy(steps / steps.max()) if steps.max() > 0 else torch.ones(len(small))


@torch.no_grad()
def _said_yes(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    wording: Wording,
    batch: int,
) -> Tensor:
    """The probability (P, T) that each of P prompts is said yes to about a frame. Each frame is encoded once."""
    ids = _single_tokens(getattr(processor, "tokenizer", processor), wording.yes)
    found = []
    with unpruned(model):
        for start in range(0, len(pictures), batch):
            clips = [[picture] for picture in pictures[start : start + batch]]
            rows = []
            for inputs in _asked(model, remembering(processor), clips, prompts):
                logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
                rows.append(logits.softmax(dim=-1)[:, ids].sum(dim=-1).cpu())
            found.append(torch.stack(rows))
    return torch.cat(found, dim=1)


def _asked(
    model: nn.Module, processor: Any, clips: Sequence[Sequence[Image.Image]], prompts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Inputs for every prompt about all of these clips, which are encoded for the first of them."""
    base = find_base(model)
    encoded: Callable[[], dict[str, Any]] | None = None
    for prompt in prompts:
        inputs = moved(clip_inputs(processor, clips, [prompt] * len(clips)), model)
        if encoded is None:
            encoded = encode_once(model, base, family_of(base.config), inputs, readings={})
        outputs = encoded().get("mm_encoder_outputs")
        if outputs is None:
            yield inputs
            continue
        rest = {name: value for name, value in inputs.items() if name not in PIXEL_NAMES}
        yield {**rest, "mm_encoder_outputs": outputs}


def _single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The distinct ids of those words that are one token; raises `InvalidOption` where none is."""
    encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    found = {ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id}
    if not found:
        raise InvalidOption(f"yes={tuple(words)!r}: expected a word that is one token of {type(tokenizer).__name__}")
    return sorted(found)
