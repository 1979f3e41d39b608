"""One answer of a model under one method, with the clock around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.api import pruning
from vtprune.catalog import build, describe
from vtprune.demo.choices import evidence_of
from vtprune.demo.panes import RANDOM, UNPRUNED, Ask, Numbers, keys_of, numbers_of
from vtprune.demo.scoring import Scored, Watch, with_forced
from vtprune.errors import MissingEvidence
from vtprune.estimates import kv_bytes_per_token
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport
from vtprune.runtime.pruner import Pruner
from vtprune.seam import find_base
from vtprune.video.relevance import per_part, score_frames

Relevance = Callable[[Tensor, list[str]], Tensor]
_IDLE = ("select", "cut")
"""Parts that `identity` has no use for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a method did: see `Pane`."""

    answer: str
    ids: tuple[int, ...]
    numbers: Numbers
    report: PruneReport
    scored: Scored | None
    colours: tuple[tuple[str, tuple[int, int, int]], ...]
    notes: tuple[str, ...]


@dataclass(kw_only=True)
class Clock:
    """A streamer of `generate`: when the prompt came by, the first token and the last one."""

    moments: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with every token; it is on the host already."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""

    @property
    def decoding(self) -> float:
        """Seconds from the first token to the last."""
        return self.moments[-1] - self.moments[1] if len(self.moments) > 2 else 0.0


def run(
    model: Any,
    processor: Any,
    ask: Ask,
    inputs: Mapping[str, Any],
    method: str,
    *,
    longest: int,
    relevance: Relevance | None = None,
    sizes: Sequence[int] = (),
) -> Run:
    """Answer greedily under a method; nobody else may use the model meanwhile.

    `sizes` are tokens of each picture of the prompt, where it has several.

    Raises:
        The errors of `wrap`, `using` and the model.
    """
    pipeline = build(method, {"seed": ask.seed} if "seed" in describe(method).parameters else {})
    watch = None if method == UNPRUNED else Watch.of(pipeline, ask.debiaser, debias=ask.debias)
    running = pipeline if watch is None else watch.pipeline
    keep = ask.keep if pipeline.drops else 1.0
    begin = time.perf_counter()
    evidence = _evidence(model, processor, ask, inputs, pipeline, relevance)
    scoring = time.perf_counter() - begin
    clock = Clock()
    with pruning(model, running, keep=keep) as pruner:
        forced = (
            nullcontext() if method == UNPRUNED else pruner.using(**_fitting(evidence, pruner), **_forced(ask, sizes))
        )
        begin = time.perf_counter()
        with forced:
            mode = {"max_new_tokens": longest, "do_sample": False, "num_beams": 1, "streamer": clock}
            written = model.generate(**inputs, **mode)
        ids = tuple(written[0, inputs["input_ids"].shape[1] :].tolist())
        whole = time.perf_counter() - begin
        report = pruner.last
        assert report is not None
    idle = _IDLE if method == UNPRUNED else ()
    seconds = {part: spent for part, spent in report.seconds.items() if part not in idle}
    seconds |= {"decode": clock.decoding, "total": whole, **({"score": scoring} if evidence else {})}
    tokenizer = getattr(processor, "tokenizer", processor)
    numbers = numbers_of(report, kv_bytes_whole=_kv_bytes(model, report), seconds=seconds)
    return Run(
        answer=tokenizer.decode(ids, skip_special_tokens=True).strip(),
        ids=ids,
        numbers=numbers,
        report=report,
        scored=None if watch is None else with_forced(watch.scored(report), ask),
        colours=keys_of(report, None if watch is None else ask),
        notes=(*(() if watch is None or method == RANDOM else watch.notes), *_notes(pipeline, report, ask)),
    )


def _evidence(
    model: nn.Module,
    processor: Any,
    ask: Ask,
    inputs: Mapping[str, Any],
    pipeline: Pipeline,
    relevance: Relevance | None,
) -> dict[str, Tensor]:
    """What a method reads that the model does not give by itself: scores of frames, or of patches."""
    found: dict[str, Tensor] = {}
    wanted = evidence_of(pipeline)
    if "frames" in wanted and ask.media.kind == "video":
        scores = score_frames(model, processor, ask.media.pictures, ask.question)
        found["frames"] = per_part(scores, model)
    if "relevance" in wanted and relevance is not None and ask.media.kind == "image":
        with torch.no_grad():
            found["relevance"] = relevance(inputs["pixel_values"], [ask.question])[0]
    if wanted - found.keys():
        names = ", ".join(sorted(wanted - found.keys()))
        raise MissingEvidence(f"method {pipeline.name!r} reads {names}, which nobody gives here: choose another method")
    return found


def _fitting(evidence: Mapping[str, Tensor], pruner: Pruner) -> dict[str, Sequence[Any]]:
    """The evidence of one prompt; scores of frames one by one where a family takes frames for pictures."""
    given: dict[str, Sequence[Any]] = {name: [values] for name, values in evidence.items()}
    if "frames" in evidence and "video" not in pruner.family.kinds:
        given["frames"] = [[score[None] for score in evidence["frames"]]]
    return given


def _forced(ask: Ask, sizes: Sequence[int]) -> dict[str, Sequence[Any]]:
    """The forced tokens of one prompt, picture by picture where it has several."""
    named = {"protect": ask.forced_in, "forbid": ask.forced_out}
    return {
        name: [list(tokens) if len(sizes) < 2 else _by_picture(tokens, sizes)]
        for name, tokens in named.items()
        if tokens
    }


def _by_picture(tokens: Sequence[int], sizes: Sequence[int]) -> list[list[int] | None]:
    """Tokens of each picture, counted anew in each; None where there are none."""
    starts = [0, *accumulate(sizes)]
    return [[token - low for token in tokens if low <= token < high] or None for low, high in pairwise(starts)]


def _kv_bytes(model: nn.Module, report: PruneReport) -> int:
    """Keys and values of the prompt without pruning."""
    base: Any = find_base(model)
    config = base.config.get_text_config()
    itemsize = next(model.parameters()).element_size()
    return sum(report.length_before) * kv_bytes_per_token(config, itemsize)


def _notes(pipeline: Pipeline, report: PruneReport, ask: Ask) -> list[str]:
    """What a reader has to know to read the pane aright."""
    notes = []
    if pipeline.name != UNPRUNED and not pipeline.drops:
        notes.append("keeps every token at any budget, and changes attention instead")
    if pipeline.inside:
        notes.append(
            f"kept patches are those behind the last cut between layers; {report.average:.0f} tokens on average over "
            "layers"
        )
    if pipeline.cache is not None:
        notes.append(f"every patch passes through all layers; the cache of a layer stores {report.average:.0f} of them")
    if pipeline.adaptive:
        notes.append("the budget is the most that stays: the picture decides")
    if pipeline.name == "quota" and ask.media.kind == "video":
        notes.append("frames were scored by the model itself beforehand, which takes a pass for each")
    return notes
