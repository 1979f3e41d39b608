"""Time to choose, beside what it saves.

Time to choose: what a pick costs, next to the prefill that it saves.

    python benchmarks/selection.py --bounded-only --csv benchmarks/results/selection.csv
    python benchmarks/selection.py --batch 1 --rounds 3 --csv benchmarks/results/selection.csv   # with what is reported
    python benchmarks/selection.py --width 512 --batch 2 --rounds 3                             # a quick look

Every pick takes 64 of the 576 tokens of each of 8 pictures, random features as wide as Llama-7B (4096) and random
scores. What it saves is the prefill of 576 visual tokens less that of 64, each with 60 tokens of text, in a language
model of the shape of Llama-7B. Of its 32 layers `--layers-measured` are run, with random weights, and their time is
multiplied: all layers do the same work. `share` is the time of the pick over the time saved: at 0.01 a hundredth of the
gain goes into choosing, above 1 pruning slows the prefill down. Encoder scores are on neither side. A pick is to stay
below `bound`, 0.03. Three more are held against the same prefill and reported, not bounded:

- "zoo sensitivity", evidence of ZOO-Prune: 64 probes of a projector of the shape of LLaVA-1.5's, each in both
  directions and in fp32, as the rule has it. Nothing is picked.
- "clip relevance", evidence of CDPruner: a whole call of `vtprune.text_relevance`, tokenizer included, with a CLIP of
  the shape of ViT-L/14-336. It runs a vision tower of its own over the pictures, all of it on top of the encoder that
  ran anyway, even where that is the same CLIP, and the text tower once for each question (as long as the text).
- "pca groups", the pick of PruneSID, on features as wide as the encoder (1024).

Their widths and the depth of CLIP shrink with `--width`, the size of the pictures follows `--visual`.
On a CPU the figure is process CPU time in fp32, on a GPU the time between CUDA events in bfloat16. In each round every
arm runs once, in random order, and a share is held against the prefill of its own round: what drifts cancels.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from recording import append_rows, csv_path, machine, run
from rich.progress import track
from timing import clock_ms, keep_freed_memory
from torch import Tensor, nn

import vtprune
from vtprune._torchvision import heal
from vtprune.readings import Projection
from vtprune.stages.diverse import DPP, Dispersion, Facility
from vtprune.stages.selectors import MMR, TopK
from vtprune.stages.sensitivity import ProbedSensitivity
from vtprune.stages.structured import GroupSuppress
from vtprune.types import Ordinal, Part, VisualTokens

PICKS = {
    "top-k": TopK(),
    "mmr": MMR(),
    "k-center": Dispersion(reduce="min", first="isolated"),
    "dpp": DPP(),
    "facility": Facility(),
}
BOUND = 0.03
LONG, SHORT = "prefill of all", "prefill of the kept"
WARM_UPS = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pick with quartiles; `saved_ms` is the median of the prefill saved, `share` that of the ratios to it.

    `bound` is what `share` is to stay below, None (empty in the file) for what is only reported.
    """

    pick: str
    median_ms: float
    low_ms: float
    high_ms: float
    saved_ms: float
    share: float
    share_low: float
    share_high: float
    batch: int
    visual: int
    keep: int
    text: int
    width: int
    layers: int
    layers_measured: int
    clock: str
    dtype: str
    allocator: str
    rounds: int
    threads: int
    device: str
    torch: str
    transformers: str
    commit: str
    bound: float | None


def stack(options: argparse.Namespace, width: int, device: str, dtype: torch.dtype) -> tuple[VisualTokens, Tensor]:
    """Pictures of random features, and scores."""
    S, N = options.batch, options.visual
    generator = torch.Generator().manual_seed(0)
    tokens = VisualTokens(
        features=torch.randn(S, N, width, generator=generator).to(device, dtype),
        parts=(Part(start=0, stop=N, kind="image", grid=(1, N)),),
        ordinals=tuple(Ordinal(segment=number) for number in range(S)),
    )
    return tokens, torch.rand(S, N, generator=generator).to(device)


def pick_arms(options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Every pick on the same stack of pictures."""
    tokens, scores = stack(options, options.width, device, dtype)
    return {
        name: lambda selector=selector: selector(tokens, scores, options.keep, None) for name, selector in PICKS.items()
    }


def reported_arms(options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What has no bound, behind an encoder a quarter as wide as the language model."""
    inner = options.width // 4
    tokens, scores = stack(options, inner, device, dtype)
    torch.manual_seed(0)
    layers = nn.Linear(inner, options.width), nn.GELU(), nn.Linear(options.width, options.width)
    seen = Projection(inputs=tokens.features, projector=nn.Sequential(*layers).to(device, dtype))
    probes, groups = ProbedSensitivity(), GroupSuppress()
    return {
        "zoo sensitivity": lambda: probes(seen),
        "clip relevance": relevance_arm(options, device, dtype),
        "pca groups": lambda: groups(tokens, scores, options.keep, None),
    }


def relevance_arm(options: argparse.Namespace, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A random CLIP, at full width of the shape of ViT-L/14-336, and a tokenizer with the one word of its questions."""
    side, inner, text = 14 * math.isqrt(options.visual), options.width // 4, options.width * 3 // 16
    config = transformers.CLIPConfig(
        vision_config={
            "hidden_size": inner,
            "intermediate_size": 4 * inner,
            "num_hidden_layers": max(1, 24 * options.width // 4096),
            "num_attention_heads": 16,
            "image_size": side,
            "patch_size": 14,
        },
        text_config={
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_hidden_layers": max(1, 12 * options.width // 4096),
            "num_attention_heads": 12,
        },
        projection_dim=text,
    )
    torch.manual_seed(0)
    clip = transformers.CLIPModel(config).eval().to(device, dtype)
    tokenizer = transformers.CLIPTokenizer(vocab={"a</w>": 320, "<|startoftext|>": 49406, "<|endoftext|>": 49407})
    pixels = torch.randn(options.batch, 3, side, side).to(device, dtype)
    questions = [" ".join("a" * (options.text - 2))] * options.batch
    return lambda: vtprune.text_relevance(clip, tokenizer, pixels, questions)


def prefill_arms(options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The measured layers on the long and on the short prompt."""
    config = transformers.LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 43 // 16,
        num_hidden_layers=options.layers_measured,
        num_attention_heads=options.width // 128,
        vocab_size=8,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).eval().to(device, dtype)

    def prefill(visual: int) -> Callable[[], Any]:
        embeds = torch.randn(options.batch, visual + options.text, options.width).to(device, dtype)
        return lambda: model(inputs_embeds=embeds, use_cache=True)

    return {LONG: prefill(options.visual), SHORT: prefill(options.keep)}


def measure(arms: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every arm in every round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    names, shuffle = list(arms), random.Random(0)
    for number in track(range(rounds + WARM_UPS), description="rounds"):
        shuffle.shuffle(names)
        for name in names:
            milliseconds = clock_ms(device, arms[name])
            if number >= WARM_UPS:
                times[name].append(milliseconds)
    return times


def rows_of(times: dict[str, list[float]], options: argparse.Namespace, common: dict[str, Any]) -> list[Row]:
    """Medians and quartiles, shares round by round."""
    scale = options.layers / options.layers_measured
    saved = [scale * (long - short) for long, short in zip(times[LONG], times[SHORT], strict=True)]
    rows = []
    for name in times:
        if name in (LONG, SHORT):
            continue
        low, median, high = statistics.quantiles(times[name], n=4)
        shares = [own / gain for own, gain in zip(times[name], saved, strict=True)]
        share_low, share, share_high = statistics.quantiles(shares, n=4)
        rows.append(
            Row(
                pick=name,
                median_ms=round(median, 3),
                low_ms=round(low, 3),
                high_ms=round(high, 3),
                saved_ms=round(statistics.median(saved), 1),
                share=round(share, 6),
                share_low=round(share_low, 6),
                share_high=round(share_high, 6),
                bound=BOUND if name in PICKS else None,
                **common,
            )
        )
    return rows


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, 2 or more, after a warm-up")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--batch", type=int, default=8, help="pictures")
    parser.add_argument("--visual", type=int, default=576, help="tokens of a picture, a square number")
    parser.add_argument("--keep", type=int, default=64, help="how many of them are kept")
    parser.add_argument("--text", type=int, default=60, help="tokens of text beside them")
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 128")
    parser.add_argument("--layers", type=int, default=32, help="layers of the language model")
    parser.add_argument("--layers-measured", type=int, default=1, help="how many of them are run")
    parser.add_argument("--bounded-only", action="store_true", help="leave out what is only reported: minutes a round")
    parser.add_argument("--csv", type=csv_path, help="append the rows to this file")
    options = parser.parse_args()
    if math.isqrt(options.visual) ** 2 != options.visual:
        parser.error(f"--visual {options.visual}: expected a square number, of patches in rows and columns alike")
    heal()
    torch.set_num_threads(options.threads)
    allocator = "keeps what is freed" if keep_freed_memory() else "as it comes"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    asked = ("batch", "visual", "keep", "text", "width", "layers", "layers_measured", "rounds", "threads")
    common = {name: getattr(options, name) for name in asked} | {
        "dtype": str(dtype).removeprefix("torch."),
        "allocator": allocator,
        **machine(device),
    }
    with torch.no_grad():
        builders = [pick_arms, prefill_arms] if options.bounded_only else [pick_arms, reported_arms, prefill_arms]
        made = [build(options, device, dtype) for build in builders]
        arms = {name: run for group in made for name, run in group.items()}
        rows = rows_of(measure(arms, options.rounds, device), options, common)
    print(f"prefill saved: {rows[0].saved_ms:.1f} ms ({options.layers_measured} of {options.layers} layers measured)")
    for row in rows:
        spread = f"{row.low_ms:9.2f} .. {row.high_ms:9.2f}"
        bound = "reported" if row.bound is None else f"bound {row.bound:.0%}"
        print(f"{row.pick:16s} {row.median_ms:9.2f} ms ({spread})  share {row.share:.4%} of what it saves, {bound}")
    if options.csv:
        append_rows(options.csv, [asdict(row) for row in rows])


if __name__ == "__main__":
    run(main)
