"""The same job on a Ray cluster: replicas of the model each take clips, this process notes what comes back.

Every machine must see the clips, and the model where it is a directory, under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtprune.errors import BackendUnavailable, VtpruneError
from vtprune.video.guard import Decoders
from vtprune.video.journal import Journal, Record
from vtprune.video.qa import AHEAD, ClipTask, Counts, Report, answered, check_readable, decoded, noting
from vtprune.video.questions import Question
from vtprune.video.task import Task


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
    """As `answer_questions`, with `replicas` of the model as actors of Ray Data.

    A cluster is taken where there is one (RAY_ADDRESS), else one is started on this machine.

    Raises:
        BackendUnavailable: without Ray.
        VtpruneError: as `answer_questions` does.
    """
    check_readable(task, questions, directory)
    ray = start()
    needs = _needs(task)
    settings = _asked(ray, ray.remote(**needs)(_settings).remote(task.to_dict()))
    with Journal(out, settings, retry=retry) as journal:
        clips, counts, note = noting(questions, journal, directory, on_records)
        if clips:
            rows = [{"clip": json.dumps(asdict(clip), default=str)} for clip in clips]
            each = max(1, task.batch * len(clips) // sum(len(clip.questions) for clip in clips))
            data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // each)).map_batches(
                _Replica,
                fn_constructor_args=(task.to_dict(),),
                batch_size=each,
                compute=ray.data.ActorPoolStrategy(size=min(replicas, len(rows))),
                **needs,
            )
            for lines in _streamed(ray, data):
                found = [Record.from_json(line) for line in lines]
                note([record for record in found if record.id not in journal.records])
        return counts, dict(journal.records)


class _Replica:
    """A model on some machine, and a process that decodes for it."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self._task = Task.from_dict(stored)
        self._answerer = self._task.load()
        self._decoders = Decoders(workers=1, timeout=self._task.timeout)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Records, one JSON line each, for the clips of a batch."""
        clips = decoded(self._task, [_clip(str(line)) for line in batch["clip"]], self._decoders, ahead=AHEAD)
        groups = answered(self._task, self._answerer, clips)
        return {"record": [record.to_json() for group, _ in groups for record in group]}


def _clip(line: str) -> ClipTask:
    stored = json.loads(line)
    return ClipTask(path=Path(stored["path"]), questions=tuple(Question(**own) for own in stored["questions"]))


def _settings(stored: dict[str, Any]) -> dict[str, Any]:
    """What the header says, from a machine that can load the model."""
    task = Task.from_dict(stored)
    return task.settings(task.load())


def _needs(task: Task) -> dict[str, float]:
    """What a replica takes of the cluster."""
    import torch

    cuda = task.device.startswith("cuda") or (task.device == "auto" and torch.cuda.is_available())
    return {"num_gpus": 1} if cuda else {"num_cpus": 1}


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
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _asked(ray: Any, reference: Any) -> Any:
    """What a remote function returns; raises what it raised, if that is ours."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise _ours(error) from error


def _streamed(ray: Any, data: Any) -> Iterator[list[str]]:
    try:
        for batch in data.iter_batches(batch_size=None):
            yield [str(line) for line in batch["record"]]
    except ray.exceptions.RayError as error:
        raise _ours(error) from error


def _ours(error: Any) -> VtpruneError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, VtpruneError):
        return cause
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return VtpruneError(f"the job on Ray ended early ({last}): what was answered is noted, run it again to go on")
