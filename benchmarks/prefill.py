"""Time to prefill: unwrapped, wrapped, and an oracle that is handed the already shortened prompt.

    python benchmarks/prefill.py --csv benchmarks/results/prefill.csv

The model has random weights and the shape of LLaVA-1.5 with hidden size 512 and 8 layers: 576 visual of 636 tokens.
On a CPU the figure is process CPU time, on a GPU the time between CUDA events. Arms are interleaved: in each round
every arm stands once, next to a run of the arm it is held against, pairs in random order and the two of a pair too.
A ratio is the median over the pairs, with a bootstrap interval of 95 %: what drifts from round to round cancels.
On Linux the allocator is told to keep what is freed, in all arms: how much of it the heap gives back and faults in
again depends on what ran long before, and makes single runs differ by several percent.
Pictures are encoded once beforehand: the arms differ only behind the encoder, except for the `encoder` arms.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from recording import append_rows, machine
from rich.progress import track
from torch import Tensor, nn

import vtprune
from vtprune._torchvision import heal

IMAGE = 5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TEXT_BEFORE, TEXT_AFTER = 20, 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm of one run, with quartiles of its times and ratios; `sure` is the interval of the median ratio."""

    arm: str
    method: str
    keep: float
    tokens: int
    clock: str
    median_ms: float
    low_ms: float
    high_ms: float
    over: str
    ratio: float
    ratio_low: float
    ratio_high: float
    sure_low: float
    sure_high: float
    allocator: str
    rounds: int
    threads: int
    hidden: int
    layers: int
    visual: int
    device: str
    torch: str
    transformers: str
    commit: str


def build_model(hidden: int, layers: int, device: str) -> nn.Module:
    """Random LLaVA: a CLIP tower of 24 x 24 patches, `hidden` wide, and a Llama of `layers` layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval().to(device)


def build_inputs(visual: int, device: str) -> dict[str, Tensor]:
    """One prompt with one picture."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(10, 4000, (1, TEXT_BEFORE + TEXT_AFTER), generator=generator)
    picture = torch.full((1, visual), IMAGE)
    ids = torch.cat([words[:, :TEXT_BEFORE], picture, words[:, TEXT_BEFORE:]], dim=1)
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids.to(device), "pixel_values": pixels.to(device)}


def clock_ms(device: str, run: Callable[[], Any]) -> float:
    """Milliseconds of one call: CUDA events on a GPU, process CPU time elsewhere."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e3


class Calls:
    """The calls to be timed, by name; each sets itself up outside of the clock."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.inputs = inputs
        self.shared: dict[str, Any] = {}

    def encode(self, method: str) -> None:
        """Encode the picture while wrapped, so that evidence travels with the features."""
        with vtprune.pruning(self.model, method, keep=0.5):
            output = self.model.model.get_image_features(self.inputs["pixel_values"], return_dict=True)
        self.shared = {"image": output}

    def forward(self) -> Any:
        ids = self.inputs["input_ids"]
        return self.model(input_ids=ids, mm_encoder_outputs=dict(self.shared), use_cache=True, logits_to_keep=1)

    def with_encoder(self) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def short_prompt(self, kept: int) -> Callable[[], Any]:
        """Transformers alone on a prompt with `kept` placeholders and as many features: nothing left to prune."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        ids = self.inputs["input_ids"]
        text = ids[ids != IMAGE]
        short = torch.cat([text[:TEXT_BEFORE], ids.new_full((kept,), IMAGE), text[TEXT_BEFORE:]])[None]
        features = BaseModelOutputWithPooling(pooler_output=[self.shared["image"].pooler_output[0][:kept].clone()])
        return lambda: self.model(
            input_ids=short, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1
        )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A call to be timed, and the name of the one it is held against (its own where there is none)."""

    name: str
    method: str
    keep: float
    against: str
    timed: Callable[[], float]


def all_arms(calls: Calls, methods: list[str], keeps: list[float], device: str) -> dict[str, Arm]:
    """Every arm by its name."""
    visual = int((calls.inputs["input_ids"] == IMAGE).sum())
    found: dict[str, Arm] = {}

    def plain(name: str, keep: float, run: Callable[[], Any]) -> None:
        key = name if keep == 1.0 else f"{name} {keep}"
        found[key] = Arm(name=name, method="", keep=keep, against=key, timed=lambda: clock_ms(device, run))

    def wrapped(name: str, method: str, keep: float, run: Callable[[], Any], against: str) -> None:
        def timed() -> float:
            with vtprune.pruning(calls.model, method, keep=keep):
                return clock_ms(device, run)

        found[f"{name} {method} {keep}"] = Arm(name=name, method=method, keep=keep, against=against, timed=timed)

    plain("unwrapped", 1.0, calls.forward)
    plain("unwrapped+encoder", 1.0, calls.with_encoder)
    for keep in keeps:
        plain("oracle", keep, calls.short_prompt(int(keep * visual + 0.5)))
    for method in methods:
        for keep in (1.0, *keeps):
            against = "unwrapped" if keep == 1.0 else f"oracle {keep}"
            wrapped("wrapped", method, keep, calls.forward, against)
            wrapped("wrapped+encoder", method, keep, calls.with_encoder, "unwrapped+encoder")
    return found


def measure(arms: dict[str, Arm], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of every arm in every round, each with those of the arm it is held against, run next to it."""
    pairs = [arm for key, arm in arms.items() if arm.against != key]
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in arms}
    shuffle = random.Random(0)
    for number in track(range(rounds + 2), description="rounds"):
        shuffle.shuffle(pairs)
        for arm in pairs:
            other = arms[arm.against]
            own_first = shuffle.random() < 0.5
            first, second = (arm, other) if own_first else (other, arm)
            milliseconds = first.timed(), second.timed()
            own, beside = milliseconds if own_first else milliseconds[::-1]
            if number >= 2:
                times[f"{arm.name} {arm.method} {arm.keep}"].append((own, beside))
                times[arm.against].append((beside, beside))
    return times


def interval(values: list[float], level: float = 0.95, draws: int = 4000) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    skip = round(draws * (1 - level) / 2)
    return medians[skip], medians[-1 - skip]


def rows_of(times: dict[str, list[tuple[float, float]]], arms: dict[str, Arm], common: dict[str, Any]) -> list[Row]:
    """Medians with quartiles, and the ratio to the arm each is held against, pair by pair."""
    rows = []
    visual, text = common["visual"], TEXT_BEFORE + TEXT_AFTER
    for key, arm in arms.items():
        ratios = [own / beside for own, beside in times[key]]
        low, median, high = statistics.quantiles([own for own, _ in times[key]], n=4)
        ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4)
        sure_low, sure_high = interval(ratios)
        rows.append(
            Row(
                arm=arm.name,
                method=arm.method,
                keep=arm.keep,
                tokens=text + int(arm.keep * visual + 0.5),
                median_ms=round(median, 3),
                low_ms=round(low, 3),
                high_ms=round(high, 3),
                over=arm.against,
                ratio=round(ratio, 4),
                ratio_low=round(ratio_low, 4),
                ratio_high=round(ratio_high, 4),
                sure_low=round(sure_low, 4),
                sure_high=round(sure_high, 4),
                **common,
            )
        )
    return sorted(rows, key=lambda row: (row.arm, row.method, -row.keep))


def keep_freed_memory() -> bool:
    """Tell glibc not to give freed memory back to the system; False where there is no glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(M_MMAP_THRESHOLD, 2**25))


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds after two warm-ups")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["vtprune", "fastervlm", "divprune", "random"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25, 0.11])
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    heal()
    torch.set_num_threads(options.threads)
    allocator = "keeps what is freed" if keep_freed_memory() else "as it comes"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(options.hidden, options.layers, device)
    common = {
        "allocator": allocator,
        "rounds": options.rounds,
        "threads": options.threads,
        "hidden": options.hidden,
        "layers": options.layers,
        "visual": 576,
        **machine(device),
    }
    calls = Calls(model, build_inputs(576, device))
    calls.encode("vtprune")
    gc.collect()
    arms = all_arms(calls, options.methods, options.keep, device)
    with torch.no_grad():
        times = measure(arms, options.rounds)
    rows = rows_of(times, arms, common)
    for row in rows:
        name = f"{row.arm} {row.method}".strip()
        spread = f"{row.low_ms:8.2f} .. {row.high_ms:8.2f}"
        ratio = f"{row.ratio:6.3f} [{row.sure_low:.3f}, {row.sure_high:.3f}]"
        print(f"{name:28s} keep {row.keep:<5} {row.median_ms:8.2f} ms ({spread})  {ratio} x {row.over}")
    if options.csv:
        append_rows(options.csv, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
