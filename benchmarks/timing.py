"""What benchmarks measure with: the clock, spreads of what it says, and rates of the device to hold it against."""

from __future__ import annotations

import ctypes
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 2**25
_CYCLES_PER_CALL = 50_000


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


def clock_each_ms(device: str, run: Callable[[], Any], calls: int) -> float:
    """Milliseconds of a call, out of several in a row.

    A GPU is kept busy in front of them, so that it does not wait for the calls to be made: that is how it meets them
    in the middle of a prefill. Calls that wait for it themselves are timed with their waiting.
    """

    def several() -> None:
        for _ in range(calls):
            run()

    if device == "cuda":
        torch.cuda._sleep(_CYCLES_PER_CALL * calls)
    return clock_ms(device, several) / calls


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower one, the median and the upper one; of a single value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def interval(values: Sequence[float], level: float = 0.95, draws: int = 4000) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    skip = round(draws * (1 - level) / 2)
    return medians[skip], medians[-1 - skip]


def keep_freed_memory() -> bool:
    """Tell glibc not to give freed memory back to the system; False where there is no glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(M_MMAP_THRESHOLD, 2**25))


def cache_bytes(device: str) -> int:
    """Size of the largest cache of the device."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=UNKNOWN_CACHE)


def copy_rate(device: str) -> float:
    """Bytes that the device reads and writes in a millisecond while it copies what no cache holds."""
    source = torch.zeros(max(2**26, 4 * cache_bytes(device)), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _median_of(device, lambda: target.copy_(source))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations of a millisecond of square products, each multiplication and each addition counted.

    On a CPU the faster of two ways: a convolution of single pixels goes through another library than `@`.
    """
    side = 8192 if device == "cuda" else 1024
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    ways: list[Callable[[], Any]] = [lambda: left @ right]
    if device == "cpu":
        pixels, kernels = left.view(1, side, 1, side).permute(0, 3, 1, 2), right[:, :, None, None]
        ways.append(lambda: torch.conv2d(pixels, kernels, dilation=2))
    return 2 * side**3 / min(_median_of(device, way) for way in ways)


def _median_of(device: str, run: Callable[[], Any], rounds: int = 9) -> float:
    """Milliseconds of a call, the median behind two to warm up."""
    return statistics.median([clock_each_ms(device, run, 1) for _ in range(rounds + 2)][2:])


def extra_bytes(device: str, run: Callable[[], Any]) -> int | None:
    """Peak of the memory that a call takes, its result included; None on the CPU, where nobody counts it."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
