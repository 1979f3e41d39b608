"""Launching the same kernels many times over, without the host in between."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

WORTH_A_GRAPH = 16
"""Fewer launches cost less than capturing one."""


class _Running(threading.local):
    """Graphs that a thread has launched, each with an event behind it: they must live as long as they run."""

    def __init__(self) -> None:
        self.graphs: deque[tuple[torch.cuda.CUDAGraph, torch.cuda.Event]] = deque()


_running = _Running()


def repeat(step: Callable[[], None], count: int, device: torch.device) -> None:
    """Call `step` so many times: on a GPU it is captured once and replayed.

    `step` launches kernels on tensors that are there already, and keeps what changes from one time to the next in the
    memory of the device.
    """
    if count < WORTH_A_GRAPH or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        for _ in range(count):
            step()
        return
    step()
    with torch.cuda.device(device):
        _replay(step, count - 1)


def _replay(step: Callable[[], None], count: int) -> None:
    """As `repeat`, of kernels that are compiled; on a stream of its own, which waits and is waited for."""
    while _running.graphs and _running.graphs[0][1].query():
        _running.graphs.popleft()
    current, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
        for _ in range(count):
            graph.replay()
        done = torch.cuda.Event()
        done.record(aside)
    current.wait_stream(aside)
    _running.graphs.append((graph, done))
