"""What is asked and what came of it, as values: panes with an answer, numbers and pictures each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from vtprune.comparing import overlap
from vtprune.debiasing import DEBIASERS
from vtprune.demo.media import Media
from vtprune.errors import InvalidOption
from vtprune.report import PruneReport, SegmentReport
from vtprune.types import Budget
from vtprune.viz import Box, legend
from vtprune.viz.marks import IN, OUT

RANDOM = "random"
"""The method of the last pane, whatever else is asked for."""
UNPRUNED = "identity"
VIEWS: Mapping[str, str] = {
    "kept": "kept patches",
    "stages": "by the stage that took them",
    "groups": "merged groups",
    "scores": "scores",
    "debiased": "scores, debiased",
    "strip": "frames and their budgets",
}
"""The pictures of a pane, with captions."""
PARTS: Mapping[str, str] = {
    "score": "score beforehand",
    "encode": "encode",
    "layout": "layout",
    "select": "select",
    "cut": "cut",
    "prefill": "prefill",
    "decode": "decode",
    "total": "all of generate",
}
"""What seconds are told of: the first is done before the model is asked, "total" is the clock around `generate`."""
FORCED_IN, FORCED_OUT = "forced in by hand", "forced out by hand"
"""Names of marks, among the colours of a pane."""

TIMES = {
    True: "Seconds are of one run each and no benchmark; every pane encodes by itself, so that they are its own.",
    False: "Seconds are of one run and no benchmark; the tower looks once, for all panes.",
}
"""Whether there is a language model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ask:
    """A question about a picture or clip, to the unpruned model, to two methods and to `random`.

    `keep` is that of `wrap`; methods that drop nothing take 1.0 instead. `debias` takes a bias off attention where a
    method goes by any; `debiaser` says which, also for the heat-map beside. `forced_in` and `forced_out` are tokens,
    separators left out; where frames are pictures of their own, they are counted through all of them.
    `max_new_tokens` is that of the host by default.

    Raises:
        InvalidOption: for options out of range, and tokens forced both in and out.
    """

    media: Media
    question: str
    methods: tuple[str, str] = ("vtprune", "divprune")
    keep: float | int = 0.25
    seed: int = 0
    debias: bool = False
    debiaser: str = "recency"
    forced_in: tuple[int, ...] = ()
    forced_out: tuple[int, ...] = ()
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        Budget(keep=self.keep)
        if len(self.methods) != 2:
            raise InvalidOption(f"methods={self.methods!r}: expected two, {RANDOM} stands beside them anyway")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InvalidOption(f"seed={self.seed!r}: expected a whole number, 0 or more")
        if self.debiaser not in DEBIASERS:
            raise InvalidOption(f"debiaser={self.debiaser!r}: expected one of {', '.join(DEBIASERS)}")
        both = sorted(set(self.forced_in) & set(self.forced_out))
        if both:
            raise InvalidOption(f"tokens {both} are forced in and out: choose one of it")
        length = self.max_new_tokens
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise InvalidOption(f"max_new_tokens={length!r}: expected a whole number, 1 or more")


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a pane cost and kept.

    `average` is tokens in a decoder layer, on average over layers; of methods that cut caches, tokens that one stores.
    `kv_bytes` are keys and values of the prompt, `kv_bytes_whole` those without pruning. `seconds` are measured, once,
    by the names of `PARTS`. `prompt` is the length of the prompt behind the last cut, `prompt_whole` that before any,
    `prompt_average` that in a decoder layer, on average. `cached` says that all tokens pass, and caches store fewer.
    `coverage` is the share of the tokens that are kept or lie beside a kept one of the same
    grid, also across a corner; None where there is no picture, and where all tokens pass and caches store fewer.
    """

    tokens: int
    kept: int
    average: float
    merged: int
    separators: int
    prompt: int
    prompt_whole: int
    prompt_average: float
    cached: bool
    kv_bytes: int
    kv_bytes_whole: int
    coverage: float | None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def kv_megabytes(self) -> float:
        """Millions of bytes."""
        return self.kv_bytes / 1e6


@dataclass(frozen=True, kw_only=True, eq=False)
class Pane:
    """One method: its answer, its numbers and its pictures; or an `error`, and hardly anything else.

    `line` says what the method does, `paper` where it is from. `ids` are the tokens of the answer; `same` says whether
    the unpruned model answers in the same words, `agreement` is the share of the longer answer, in tokens, up to where
    the two part; both are None where one of the answers is missing. `pictures` are some of `VIEWS`, `missing` says of
    others why they are not there. `colours` are those in "stages": see `keys_of`.
    """

    method: str
    line: str = ""
    paper: str = ""
    answer: str | None = None
    ids: tuple[int, ...] = ()
    same: bool | None = None
    agreement: float | None = None
    numbers: Numbers | None = None
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    colours: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    notes: tuple[str, ...] = ()
    report: PruneReport | None = None
    error: str = ""

    @property
    def title(self) -> str:
        """What to call it on the page."""
        return "all tokens" if self.method == UNPRUNED else self.method


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What came of an `ask`: the pane without pruning, None where no language model answers, and those of methods.

    `model` is its name. `framing` is the box of the picture that the encoder sees, None where it is not known.
    """

    ask: Ask
    model: str
    panes: tuple[Pane, ...]
    unpruned: Pane | None = None
    framing: Box | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int | None:
        """Tokens that could be pruned; None where no pane has them."""
        every = (*(() if self.unpruned is None else (self.unpruned,)), *self.panes)
        return next((pane.numbers.tokens for pane in every if pane.numbers is not None), None)

    @property
    def segments(self) -> tuple[SegmentReport, ...]:
        """The pictures or clips of whichever pane has them; kept tokens differ from pane to pane, parts do not."""
        every = (*(() if self.unpruned is None else (self.unpruned,)), *self.panes)
        return next((pane.report.segments for pane in every if pane.report is not None and pane.report.segments), ())

    @property
    def segment(self) -> SegmentReport | None:
        """The first of them."""
        return self.segments[0] if self.segments else None

    def overlap(self, first: int = 0, second: int = 1) -> float | None:
        """How much the choices of two panes overlap: see `overlap`. None where one of them has none."""
        one, other = self.panes[first].report, self.panes[second].report
        return None if one is None or other is None else overlap(one, other)


def coverage(segments: Sequence[SegmentReport]) -> float | None:
    """The share of the tokens that are kept, or lie in one of the eight cells around a kept one of their grid."""
    near = [_near_kept(segment) for segment in segments]
    count = sum(segment.n for segment in segments)
    return sum(int(one.sum()) for one in near) / count if count else None


def _near_kept(segment: SegmentReport) -> Tensor:
    """(n,) 1 at tokens that are kept or lie beside a kept one, 0 elsewhere."""
    kept = torch.zeros(segment.n)
    kept[segment.keep] = 1
    sizes = [part.tokens for part in segment.parts]
    grids = [own.view(1, *part.grid) for own, part in zip(kept.split(sizes), segment.parts, strict=True)]
    return torch.cat([max_pool2d(grid, kernel_size=3, stride=1, padding=1).flatten() for grid in grids])


def agreement(answer: Sequence[int], reference: Sequence[int]) -> float:
    """The share of the longer of two answers up to where they part, in tokens; 1 where both are empty."""
    longest = max(len(answer), len(reference))
    pairs = zip(answer, reference, strict=False)
    alike = next(
        (number for number, (one, other) in enumerate(pairs) if one != other), min(len(answer), len(reference))
    )
    return alike / longest if longest else 1.0


def keys_of(report: PruneReport, ask: Ask | None) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    """What is seen in "stages": colours of picks and cuts, and marks of what was forced, if anything could be."""
    found = [(name, colour) for name, colour in legend(report) if name != "protected"]
    forced = () if ask is None else ((FORCED_IN, IN, ask.forced_in), (FORCED_OUT, OUT, ask.forced_out))
    return (*found, *((name, colour) for name, colour, tokens in forced if tokens))


def numbers_of(
    report: PruneReport,
    *,
    kv_bytes_whole: int = 0,
    seconds: Mapping[str, float] | None = None,
) -> Numbers:
    """The numbers of a pane, from its report and what only its caller knows."""
    cached = any(one.cached is not None for one in report.segments)
    prompt = sum(report.length_after)
    return Numbers(
        tokens=report.tokens,
        kept=report.kept,
        average=report.average,
        merged=report.merged,
        separators=report.separators,
        prompt=prompt,
        prompt_whole=sum(report.length_before),
        prompt_average=prompt if cached else prompt + report.average - report.kept,
        cached=cached,
        kv_bytes=kv_bytes_whole - report.kv_bytes_saved,
        kv_bytes_whole=kv_bytes_whole,
        coverage=None if cached else coverage(report.segments),
        seconds=dict(seconds or {}),
    )
