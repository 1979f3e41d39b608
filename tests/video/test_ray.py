"""The job on a local Ray cluster: what the other engine answers, whatever becomes of replicas."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.video.test_qa import TASK, answered, folder, records_of
from vtprune.errors import InvalidOption, VtpruneError
from vtprune.video import ray_engine
from vtprune.video.journal import Record
from vtprune.video.qa import ClipTask, Counts, Decoded
from vtprune.video.questions import read_questions

__all__ = ["folder"]
pytestmark = pytest.mark.slow
PATIENCE = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two processors, and no GPU."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


def with_ray(kind: Any, folder: Path, **options: Any) -> tuple[Counts, dict[str, Record]]:
    """The job with replicas of that kind."""
    questions, _ = read_questions(folder / "q.jsonl")
    with patch.object(ray_engine, "_Replica", kind):
        return ray_engine.answer_with_ray(TASK, questions, folder / "clips", folder / "a.jsonl", **options)


class Mortal(ray_engine._Replica):
    """Killed by one clip, as the system does where the memory is full."""

    def _answer(self, frames: Sequence[Decoded]) -> list[Record]:
        if any(clip.path.name == "2.mp4" for clip, _, _ in frames):
            with (frames[0][0].path.parent / "ends").open("a") as file:
                file.write(f"{len(frames)}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._answer(frames)


class Full(ray_engine._Replica):
    """Killed before there is anything to answer from."""

    def _decode(self, clips: Sequence[ClipTask]) -> list[Decoded]:
        if any(clip.path.name == "2.mp4" for clip in clips):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._decode(clips)


class Failing(ray_engine._Replica):
    """One clip costs it its device."""

    def _answer(self, frames: Sequence[Decoded]) -> list[Record]:
        if any(clip.path.name == "2.mp4" for clip, _, _ in frames):
            raise VtpruneError("the device failed")
        return super()._answer(frames)


class Unborn(ray_engine._Replica):
    """Killed while it loads, as one is that is larger than the memory."""

    def __init__(self, stored: dict[str, Any], ledger: Any) -> None:
        with patch.object(ray_engine.Task, "load", lambda task: os.kill(os.getpid(), signal.SIGKILL)):
            super().__init__(stored, ledger)


class Watched(ray_engine._Replica):
    """Answers the first clips when the next are decoded, and the last when the driver noted some."""

    def __init__(self, stored: dict[str, Any], ledger: Any) -> None:
        super().__init__(stored, ledger)
        self._next = threading.Event()

    def _decode(self, clips: Sequence[ClipTask]) -> list[Decoded]:
        found = super()._decode(clips)
        if clips[0].path.name != "0.mp4":
            self._next.set()
        return found

    def _answer(self, frames: Sequence[Decoded]) -> list[Record]:
        path = frames[0][0].path
        if path.name == "0.mp4":
            assert self._next.wait(PATIENCE), "nothing is decoded meanwhile"
        begin = time.monotonic()
        while path.name == "4.mp4" and not (path.parent / "noted").exists():
            assert time.monotonic() < begin + PATIENCE, "nothing is noted meanwhile"
            time.sleep(0.05)
        return super()._answer(frames)


class Stillborn(ray_engine._Replica):
    """Does not load, on a machine unlike the first."""

    def __init__(self, stored: dict[str, Any], ledger: Any) -> None:
        raise InvalidOption("this machine is too small")


def test_ray_answers_the_same(folder: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "vtprune", "video-qa", str(folder / "q.jsonl"), "--videos", str(folder / "clips")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    ran = subprocess.run(
        [*command, "--out", str(folder / "a.jsonl"), "--batch", "4", "--engine", "ray", "--replicas", "2"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stderr
    answered(folder, folder / "whole.jsonl")
    assert records_of(folder / "a.jsonl") == records_of(folder / "whole.jsonl")
    assert (folder / "a.jsonl").read_text().splitlines()[0] == (folder / "whole.jsonl").read_text().splitlines()[0]


def test_a_clip_that_ends_replicas_costs_its_own_answers(cluster: Any, folder: Path) -> None:
    """Also where more replicas are asked for than there is room for."""
    counts, records = with_ray(Mortal, folder, replicas=4)
    assert (counts.answered, counts.failed) == (12, 6)
    assert all("ended, 3 times: its process was killed" in (records[f"2/{turn}"].error or "") for turn in range(3))
    assert (folder / "clips" / "ends").read_text().split() == ["2", "1", "1"]
    answered(folder, folder / "whole.jsonl")
    others = {id: record for id, record in records_of(folder / "whole.jsonl").items() if id[0] != "2"}
    assert {id: record for id, record in records_of(folder / "a.jsonl").items() if id[0] != "2"} == others
    again, _ = with_ray(ray_engine._Replica, folder, retry=True)
    assert (again.answered, again.failed) == (3, 3)
    assert records_of(folder / "a.jsonl") == records_of(folder / "whole.jsonl")


def test_decoded_beside_the_model_and_noted_at_once(cluster: Any, folder: Path) -> None:
    def note(counts: Counts, records: Sequence[Record]) -> None:
        if records:
            (folder / "clips" / "noted").touch()

    counts, records = with_ray(Watched, folder, on_records=note)
    assert (counts.answered, counts.failed) == (15, 3)
    assert all(record.error is None for id, record in records.items() if id[0] != "3")


def test_a_clip_that_cannot_be_held(cluster: Any, folder: Path) -> None:
    counts, records = with_ray(Full, folder)
    assert (counts.answered, counts.failed) == (12, 6)
    assert "ended, 3 times" in (records["2/0"].error or "")


def test_a_replica_whose_device_fails_is_started_again(cluster: Any, folder: Path) -> None:
    counts, records = with_ray(Failing, folder)
    assert (counts.answered, counts.failed) == (12, 6)
    assert (records["2/1"].error or "").endswith("ended, 3 times: the device failed")


@pytest.mark.usefixtures("cluster")
def test_replicas_that_die_while_they_load_end_the_job(folder: Path) -> None:
    with pytest.raises(VtpruneError, match="ended while it loaded"):
        with_ray(Unborn, folder)
    assert len((folder / "a.jsonl").read_text().splitlines()) == 1


def test_errors_that_end_the_job_say_why(cluster: Any, folder: Path) -> None:
    with pytest.raises(InvalidOption, match=r"^this machine is too small$"):
        with_ray(Stillborn, folder)
    questions, _ = read_questions(folder / "q.jsonl")
    for broken, kind, said in (
        (replace(TASK, model="tiny:nosuch"), VtpruneError, "nosuch"),
        (replace(TASK, model="tiny:clip"), VtpruneError, "clip"),
        (replace(TASK, device="cuda"), InvalidOption, "the Ray cluster has no GPU"),
    ):
        with pytest.raises(kind, match=said) as caught:
            ray_engine.answer_with_ray(broken, questions, folder / "clips", folder / "b.jsonl")
        assert "ended early" not in str(caught.value)
    assert not (folder / "b.jsonl").exists()


def raising() -> None:
    raise KeyError("some\nthing " * 100)


def aborting() -> None:
    os.abort()


def test_errors_of_others_are_told_in_a_line(cluster: Any) -> None:
    for job, said in ((raising, "early .KeyError: "), (aborting, "early .WorkerCrashedError: ")):
        with pytest.raises(cluster.exceptions.RayError) as caught:
            cluster.get(cluster.remote(max_retries=0)(job).remote())
        told = str(ray_engine._ours(caught.value))
        assert re.search(said, told) and len(told.splitlines()) == 1 and len(told) < 400


def test_what_a_replica_takes() -> None:
    assert ray_engine._needs("auto", {"CPU": 4.0, "GPU": 2.0}) == {"num_gpus": 1}
    assert ray_engine._needs("cuda", {"GPU": 1.0}) == {"num_gpus": 1}
    assert ray_engine._needs("auto", {"CPU": 4.0}) == ray_engine._needs("cpu", {"GPU": 2.0}) == {"num_cpus": 1}
    with pytest.raises(InvalidOption, match="expected cuda"):
        ray_engine._needs("cuda:1", {"GPU": 2.0})
