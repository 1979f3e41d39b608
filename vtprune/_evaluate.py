"""The command `vtprune eval`. Only `cli` imports it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune._arguments import (
    add_attention,
    check_debias,
    check_files,
    share_or_number,
    versions,
    write_outputs,
)
from vtprune.errors import InvalidOption

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from vtprune.eval.runner import Result
    from vtprune.eval.store import Store
    from vtprune.eval.subject import Subject
    from vtprune.eval.table import Row
    from vtprune.types import Modality

_KEEP = ("0.5", "0.25", "0.11", "0.05")
_FOR_CLIPS = ("llava_next_video", "video_llava")
_EXAMPLES = """Drawn scenes with questions whose answers are known: how often is the model right from fewer tokens?
Always in the table: the unpruned model (identity), random and uniform tokens, averages (pool), a smaller picture
(downsample), tokens chosen by who knows where the things are (oracle), and another picture (blind). Beside methods that
cut between layers: random tokens at the same cuts (random@ and the layers; 0 is in front of the language model).

  vtprune eval --samples 20                            a first look at the bundled model
  vtprune eval --csv out.csv --markdown out.md --plot out.png
  vtprune eval --model ./my-llava --methods divprune vtprune --keep 0.25 64 --csv mine.csv
  vtprune eval --methods fastv pyramiddrop --keep 0.5 0.33 0.25 --markdown cuts.md
  vtprune eval --methods fastv vflowopt --debias recency --calibration my.json    with and without what was measured
  vtprune eval --split dev --seed 1 --samples 500 --csv dev.csv
  vtprune eval --from-csv out.csv --markdown out.md    the page again, nothing is run

Decide on scenes of the split dev, report those of test. With --csv OUT.csv every answer is noted in OUT.jsonl as
it comes: the same command goes on where it was interrupted. Budgets and methods may be added in a later run.
"""


def add_eval(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser; `add` is that of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = add("eval", help="how often answers are right, method by method", epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument(
        "--model", default="tiny:llava", help="tiny:NAME, a directory or a hub id (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="names from `vtprune methods` (default: all)")
    add_attention(parser, then="; methods that take it come twice, with and without")
    parser.add_argument("--keep", nargs="+", default=_KEEP, help=f"shares or numbers (default: {' '.join(_KEEP)})")
    parser.add_argument(
        "--about",
        choices=("scenes", "clips"),
        help="what is asked about (default: clips where the model is made for them)",
    )
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="which scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="number of scenes (default: %(default)s)")
    parser.add_argument("--csv", metavar="OUT.csv", help="write every number")
    parser.add_argument("--markdown", metavar="OUT.md", help="write the page for people")
    parser.add_argument("--plot", metavar="OUT.png", help="draw accuracy over tokens kept (extra `plots`)")
    parser.add_argument("--resume-file", metavar="OUT.jsonl", help="where answers are noted (default: beside the CSV)")
    parser.add_argument("--from-csv", metavar="IN.csv", help="make --markdown and --plot from this table, run nothing")
    parser.add_argument("--batch", type=int, default=64, help="questions answered at once (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument(
        "--positions", choices=("auto", "compact", "keep"), default="auto", help="what becomes of the ids"
    )
    parser.add_argument("--threads", type=int, help="threads of one operation on the CPU (default: as torch decides)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: 3 for the tiny model, else 8)")
    parser.add_argument("--instruction", default="", metavar="TEXT", help='put behind each question ("One word only.")')
    parser.set_defaults(command=_eval)


def _eval(options: argparse.Namespace, console: Console) -> None:
    _check(options)
    if options.from_csv is not None:
        from vtprune.eval.table import read_csv

        rows = read_csv(options.from_csv)
    else:
        rows = _run(options)
        console.print(_shown(rows))
    _write(options, rows, console)


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything heavy, what can be refused by then; file names become paths, budgets numbers."""
    for name, least in (("seed", 0), ("samples", 1), ("batch", 1), ("threads", 1), ("max_new_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InvalidOption(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    options.keep = [share_or_number(text) for text in options.keep]
    if options.csv and options.resume_file is None:
        options.resume_file = str(Path(options.csv).with_suffix(".jsonl"))
    check_files(options, ("from_csv", "calibration"), ("csv", "markdown", "plot", "resume_file"))
    if options.from_csv is not None:
        if options.csv is not None or options.resume_file is not None:
            raise InvalidOption("--from-csv runs nothing: leave --csv and --resume-file out")
        if options.markdown is None and options.plot is None:
            raise InvalidOption("--from-csv: say what to make of it, --markdown OUT.md, --plot OUT.png or both")
    if options.plot is not None:
        from vtprune.eval.plot import check_plot

        check_plot(options.plot)
    if options.from_csv is None:
        from vtprune.eval.arms import plan
        from vtprune.tiny.loading import tiny_folder

        if options.model.startswith("tiny:"):
            tiny_folder(options.model.removeprefix("tiny:"))
        from vtprune.eval.variants import Variants

        check_debias(options.debias)
        options.variants = Variants(debias=options.debias, calibration=options.calibration)
        options.steps = plan(options.methods, options.keep, options.variants)


def _relevance(model: str) -> Callable[..., Tensor] | None:
    """That of the text tower bundled with a tiny model, with the sign of CLIP: it was aligned patch by patch."""
    from vtprune.relevance import text_relevance
    from vtprune.tiny.loading import TEXT_TOWERS, load_tiny_clip

    name = model.removeprefix("tiny:")
    if name == model or name not in TEXT_TOWERS:
        return None
    clip, tokenizer = load_tiny_clip(name)
    return lambda pixels, questions: -text_relevance(clip, tokenizer, pixels, questions)


def _frames(model: Any, processor: Any) -> Callable[..., Tensor]:
    """How much the parts of a clip have to do with a question, asked of the model under test itself."""
    from vtprune.video.relevance import per_part, score_frames

    return lambda pictures, question: per_part(score_frames(model, processor, pictures, question), model)


def _run(options: argparse.Namespace) -> list[Row]:
    from vtprune import _console as helpers

    with options.trouble.status("importing torch and transformers") as status:
        import torch

        from vtprune.eval.questions import draw_items
        from vtprune.eval.store import Store, fingerprint
        from vtprune.eval.subject import Subject
        from vtprune.eval.table import tabulate

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        device = helpers.choose_device(options.device)
        helpers.quiet_transformers()
        status.update(f"loading {options.model}")
        model, processor = helpers.load_model(options.model, device)
        options.about = options.about or ("clips" if model.config.model_type in _FOR_CLIPS else "scenes")
        status.update(f"drawing {options.about}")
        modality: Modality = "video" if options.about == "clips" else "image"
        items = draw_items(options.split, options.seed * options.samples, options.samples, modality)
        length = options.max_new_tokens or (3 if options.model.startswith("tiny:") else 8)
        subject = Subject(
            model=model,
            processor=processor,
            positions=options.positions,
            max_new_tokens=length,
            instruction=options.instruction,
            relevance=_relevance(options.model),
            frames=_frames(model, processor) if modality == "video" else None,
            variants=options.variants,
        )
        weights = fingerprint(model)
        settings = {"weights": weights, "dtype": str(model.dtype), "device": device.type, "max-new-tokens": length}
        store = Store(options.resume_file, settings | _settings(options))
    results = _answer(subject, items, options, store)
    about = {
        "model": _name(options.model),
        "weights": weights,
        "about": options.about,
        "split": options.split,
        "seed": options.seed,
        "scenes": options.samples,
        "positions": options.positions,
        "versions": versions(),
    }
    return tabulate(results, items, about, options.seed)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What else answers depend on, but for the method and the budget."""
    names = ("about", "split", "seed", "samples", "batch", "positions", "instruction")
    return {**{name: getattr(options, name) for name in names}, "versions": versions()}


def _answer(subject: Subject, items: Sequence[Any], options: argparse.Namespace, store: Store) -> list[Result]:
    from vtprune.eval.runner import evaluate

    with _progress(options.trouble) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int, method: str) -> None:
            progress.update(task, completed=done, total=total, description=method)

        return evaluate(subject, items, options.steps, batch=options.batch, store=store, on_step=show)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _name(source: str) -> str:
    """The model as the table calls it: of a directory the last part."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def _shown(rows: Sequence[Row]) -> Any:
    """The rows over kinds, for a terminal, with what can be told apart below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from vtprune.eval.markdown import INSIDE, best_lines, gap, in_order, main_cells, main_kind, without_a_number

    kind = main_kind(rows)
    chance = ["above chance"] if any(row["control"] for row in rows) else []
    names = ("method", "keep", "tokens", "accuracy %", "objects %", "above random", *chance)
    table = Table(header_style="bold", box=None, pad_edge=False, title=f"{kind}, 95 % intervals", title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for row in in_order([row for row in rows if row["kind"] == kind]):
        cells = (row["method"], row["keep"], *_few(main_cells(row)), *([gap(row, "minus_control")] if chance else []))
        table.add_row(*map(Text, cells))
    lines = [f"{INSIDE}: inside the noise", *(line.replace("`", "") for line in best_lines(rows, kind))]
    reasons = [f"{row['method']}: {row['reason']}" for row in without_a_number(rows)]
    return Group(table, *(Text(line) for line in (*lines, *reasons)))


def _few(cells: Sequence[str]) -> list[str]:
    """Tokens, accuracy, recall and the difference: what a terminal is wide enough for."""
    return [*cells[:2], *cells[4:]]


def _write(options: argparse.Namespace, rows: Sequence[Row], console: Console) -> None:
    """Each output is tried, whatever becomes of the others."""
    from vtprune.eval.markdown import as_markdown
    from vtprune.eval.plot import draw_plot
    from vtprune.eval.table import write_csv

    def write_page(path: Path) -> None:
        drawn = os.path.relpath(options.plot, path.parent).replace(os.sep, "/") if options.plot else None
        path.write_text(as_markdown(rows, drawn), encoding="utf-8")

    writers: dict[str, tuple[Path | None, Callable[[Path], None]]] = {
        "table saved to": (options.csv, lambda path: write_csv(rows, path)),
        "page saved to": (options.markdown, write_page),
        "plot saved to": (options.plot, lambda path: draw_plot(rows, path)),
    }
    write_outputs(writers, console)
