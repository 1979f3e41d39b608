"""Processes that decode, as their parent finds them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.video.common import clip
from vtprune.video.guard import Decoders
from vtprune.video.sampling import Uniform

PLENTY = 600.0
"""Seconds that no file takes, however busy the machine is."""
HERE = Path(__file__).parents[2]


PARENT = """
import sys, time
from vtprune.video import Decoders, Uniform
decoders = Decoders(workers=2)
decoders.submit({even!r}, Uniform(1)).result()
for path in {paths!r}:
    decoders.submit(path, Uniform(4))
print("ready", flush=True)
{last}
"""


def children(parent: int | None = None) -> set[int]:
    """Processes that decode for that parent."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, father = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if state != "Z" and int(father) == (parent or os.getpid()) and b"vtprune.video.worker" in words:
                found.add(int(entry.name))
    return found


def reads(process: int, path: Path) -> bool:
    """Whether a process has that file open. What it used of processors would not tell: it tidies up after a file."""
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        try:
            if descriptor.readlink() == path:
                return True
        except OSError:  # closed since it was listed
            continue
    return False


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def warm(decoders: Decoders) -> int:
    """The process of decoders with one worker, when it is ready for a file."""
    decoders.submit(clip("even.mp4"), Uniform(1)).result()
    (child,) = children()
    return child


def limit(decoders: Decoders, path: Path, seconds: float) -> None:
    """That file alone has little time: how busy the machine is must not decide about others."""
    (worker,) = decoders._workers
    run = worker.run

    def limited(request: dict[str, Any]) -> Any:
        worker._timeout = seconds if request["path"] == str(path) else PLENTY
        return run(request)

    worker.run = limited  # type: ignore[method-assign]
