"""The arms of the table: a batch answered from fewer tokens, by a method or by what methods are measured against."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vtprune.catalog import build, describe, list_methods
from vtprune.errors import InvalidOption, UnsupportedCall, VtpruneError
from vtprune.eval.questions import Item, coverage, in_turn
from vtprune.eval.subject import Answers, Batch, Inputs
from vtprune.eval.variants import Variants
from vtprune.readings import Reading
from vtprune.runtime.evidence import readings_of
from vtprune.types import Budget, Ordinal, VisualTokens

Arm = Callable[[Batch, float | int], Answers]


def method_arm(name: str, batch: Batch, keep: float | int) -> Answers:
    """The method of that name."""
    return batch.answer(name, keep)


def identity(batch: Batch, keep: float | int) -> Answers:
    """All tokens, nothing pruned."""
    return batch.whole[0]


def blind(batch: Batch, keep: float | int) -> Answers:
    """All tokens of another picture or clip, the next one: what can be answered without seeing anything."""
    subject = batch.subject
    inputs = subject.inputs(batch.items, [item.other for item in batch.items])
    answers, _ = subject.answer(subject.encode(inputs)(), "identity", 1.0)
    return dataclasses.replace(answers, tokens=None)


def random(batch: Batch, keep: float | int) -> Answers:
    """The method `random`, drawn anew for every scene, so that no single draw decides."""
    k = batch.count(keep)
    features = torch.zeros(1, batch.n, 1)
    tokens = VisualTokens(features=features, parts=batch.parts, ordinals=(Ordinal(segment=0),))

    def drawn(item: Item) -> list[int]:
        chosen: list[int] = build("random", {"seed": item.seed}).run(tokens, k).keep[0].tolist()
        return chosen

    return batch.answer("random", keep, evidence={"protect": [drawn(item) for item in batch.items]})


def oracle(batch: Batch, keep: float | int) -> Answers:
    """The tokens that show most of the things, every thing once before any twice; what is left of the budget is spread
    evenly over the rest. It is told where the things are, not what is asked."""
    k = batch.count(keep)
    chosen = [in_turn(coverage(item.views, batch.parts))[:k] for item in batch.items]
    return batch.answer("uniform", keep, evidence={"protect": chosen})


def downsample(batch: Batch, keep: float | int) -> Answers:
    """The picture scaled down to the largest size of which the encoder makes no more tokens than the budget, stretched
    to at most twice its shape; the prompt is shorter to match. Encoders of one size interpolate their position
    embeddings. Of a clip, as many frames as the budget has room for, evenly apart."""
    k = batch.count(keep)
    clip = batch.items[0].modality == "video"
    if len(batch.parts) > 1 and not clip:
        raise UnsupportedCall("this family packs a picture from several parts, whatever its size")
    try:
        inputs = _fewer(batch, k) if clip else _smaller(batch, k)
        answers, parts = batch.subject.answer(inputs(), "identity", 1.0)
    except (VtpruneError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedCall(f"this model does not take smaller pictures: {reason}") from error
    if sum(part.tokens for part in parts) > k:
        raise UnsupportedCall(f"the encoder makes more than {k} tokens of any picture")
    return dataclasses.replace(answers, tokens=None)


def _fewer(batch: Batch, k: int) -> Callable[[], Inputs]:
    """The batch with so many frames of every clip that they have at most `k` tokens, encoded."""
    views = [item.views for item in batch.items]
    here = len(views[0])
    count = k // (batch.n // here)
    if count < 1:
        raise UnsupportedCall(f"one frame alone is more than {k} tokens")
    chosen = [(2 * turn + 1) * here // (2 * count) for turn in range(count)]
    return batch.subject.encode(batch.subject.inputs(batch.items, [[own[i] for i in chosen] for own in views]))


def _smaller(batch: Batch, k: int) -> Callable[[], Inputs]:
    """The batch with pictures of at most `k` tokens, encoded."""
    subject, pixels = batch.subject, batch.inputs["pixel_values"]
    grid, views = batch.parts[0].grid, [item.views for item in batch.items]
    any_size = batch.inputs.get("image_grid_thw")
    if any_size is not None:
        patch: Any = subject.base.config.vision_config.patch_size  # type: ignore[union-attr]
        unit = int(any_size[0, 1]) * patch // grid[0]
        size = {"shortest_edge": unit**2, "longest_edge": (math.isqrt(k) * unit) ** 2}
        return subject.encode(subject.inputs(batch.items, views, size=size))
    rows, columns = coarser_grid(grid, k)
    size = {"height": rows * (pixels.shape[-2] // grid[0]), "width": columns * (pixels.shape[-1] // grid[1])}
    crop = {"crop_size": size} if getattr(subject.processor.image_processor, "do_center_crop", False) else {}
    inputs = subject.inputs(batch.items, views, size=size, **crop)
    tower = getattr(subject.base, "vision_tower", None)
    if tower is None or "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        raise UnsupportedCall("its encoder takes one size only")
    return subject.encode(inputs, options={"interpolate_pos_encoding": True})


def coarser_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The largest grid of at most `count` cells, none longer than twice its width; the squarest of equal ones."""

    def stretch(rows: int, columns: int) -> float:
        aspect = (grid[0] / rows) / (grid[1] / columns)
        return max(aspect, 1 / aspect)

    choices = [(rows, min(grid[1], count // rows)) for rows in range(1, min(grid[0], count) + 1)]
    fitting = [choice for choice in choices if stretch(*choice) <= 2]
    if not fitting:
        return min(choices, key=lambda choice: stretch(*choice))
    return max(fitting, key=lambda choice: (choice[0] * choice[1], -stretch(*choice)))


OWN: dict[str, Arm] = {
    "random": random,
    "uniform": functools.partial(method_arm, "uniform"),
    "pool": functools.partial(method_arm, "pool"),
    "downsample": downsample,
    "oracle": oracle,
}
"""What methods are measured against, at every budget."""
WHOLE: dict[str, Arm] = {"identity": identity, "blind": blind}
"""What has all tokens, and one row."""
REVISION = 2
"""To be raised when an own arm changes, so that its stored answers are not taken for those of the new one."""
Step = tuple[str, float | int]


def plan(
    methods: Sequence[str] | None, keep: Sequence[float | int], variants: Variants | None = None
) -> tuple[Step, ...]:
    """Every row of the table to be: those with all tokens, then every method and own arm at every budget. Methods that
    drop nothing have one row.

    `methods` are names of `list_methods()`, by default all of them; `variants` give some a second row.

    Raises:
        InvalidOption: for an unknown method, a budget out of range, or variants that no method takes.
    """
    names = list_methods() if methods is None else list(methods)
    chosen = [name for name in dict.fromkeys(names) if name not in OWN and name not in WHOLE]
    pruning = [name for name in chosen if build(name).drops]
    budgets = {str(Budget(keep=value).keep): Budget(keep=value).keep for value in keep}
    if not budgets:
        raise InvalidOption("keep is empty: expected at least one share or number of tokens")
    rows = (variants or Variants()).all_of(pruning)
    whole = [(name, 1.0) for name in (*WHOLE, *(name for name in chosen if name not in pruning))]
    return (*whole, *((name, value) for name in (*rows, *OWN) for value in budgets.values()))


def arm_of(name: str) -> Arm:
    """The arm behind a name of the plan."""
    return {**WHOLE, **OWN}.get(name) or functools.partial(method_arm, name)


def readings(steps: Sequence[Step], variants: Variants) -> dict[str, Reading]:
    """What the methods of the plan take from the encoder."""
    methods = [variants.pipeline(name, keep) for name, keep in steps if name not in OWN and name not in WHOLE]
    return {name: reading for method in methods for name, reading in readings_of(method).items()}


def about(name: str) -> str:
    """What an own arm does, for a legend; empty for a method."""
    arm = WHOLE.get(name) or OWN.get(name)
    if isinstance(arm, functools.partial):
        return describe(name).summary
    if arm is None:
        return ""
    return " ".join((inspect.getdoc(arm) or "").replace("`", "").split())
