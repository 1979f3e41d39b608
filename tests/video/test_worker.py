"""The process that decodes, without the parent that usually talks to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.video.common import clip, slow_clip
from vtprune.video.sampling import Uniform

pytest.importorskip("av")
HERE = Path(__file__).parents[2]
CHILD = """
import os
from vtprune.video import worker

def noisy(*arguments, **options):
    os.write(1, b"out" * 100000)
    os.write(2, b"err" * 100000)
    print("more")
    return read_frames(*arguments, **options)

read_frames, worker.read_frames = worker.read_frames, noisy
worker.PATIENCE = 0.2
worker.main()
"""


@contextmanager
def started(path: Path, timeout: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has begun with a file."""
    request = {"path": str(path), "sampling": Uniform(2).to_dict(), "backend": "pyav", "on_truncated": "warn"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", CHILD], cwd=HERE, **pipes) as child:
        child.stdin.write(json.dumps({**request, "rate": None, "timeout": timeout}).encode() + b"\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline()) == {"begun": True}
        yield child


def test_what_libraries_print_goes_nowhere() -> None:
    with started(clip("even.mp4"), 30.0) as child:
        assert json.loads(child.stdout.readline())["shape"] == [2, 48, 64, 3]
        assert len(child.stdout.read(2 * 48 * 64 * 3)) == 2 * 48 * 64 * 3
        assert child.communicate(timeout=30) == (b"", b"")
        assert child.returncode == 0


def test_a_process_gives_up_by_itself_where_nobody_kills_it() -> None:
    """Its pipe stays open here, as it does where a process that its parent forked has a copy of the other end."""
    with started(slow_clip(), 0.1) as child:
        assert child.stdout.read() == b""
        assert child.wait(timeout=30) == 1
