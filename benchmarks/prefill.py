"""Time to prefill, beside an oracle.

Time to prefill: unwrapped, wrapped, and an oracle that is handed the already shortened prompt.

    python benchmarks/prefill.py --csv benchmarks/results/prefill.csv
    python benchmarks/prefill.py --shape llava-next-7b --csv benchmarks/results/prefill.csv           # needs a GPU
    python benchmarks/prefill.py --shape qwen2.5-vl-7b --hidden 256 --layers 1 --vision-layers 1 --visual 256 --rounds 1

Weights are random. The shape `small` is that of LLaVA-1.5 with hidden size 512 and 8 layers: 576 visual of 636 tokens.
The others are those of the checkpoints they are named after: 576 tokens of LLaVA-1.5, 2928 of LLaVA-NeXT (2880 and 48
newlines, which are kept), 4096 of Qwen2.5-VL. In full they are for a GPU: on a CPU their rows are written as "not
measured", unless numbers are made smaller (the shape is "cut down" then) or `--force` insists.

On a CPU the figure is process CPU time in fp32, on a GPU the time between CUDA events in bfloat16. Arms are
interleaved: in each round every arm stands once, next to a run of the arm it is held against, pairs in random order and
the two of a pair too. A ratio is the median over the pairs, with a bootstrap interval of 95 %: what drifts from round
to round cancels. On Linux the allocator is told to keep what is freed, in all arms: how much of it the heap gives back
and faults in again depends on what ran long before, and makes single runs differ by several percent.

The oracle and the wrapped model are called alike: ids with placeholders, the features to put there, on M-RoPE position
ids made beforehand, as `generate` does it, and one row of logits. The oracle has as many placeholders as the wrapped
model keeps (separators too), as many features, and on M-RoPE the ids of evenly spaced tokens. So the wrapped model has
on top: embedding the long prompt, putting all features there, choosing, and cutting. Pictures are encoded once
beforehand, and what a method reads of the encoder is read by then; it is in the arms with `encoder` and `first token`.

Of the large shapes there are two more arms. "first token" is the encoder and the prefill in one, against the encoder
and the oracle; "encoder probe" is the encoder while a method reads it, against the encoder alone, with what is worked
out of the readings later. `bound` is the most that a ratio is to be on a Hopper-class GPU.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from prefill_calls import Arm, Calls, plan
from recording import MEASURED, NOT_MEASURED, append_rows, csv_path, machine, run
from rich.progress import track
from shapes import SHAPES, Shape
from timing import interval, keep_freed_memory, quartiles

import vtprune
from vtprune._torchvision import heal
from vtprune.kernels.backends import BACKENDS, choose_backend

WARM_UPS = 2
CUT = ("hidden", "layers", "vision_layers", "visual")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm of one run, with quartiles of its times and ratios; `sure` is the interval of the median ratio.

    Numbers are None of an arm that was not measured, `tokens` too.
    """

    arm: str
    method: str
    keep: float
    tokens: int | None = None
    clock: str = ""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    over: str
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    sure_low: float | None = None
    sure_high: float | None = None
    allocator: str = ""
    rounds: int | None = None
    threads: int | None = None
    hidden: int
    layers: int
    visual: int
    device: str = ""
    torch: str
    transformers: str
    commit: str
    shape: str
    dtype: str
    vision_layers: int
    backend: str
    bound: float | None
    measured: str = MEASURED


def measure(calls: Calls, arms: dict[str, Arm], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of every arm in every round, each with those of the arm it is held against, run next to it."""
    pairs = [arm for key, arm in arms.items() if arm.against != key]
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in arms}
    shuffle = random.Random(0)
    for number in track(range(rounds + WARM_UPS), description="rounds"):
        shuffle.shuffle(pairs)
        for arm in pairs:
            other = arms[arm.against]
            own_first = shuffle.random() < 0.5
            first, second = (arm, other) if own_first else (other, arm)
            milliseconds = calls.timed(first), calls.timed(second)
            own, beside = milliseconds if own_first else milliseconds[::-1]
            if number >= WARM_UPS:
                times[arm.key].append((own, beside))
                times[arm.against].append((beside, beside))
    return times


def row_of(arm: Arm, times: list[tuple[float, float]], tokens: int, common: dict[str, Any]) -> Row:
    """Medians with quartiles, and the ratio to the arm it is held against, pair by pair."""
    ratios = [own / beside for own, beside in times]
    low, median, high = quartiles([own for own, _ in times])
    ratio_low, ratio, ratio_high = quartiles(ratios)
    sure_low, sure_high = interval(ratios)
    return Row(
        arm=arm.name,
        method=arm.method,
        keep=arm.keep,
        tokens=tokens,
        median_ms=round(median, 3),
        low_ms=round(low, 3),
        high_ms=round(high, 3),
        over=arm.against,
        ratio=round(ratio, 4),
        ratio_low=round(ratio_low, 4),
        ratio_high=round(ratio_high, 4),
        sure_low=round(sure_low, 4),
        sure_high=round(sure_high, 4),
        bound=arm.bound,
        **common,
    )


def not_measured(arm: Arm, common: dict[str, Any]) -> Row:
    """The line of an arm without its numbers."""
    known = {name: common[name] for name in (*CUT, "shape", "dtype", "backend", "torch", "transformers", "commit")}
    return Row(
        arm=arm.name,
        method=arm.method,
        keep=arm.keep,
        over=arm.against,
        bound=arm.bound,
        measured=NOT_MEASURED,
        **known,
    )


def show(rows: list[Row]) -> None:
    """A table for people."""
    for row in rows:
        name = f"{row.arm} {row.method}".strip()
        bound = "" if row.bound is None else f", at most {row.bound}"
        if row.measured == NOT_MEASURED:
            print(f"{name:28s} keep {row.keep:<5} not measured{bound}")
            continue
        spread = f"{row.low_ms:8.2f} .. {row.high_ms:8.2f}"
        ratio = f"{row.ratio:6.3f} [{row.sure_low:.3f}, {row.sure_high:.3f}]"
        print(f"{name:28s} keep {row.keep:<5} {row.median_ms:8.2f} ms ({spread})  {ratio} x {row.over}{bound}")


def arguments() -> argparse.Namespace:
    """What was asked for; `shape` becomes a `Shape` with the numbers that were given, `name` what rows call it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="model and prompt (default: small)")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds after two warm-ups (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--hidden", type=int, help="width of the language model, a multiple of 64 or 128 (large ones)")
    parser.add_argument("--layers", type=int, help="layers of the language model")
    parser.add_argument("--vision-layers", type=int, help="layers of the vision encoder")
    parser.add_argument("--visual", type=int, help="visual tokens, a square number (qwen2.5-vl-7b only)")
    parser.add_argument("--methods", nargs="+", help="from `vtprune methods` (default: those of the shape)")
    parser.add_argument("--keep", nargs="+", type=float, help="shares (default: those of the shape)")
    parser.add_argument("--force", action="store_true", help="run a large shape on a CPU: takes hours")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the kernels (default: auto)")
    parser.add_argument("--csv", type=csv_path, help="append the rows to this file")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.visual is not None and (not shape.square or math.isqrt(options.visual) ** 2 != options.visual):
        parser.error(f"--visual {options.visual}: expected a square number, and --shape qwen2.5-vl-7b")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected 1 or more")
    if unknown := set(options.methods or ()) - set(vtprune.list_methods()):
        parser.error(f"--methods {' '.join(sorted(unknown))}: expected names from `vtprune methods`")
    if any(not 0 < keep <= 1 for keep in options.keep or ()):
        parser.error(f"--keep {' '.join(map(str, options.keep))}: expected shares above 0, up to 1")
    head = 128 if shape.bounded else 64
    if options.hidden is not None and (options.hidden < head or options.hidden % head):
        parser.error(f"--hidden {options.hidden}: expected a multiple of {head}")
    choose_backend(options.backend)
    given = {name: getattr(options, name) for name in CUT if getattr(options, name) is not None}
    options.shape = replace(shape, **given)
    options.name = shape.name + (" (cut down)" if shape.bounded and options.shape != shape else "")
    options.methods = options.methods or list(shape.methods)
    options.keep = options.keep or list(shape.keep)
    return options


@torch.no_grad()
def main() -> None:
    """Run the benchmark and print the table."""
    options = arguments()
    shape: Shape = options.shape
    heal()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    whole = shape.bounded and shape == SHAPES[shape.name]
    runs = device == "cuda" or not whole or options.force
    common = {
        "allocator": "keeps what is freed" if keep_freed_memory() else "as it comes",
        "rounds": options.rounds,
        "threads": options.threads,
        **{name: getattr(shape, name) for name in CUT},
        "shape": options.name,
        "backend": options.backend,
        "dtype": str(dtype if runs else torch.bfloat16).removeprefix("torch."),
        **machine(device),
    }
    arms = plan(shape, options.methods, options.keep)
    if not whole:
        arms = {key: replace(arm, bound=None) for key, arm in arms.items()}
    if runs:
        print(f"{options.name}: {len(arms)} arms, {options.rounds} rounds on {common['device']}", flush=True)
        calls = Calls(shape, options.methods, options.keep, device, dtype, options.backend)
        gc.collect()
        times = measure(calls, arms, options.rounds)
        rows = [row_of(arm, times[key], calls.tokens(arm), common) for key, arm in arms.items()]
    else:
        print("not measured: that takes a GPU. Make it smaller (--hidden, --layers), or insist with --force")
        rows = [not_measured(arm, common) for arm in arms.values()]
    rows.sort(key=lambda row: (row.arm, row.method, -row.keep))
    show(rows)
    if options.csv:
        append_rows(options.csv, [asdict(row) for row in rows])


if __name__ == "__main__":
    run(main)
