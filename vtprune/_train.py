"""The command `vtprune train`. Only `cli` imports it."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import BackendUnavailable, InvalidOption

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.tiny.training.loop import Plan

_NAMES = ("llava", "llava_next_video", "qwen2_5_vl")
_EXAMPLES = """The bundled tiny models come from this command. It draws its own pictures, needs no network, and goes on
where it was stopped when it is called again with the same folder. It takes half an hour or so of two CPU cores.

  vtprune train llava                                  pictures; into ./train-llava
  vtprune train llava_next_video                       clips; begins with the weights of the bundled llava
  vtprune train qwen2_5_vl                             pictures, with M-RoPE and windows in its tower
  vtprune train llava --out runs/second --seed 1       another seed, another folder
  vtprune train llava --device cuda --workers 1
  vtprune eval --model train-llava/model               measure what came out
"""


def add_train(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser; `add` is that of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = add("train", help="train a tiny model from a seed", epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("name", choices=_NAMES, help="which of the bundled models")
    parser.add_argument("--out", metavar="DIR", help="states, learning curve and model (default: train-NAME)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: 2 where there are two cores, 1 on a GPU)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="at most so many steps a stage, for a trial (default: the recipe's)")
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace, console: Console) -> None:
    folder = Path(options.out or f"train-{options.name}")
    if options.steps is not None and options.steps < 1:
        raise InvalidOption(f"--steps {options.steps}: expected 1 or more")
    if folder.exists() and not folder.is_dir():
        raise InvalidOption(f"--out {folder}: this is a file, expected a directory")
    from vtprune._console import choose_device, quiet_transformers
    from vtprune.tiny.training.curve import draw_curve
    from vtprune.tiny.training.run import RECIPES, train

    quiet_transformers()
    device = choose_device(options.device)
    workers = options.workers
    if workers is None:
        workers = min(2, os.cpu_count() or 1) if device.type == "cpu" else 1
    plans = RECIPES[options.name].shortened(options.steps).plans
    with _Bars(folder, plans, options.trouble) as bars:
        model = train(
            options.name,
            folder,
            seed=options.seed,
            workers=workers,
            device=str(device),
            steps=options.steps,
            on_poll=bars.refresh,
        )
    try:
        draw_curve(folder, plans, folder / "curve.png")
        console.print(f"learning curve saved to {folder / 'curve.png'}", markup=False, soft_wrap=True)
    except BackendUnavailable as error:
        warnings.warn(str(error), stacklevel=1)
    console.print(f"model saved to {model}; measure it: vtprune eval --model {model}", markup=False, soft_wrap=True)


class _Bars:
    """One progress bar a stage, read from the notes of the run."""

    def __init__(self, folder: Path, plans: tuple[Plan, ...], console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[last]}"), console=console)
        self._folder = folder
        self._tasks = {
            plan: self._progress.add_task(plan.stage.name, total=plan.steps, last="", start=False) for plan in plans
        }

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def refresh(self) -> None:
        """Move the bars to what has been noted."""
        from vtprune.tiny.training.loop import notes_path, read_notes

        for plan, task in self._tasks.items():
            notes = read_notes(notes_path(self._folder, plan.stage))
            if notes:
                self._progress.start_task(task)
                told = " ".join(f"{name} {value:.2f}" for name, value in notes[-1].metrics.items())
                self._progress.update(task, completed=notes[-1].step, last=told)
