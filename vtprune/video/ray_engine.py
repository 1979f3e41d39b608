"""The same job on a Ray cluster: replicas of the model each take clips, this process notes what comes back.

Every machine must see the clips, and the model where it is a directory, under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtprune import errors
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.video.guard import Decoders
from vtprune.video.journal import Journal, Record
from vtprune.video.qa import (
    ClipTask,
    Counts,
    Decoded,
    Report,
    answered,
    check_readable,
    decoded,
    ids_of,
    noting,
    settings_of,
)
from vtprune.video.questions import Question
from vtprune.video.records import failed, plainly
from vtprune.video.task import Task

CALLS = 2
"""Groups of clips that a replica has in work: one is answered, the next is decoded."""
_LOADING = "loading"
"""What the ledger calls it."""
TRIES = 2
"""How often a clip is tried alone, behind a try among others, where its replica ends each time."""


def answer_with_ray(
    task: Task,
    questions: Sequence[Question],
    directory: Path,
    out: Path,
    *,
    retry: bool = False,
    replicas: int = 1,
    on_records: Report | None = None,
) -> tuple[Counts, dict[str, Record]]:
    """As `answer_questions`, with models as actors of Ray Data: `replicas` of them, or as many as the cluster holds.

    A cluster is taken where there is one (RAY_ADDRESS), else one is started on this machine. Where a replica ends,
    the clips it had in work are tried one by one; one that ends a replica then, twice, has errors.

    Raises:
        BackendUnavailable: without Ray.
        InvalidOption: for a GPU where the cluster has none, and as `answer_questions` does.
        VtpruneError: as `answer_questions` does, and where the cluster fails.
    """
    check_readable(task, questions, directory)
    ray = start()
    needs = _needs(task.device, ray.cluster_resources())
    # The process ends with its call: a model that stayed behind would hold the GPU of a replica.
    asked = ray.remote(max_calls=1, max_retries=TRIES - 1, **needs)(_settings)
    try:
        settings = ray.get(asked.remote(task.to_dict()))
        with Journal(out, settings_of(settings, directory), retry=ids_of(questions, retry)) as journal:
            clips, counts, note = noting(questions, journal, directory, on_records)
            for found in _records(ray, task, _grouped(clips, task.batch), needs, replicas):
                # What a replica answered is answered again where it ended before that was here.
                note([record for record in found if record.id not in journal.records])
            return counts, dict(journal.records)
    except ray.exceptions.RayError as error:
        raise _ours(error) from error


def _grouped(clips: Sequence[ClipTask], batch: int) -> list[list[ClipTask]]:
    """Clips in a row that together have questions for a batch."""
    groups: list[list[ClipTask]] = []
    asked = batch
    for clip in clips:
        if asked >= batch:
            groups.append([])
            asked = 0
        groups[-1].append(clip)
        asked += len(clip.questions)
    return groups


def _records(
    ray: Any,
    task: Task,
    groups: Sequence[Sequence[ClipTask]],
    needs: Mapping[str, float],
    replicas: int,
) -> Iterator[list[Record]]:
    """The records of each group, as soon as it is done."""
    if not groups:
        return
    rows = [{"clips": json.dumps([asdict(clip) for clip in group], default=str)} for group in groups]
    size = min(replicas, len(rows))
    pool = ray.data.ActorPoolStrategy(
        min_size=1,  # a cluster that is too small for more is not waited for
        max_size=size,
        initial_size=size,
        enable_true_multi_threading=True,
        max_concurrent_calls_per_actor=CALLS,
    )
    ledger = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Ledger).remote(size)
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Replica, fn_constructor_args=(task.to_dict(), ledger), batch_size=None, compute=pool, **needs
    )
    for batch in data.iter_batches(batch_size=None):
        for lines in batch["records"]:
            yield [Record.from_json(line) for line in str(lines).splitlines()]


class _Ledger:
    """What replicas began and did not end, and why not: an actor, since Ray tries for ever what ends replicas."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._begun: dict[str, int] = {}
        self._reasons: dict[str, str] = {}

    def begin(self, name: str) -> tuple[int, str]:
        """How often this was begun before without an end, and the reason that was known last."""
        before = self._begun.get(name, 0)
        self._begun[name] = before + 1
        if name == _LOADING:  # all of them load at once
            before //= self._replicas
        return before, self._reasons.get(
            name, "its process was killed, perhaps for want of memory: see the logs of Ray"
        )

    def end(self, name: str) -> None:
        """It went well."""
        self._begun.pop(name, None)

    def blame(self, name: str, reason: str) -> None:
        """Why it will not end."""
        self._reasons[name] = reason


class _Replica:
    """A model on some machine, and a process that decodes for it. Called from two threads."""

    def __init__(self, stored: dict[str, Any], ledger: Any) -> None:
        import ray

        self._ledger = ledger
        ended, reason = self._begin(_LOADING)
        if ended > TRIES:
            raise VtpruneError(f"a replica ended while it loaded {stored['model']}, {ended} times: {reason}")
        self._task = Task.from_dict(stored)
        self._answerer = self._task.load()
        ray.get(ledger.end.remote(_LOADING))
        self._decoders = Decoders(workers=1, timeout=self._task.timeout)
        self._answering = threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Records, one JSON line each, for each group of clips; while one is answered, the next is decoded."""
        groups = [[_clip(clip) for clip in json.loads(str(group))] for group in batch["clips"]]
        return {"records": ["\n".join(record.to_json() for record in self._group(clips)) for clips in groups]}

    def _group(self, clips: Sequence[ClipTask]) -> list[Record]:
        name = "\n".join(str(clip.path) for clip in clips)
        ended, _ = self._begin(name)
        if not ended:
            frames = self._decode(clips)
            with self._answering:
                return self._checked(name, frames)
        # One of these, or of those beside them, was the end of a replica: now nothing is beside the one that is tried.
        with self._answering:
            return [record for clip in clips for record in self._alone(clip)]

    def _alone(self, clip: ClipTask) -> list[Record]:
        name = f"alone: {clip.path}"
        ended, reason = self._begin(name)
        if ended < TRIES:
            return self._checked(name, self._decode([clip]))
        lost = VtpruneError(f"the replica that answered about this clip ended, {1 + ended} times: {reason}")
        return [failed(question, lost) for question in clip.questions]

    def _begin(self, name: str) -> tuple[int, str]:
        import ray

        told: tuple[int, str] = ray.get(self._ledger.begin.remote(name))
        return told

    def _checked(self, name: str, frames: Sequence[Decoded]) -> list[Record]:
        """The records; ends this process where there are none."""
        import ray

        try:
            records = self._answer(frames)
        except Exception as error:
            # What costs a clip only is a record by now: after this the device, or the process, is good for nothing.
            ray.get(self._ledger.blame.remote(name, plainly(error)))
            os._exit(1)
        ray.get(self._ledger.end.remote(name))
        return records

    def _decode(self, clips: Sequence[ClipTask]) -> list[Decoded]:
        return list(decoded(self._task, clips, self._decoders, ahead=len(clips)))

    def _answer(self, frames: Sequence[Decoded]) -> list[Record]:
        return [record for records, _ in answered(self._task, self._answerer, frames) for record in records]


def _clip(stored: Mapping[str, Any]) -> ClipTask:
    return ClipTask(path=Path(stored["path"]), questions=tuple(Question(**own) for own in stored["questions"]))


def _settings(stored: dict[str, Any]) -> dict[str, Any]:
    """What the header says, from a machine that can load the model."""
    task = Task.from_dict(stored)
    return task.settings(task.load())


def _needs(device: str, resources: Mapping[str, float]) -> dict[str, float]:
    """What a replica takes of a cluster. Raises `InvalidOption` for a GPU where there is none."""
    some = resources.get("GPU", 0) >= 1
    if device.startswith("cuda"):
        if not some:
            raise InvalidOption(
                f"--device {device}: the Ray cluster has no GPU; expected auto or cpu, or a cluster that has one"
            )
        if device not in ("cuda", "cuda:0"):
            raise InvalidOption(f"--device {device}: Ray chooses a GPU for each replica; expected cuda")
    return {"num_gpus": 1} if some and device not in ("cpu", "mps") else {"num_cpus": 1}


def start() -> Any:
    """Ray with Ray Data, joined to a cluster. Raises `BackendUnavailable` without it."""
    # Ray tells its makers about clusters unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendUnavailable("the engine 'ray' needs Ray: pip install 'vtprune[ray]'") from error
    if not ray.is_initialized():
        # A cluster that is there has its dashboard, or not, already.
        dashboard = None if os.environ.get("RAY_ADDRESS") else False
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # What it says of errors is raised as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return ray


def _ours(error: BaseException) -> VtpruneError:
    """What was raised remotely, if that is ours; else an error that says in a line what it was."""
    found = error
    while isinstance(inner := getattr(found, "cause", None), BaseException):
        found = inner
    if isinstance(found, VtpruneError):
        return found
    # Indented are the lines of traces, and the numbers of processes.
    told = [line.strip() for line in str(found).splitlines() if line[:1].strip()]
    traced = '\n  File "' in str(found)
    # An actor that cannot be made leaves no more of its error than a text.
    place, _, reason = told[-1].partition(": ") if traced else ("", "", "")
    kind = getattr(errors, place.removeprefix("vtprune.errors."), None) if place.startswith("vtprune.errors.") else None
    if isinstance(kind, type) and issubclass(kind, VtpruneError):
        return kind(reason)
    reason = told[-1] if traced else f"{type(found).__name__}: {' '.join(told)}"
    reason = textwrap.shorten(reason, 300, placeholder=" ...")
    return VtpruneError(f"the job on Ray ended early ({reason}): what was answered is noted, run it again to go on")
