"""The learning curve of a run: lines read from its folder, drawn as a picture."""

from __future__ import annotations

from pathlib import Path

from vtprune.errors import BackendUnavailable
from vtprune.tiny.training.loop import Plan, notes_path, read_notes


def draw_curve(folder: Path, plans: tuple[Plan, ...], picture: Path) -> None:
    """One panel a stage: its metrics over its steps. Raises `BackendUnavailable` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable("the learning curve needs matplotlib: pip install 'vtprune[plots]'") from error
    figure = Figure(figsize=(4.2 * len(plans), 3.6), layout="constrained")
    for panel, plan in zip(figure.subplots(1, len(plans), squeeze=False)[0], plans, strict=True):
        notes = read_notes(notes_path(folder, plan.stage))
        for name in sorted({name for note in notes for name in note.metrics}):
            points = [(note.step, note.metrics[name]) for note in notes if name in note.metrics]
            if name == "loss":
                losses = panel.twinx()
                losses.semilogy(*zip(*points, strict=True), color="black", linewidth=0.8)
                losses.set_ylabel("loss (black)")
            else:
                panel.plot(*zip(*points, strict=True), label=name)
        panel.set(title=plan.stage.name, xlabel="step", ylim=(0, 1.05))
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    figure.savefig(picture, dpi=110)
