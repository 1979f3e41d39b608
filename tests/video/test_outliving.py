"""Nothing is left of a process that decodes: what it started ends with it, and it ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.video.children import HERE, PARENT, PLENTY, alive, children, limit, wait_for, warm
from tests.video.common import clip, slow_clip
from vtprune.errors import InvalidOption
from vtprune.video.guard import Decoders
from vtprune.video.sampling import Uniform

pytest.importorskip("av")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found in /proc")


@pytest.fixture(scope="module")
def slow() -> Path:
    return slow_clip()


HELPED = """
import os, subprocess
if __import__("sys").orig_argv[-1].endswith("video.worker"):
    helper = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    with open(os.path.join(os.path.dirname(__file__), f"{helper.pid}.pid"), "w"):
        pass
"""
"""What a decoding process imports when it starts: it starts a process of its own, as libraries may."""


def helpers(folder: Path) -> list[int]:
    """The processes that decoding processes started."""
    return [int(file.stem) for file in folder.glob("*.pid")]


def test_what_a_decoding_process_started_ends_with_it(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HELPED)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Decoders(workers=1, timeout=PLENTY) as decoders:
        limit(decoders, slow, 0.01)
        warm(decoders)
        assert [alive(helper) for helper in helpers(tmp_path)] == [True]
        with pytest.raises(InvalidOption, match="was not read within"):
            decoders.submit(slow, Uniform(4)).result()
        wait_for(lambda: not any(map(alive, helpers(tmp_path))))
        child = warm(decoders)
        os.kill(child, signal.SIGKILL)
        assert len(decoders.submit(clip("even.mp4"), Uniform(4)).result().indices) == 4
        assert len(helpers(tmp_path)) == 3
        wait_for(lambda: sum(map(alive, helpers(tmp_path))) == 1)
    wait_for(lambda: not any(map(alive, helpers(tmp_path))))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_parent_whatever_it_started(slow: Path, tmp_path: Path, how: signal.Signals) -> None:
    """A key pressed in a terminal is for all processes of the group, to which those that decode do not belong."""
    (tmp_path / "sitecustomize.py").write_text(HELPED)
    code = PARENT.format(even=str(clip("even.mp4")), paths=[str(slow)] * 6, last="time.sleep(600)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HERE)])}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=HERE, env=environment, start_new_session=True
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        wait_for(lambda: len(children(parent.pid)) == len(helpers(tmp_path)) == 2)
        left = [*children(parent.pid), *helpers(tmp_path)]
        os.killpg(parent.pid, how) if how == signal.SIGINT else parent.send_signal(how)
    wait_for(lambda: not any(map(alive, left)))
