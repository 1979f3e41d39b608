"""The kernels, beside loops and floors.

The kernels, one by one: against what they take the place of, and against what the device could do at best.

    python benchmarks/kernels.py --csv benchmarks/results/kernels.csv
    python benchmarks/kernels.py --kernels mmr cut_sequence --rounds 3          # a quick look

Each kernel runs on random inputs of the shapes in `PRESETS`: `gpu` in bfloat16, `cpu`, which a core does in a second or
so, in float32. Without a GPU the rows of `gpu` are written as "not measured", without numbers.

A choice (mmr, k-center, max-sum, score-x-distance, dpp, facility) is held against a loop over pictures and steps, as
published implementations have it (`step_loops.py`), and on a GPU against its own PyTorch reference, with and without
torch.compile, which unrolls the steps and is left out where they are many. On pictures without near ties all arms must
choose the same tokens, or there are no times; `agreement` is the share of the reference's tokens that an arm chooses on
the inputs that are timed, where the loop rounds similarities to bfloat16. `cut_sequence` is held against a loop over
rows with padding, `merge_rows` against the product with a dense mixture, attention against one call of SDPA of the same
layer and against the map of all rows; `encoder-probe` is the encoder while its CLS attention is read, against the
encoder alone, of as many layers as the row says.

Times are medians, with quartiles, of CUDA events in a busy queue, or of process CPU time. In each round every arm runs
once, in random order, often enough for `--least-ms`, on sets of inputs in turn that together are twice as large as the
largest cache. A ratio is the median over rounds of the time of an arm over that of the arm in the column `over`, with a
bootstrap interval of 95 %. `floor_ms` is the larger of two times: bytes that must be read and written over the copy
rate, and operations of products over the rate of a square product, both measured at the beginning. Every input is read
once; for a choice the products are those of all pairs where the rule asks for them, else of the pairs with a chosen
token, and "ours, none held" reads all features anew in every step. `extra_bytes` is the peak that the GPU's allocator
tells of a call. `bound` is what the figures are to reach on a Hopper-class GPU, `within` whether they do.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from kernel_cases import LETTERS, OURS, Arm, Case, Inputs, Setting
from kernel_presets import DTYPES, NAMES, PRESETS
from recording import MEASURED, NOT_MEASURED, append_rows, csv_path, machine, run
from rich.progress import Progress
from timing import (
    cache_bytes,
    clock_each_ms,
    copy_rate,
    extra_bytes,
    interval,
    keep_freed_memory,
    matmul_rate,
    quartiles,
)

from vtprune._torchvision import heal
from vtprune.errors import VtpruneError
from vtprune.kernels import backends

MOST_CALLS, MOST_SETS, MOST_BYTES = 200, 64, 2**32


def draw_sets(case: Case, device: str) -> list[Inputs]:
    """So many inputs that what the leanest arm reads of them is twice as large as the largest cache; at least two."""
    generator = torch.Generator(device).manual_seed(0)
    sets = [case.draw(generator)]
    work = case.arm(OURS).work
    held = sum(value.nbytes for value in _tensors(sets[0].values()))
    read = min(held, work.bytes) if work is not None and work.bytes else held
    most = min(MOST_SETS, max(2, MOST_BYTES // held))
    count = max(2, min(most, math.ceil(2 * cache_bytes(device) / read)))
    return sets + [case.draw(generator) for _ in range(count - 1)]


def _tensors(values: Sequence[Any] | Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        found += _tensors(value) if isinstance(value, list) else [value] if isinstance(value, torch.Tensor) else []
    return found


def measure(case: Case, sets: list[Inputs], options: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """Milliseconds of every arm in every round, behind a round to warm up that says how often each has to run."""
    turn = itertools.cycle(sets)
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {arm.name: [] for arm in case.arms}
    arms, shuffle = list(case.arms), random.Random(0)
    for number in rounds_shown(options.rounds + 1, f"{case.kernel}, {case.shape}"):
        shuffle.shuffle(arms)
        for arm in arms:
            with arm.around():
                if number == 0:
                    arm.run(next(turn))
                    once = clock_each_ms(device, lambda arm=arm: arm.run(next(turn)), 1)
                    calls[arm.name] = max(1, min(MOST_CALLS, math.ceil(options.least_ms / max(once, 1e-3))))
                else:
                    step = partial(_step, arm, turn)
                    times[arm.name].append(clock_each_ms(device, step, calls[arm.name]))
    return times


def rounds_shown(count: int, description: str) -> Iterator[int]:
    """Numbers of rounds beside a bar that is drawn between them: threads that draw would change how kernels launch."""
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task(description, total=count)
        for number in range(count):
            yield number
            progress.update(task, advance=1, refresh=True)


def _step(arm: Arm, turn: Any) -> None:
    arm.run(next(turn))


def facts_of(arm: Arm, inputs: Inputs, device: str) -> dict[str, Any]:
    """The memory that a call takes, and on which backend its kernels ran."""
    with arm.around() as use:
        extra = extra_bytes(device, lambda: arm.run(inputs))
    return {"extra_bytes": extra, "backend": str(use) if isinstance(use, backends.Use) else "torch"}


def row_of(case: Case, arm: Arm, times: Mapping[str, list[float]], rates: tuple[float, float]) -> dict[str, Any]:
    """The line of an arm, without what is not told by times."""
    low, median, high = quartiles(times[arm.name])
    ratios = [own / other for own, other in zip(times[arm.name], times[arm.over], strict=True)]
    sure_low, sure_high = interval(ratios)
    row: dict[str, Any] = {
        "median_ms": round(median, 4),
        "low_ms": round(low, 4),
        "high_ms": round(high, 4),
        "over": arm.over,
        "ratio": round(statistics.median(ratios), 4),
        "sure_low": round(sure_low, 4),
        "sure_high": round(sure_high, 4),
    }
    if arm.work is not None:
        floor, of = arm.work.floor_ms(*rates)
        row |= {"floor_ms": round(floor, 4), "floor_of": of, "share_of_floor": round(floor / median, 4)}
    return row


COLUMNS = ("kernel", "shape", *LETTERS, "dtype", "arm", "median_ms", "low_ms", "high_ms", "over", "ratio", "sure_low")
COLUMNS += ("sure_high", "floor_ms", "floor_of", "share_of_floor", "extra_bytes", "agreement", "backend", "bound")
COLUMNS += ("within", "measured", "preset", "rounds", "threads", "copy_gb_s", "matmul_gflop_s", "allocator")


def whole_row(case: Case, arm: Arm, preset: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """A line with all columns, empty where nothing is told."""
    known = {
        "kernel": case.kernel,
        "shape": case.shape,
        **case.letters,
        "dtype": str(case.dtype).removeprefix("torch."),
        "arm": arm.name,
        "over": arm.over,
        "bound": " and ".join(map(str, arm.bounds)),
        "measured": NOT_MEASURED,
        "preset": preset,
    }
    return dict.fromkeys(COLUMNS, "") | known | told


def measured_rows(case: Case, options: argparse.Namespace, preset: str, common: Mapping[str, Any]) -> list[dict]:
    """All lines of a case, once its arms are known to say the same."""
    device = common["device_type"]
    rates = common["rates"][case.dtype]
    sets = draw_sets(case, device)
    case.check(sets[0])
    times = measure(case, sets, options, device)
    rows = []
    for arm in case.arms:
        told = row_of(case, arm, times, rates) | facts_of(arm, sets[0], device) | common["columns"]
        told |= {"copy_gb_s": round(rates[0] / 1e6, 1), "matmul_gflop_s": round(rates[1] / 1e6, 1)}
        if case.agreement is not None:
            told["agreement"] = round(case.agreement(sets[0], arm), 4)
        if arm.bounds:
            told["within"] = "yes" if all(bound.holds(told) for bound in arm.bounds) else "no"
        rows.append(whole_row(case, arm, preset, told | {"measured": MEASURED}))
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A few lines for people."""
    print(f"{rows[0]['kernel']}, {rows[0]['shape']}, {rows[0]['dtype']}")
    for row in rows:
        if row["measured"] != MEASURED:
            print(f"  {row['arm']:32s} not measured  {row['bound']}")
            continue
        sure = f" [{row['sure_low']:.3f}, {row['sure_high']:.3f}]" if row["rounds"] > 2 else ""
        ratio = "" if row["over"] == row["arm"] else f"{row['ratio']:8.3f}{sure} x {row['over']}"
        floor = f"  floor {row['floor_ms']:.3g} ms ({row['floor_of']})" if row["floor_of"] else ""
        bound = f"  {row['bound']}: {row['within']}" if row["bound"] else ""
        print(f"  {row['arm']:32s} {row['median_ms']:10.3f} ms {ratio}{floor}{bound}")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="shapes (default: gpu; without one, cpu and gpu)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds after one to warm up (default: 7)")
    parser.add_argument("--least-ms", type=float, default=20.0, help="an arm runs that long in a round (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--backend", choices=backends.BACKENDS, default="auto", help="of the kernels (default: auto)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="an arm with torch.compile of the reference (default: on a GPU)",
    )
    parser.add_argument("--csv", type=csv_path, help="append the rows to this file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected 1 or more")
    backends.choose_backend(options.backend)
    return options


def measurable(preset: str, device: str) -> bool:
    """Whether a preset is for such a device."""
    return device == "cuda" or preset != "gpu"


def common_of(options: argparse.Namespace, presets: list[str], device: str, allocator: str) -> dict[str, Any]:
    """The columns that all measured rows share, and the rates of the device for each dtype that is measured."""
    about = {"rounds": options.rounds, "threads": options.threads, "allocator": allocator, **machine(device)}
    dtypes = {DTYPES[preset] for preset in presets if measurable(preset, device)}
    copy = copy_rate(device) if dtypes else 0.0
    rates = {dtype: (copy, matmul_rate(device, dtype)) for dtype in dtypes}
    return {"columns": about, "device_type": device, "rates": rates}


@torch.no_grad()
def main() -> None:
    """Run the benchmark, print the rows, and append them case by case: a later failure loses nothing."""
    options = arguments()
    torch.set_num_threads(options.threads)
    allocator = "keeps what is freed" if keep_freed_memory() else "as it comes"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    presets = options.preset or (["gpu"] if device == "cuda" else ["cpu", "gpu"])
    if any(measurable(preset, device) for preset in presets):
        heal()
    common = common_of(options, presets, device, allocator)
    failed = []
    for preset in presets:
        here = measurable(preset, device)
        setting = Setting(
            device=device if here else "cuda",
            dtype=DTYPES[preset],
            backend=options.backend,
            compiled=options.compile if here else True,
            bounded=preset == "gpu",
        )
        for problem in PRESETS[preset]:
            if problem.kernel in options.kernels:
                failed += _one(problem.case(setting), options, preset, common, here)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def _one(case: Case, options: argparse.Namespace, preset: str, common: Mapping[str, Any], here: bool) -> list[str]:
    """Measure a case and write its rows; what went wrong, if anything did."""
    versions = {name: common["columns"][name] for name in ("torch", "transformers", "commit")}
    blank = {"clock": "", "device": "", **versions}
    try:
        made: Callable[[], list[dict]] = partial(measured_rows, case, options, preset, common)
        rows = made() if here else [whole_row(case, arm, preset, blank) for arm in case.arms]
    except (RuntimeError, VtpruneError) as error:
        return [f"{case.kernel}, {case.shape}: {error}"]
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    show(rows)
    if options.csv:
        append_rows(options.csv, rows)
    return []


if __name__ == "__main__":
    run(main)
