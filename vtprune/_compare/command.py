"""The parser of `vtprune compare`, what is refused, and the calls it makes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune._arguments import add_attention, check_debias, check_files, share_or_number, versions, write_outputs
from vtprune._compare import lines as shown
from vtprune.errors import InvalidOption, VtpruneError

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune._compare.lines import Line
    from vtprune.comparing import Comparison
    from vtprune.pipeline import Pipeline

_KEEP = ("0.5", "0.25", "0.11")
_EXAMPLES = """One picture and one question, answered under every method and budget. Always in the table: the unpruned
model first (identity), and random tokens, which are added where they are not named. Without arguments: the bundled
picture, question and model, with every method that the model serves by itself.

  vtprune compare
  vtprune compare --methods vtprune divprune fastervlm --keep 0.5 0.25 64
  vtprune compare --methods fastv pyramiddrop --keep 0.5 --debias recency      with and without: run it twice
  vtprune compare --image cat.jpg --prompt "What is it?" --model ./my-llava --methods divprune scope
  vtprune compare --methods vtprune dart --csv out.csv --markdown out.md --sheet out.png

  tokens   kept of all, on average over layers where a method cuts between layers or caches
  same     the answer of the unpruned model?
  IoU      of the choice with that of the first method in the table at the same --keep:
           tokens that both keep over tokens that either keeps, weighed by the share of the layers they stay in
  KV saved MB        of keys and values that the cache does not store, in millions of bytes
  select, prefill    as measured, one run each: no benchmark (see `vtprune bench`)

What the model cannot serve is refused where it was named, with the reason, and left out where it was not: methods that
prune inside the encoder have to be named. Budgets that were not asked for are left out where a named method does not
reach them. For how often answers are right see `vtprune eval`.
"""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of `compare`: methods (None: all that are able), options, and the method whose rows are left out."""

    methods: Sequence[str | Pipeline] | None
    options: dict[str, Any]
    without: str = ""


def add_compare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser; `add` is that of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = add("compare", help="one question under many methods, side by side", epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument(
        "--model", default="tiny:llava", help="tiny:NAME, a directory or a hub id (default: %(default)s)"
    )
    parser.add_argument("--image", help="a picture (default: the bundled one)")
    parser.add_argument("--prompt", help="the question (default: one that fits the bundled picture)")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="names from `vtprune methods`; random comes along (default: all)"
    )
    parser.add_argument("--keep", nargs="+", help=f"shares or numbers of tokens (default: {' '.join(_KEEP)})")
    parser.add_argument("--per", choices=("image", "part", "prompt"), default="image", help="what --keep applies to")
    parser.add_argument(
        "--positions", choices=("auto", "compact", "keep"), default="auto", help="what becomes of the ids"
    )
    add_attention(parser, then="; not for random, and named methods have to take it")
    parser.add_argument("--backend", choices=("auto", "torch", "triton"), default="auto", help="what kernels run on")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: 4 for a tiny model, else 64)")
    parser.add_argument("--seed", type=int, default=0, help="of random (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of one operation on the CPU (default: as torch decides)")
    parser.add_argument("--csv", metavar="OUT.csv", help="write every number")
    parser.add_argument("--markdown", metavar="OUT.md", help="write the table for people")
    parser.add_argument("--sheet", metavar="OUT.png", help="save the pictures, a row for each method")
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace, console: Console) -> None:
    from vtprune import _console as helpers
    from vtprune._compare.sheet import draw_sheet
    from vtprune._pictures import read_picture
    from vtprune.demo.wording import unknown_words
    from vtprune.tiny import PICTURE, QUESTION

    _check(options)
    picture = read_picture(options.image or PICTURE)
    tiny = options.model.startswith("tiny:")
    prompt = options.prompt or (QUESTION if tiny or options.image is None else "What is in this picture?")
    options.max_new_tokens = options.max_new_tokens or (4 if tiny else 64)
    with options.trouble.status("importing torch and transformers") as status:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        calls = _calls(options)
        options.device = helpers.choose_device(options.device)
        helpers.quiet_transformers()
        status.update(f"loading {options.model}")
        model, processor = helpers.load_model(options.model, options.device)
        inputs = helpers.build_inputs(processor, picture, prompt, model)
        budgets = _reached(options, model, calls)
    console.print(f"prompt: {prompt}", markup=False, soft_wrap=True)
    if unknown := unknown_words(processor, prompt):
        told = f"the model does not know these words: {', '.join(unknown)}"
        options.trouble.print(told, markup=False, style="yellow", soft_wrap=True)
    lines = _answered(options, console, model, processor, inputs, calls, budgets)
    shown.tell(lines, every=options.methods is None, console=console)
    settings = ("model", "per", "positions", "debias", "calibration", "seed", "max_new_tokens", "device")
    about = {name: getattr(options, name) for name in settings}
    about |= {"prompt": prompt, "image": (options.image or PICTURE).name, "versions": versions()}
    writers: dict[str, tuple[Path | None, Callable[[Path], object]]] = {
        "table saved to": (options.csv, lambda path: shown.write_csv(lines, about, path)),
        "page saved to": (options.markdown, lambda path: shown.write_page(lines, about, path)),
        "sheet saved to": (options.sheet, lambda path: draw_sheet(lines, picture, processor, prompt).save(path)),
    }
    write_outputs(writers, console)


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything heavy, what can be refused by then; file names become paths, budgets numbers."""
    from vtprune.tiny.loading import tiny_folder

    for name, least in (("seed", 0), ("threads", 1), ("max_new_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InvalidOption(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    if options.prompt is not None and not options.prompt.strip():
        raise InvalidOption("--prompt is empty: expected a question")
    options.default_keep = options.keep is None
    budgets = [share_or_number(text) for text in options.keep or _KEEP]
    options.keep = list({repr(keep): keep for keep in budgets}.values())
    if options.model.startswith("tiny:"):
        tiny_folder(options.model.removeprefix("tiny:"))
    check_files(options, ("image", "calibration"), ("csv", "markdown", "sheet"))
    if options.sheet is not None:
        from vtprune._pictures import check_format

        check_format(options.sheet)


def _calls(options: argparse.Namespace) -> list[_Call]:
    """What is asked of `compare`: random by itself where others take options that it refuses, or get no seed."""
    from vtprune.calibration import Calibration
    from vtprune.catalog import build
    from vtprune.types import Budget

    check_debias(options.debias)
    for keep in options.keep:
        Budget(keep=keep, per=options.per)
    if options.calibration is not None:
        Calibration.read(options.calibration)
    plain = {name: getattr(options, name) for name in ("per", "positions", "backend")}
    own = {**plain, "debias": options.debias, "calibration": options.calibration}
    apart = options.debias is not None or options.calibration is not None
    chance = build("random", {"seed": options.seed})
    by_itself = _Call(methods=[chance], options=plain, without="identity")
    if options.methods is None:
        every = _Call(methods=None, options=own, without="random")
        return [every, by_itself] if apart or options.seed else [_Call(methods=None, options=own)]
    for name in options.methods:
        build(name)
    names = [name for name in dict.fromkeys(options.methods) if name != "identity"]
    others = [name for name in names if name != "random"]
    if apart:
        return [*([_Call(methods=others, options=own)] if others else []), by_itself]
    added = names if "random" in names else [*names, "random"]
    return [_Call(methods=[chance if name == "random" else name for name in added], options=own)]


def _reached(options: argparse.Namespace, model: Any, calls: Sequence[_Call]) -> list[float | int]:
    """Budgets that every named method reaches on the model; those that were asked for are all of them.

    Raises `InvalidOption` where a method reaches none, or one that was asked for is not reached.
    """
    refused: dict[str, str] = {}
    for call in calls:
        for method in call.methods or ():
            reasons = {repr(keep): _refusal(model, method, keep, call.options) for keep in options.keep}
            own = {keep: reason for keep, reason in reasons.items() if reason}
            if own and (len(own) == len(reasons) or not options.default_keep):
                raise InvalidOption(next(iter(own.values())))
            refused = {**own, **refused}
    reached = [keep for keep in options.keep if repr(keep) not in refused]
    if not reached:
        raise InvalidOption(f"no --keep that all of these methods reach: {'; '.join(refused.values())}")
    for reason in refused.values():
        options.trouble.print(f"left out: {reason}", markup=False, style="yellow")
    return reached


def _refusal(model: Any, method: str | Pipeline, keep: float | int, own: dict[str, Any]) -> str:
    """Why the model cannot serve a method at a budget; empty where it can."""
    from vtprune.api import pruning
    from vtprune.runtime.evidence import readings_of

    name = method if isinstance(method, str) else method.name
    try:
        with pruning(model, method, keep=keep, **own) as pruner:
            pipeline = pruner.pipeline
    except VtpruneError as error:
        return f"{name} at keep {keep}: {error}"
    missing = sorted(str(need) for need in pipeline.asked - readings_of(pipeline).keys())
    given = "that is given from Python only, `with model.vtprune.using(...)`"
    return f"{name} needs {', '.join(missing)}: {given}" if missing else ""


def _answered(
    options: argparse.Namespace,
    console: Console,
    model: Any,
    processor: Any,
    inputs: Any,
    calls: Sequence[_Call],
    budgets: Sequence[float | int],
) -> list[Line]:
    """Every line of the table, each shown as it comes, with a bar below where there is a terminal."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vtprune.comparing import compare

    lines: list[Line] = []
    wide = _widest_name(calls, options.debias)
    known = all(call.methods is not None for call in calls)
    total = 1 + sum(len(call.methods or ()) for call in calls) * len(budgets) if known else None
    place = console if console.is_terminal else options.trouble
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=place, transient=True, disable=not place.is_terminal) as progress:
        bar = progress.add_task("encoding", total=total)
        for call in calls:

            def add(row: Comparison, without: str = call.without) -> None:
                if row.method == without:
                    return
                words = processor.batch_decode(row.answer, skip_special_tokens=True)[0].split()
                lines.append(shown.line_of(row, " ".join(words), lines))
                shown.show_last(lines, wide, console)
                progress.update(bar, advance=1, description=row.method)

            try:
                compare(
                    model,
                    inputs,
                    call.methods,
                    budgets,
                    on_row=add,
                    max_new_tokens=options.max_new_tokens,
                    **call.options,
                )
            except torch.OutOfMemoryError as error:
                raise VtpruneError("out of memory: try a smaller picture or model, or --device cpu") from error
    return lines


def _widest_name(calls: Sequence[_Call], debias: str | None) -> int:
    from vtprune.catalog import list_methods

    methods = [method for call in calls for method in call.methods or list_methods()]
    names = [method if isinstance(method, str) else method.name for method in methods]
    return max(len("identity"), *map(len, names)) + (0 if debias is None else len(debias) + 1)
