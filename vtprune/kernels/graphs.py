"""Launching the same kernels many times over, without the host in between."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

WORTH_A_GRAPH = 16
"""Fewer launches cost less than capturing one."""
_WITHOUT_DEVICE = frozenset({"TMonitor"})
"""Threads that are known to launch nothing: tqdm leaves one behind wherever a model was loaded with a progress bar."""


_running: deque[tuple[torch.cuda.CUDAGraph, torch.cuda.Event]] = deque()
"""Graphs that were launched, each with an event behind it: they must live as long as they run."""


def repeat(step: Callable[[], None], count: int, device: torch.device) -> None:
    """Call `step` so many times: on a GPU it is captured once and replayed, where nothing else runs in this process.

    `step` launches kernels on tensors that are there already, and keeps what changes from one time to the next in the
    memory of the device. While a graph is captured no other thread may draw random numbers on the device, so that
    with several threads every step is launched by itself.
    """
    own = threading.current_thread()
    alone = all(thread is own or thread.name in _WITHOUT_DEVICE for thread in threading.enumerate())
    if count < WORTH_A_GRAPH or device.type != "cuda" or not alone or torch.cuda.is_current_stream_capturing():
        for _ in range(count):
            step()
        return
    step()
    with torch.cuda.device(device):
        _replay(step, count - 1)


@functools.cache
def _aside(device: int) -> torch.cuda.Stream:
    """The stream of a device on which graphs are captured: always the same one."""
    return torch.cuda.Stream(device)


def _replay(step: Callable[[], None], count: int) -> None:
    """As `repeat`, of kernels that are compiled; on a stream of its own, which waits and is waited for."""
    while _running and _running[0][1].query():
        _running.popleft()
    current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    aside = _aside(torch.cuda.current_device())
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        for _ in range(count):
            graph.replay()
        done = torch.cuda.Event()
        done.record(aside)
    current.wait_stream(aside)
    _running.append((graph, done))
