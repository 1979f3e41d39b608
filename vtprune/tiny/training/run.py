"""Train a tiny model from a seed: processes that share the stages out, and a folder they can go on from."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from vtprune._torchvision import heal
from vtprune.errors import InvalidOption
from vtprune.tiny.loading import check_processors
from vtprune.tiny.training.batches import SEEDS
from vtprune.tiny.training.caption import Caption
from vtprune.tiny.training.export import export_clips, export_llava, export_qwen
from vtprune.tiny.training.loop import Plan, load_parts, run_stage, state_path
from vtprune.tiny.training.optimizer import check_torch
from vtprune.tiny.training.stages import Join, Meet, Read, See, Watch
from vtprune.tiny.training.student import Student
from vtprune.tiny.training.students import LlavaStudent, QwenStudent, VideoStudent
from vtprune.tiny.training.workers import Worker

Phases = tuple[tuple[Plan, ...], ...]
"""One after the other. Plans of one phase run side by side, each in its own process; a plan by itself runs in all."""

POLL_S = 1.0
WORKERS = 8
"""More would get so few pictures of a batch that some of them show nothing to learn from."""


@dataclass(frozen=True)
class Recipe:
    """How one tiny model is trained."""

    student: Callable[[], Student]
    phases: Phases
    export: Callable[[Any, Path], None]

    def shortened(self, steps: int | None) -> Recipe:
        """The same with at most so many steps a stage."""
        if steps is None:
            return self
        phases = tuple(tuple(replace(plan, steps=min(plan.steps, steps)) for plan in phase) for phase in self.phases)
        return replace(self, phases=phases)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans in the order they begin."""
        return tuple(plan for phase in self.phases for plan in phase)


def _from_scratch(*, see: int, read: int, meet: int, join: int) -> Phases:
    """The steps of a model of which nothing is trained yet: it learns to see and to read side by side."""
    return (
        (Plan(stage=See(), number=0, steps=see, size=32), Plan(stage=Read(), number=1, steps=read)),
        (Plan(stage=Meet(), number=2, steps=meet, matrix_rate=5e-3),),
        (Plan(stage=Join(), number=3, steps=join, matrix_rate=3e-3, rate=5e-4),),
    )


RECIPES = {
    "llava": Recipe(
        student=LlavaStudent,
        phases=(
            *_from_scratch(see=1100, read=1000, meet=150, join=550),
            (Plan(stage=Caption(), number=4, steps=300),),
        ),
        export=export_llava,
    ),
    "llava_next_video": Recipe(
        student=VideoStudent,
        phases=(
            (Plan(stage=Read(), number=0, steps=400, size=32, matrix_rate=0.01, rate=1e-3),),
            (Plan(stage=Meet(), number=1, steps=150, size=12, matrix_rate=5e-3),),
            (Plan(stage=Watch(), number=2, steps=400, size=16, matrix_rate=5e-3, rate=5e-4),),
        ),
        export=export_clips,
    ),
    "qwen2_5_vl": Recipe(
        student=QwenStudent,
        phases=_from_scratch(see=550, read=1000, meet=120, join=380),
        export=export_qwen,
    ),
}
MODEL_FOLDER = "model"


def train(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    device: str = "cpu",
    steps: int | None = None,
    on_poll: Callable[[], None] = lambda: None,
) -> Path:
    """Run all stages of a recipe; a folder that holds the beginnings of the same run is gone on from.

    Args:
        name: a key of `RECIPES`.
        folder: where states, learning curves and, in `model`, the trained model go.
        seed: of weights and pictures.
        workers: processes; two can train tower and language model side by side.
        device: one that all workers use.
        steps: at most so many a stage; for a trial.
        on_poll: called about once a second while they work.

    Returns:
        The folder of the trained model.

    Raises:
        InvalidOption: an unknown name, a seed or a number of workers out of range, or a folder that holds another run.
        BackendUnavailable: torch is too old to train with, or the processor of the model needs a missing package.
    """
    if name not in RECIPES:
        raise InvalidOption(f"no recipe for {name!r}; there are: {', '.join(RECIPES)}")
    if not 0 <= seed < SEEDS:
        raise InvalidOption(f"seed {seed}: expected 0 to {SEEDS - 1}")
    if not 1 <= workers <= WORKERS:
        raise InvalidOption(f"workers {workers}: expected 1 to {WORKERS}")
    check_torch()
    check_processors(name)
    plans = RECIPES[name].shortened(steps).plans
    recipe = hashlib.sha256(repr(plans).encode()).hexdigest()[:12]
    _claim(folder, {"name": name, "seed": seed, "workers": workers, "recipe": recipe})
    arguments = (workers, name, folder, seed, device, steps)
    context = spawn(run_worker, args=arguments, nprocs=workers, join=False)
    assert context is not None
    while not context.join(timeout=POLL_S):
        on_poll()
    on_poll()
    return folder / MODEL_FOLDER


def _claim(folder: Path, settings: dict[str, str | int]) -> None:
    """Mark the folder as that of this run, or refuse one of another."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    mark = folder / "run.json"
    if not mark.exists():
        mark.write_text(json.dumps(settings))
        return
    try:
        there = dict(json.loads(mark.read_text()))
    except ValueError as error:
        raise InvalidOption(f"{mark} is damaged: take another folder") from error
    found = [f"{name} {there.get(name)} there, {settings[name]} now" for name in settings]
    differing = [text for name, text in zip(settings, found, strict=True) if there.get(name) != settings[name]]
    if differing:
        raise InvalidOption(f"{folder} holds another run ({'; '.join(differing)}): go on with that, or name another")


def run_worker(
    rank: int, world: int, name: str, folder: Path, seed: int, device: str, steps: int | None = None
) -> None:
    """What one process does."""
    warnings.filterwarnings("ignore", category=UserWarning)
    heal()
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    worker, recipe = Worker(rank, world), RECIPES[name].shortened(steps)
    worker.join(folder / "meeting")
    torch.manual_seed(seed)
    student = recipe.student().to(device)
    for phase in recipe.phases:
        for place, plan in enumerate(phase):
            if len(phase) == 1:
                run_stage(plan, student, worker, folder, seed, device)
            elif place % world == rank:
                run_stage(plan, student, worker.alone(), folder, seed, device)
        worker.wait()
        for plan in phase:
            load_parts(state_path(folder, plan.stage), student.parts(plan.stage.parts))
    if rank == 0:
        recipe.export(student, folder / MODEL_FOLDER)
    worker.wait()
