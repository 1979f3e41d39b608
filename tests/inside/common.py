"""What the tests of cuts between layers share: methods and budgets, tiny models of six layers, and the dense reference.

The reference is transformers alone, without a cache: all tokens go through all layers, and a 4-D mask built here hides
each dropped token from the layer on that it did not reach any more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.contracts.cases import Answer, answer
from tests.contracts.dense import Merge, hidden
from tests.contracts.merges import merges_of, noted
from tests.models import IMAGE, VIDEO, Prompt
from vtprune import Pipeline
from vtprune.catalog import build

LAYERS, STEPS, TOLERANCE = 6, 4, 1e-4
BUDGETS = {
    "fastv": 0.6,
    "pyramiddrop": 0.6,
    "sparsevlm": 0.4,
    "sparsevlm_plus": 0.4,
    "adaptinfer": 0.5,
    "transprune": 0.5,
    "dyvte": 0.5,
    "information_horizon": 0.4,
    "vflowopt": 0.4,
}
"""Methods that cut between layers, each with an average that six layers can have and that cuts at every point."""
SETTINGS: dict[str, dict[str, Any]] = {
    "information_horizon": {"horizon": 0.7},
    "vflowopt": {"recycled": 0.4},
    "sparsevlm": {"recycled": 0.2},
}
"""Parameters that show more on tiny models: a layer where all tokens leave, and more than one recycled token."""
EARLY = tuple(method for method in BUDGETS if build(method).picks)
"""Methods that pick in front of the language model, too."""
DEEP = tuple(method for method in BUDGETS if method not in EARLY)
TEXTUAL = ("sparsevlm", "sparsevlm_plus", "adaptinfer", "transprune")
"""Methods that look at the text behind the picture, not at the last token alone."""
EXITS = ("dyvte",)
"""Methods that let whole pictures leave: the budget is the most, in whole layers."""
FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "video_llava",
)
SOME = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
ONE = (Prompt(images=((32, 32),), seed=1),)
PROMPTS = {"one": ONE, "batch": models.ONE_AND_TWO}
WHOLE = ("input_ids", "attention_mask", "mm_token_type_ids")


def fresh(family: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A model that never stops early; always with the same weights."""
    model = models.build(family, layers=LAYERS, **options)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    return model


@functools.cache
def model_of(family: str, attention: str = "sdpa") -> nn.Module:
    """The one that the tests of a process share: leave it unwrapped."""
    return fresh(family, attention)


@contextmanager
def pruned(model: nn.Module, method: str | Pipeline, **options: Any) -> Iterator[Any]:
    """Wrapped for a block, to the budget of the table unless told."""
    known = {"keep": BUDGETS[method], **SETTINGS.get(method, {})} if isinstance(method, str) else {}
    with noted(), vtprune.pruning(model, method, **{**known, **options}) as pruner:
        yield pruner


@dataclass(frozen=True)
class Run:
    """An answer, the report of its prefill, how far each token of its prompt went and what merged, a row per beam."""

    answer: Answer
    report: Any
    reach: Tensor
    merges: list[list[Merge]]


def run(model: nn.Module, method: str | Pipeline, inputs: dict[str, Tensor], mode: Any = None, **options: Any) -> Run:
    """Wrap, answer, unwrap; `mode` goes to `generate`."""
    with pruned(model, method, **options) as pruner:
        got = answer(model, inputs, **{"steps": STEPS, **(mode or {})})
        beams = len(pruner.last.length_before) // len(inputs["input_ids"])
        rows = {name: inputs[name].repeat_interleave(beams, dim=0) for name in ("input_ids", "attention_mask")}
        reached = reach(pruner.last, rows["input_ids"])
        return Run(got, pruner.last, reached, merges(pruner.last, rows["attention_mask"]))


def reach(report: Any, ids: Tensor, earlier: Tensor | None = None) -> Tensor:
    """How many layers each token of a prompt (B, L) went through: all of them, but where the report says otherwise.

    Of a chat, `earlier` is the same of the prompt before, whose pictures the report does not name.
    """
    found = torch.full(ids.shape, LAYERS)
    known = 0
    if earlier is not None:
        known = earlier.shape[1]
        found[:, :known] = earlier
    visual = [[place for place in range(known, len(row)) if row[place] in (IMAGE, VIDEO)] for row in ids.tolist()]
    for segment in report.segments:
        places = [visual[segment.row].pop(0) for _ in range(segment.parts[-1].stop)]
        always = {offset for part in segment.parts for offset in part.separators}
        tokens = [place for offset, place in enumerate(places) if offset not in always]
        found[segment.row, tokens] = segment.depths
    assert not any(visual), "the report must account for every placeholder"
    return found


def merges(report: Any, attended: Tensor, known: int = 0) -> list[list[Merge]]:
    """What merged between layers, at places of the prompts, of which the first `known` tokens were cached before.

    All tokens that are `attended` (B, L) must have entered the language model.
    """
    found = []
    for row, real in enumerate(attended.bool()):
        places = [place for place in range(known, len(real)) if real[place]]
        found.append([one.placed(places) for one in merges_of(report, row)])
    return found


def dense(
    model: nn.Module, inputs: dict[str, Tensor], reached: Tensor, merged: Sequence[Sequence[Merge]] = (), **mode: Any
) -> Answer:
    """The answer of transformers alone, without a cache, its layers seeing only what reached them, means included."""
    assert not hasattr(model, "vtprune"), "the reference needs the unwrapped model"
    with hidden(model, reached, merged):
        return answer(model, inputs, use_cache=False, **{"steps": STEPS, **mode})


def assert_same(got: Answer, expected: Answer, rows: Sequence[int] | slice = slice(None)) -> None:
    """Equal tokens, logits within `TOLERANCE`."""
    assert (got.logits - expected.logits[rows]).abs().max() < TOLERANCE
    assert got.tokens.tolist() == expected.tokens[rows].tolist()


def stored(cache: Any) -> list[int]:
    """Tokens in the cache of every layer, padding counted in."""
    return [layer.keys.shape[2] for layer in cache.layers]


def lengths(reached: Tensor, attended: Tensor, written: int) -> list[int]:
    """What `stored` must be: in every layer the longest row, and all but the last of the `written` tokens."""
    real = attended.bool()
    return [int((real & (reached > layer)).sum(dim=1).max()) + written - 1 for layer in range(LAYERS)]
