"""Decoding in other processes: what hangs or dies costs an error, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.video.children import HERE, PARENT, PLENTY, alive, children, limit, reads, wait_for, warm
from tests.video.common import FOLDER, clip, number_of, picture, slow_clip
from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.video import process
from vtprune.video.guard import Decoders
from vtprune.video.reader import read_frames
from vtprune.video.sampling import Scenes, Uniform

pytest.importorskip("av")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found in /proc")


@pytest.fixture(scope="module")
def slow() -> Path:
    return slow_clip()


def test_results_are_those_of_this_process_in_any_order() -> None:
    jobs = [
        (name, sampling) for name in ("uneven.mkv", "pyramid.mp4", "deep.mp4") for sampling in (Uniform(5), Scenes(3))
    ]
    with Decoders(workers=2) as decoders:
        futures = [decoders.submit(clip(name), sampling) for name, sampling in jobs]
        assert len(children()) <= 2
        for future, (name, sampling) in zip(reversed(futures), reversed(jobs)):
            found, expected = future.result(), read_frames(clip(name), sampling)
            assert (found.pixels == expected.pixels).all()
            assert found.times.tolist() == expected.times.tolist()
            assert found.indices.tolist() == expected.indices.tolist()
            assert [found.total, found.duration, found.backend] == [expected.total, expected.duration, expected.backend]
    assert children() == set()


def test_errors_and_warnings_come_back_as_they_are() -> None:
    with Decoders(workers=1) as decoders:
        for name in ("text.mp4", "empty.mp4", "cut-slow.mp4", "no-such.mp4"):
            path = FOLDER / name if name == "no-such.mp4" else clip(name)
            with pytest.raises(InvalidOption) as there:
                decoders.submit(path, Uniform(2)).result()
            with pytest.raises(InvalidOption) as here:
                read_frames(path, Uniform(2))
            assert str(there.value) == str(here.value)
        child = children()
        found = decoders.submit(clip("cut-fast.mp4"), Uniform(2)).result()
        assert found.warnings == read_frames(clip("cut-fast.mp4"), Uniform(2)).warnings != ()
        with pytest.raises(InvalidOption, match="the file ends early"):
            decoders.submit(clip("cut-fast.mp4"), Uniform(2), on_truncated="raise").result()
        with pytest.raises(InvalidOption, match="backend='vlc'"):
            decoders.submit(clip("even.mp4"), Uniform(2), backend="vlc").result()
        with pytest.raises(BackendUnavailable, match="decord"):
            decoders.submit(clip("transport.ts"), Uniform(2), backend="decord").result()
        assert children() == child


def test_a_folder_goes_through_a_process_too(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(4):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    found = read_frames(tmp_path, Uniform(4), timeout=30, rate=2.0)
    assert [number_of(frame) for frame in found.pixels] == [0, 1, 2, 3]
    assert found.duration == 2.0
    assert children() == set()


def test_a_file_that_takes_too_long_is_given_up_and_others_go_on(slow: Path) -> None:
    with Decoders(workers=1, timeout=PLENTY) as decoders:
        limit(decoders, slow, 0.01)
        first = warm(decoders)
        late, good = decoders.submit(slow, Uniform(4)), decoders.submit(clip("even.mp4"), Uniform(4))
        with pytest.raises(InvalidOption, match=r"slow\.avi was not read within 0\.01 seconds by backend 'auto'"):
            late.result()
        assert len(good.result().indices) == 4
        assert children() and first not in children()
    assert children() == set()


def test_the_timeout_of_one_file(slow: Path) -> None:
    with pytest.raises(InvalidOption, match=r"within 0\.01 seconds"):
        read_frames(slow, Uniform(4), timeout=0.01)
    assert children() == set()


STOPS = """
import os, signal
from vtprune.video import reader

def read_frames(source, *arguments, **options):
    while str(source).endswith("stops.mp4"):
        os.kill(os.getpid(), signal.SIGSTOP)
    return read(source, *arguments, **options)

read, reader.read_frames = reader.read_frames, read_frames
"""
"""What a decoding process imports when it starts: at a file of that name it stops itself, again and again."""


def test_a_process_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOPS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Decoders(workers=1, timeout=PLENTY) as decoders:
        limit(decoders, tmp_path / "stops.mp4", 0.3)
        child = warm(decoders)
        with pytest.raises(InvalidOption, match=r"stops\.mp4 was not read within 0\.3 seconds"):
            decoders.submit(tmp_path / "stops.mp4", Uniform(4)).result()
        assert len(decoders.submit(clip("even.mp4"), Uniform(4)).result().indices) == 4
        assert child not in children()


def test_a_process_that_dies_is_reported_and_others_go_on(slow: Path) -> None:
    with Decoders(workers=1) as decoders:
        child = warm(decoders)
        broken, good = decoders.submit(slow, Uniform(4)), decoders.submit(clip("even.mp4"), Uniform(4))
        wait_for(lambda: reads(child, slow))
        os.kill(child, signal.SIGKILL)
        with pytest.raises(InvalidOption, match=r"slow\.avi ended the process .* \(signal SIGKILL\)"):
            broken.result()
        assert len(good.result().indices) == 4


def test_a_process_that_dies_while_idle_is_replaced() -> None:
    with Decoders(workers=1) as decoders:
        child = warm(decoders)
        os.kill(child, signal.SIGKILL)
        assert len(decoders.submit(clip("even.mp4"), Uniform(4)).result().indices) == 4
        assert children() and child not in children()


def test_a_process_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vtprune").mkdir()
    (tmp_path / "vtprune" / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Decoders(workers=1) as decoders, pytest.raises(BackendUnavailable, match=r"does not start: .*not this one"):
        decoders.submit(clip("even.mp4"), Uniform(1)).result()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with Decoders(workers=1) as decoders, pytest.raises(BackendUnavailable, match=r"does not start: .*no-python"):
        decoders.submit(clip("even.mp4"), Uniform(1)).result()
    monkeypatch.setattr(sys, "executable", "")
    with Decoders(workers=1) as decoders, pytest.raises(BackendUnavailable, match=r"sys\.executable is empty"):
        decoders.submit(clip("even.mp4"), Uniform(1)).result()


def test_starting_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a file runs from when its process has started, and has imported what it needs."""
    happened: list[object] = []

    def told(name: str) -> None:
        function = getattr(process, name)

        def telling(*arguments: Any) -> Any:
            result = function(*arguments)
            happened.append(name)
            return result

        monkeypatch.setattr(process, name, telling)

    class Deadline(process._Deadline):
        def __init__(self, child: Any, seconds: float) -> None:
            happened.append(seconds)
            super().__init__(child, seconds)

    for name in ("_start", "_begin", "_receive"):
        told(name)
    monkeypatch.setattr(process, "_Deadline", Deadline)
    with Decoders(workers=1, timeout=PLENTY) as decoders:
        assert len(decoders.submit(clip("single.mp4"), Uniform(1)).result().indices) == 1
    assert happened == ["_start", process.STARTING, "_begin", PLENTY, "_receive"]


def test_a_limit_of_centuries_is_none() -> None:
    for seconds in (1e10, 1e300):
        assert len(read_frames(clip("even.mp4"), Uniform(2), timeout=seconds).indices) == 2


def test_closing_ends_what_runs_and_cancels_what_waits(slow: Path) -> None:
    decoders = Decoders(workers=1)
    warm(decoders)
    running, waiting = decoders.submit(slow, Uniform(4)), decoders.submit(clip("even.mp4"), Uniform(4))
    wait_for(running.running)
    decoders.close()
    assert children() == set()
    assert waiting.cancelled()
    with pytest.raises(InvalidOption, match="the decoders were closed before"):
        running.result()
    with pytest.raises(InvalidOption, match="these decoders are closed"):
        decoders.submit(clip("even.mp4"), Uniform(4))
    decoders.close()


def test_a_cancelled_file_is_not_read() -> None:
    with Decoders(workers=1) as decoders:
        child = warm(decoders)
        os.kill(child, signal.SIGSTOP)
        first = decoders.submit(clip("even.mp4"), Uniform(1))
        second, third = (decoders.submit(name, Uniform(1)) for name in (FOLDER / "no-such.mp4", clip("even.mp4")))
        assert second.cancel()
        os.kill(child, signal.SIGCONT)
        assert len(first.result().indices) == len(third.result().indices) == 1


def test_no_process_outlives_a_parent_that_is_killed(slow: Path) -> None:
    code = PARENT.format(even=str(clip("even.mp4")), paths=[str(slow)] * 6, last="time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        wait_for(lambda: len(children(parent.pid)) == 2)
        left = children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(alive(child) for child in left))


def test_a_program_that_forgets_to_close_ends_and_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PARENT.format(even=str(clip("even.mp4")), paths=[], last=""))
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_modules_in_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    """As they would be by `python -m`."""
    (tmp_path / "json.py").write_text("raise RuntimeError('not the one that was meant')")
    code = textwrap.dedent(f"""
        import sys
        sys.path = [place for place in sys.path if place]
        from vtprune.video import Uniform, read_frames
        assert len(read_frames({str(clip("even.mp4"))!r}, Uniform(2), timeout=30).indices) == 2
    """)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, timeout=60, check=True)


def test_options_out_of_range_are_named() -> None:
    for arguments, text in (
        ({"workers": 0}, "workers=0: expected a whole number from 1 on"),
        ({"timeout": 0}, "timeout=0: expected seconds above 0"),
        ({"timeout": float("inf")}, "timeout=inf"),
    ):
        with pytest.raises(InvalidOption, match=text):
            Decoders(**arguments)
    with Decoders(workers=1) as decoders, pytest.raises(InvalidOption, match="expected a path and a sampling"):
        decoders.submit(7, Uniform(1))  # type: ignore[arg-type]
    assert process.STARTING > 60
