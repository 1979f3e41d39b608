"""Cutting between decoder layers.

Cutting between decoder layers: time to first token, time per decoded token, and the memory of looking.

    python benchmarks/inside.py --csv benchmarks/results/inside.csv
    python benchmarks/inside.py --rounds 3 --hidden 256 --layers 4 --methods fastv pyramiddrop    # a quick look

Model and prompt are those of `benchmarks/prefill.py`: random weights in the shape of LLaVA, 576 visual of 636 tokens,
the picture encoded beforehand. Time to first token is the prefill behind the encoder, with one row of logits; then
`--decoded` given words follow on the cache that it left, in a call each, and decoding is the time per word. At equal
`keep`, an average over layers, stand the methods that cut between layers and `random`, which cuts in front of all of
them at next to no cost. No prompt can be shortened beforehand to what the former do: beside the measured ratio stands
`flops_ratio`, that of the report's estimates for the prefill. A budget that a method cannot reach is left out, with a
note. Every wrapped call runs next to an unwrapped one in random order; a ratio is the median over these pairs, with a
bootstrap interval of 95 %. On a CPU the clock is process CPU time in fp32, on a GPU that of CUDA events in bfloat16.

Memory is that of one more prefill: on a CPU what tensors hold, on a GPU what the allocator says.

- `probe_bytes`: the peak while a method looks at attention for its first cut, over what is in use there under the same
  cuts without looking: queries and keys that are held for it count. Where it looks at the layer to come
  (`pyramiddrop`) the cut itself counts too.
- `probe_shapes_bytes`: by shapes, the attention of the rows it looks from, once, in fp32, and these queries and keys;
  copies that the softmax makes, and keys turned to fp32, come on top.
- `probe_adds_bytes`: what looking adds to the peak of the whole prefill.
- `layer_bytes`: the peak in a layer of the unwrapped model, over what is in use in front of it.
- `peak_bytes`: the peak of the prefill, over what is in use in front of it; `kv_mib` is what it leaves in the cache.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from recording import append_rows, csv_path, machine, run
from rich.progress import track
from shapes import SMALL, TEXT_AFTER, build_inputs, build_model
from timing import clock_ms, interval, keep_freed_memory, quartiles
from torch import nn
from weighing import Bytes

import vtprune
from vtprune._torchvision import heal
from vtprune.catalog import build
from vtprune.errors import InvalidOption
from vtprune.estimates import Shape
from vtprune.picking import Pick
from vtprune.pipeline import Pipeline
from vtprune.runtime.deep import schedule_of
from vtprune.stages.scorers import Constant
from vtprune.stages.selectors import TopK
from vtprune.types import Budget

VISUAL = SMALL.visual
WARM_UPS = 2
Pair = tuple[float, float]
Hooks = tuple[Callable[..., Any], Callable[..., Any]]
CARDS = [vtprune.describe(method) for method in vtprune.list_methods()]
INSIDE = [card.name for card in CARDS if card.in_layers or card.in_cache]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method at a budget; without a name the unwrapped model."""

    method: str = ""
    keep: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A prefill: its report, None of the unwrapped model, bytes that it used, and those that it leaves in the cache.

    The part of `bytes` lies between two hooks, put on before and after the model is wrapped: what it hooks in there.
    """

    bytes: Bytes
    kv_bytes: int
    report: vtprune.PruneReport | None


class Runs:
    """The calls; the picture is encoded once for each method, along with what it reads of the encoder."""

    def __init__(self, model: nn.Module, device: str, decoded: int) -> None:
        self.model = model
        self.device = device
        inputs = build_inputs(SMALL, device, model.dtype)
        self.ids, self._pixels = inputs["input_ids"], inputs["pixel_values"]
        generator = torch.Generator().manual_seed(2)
        self._words = torch.randint(10, 4000, (decoded, 1, 1), generator=generator).to(device).unbind()
        self._encoded: dict[Arm, Any] = {}
        self.encode(Arm())

    def encode(self, arm: Arm) -> None:
        """Raises `InvalidOption` where the method does not reach the budget."""
        with self._wrapped(arm.method, arm.keep):
            output = self.model.model.get_image_features(self._pixels, return_dict=True)
        self._encoded[arm] = output

    def timed(self, arm: Arm) -> tuple[float, float]:
        """Milliseconds of the prefill, and of one word decoded behind it."""
        made: list[Any] = []
        with self._wrapped(arm.method, arm.keep):
            prefill = clock_ms(self.device, lambda: made.append(self._prefill(arm)))
            decode = partial(self._decode, made[0].past_key_values)
            return prefill, clock_ms(self.device, decode) / len(self._words)

    def weighed(self, arm: Arm, pipeline: Pipeline | None = None, hooks: Hooks | None = None) -> Weighed:
        """One more prefill, as `pipeline` where that is given; of `hooks` see `Weighed`."""
        count = Bytes(self.device)
        handles = [] if hooks is None else [hooks[0](count.begin)]
        try:
            with self._wrapped(pipeline or arm.method, arm.keep) as pruner:
                handles += [] if hooks is None else [hooks[1](count.end)]
                with count:
                    cache = self._prefill(arm).past_key_values
        finally:
            for handle in handles:
                handle.remove()
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return Weighed(bytes=count, kv_bytes=kv_bytes, report=None if pruner is None else pruner.last)

    def _wrapped(self, method: str | Pipeline, keep: float) -> AbstractContextManager[Any]:
        return vtprune.pruning(self.model, method, keep=keep) if method else nullcontext()

    def _prefill(self, arm: Arm) -> Any:
        encoded = {"image": self._encoded[arm]}
        return self.model(input_ids=self.ids, mm_encoder_outputs=encoded, use_cache=True, logits_to_keep=1)

    def _decode(self, cache: Any) -> None:
        for word in self._words:
            self.model(input_ids=word, past_key_values=cache, use_cache=True)


def probe_of(runs: Runs, arm: Arm) -> dict[str, int]:
    """Bytes of looking; none where the method does not look."""
    pipeline = build(arm.method or "identity")
    looks = pipeline.glances if pipeline.cache is None else pipeline.cache.choice.glances
    glance = next(iter(looks.values()), None)
    if glance is None:
        return dict.fromkeys(("probe_bytes", "probe_shapes_bytes", "probe_adds_bytes"), 0)
    base, lm = runs.model.model, runs.model.model.language_model
    first = (Pick(name="first", scorer=Constant(), selector=TopK()),)
    if pipeline.cache is not None:
        attention, entering, ahead = lm.layers[0].self_attn, VISUAL, pipeline.cache.sparse
        hook = attention.register_forward_pre_hook if ahead else attention.register_forward_hook
        blind = replace(pipeline, cache=replace(pipeline.cache, picks=first, counter=None))
    else:
        schedule = schedule_of(pipeline, base, lm)
        number, ahead = schedule.layers[0], glance.at == "behind"
        before, behind = lm.layers[number - 1].self_attn, lm.layers[number]
        hook = behind.register_forward_pre_hook if ahead else before.register_forward_hook
        blind = replace(pipeline, inside=tuple(replace(stage, picks=first, counter=None) for stage in pipeline.inside))
        entering = schedule.counts(VISUAL, Budget(keep=arm.keep))[0]
    looking, without = (runs.weighed(arm, one, (hook, hook)).bytes for one in (pipeline, blind))
    shape, itemsize = Shape.of(lm.config), runs.model.dtype.itemsize
    K = runs.ids.shape[1] - VISUAL + entering
    queries, keys = (K * heads * shape.head_dim * itemsize for heads in (shape.heads, shape.key_heads))
    again = K * shape.d * itemsize + keys if ahead else 0
    rows = {"last": 1, "sampled": 128, "all": 256}.get(glance.rows, TEXT_AFTER)
    return {
        "probe_bytes": looking.most - without.begun,
        "probe_shapes_bytes": shape.heads * rows * K * 4 + queries + keys + again,
        "probe_adds_bytes": looking.highest - without.highest,
    }


def facts_of(runs: Runs, arm: Arm) -> dict[str, Any]:
    """What no clock tells: tokens of the picture in a layer, on average, and in the last one, operations and bytes."""
    weighed = runs.weighed(arm)
    report = weighed.report
    return {
        "average": VISUAL if report is None else round(report.average, 2),
        "last": VISUAL if report is None else report.kept,
        "flops_ratio": 1.0 if report is None else round(report.flops_after / report.flops_before, 4),
        "kv_mib": round(weighed.kv_bytes / 2**20, 3),
        **probe_of(runs, arm),
        "peak_bytes": weighed.bytes.highest,
    }


def layer_bytes(runs: Runs) -> int:
    """Peak in a layer of the unwrapped model, over what is in use in front of it."""
    layer = runs.model.model.language_model.layers[0]
    weighed = runs.weighed(Arm(), hooks=(layer.register_forward_pre_hook, layer.register_forward_hook))
    return weighed.bytes.most - weighed.bytes.begun


def reached(runs: Runs, methods: list[str], keeps: list[float]) -> list[Arm]:
    """Arms of methods at budgets they reach; a note is printed of the others."""
    found = []
    for arm in [Arm(method=method, keep=keep) for method in methods for keep in keeps]:
        try:
            runs.encode(arm)
            found.append(arm)
        except InvalidOption as error:
            print(f"left out, {arm.method} at {arm.keep}: {error}")
    return found


def measure(runs: Runs, arms: list[Arm], rounds: int) -> dict[Arm, list[tuple[Pair, Pair]]]:
    """Times of every arm in every round, each with those of the unwrapped model, run next to it."""
    times: dict[Arm, list[tuple[Pair, Pair]]] = {arm: [] for arm in [Arm(), *arms]}
    pairs, shuffle = list(arms), random.Random(0)
    for number in track(range(rounds + WARM_UPS), description="rounds"):
        shuffle.shuffle(pairs)
        for arm in pairs:
            order = [arm, Arm()]
            shuffle.shuffle(order)
            pair = {one: runs.timed(one) for one in order}
            if number >= WARM_UPS:
                times[arm].append((pair[arm], pair[Arm()]))
                times[Arm()].append((pair[Arm()], pair[Arm()]))
    return times


def spread(what: str, times: list[Pair]) -> dict[str, float]:
    """Quartiles of milliseconds, and the median of the ratios to those beside them with its interval."""
    low, median, high = quartiles([own for own, _ in times])
    ratios = [own / beside for own, beside in times]
    sure_low, sure_high = interval(ratios)
    return {
        f"{what}_ms": round(median, 3),
        f"{what}_low_ms": round(low, 3),
        f"{what}_high_ms": round(high, 3),
        f"{what}_ratio": round(statistics.median(ratios), 4),
        f"{what}_sure_low": round(sure_low, 4),
        f"{what}_sure_high": round(sure_high, 4),
    }


def row_of(runs: Runs, arm: Arm, pairs: list[tuple[Pair, Pair]], common: dict[str, Any]) -> dict[str, Any]:
    """The line of an arm: quartiles of its times, their ratios, and the rest."""
    first, decode = ([(own[part], beside[part]) for own, beside in pairs] for part in range(2))
    name = {"arm": arm.method or "unwrapped", "keep": arm.keep}
    return name | spread("ttft", first) | spread("decode", decode) | facts_of(runs, arm) | common


def show(rows: list[dict[str, Any]]) -> None:
    """A table for people."""
    print(f"a layer of the unwrapped model takes {rows[0]['layer_bytes'] / 2**20:.2f} MiB; memory in MiB")
    print(f"{'arm':24s} {'first token':>11s} {'ratio':>22s} {'decoded':>12s} {'ratio':>22s} {'flops':>6s}", end=" ")
    print(f"{'cache':>7s} {'probe':>7s} {'shapes':>7s} {'peak':>8s}")
    for row in rows:
        sure = {part: f"[{row[f'{part}_sure_low']:.3f}, {row[f'{part}_sure_high']:.3f}]" for part in ("ttft", "decode")}
        first = f"{row['ttft_ms']:8.2f} ms {row['ttft_ratio']:7.3f} {sure['ttft']}"
        decode = f"{row['decode_ms']:9.2f} ms {row['decode_ratio']:7.3f} {sure['decode']}"
        mib = [row[f"{name}_bytes"] / 2**20 for name in ("probe", "probe_shapes", "peak")]
        memory = f"{row['kv_mib']:7.2f} {mib[0]:7.2f} {mib[1]:7.2f} {mib[2]:8.1f}"
        print(f"{row['arm']:20s}{row['keep']:4} {first} {decode} {row['flops_ratio']:6.3f} {memory}")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds, 2 or more, after two warm-ups")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="layers of the language model")
    parser.add_argument("--decoded", type=int, default=32, help="words decoded behind a prefill")
    parser.add_argument("--methods", nargs="+", default=[*INSIDE, "random"], help="any of vtprune")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.3], help="shares, averages over layers")
    parser.add_argument("--csv", type=csv_path, help="append the rows to this file")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print the table."""
    options = arguments()
    heal()
    torch.set_num_threads(options.threads)
    allocator = "keeps what is freed" if keep_freed_memory() else "as it comes"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    asked = ("hidden", "layers", "decoded", "rounds", "threads")
    with torch.no_grad():
        shape = replace(SMALL, hidden=options.hidden, layers=options.layers)
        runs = Runs(build_model(shape, device, dtype), device, options.decoded)
        arms = reached(runs, options.methods, options.keep)
        gc.collect()
        times = measure(runs, arms, options.rounds)
        common = {name: getattr(options, name) for name in asked} | {
            "visual": VISUAL,
            "text": runs.ids.shape[1] - VISUAL,
            "layer_bytes": layer_bytes(runs),
            "dtype": str(dtype).removeprefix("torch."),
            "allocator": allocator,
            **machine(device),
        }
        rows = [row_of(runs, arm, pairs, common) for arm, pairs in times.items()]
    show(rows)
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    run(main)
