"""What the law files share: the cells method x family, their models, inputs and the comparison of logits.

A test of a law takes `case` through `cells(...)` and carries `pytest.mark.law`; the count at the end is made of these.

What runs, of the full product of methods, families and laws (`selection` decides):

* by default: for the laws that depend on the method, `CORE_METHODS` (one of each kind of stage) on every family and
  every other method on `CORE_FAMILIES`; for `RUNTIME_LAWS`, which see kinds of stages and not methods, `CORE_METHODS`
  on `CORE_FAMILIES` and `WIDE_METHODS`, which have most kinds between them, on every family.
  A test marked `kinds` runs for `CORE_METHODS` alone.
* `-m matrix`: besides, every method on every family for the laws that depend on it; for `RUNTIME_LAWS`
  `RUNTIME_METHODS` on every family and each other method on one, the families in turn.
* `-m ""`: everything.

Where a law depends on the method and a test comes in both position modes, that of the family is meant. In the other one
it runs by default for `CORE_METHODS` on `CORE_FAMILIES`, in the matrix for `CORE_METHODS` on every family.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts import edits, heads, oracle, sinks
from tests.contracts.dense import Merge
from tests.contracts.merges import merges_of, noted
from tests.models import CLIPS, IMAGE_FAMILIES, ONE_AND_TWO, QWEN, VIDEO_FAMILIES, Prompt
from vtprune import Pick, Pipeline
from vtprune.catalog import build
from vtprune.debiasing import debiased
from vtprune.stages.budgets import Proportional
from vtprune.stages.debiasers import WithoutHighNorms
from vtprune.stages.filters import Passing
from vtprune.stages.scorers import Norm
from vtprune.stages.selectors import TopK

Kind = Literal["image", "video"]
Selection = Literal["default", "matrix", "product"]
FRAMES = Pipeline(
    name="frames",
    picks=(Pick(name="long", scorer=Norm(), debiasers=(WithoutHighNorms(),), selector=TopK()),),
    frames=Proportional(scorer=Norm(), power=2.0),
)
EXTRAS = {"frames": FRAMES, "pyramiddrop+recency": debiased(build("pyramiddrop"), True)}
"""Kinds of stages that no method of the list has: budgets shared among parts, and debiasers asked for with `debias`."""
METHODS = (*vtprune.list_methods(), "prumerge_plus-adaptive", "mustdrop-text", "mustdrop-adaptive", *EXTRAS)
"""Methods by name; what follows a dash tells apart those that differ in their `SETTINGS`."""
SETTINGS: dict[str, dict[str, Any]] = {
    "prumerge_plus-adaptive": {"adaptive": True},
    "mustdrop-text": {"vision": False},
    "mustdrop-adaptive": {"vision": False, "adaptive": True, "least_overall": 0.05, "least_single": 0.05},
    "zipvl": {"mass": 0.7},
    "vflowopt_select": {"recycled": 0.4},
    "vflowopt": {"recycled": 0.4},
    "sparsevlm": {"recycled": 0.2},
    "dyvte": {"first": 1 / 6, "patience": 1, "below": 0.4},
    "attention_sink": {"share": 0.2, "threshold": 1.9, "most": 0.8, "least": 0.05, "channels": (3, 17, 40)},
    "blindsight": {
        "classes": (
            ("sink", "intra", "intra+sink", "dense"),
            ("dense",) * 4,
            ("intra",) * 4,
            ("intra+sink", "intra+sink", "dense", "dense"),
            ("sink", "sink", "intra", "intra"),
            ("dense", "intra", "sink", "intra+sink"),
        )
    },
}
"""Parameters that are not the default ones: tiny pictures have too few tokens for the shares that are recycled, of six
layers too few are left for dyvte to find more than one layer to leave at, tiny models have no massive activations, and
heads have no classes before they are measured."""
PIPELINES = {method: EXTRAS.get(method) or build(method.partition("-")[0], SETTINGS.get(method)) for method in METHODS}
FAMILIES = IMAGE_FAMILIES
CORE_FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl")
CORE_METHODS = (
    "random",
    "fastervlm",
    "divprune",
    "vtprune",
    "pool",
    "prumerge_plus-adaptive",
    "flowcut",
    "pyramiddrop",
)
NEUTRAL = tuple(method for method in METHODS if not PIPELINES[method].drops)
"""Methods that refuse any budget but 1.0."""
EDITING = tuple(method for method in METHODS if PIPELINES[method].attention is not None)
"""Those of them that change attention instead: at their neutral settings they change nothing."""
MARKING = ("attention_sink",)
"""Those of them whose cache remembers something."""
NEUTRAL_SETTINGS: dict[str, dict[str, Any]] = {
    "attention_sink": {"share": 1.0},
    "blindsight": {"classes": (("dense",) * 4,) * 6},
}
IN_LAYERS = tuple(method for method in METHODS if PIPELINES[method].inside)
"""Methods that prune between the decoder layers."""
ONLY_INSIDE = tuple(method for method, one in PIPELINES.items() if (one.inside or one.cache) and not one.picks)
"""Methods that drop nothing in front of the language model: position ids have no gaps that could be closed."""
LEAVING = tuple(m for m in IN_LAYERS if any(stage.counter is not None for stage in PIPELINES[m].inside))
"""Those of them that let all tokens of a picture go or not: the budget is only the most."""
FILTERING = tuple(m for m in LEAVING if any(isinstance(s.counter, Passing) for s in PIPELINES[m].inside))
"""Those of them that let any number go."""
TRIMMING = tuple(method for method in METHODS if PIPELINES[method].trims)
"""Those that drop from caches what later layers dropped: without a cache their answers are others."""
CACHING = tuple(method for method in METHODS if PIPELINES[method].cache is not None)
"""Methods that let all tokens pass and store fewer: their references are in `caches`."""
SHORTENING = tuple(method for method in METHODS if method not in CACHING)
MERGING_INSIDE = tuple(m for m in IN_LAYERS if any(stage.merger is not None for stage in PIPELINES[m].inside))
"""Those that merge what leaves there."""
BY_LAYERS = tuple(m for m in IN_LAYERS if any(stage.keep is None for stage in PIPELINES[m].inside))
"""Those whose budget is a number of layers: a token more changes nothing until it is a layer more."""
MERGING = tuple(method for method in METHODS if PIPELINES[method].merger is not None)
IN_TOWER = tuple(method for method in METHODS if PIPELINES[method].encoder is not None)
"""Methods that prune inside the vision encoder."""
CUT_TOWERS = ("llava", "video_llava")
"""Families whose encoder bears that; the others refuse."""
ADAPTIVE = tuple(method for method in METHODS if PIPELINES[method].counter is not None)
GIVEN = {m: name for m in METHODS for name in ("relevance", "frames") if name in PIPELINES[m].needs}
"""Methods whose evidence the user has to give, and what it is called."""
WIDE_METHODS = ("vtprune", "prumerge_plus-adaptive")
"""Two of the core: evidence, debiasing, several picks, a merger and a counter between them."""
RUNTIME_METHODS = (*CORE_METHODS, *GIVEN, *NEUTRAL, "sparsevlm", "mustdrop-text", "dyvte", "zipvl", "look_m")
RUNTIME_LAWS = ("5 undo", "6 refusal", "7 turns", "8 modes")
TOLERANCE = 1e-5
"""Largest difference of fp32 logits, as a share of the largest logit (at least of 1)."""
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method on a family, with pictures or clips."""

    method: str
    family: str
    kind: Kind

    @property
    def name(self) -> str:
        """What reports call the method."""
        return PIPELINES[self.method].name

    @property
    def asked(self) -> str | Pipeline:
        """What `wrap` is given for the method."""
        return EXTRAS.get(self.method, self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """Parameters of the method, for `wrap`."""
        return SETTINGS.get(self.method, {})

    @property
    def neutral(self) -> dict[str, Any]:
        """Parameters at which a method that changes attention changes nothing, none for any other."""
        return NEUTRAL_SETTINGS.get(self.method, {})

    @property
    def refused(self) -> bool:
        """The family's encoder cannot be pruned as the method does: only its neutral budget is taken."""
        return self.method in IN_TOWER and self.family not in CUT_TOWERS

    @property
    def layers(self) -> int:
        """Decoder layers of the model: methods that prune between them need some before and behind each cut, those
        that change attention some before and behind what they change."""
        return 6 if self.method in (*IN_LAYERS, *EDITING) else 2

    @property
    def keep(self) -> float:
        """A budget that prunes, where the method prunes at all."""
        return 1.0 if self.method in NEUTRAL else 0.6 if self.method in IN_LAYERS else 0.4

    @property
    def few(self) -> int:
        """A number of tokens that prunes every picture of `prompts`, or the largest where few would be too few."""
        if self.method not in IN_LAYERS:
            return 5
        return self._most * 9 // 20

    @property
    def more(self) -> int:
        """A larger number, by the least that shows."""
        return self.few + (self._most // self.layers + 1 if self.method in BY_LAYERS else 1)

    @property
    def _most(self) -> int:
        """Tokens of the largest picture of `prompts`."""
        return max(n for prompt in self.prompts for n in _counts(self.family, prompt, self.kind))

    @property
    def mrope(self) -> bool:
        """Ids of (t, h, w)."""
        return self.family in QWEN

    @property
    def positions(self) -> str:
        """The position mode that `auto` stands for."""
        return "keep" if self.mrope or not self.honours("compact") else "compact"

    def honours(self, positions: str) -> bool:
        """Whether the method takes a position mode, or refuses it as one without effect."""
        return positions != "compact" or self.method not in ONLY_INSIDE

    @property
    def model(self) -> nn.Module:
        """Shared by all tests of the process: leave it unwrapped."""
        return model_of(self.family, self.layers)

    @property
    def spare(self) -> nn.Module:
        """Its twin, for what has to be known of a prompt while that one is wrapped."""
        return spare_model_of(self.family, self.layers)

    @property
    def forbidden(self) -> list[int]:
        """Tokens that decoding never writes."""
        return self.model.generation_config.suppress_tokens

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Two rows of different length, with one and two pictures (or clips)."""
        return ONE_AND_TWO if self.kind == "image" else CLIPS

    @property
    def batch(self) -> dict[str, Tensor]:
        """Both rows, left padded."""
        return self.inputs(self.prompts)

    @property
    def rows(self) -> list[dict[str, Tensor]]:
        """Each row alone, unpadded."""
        return [self.inputs((prompt,)) for prompt in self.prompts]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What a processor would return."""
        return dict(_inputs(self.family, tuple(prompts), self.kind))

    def wrap(self, model: Any, **options: Any) -> nn.Module:
        """`vtprune.wrap` with this method or a pipeline in its place, at a budget that prunes unless told."""
        return vtprune.wrap(model, **self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        method = {} if "method" in options else {"method": self.asked, **self.settings}
        return {"keep": self.keep, **method, **options}

    @contextmanager
    def pruned(self, prompts: Sequence[Prompt] | None = None, **options: Any) -> Iterator[Any]:
        """`wrap` the shared model for a block, with evidence for `prompts`: those of the batch unless told."""
        prompts = self.prompts if prompts is None else prompts
        noting = noted() if self.method in MERGING_INSIDE else nullcontext()
        with noting, vtprune.pruning(self.model, **self._options(options)) as pruner, self.using(pruner, prompts):
            yield pruner

    def using(self, pruner: Any, prompts: Sequence[Prompt], *, as_one: bool = False) -> AbstractContextManager[Any]:
        """Evidence that a user has to give for a call with these rows, or with all of them `as_one`; else nothing."""
        if self.method not in GIVEN:
            return nullcontext()
        rows = [_scores(self.family, prompt, self.kind) for prompt in prompts]
        given = [[picture for row in rows for picture in row]] if as_one else rows
        return pruner.using(**{GIVEN[self.method]: given})


def cells(methods: Sequence[str] = METHODS, kinds: Sequence[Kind] = ("image", "video")) -> pytest.MarkDecorator:
    """Parametrise a test over method x family; which of them run depends on the law, see `selection`."""
    every = [
        Case(method=method, family=family, kind=kind)
        for family in FAMILIES
        for kind in kinds
        if kind == "image" or family in VIDEO_FAMILIES
        for method in methods
    ]
    return pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.method}-{c.family}-{c.kind}") for c in every])


def selection(method: str, family: str, law: str, *, again: bool = False) -> Selection:
    """The smallest selection that a cell is in; `again`: its tests in the position mode that is not the default."""
    core = method in CORE_METHODS
    if law in RUNTIME_LAWS:
        if method in WIDE_METHODS or (core and family in CORE_FAMILIES):
            return "default"
        turn = FAMILIES[METHODS.index(method) % len(FAMILIES)]
        return "matrix" if method in RUNTIME_METHODS or family == turn else "product"
    if again:
        return "product" if not core else "default" if family in CORE_FAMILIES else "matrix"
    return "default" if core or family in CORE_FAMILIES else "matrix"


PRUNING_METHODS = tuple(method for method in METHODS if method not in NEUTRAL)
EXACT_METHODS = tuple(method for method in PRUNING_METHODS if method not in (*ADAPTIVE, *IN_LAYERS, *CACHING))
"""Methods that keep as many tokens as the budget says."""


def fresh_model(family: str, layers: int = 2) -> nn.Module:
    """A tiny model of the family, which never stops early; always with the same weights."""
    model = models.build(family, layers=layers)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def model_of(family: str, layers: int = 2) -> nn.Module:
    """The model of the family that the tests of a process share."""
    return fresh_model(family, layers)


@functools.cache
def spare_model_of(family: str, layers: int = 2) -> nn.Module:
    """Its twin."""
    return fresh_model(family, layers)


@functools.cache
def _counts(family: str, prompt: Prompt, kind: Kind) -> tuple[int, ...]:
    """Tokens of every picture of a prompt that could be pruned."""
    model = spare_model_of(family)
    with vtprune.pruning(model, "identity", keep=1.0) as pruner, torch.no_grad():
        model(**_inputs(family, (prompt,), kind))
    return tuple(segment.n for segment in pruner.last.segments)


@functools.cache
def _lengths(family: str, prompt: Prompt, kind: Kind) -> tuple[int, ...]:
    """Tokens of every picture of a prompt, separators counted in."""
    model = spare_model_of(family)
    with vtprune.pruning(model, "identity", keep=1.0) as pruner, torch.no_grad():
        model(**_inputs(family, (prompt,), kind))
    return tuple(segment.parts[-1].stop for segment in pruner.last.segments)


@functools.cache
def _scores(family: str, prompt: Prompt, kind: Kind) -> list[Tensor]:
    """Scores for every picture of a prompt, the same wherever it stands."""
    return [
        torch.rand(n, generator=torch.Generator().manual_seed(100 * prompt.seed + number))
        for number, n in enumerate(_counts(family, prompt, kind))
    ]


@functools.cache
def _prompted(family: str, layers: int, prompt: Prompt, kind: Kind) -> oracle.Merged:
    return oracle.merge(spare_model_of(family, layers), _inputs(family, (prompt,), kind))


@functools.cache
def _inputs(family: str, prompts: tuple[Prompt, ...], kind: Kind) -> dict[str, Tensor]:
    return models.inputs(model_of(family), prompts, kind)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """New tokens (B, steps) and raw logits (B, steps, V) of a generation, its full sequences and its cache."""

    tokens: Tensor
    logits: Tensor
    sequences: Tensor
    cache: Any


def answer(model: nn.Module, inputs: dict[str, Any], *, steps: int = STEPS, **mode: Any) -> Answer:
    """Greedy unless told otherwise."""
    out = model.generate(**inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **mode)
    return Answer(
        tokens=out.sequences[:, inputs["input_ids"].shape[1] :],
        logits=torch.stack(out.logits, dim=1),
        sequences=out.sequences,
        cache=out.past_key_values,
    )


def unpruned(case: Case) -> Answer:
    """The answer of the model that was never wrapped to its batch."""
    return _unpruned(case.family, case.layers, case.kind)


@functools.cache
def _unpruned(family: str, layers: int, kind: Kind) -> Answer:
    return answer(model_of(family, layers), Case(method="identity", family=family, kind=kind).batch)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest expected logit (at least of 1)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Logits that agree within `TOLERANCE`."""
    assert distance(actual, expected) <= TOLERANCE


def placeholders(model: nn.Module) -> set[int]:
    """Token ids of pictures and clips."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    return {getattr(model.config, name, None) for name in names} - {None}


def depths_of(segment: Any, layers: int) -> list[int]:
    """How many of the decoder layers every token of a picture goes through, 0 where it is dropped before them."""
    if segment.depths is not None:
        return segment.depths.tolist()
    kept = set(segment.keep.tolist())
    return [layers if index in kept else 0 for index in range(segment.n)]


def stored_in(segment: Any, depths: list[int]) -> list[Any]:
    """In how many layers each token of a picture is stored: those it went through, but where caches are cut."""
    return depths if segment.cached is None else segment.cached.tolist()


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Prompt positions that go into the language model, how many of its layers each goes through, and is stored in.

    `merges` says what merges there.
    """

    positions: list[int]
    depths: list[int]
    stored: list[int]
    merges: tuple[Merge, ...] = ()


def kept_tokens(case: Case, report: Any, row: int, ids: Sequence[int]) -> Kept:
    """What a report says is kept, for the unpadded ids of a row: text, separators and choices."""
    depths = [case.layers] * len(ids)
    stored = list(depths)
    for segment, candidates in candidate_positions(case, report, row, ids):
        own = depths_of(segment, case.layers)
        for position, depth, cached in zip(candidates, own, stored_in(segment, own), strict=True):
            depths[position], stored[position] = depth, cached
    positions = [position for position, depth in enumerate(depths) if depth]
    return Kept(
        positions=positions,
        depths=[depths[position] for position in positions],
        stored=[stored[position] for position in positions],
        merges=merges_of(report, row),
    )


def kept_positions(case: Case, report: Any, row: int, ids: Sequence[int]) -> list[int]:
    """Prompt positions that go into the language model."""
    return kept_tokens(case, report, row, ids).positions


def candidate_positions(case: Case, report: Any, row: int, ids: Sequence[int]) -> list[tuple[Any, list[int]]]:
    """For every picture of a row its report and the prompt positions of its tokens, separators left out."""
    wanted = placeholders(case.model)
    visual = [position for position, token in enumerate(ids) if token in wanted]
    found = []
    first = 0
    for segment in report.segments:
        if segment.row != row:
            continue
        positions = visual[first : first + segment.parts[-1].stop]
        first += len(positions)
        separators = {offset for part in segment.parts for offset in part.separators}
        found.append((segment, [position for i, position in enumerate(positions) if i not in separators]))
    assert first == len(visual), "the report must account for every placeholder"
    return found


def choices(report: Any, row: int) -> list[list[int]]:
    """What became of every token of every picture of a row: how many layers it went through, and is stored in."""
    found = [(segment, depths_of(segment, report.layers)) for segment in report.segments if segment.row == row]
    return [[*zip(depths, stored_in(segment, depths), strict=True)] for segment, depths in found]


@contextmanager
def handed_over(model: nn.Module) -> Iterator[list[Tensor]]:
    """Embeddings (B, L, D) of every call of the language model of a wrapped model, after vtprune had its say."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])

    handle = model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@functools.cache
def _merged_rows(case: Case, prompt: Prompt, keep: float | int) -> tuple[list[int], Tensor]:
    """Positions and embeddings (1, K, D) of what is kept of a prompt that is alone, as vtprune hands them over."""
    model, inputs = case.spare, case.inputs((prompt,))
    options = {"keep": keep, **case.settings}
    with vtprune.pruning(model, case.asked, **options) as pruner, handed_over(model) as seen:
        with case.using(pruner, (prompt,)), torch.no_grad():
            model(**inputs)
        report = pruner.last
    return kept_positions(case, report, 0, inputs["input_ids"][0].tolist()), seen[0]


def whole(case: Case, prompt: Prompt, kept: list[int], *, keep: float | int | None = None) -> oracle.Merged:
    """One unpadded prompt; where the method changes the tokens at `kept`, they are what they become at this budget.

    What they become is taken from vtprune. Law 2 holds it to what the report says, law 3 to what it is in a batch.
    """
    prompted = _prompted(case.family, case.layers, prompt, case.kind)
    if case.method not in (*MERGING, *IN_TOWER):
        return prompted
    positions, rows = _merged_rows(case, prompt, case.keep if keep is None else keep)
    assert positions == kept, "another choice than when the prompt is alone"
    return oracle.replaced(prompted, kept, rows)


def by_hand(
    case: Case,
    prompt: Prompt,
    kept: Kept,
    *,
    compact: bool,
    keep: float | int | None = None,
    steps: int = STEPS,
    cached: bool = True,
) -> tuple[list[int], Tensor]:
    """Tokens and logits of one unpadded row, by the oracle."""
    return oracle.decode(
        case.model,
        whole(case, prompt, kept.positions, keep=keep),
        kept.positions,
        steps=steps,
        compact=compact,
        forbidden=case.forbidden,
        depths=kept.depths,
        later=kept.stored if cached else None,
        merges=kept.merges,
        edits=edits_alone(case, prompt),
    )


def edits_alone(case: Case, prompt: Prompt) -> edits.Told | None:
    """`edits_of` a prompt of its own."""
    ids = case.inputs((prompt,))["input_ids"][0].tolist()
    return edits_of(case, ids, [(0, len(ids), prompt)])


def edits_of(
    case: Case, ids: Sequence[int], turns: Sequence[tuple[int, int, Prompt]], written: Sequence[bool] | None = None
) -> edits.Told | None:
    """What the reference has to know of the ids of a row where the method changes attention.

    Args:
        turns: where every prompt of the row begins and ends.
        written: which of them the model wrote; None: nothing.
    """
    if case.method not in EDITING:
        return None
    wanted = placeholders(case.model)
    visual = [token in wanted for token in ids]
    if case.method == "attention_sink":
        marks = sinks.Marks(visual, [not own for own in written or [False] * len(ids)])
        return edits.Told(marks, sinks.Edit(**case.settings))
    lengths = [(start, stop, _lengths(case.family, prompt, case.kind)) for start, stop, prompt in turns]
    return edits.Told(heads.pictures_of(visual, lengths), case.settings["classes"])
