"""Run one stage: step, note, save; go on from what was saved."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vtprune.errors import VtpruneError
from vtprune.tiny.training.batches import Chance, Source
from vtprune.tiny.training.optimizer import Optimizer
from vtprune.tiny.training.stages import Metrics, Stage
from vtprune.tiny.training.student import Student
from vtprune.tiny.training.workers import Worker

SAVE_EVERY_S = 60.0
NOTE_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage with its place in the run: how many steps over how many pictures, at what rates."""

    stage: Stage
    number: int
    steps: int
    size: int = 48
    matrix_rate: float = 0.02
    rate: float = 2e-3

    def source(self, seed: int, student: Student, device: str) -> Source:
        """The pictures of this stage."""
        crowded = self.stage.crowded
        return student.source(seed=seed, stage=self.number, patch=student.patch, crowded=crowded, device=device)


@dataclass(frozen=True)
class Note:
    """A line of the learning curve: means over the steps since the last one; `seconds` of CPU time, of this process."""

    stage: str
    step: int
    seconds: float
    metrics: Metrics


def run_stage(plan: Plan, student: Student, worker: Worker, folder: Path, seed: int, device: str) -> None:
    """Train the parts of a stage, from where it was left. Afterwards the student holds them, and so does the folder."""
    modules = student.parts(plan.stage.parts)
    optimizer = Optimizer(modules, steps=plan.steps, matrix_rate=plan.matrix_rate, rate=plan.rate)
    saved = state_path(folder, plan.stage)
    done = _resume(saved, modules, optimizer)
    keeper = _Keeper(notes_path(folder, plan.stage), plan, worker.rank == 0)
    keeper.forget_after(done)
    source = plan.source(seed, student, device)
    student.train()
    if done == 0:
        plan.stage.begin(student, source.batch(0, range(plan.size), plan.size))
    while done < plan.steps:
        batch = source.batch(done, worker.rows(plan.size), plan.size)
        chance = Chance.of((seed * 8 + plan.number) * 1_000_003 + done, worker.rank)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss, metrics = plan.stage.loss(student, batch, chance)
        loss.backward()
        worker.average(optimizer.weights)
        optimizer.step(done)
        done += 1
        keeper.note(done, metrics)
        if keeper.save_is_due(done):
            _save(saved, modules, optimizer, done)
    worker.wait()


class _Keeper:
    """Writes the curve and says when to save; only one of the workers does."""

    def __init__(self, path: Path, plan: Plan, writes: bool) -> None:
        self._path = path
        self._plan = plan
        self._writes = writes
        self._gathered: list[Metrics] = []
        self._saved_at = time.monotonic()

    def forget_after(self, done: int) -> None:
        """Take back notes of steps that will be done again."""
        if self._writes and self._path.exists():
            kept = [note for note in read_notes(self._path) if note.step <= done]
            self._path.write_text("".join(_line(note) for note in kept))

    def note(self, done: int, metrics: Metrics) -> None:
        """Gather, and write every `NOTE_EVERY` steps and at the end."""
        self._gathered.append(metrics)
        if self._writes and (done == self._plan.steps or done % NOTE_EVERY == 0):
            seconds = round(time.process_time(), 1)
            with self._path.open("a") as file:
                file.write(_line(Note(self._plan.stage.name, done, seconds, _mean(self._gathered))))
            self._gathered = []

    def save_is_due(self, done: int) -> bool:
        """At the end, and when the last one is a while ago."""
        if not self._writes or (done < self._plan.steps and time.monotonic() - self._saved_at < SAVE_EVERY_S):
            return False
        self._saved_at = time.monotonic()
        return True


def read_notes(path: Path) -> list[Note]:
    """What a stage has noted so far; a line that is being written is left for later."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Note(**json.loads(line)) for line in lines if line.endswith("\n")]


def _line(note: Note) -> str:
    return json.dumps(asdict(note)) + "\n"


def _mean(gathered: list[Metrics]) -> Metrics:
    names = sorted({name for metrics in gathered for name in metrics})
    found = {name: [metrics[name] for metrics in gathered if name in metrics] for name in names}
    return {name: round(sum(values) / len(values), 4) for name, values in found.items()}


def _save(path: Path, modules: list[nn.Module], optimizer: Optimizer, done: int) -> None:
    """Whole or not at all."""
    tensors = {"done": torch.tensor(done)}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer.tensors().items()}
    for number, module in enumerate(modules):
        tensors |= {f"{number}.{name}": tensor for name, tensor in module.state_dict().items()}
    draft = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
    os.replace(draft, path)


def _resume(path: Path, modules: list[nn.Module], optimizer: Optimizer) -> int:
    """Load what was saved; the number of steps that were done."""
    if not path.exists():
        return 0
    load_parts(path, modules)
    tensors = load_file(path)
    gathered = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    optimizer.restore({name.removeprefix("optimizer."): tensor for name, tensor in gathered.items()})
    return int(tensors["done"])


def load_parts(path: Path, modules: list[nn.Module]) -> None:
    """Only the weights that a stage left. Raises `VtpruneError` where the file is damaged."""
    try:
        tensors = load_file(path)
        for number, module in enumerate(modules):
            module.load_state_dict({name: tensors[f"{number}.{name}"] for name in module.state_dict()})
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise VtpruneError(f"cannot go on from {path} ({error}): delete it to do its stage again") from error


def state_path(folder: Path, stage: Stage) -> Path:
    """Where a stage keeps its state."""
    return folder / f"{stage.name}.safetensors"


def notes_path(folder: Path, stage: Stage) -> Path:
    """Where a stage keeps its learning curve."""
    return folder / f"{stage.name}.jsonl"
