"""The command line: `vtprune run` and the other commands. Heavy imports wait for a command."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune import _bench, _calibrate, _compare, _demo, _evaluate, _train, _video_qa
from vtprune._arguments import (
    add_attention,
    check_debias,
    check_files,
    parameters_of,
    share_or_number,
    write_outputs,
)
from vtprune.errors import InvalidOption, VtpruneError

if TYPE_CHECKING:
    from rich.console import Console

_TINY = "tiny:llava"
_ABOUT = "Make vision-language models answer from fewer visual tokens."
_EXAMPLES = """examples:
  vtprune run                                          bundled model and picture, a quarter of the tokens
  vtprune run --method random --keep 0.11              what blind choices do to the answer
  vtprune run --image cat.jpg --prompt "What is it?" --model ./my-llava --keep 64
  vtprune run --set lam=0.3 --overlay kept.png --report runs.jsonl
  vtprune compare --sheet sheet.png                    one question under many methods, side by side
  vtprune methods                                      what --method takes
  vtprune describe divprune                            one method, its source and its parameters
  vtprune families                                     which models have an adapter
  vtprune video-qa                                     questions about clips, in batches
  vtprune eval --csv out.csv --plot out.png            how often answers are right, method by method
  vtprune doctor ./my-llava                            can this model be pruned, and with which methods?
  vtprune demo                                         see which patches are kept, in the browser
  vtprune demo --model tiny:llava_next_video           the same of clips
  vtprune bench                                        the benchmarks, and what they measure
  vtprune train llava                                  make the bundled model anew
"""
_RUN_EXAMPLES = """The model answers twice, with all visual tokens and with those the method keeps.
Times are the best of a few prefills and no benchmark. A share is written as a float (--keep 0.25), a number
of tokens as a whole number (--keep 64). Parameters of a method (see `vtprune describe NAME`)
are set by --set, once for each:

  vtprune run --method vtprune --set lam=0.3

Methods that go by attention can do so without its known faults, as each picture shows them or as they were measured
once of a model (see `vtprune calibrate --help`):

  vtprune run --method pyramiddrop --keep 0.5 --debias recency
  vtprune run --method fastv --keep 0.5 --debias recency --calibration calibration.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake of the user, 130 when interrupted.

    `bench` hands on that of the benchmark.
    """
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        parsed.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from rich.console import Console

    parsed.trouble = trouble = Console(stderr=True, soft_wrap=True, highlight=False)

    def warn(message: Warning | str, *where: object) -> None:
        trouble.print("[bold yellow]warning:[/bold yellow]", end=" ")
        trouble.print(" ".join(str(message).split()), markup=False)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn  # type: ignore[assignment]
            code: int | None = parsed.command(parsed, Console(highlight=False))
    except VtpruneError as error:
        trouble.print("[bold red]error:[/bold red]", end=" ")
        trouble.print(str(error), markup=False)
        return 2
    return code or 0


def _parser() -> argparse.ArgumentParser:
    from vtprune._version import __version__

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("vtprune", description=_ABOUT, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"vtprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_run(
        commands.add_parser("run", help="answer a question before and after", epilog=_RUN_EXAMPLES, formatter_class=raw)
    )
    methods = commands.add_parser("methods", help="list the methods")
    methods.set_defaults(command=_methods)
    families = commands.add_parser("families", help="list the families of models")
    families.set_defaults(command=_families)
    for table in (methods, families):
        table.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    describe = commands.add_parser("describe", help="tell about one method")
    describe.add_argument("name", help="a name from `vtprune methods`")
    describe.set_defaults(command=_describe)
    doctor = commands.add_parser("doctor", help="check this machine, and whether a model can be pruned")
    doctor.add_argument("model", nargs="?", help="tiny:NAME, a directory or a hub id; weights are not loaded")
    doctor.set_defaults(command=_doctor)
    _demo.add_demo(commands.add_parser)
    _video_qa.add_video_qa(commands.add_parser)
    _compare.add_compare(commands.add_parser)
    _evaluate.add_eval(commands.add_parser)
    _train.add_train(commands.add_parser)
    _calibrate.add_calibrate(commands.add_parser)
    _bench.add_bench(commands.add_parser)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=_TINY, help="tiny:NAME, a directory or a hub id (default: %(default)s)")
    parser.add_argument("--image", help="a picture (default: the bundled one)")
    parser.add_argument("--prompt", help="the question (default: one that fits the bundled picture)")
    parser.add_argument("--method", default="vtprune", help="a name from `vtprune methods` (default: %(default)s)")
    parser.add_argument("--keep", help="share (0.25) or number (64) of visual tokens (default: 0.25, or 1.0)")
    parser.add_argument("--per", choices=("image", "part", "prompt"), default="image", help="what --keep applies to")
    parser.add_argument(
        "--positions", choices=("auto", "compact", "keep"), default="auto", help="what becomes of the ids"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    add_attention(parser)
    parser.add_argument("--backend", choices=("auto", "torch", "triton"), default="auto", help="what kernels run on")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: 4 for the tiny model, else 64)")
    parser.add_argument("--report", metavar="OUT.jsonl", help="append the report of the pruned run")
    parser.add_argument("--overlay", metavar="OUT.png", help="save the picture, dim where dropped, framed by pick")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace, console: Console) -> None:
    from vtprune import _console as helpers
    from vtprune import _pictures as pictures
    from vtprune.tiny import PICTURE, QUESTION

    keep, parameters = _keep(options), parameters_of(options.set)
    _check(options)
    picture = pictures.read_picture(options.image or PICTURE)
    tiny = options.model.startswith("tiny:")
    prompt = options.prompt or (QUESTION if tiny or options.image is None else "What is in this picture?")
    with options.trouble.status("importing torch and transformers") as status:
        from vtprune.calibration import Calibration
        from vtprune.catalog import build
        from vtprune.debiasing import debiased
        from vtprune.types import Budget

        check_debias(options.debias)
        pipeline = debiased(build(options.method, parameters), options.debias)
        keep = (0.25 if pipeline.drops else 1.0) if keep is None else keep
        Budget(keep=keep, per=options.per)
        if options.calibration is not None:
            Calibration.read(options.calibration)
        device = helpers.choose_device(options.device)
        helpers.quiet_transformers()
        status.update(f"loading {options.model}")
        model, processor = helpers.load_model(options.model, device)
        inputs = helpers.build_inputs(processor, picture, prompt, model)
        status.update("answering from all tokens")
        ask = helpers.Asker(model, processor, inputs, options.max_new_tokens or (4 if tiny else 64))
        before = ask("identity", keep=1.0)
        status.update(f"answering from the tokens that {options.method} keeps")
        asked = {name: getattr(options, name) for name in ("per", "positions", "debias", "calibration", "backend")}
        after = ask(options.method, keep=keep, **asked, **parameters)
    console.print(f"prompt: {prompt}", markup=False, soft_wrap=True)
    console.print(helpers.run_table(before, after))
    times = f"times: best of {ask.repeats} on {device}, no benchmark; prefill is the language model alone"
    console.print(times, markup=False, soft_wrap=True)
    report = after[1]
    console.print(report.summary(), markup=False, soft_wrap=True)

    def save_overlay(path: Path) -> None:
        from vtprune.viz import framing_of, overlay

        framing = framing_of(processor, picture.size, report.segments[0].parts if report.segments else ())
        overlay(report, picture, stages=len(report.picks) > 1, framing=framing).save(path)

    writers = {
        "report appended to": (options.report, report.write_jsonl),
        "overlay saved to": (options.overlay, save_overlay),
    }
    write_outputs(writers, console)


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything heavy is imported, what can be refused by then; file names become paths."""
    from vtprune.tiny.loading import tiny_folder

    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise InvalidOption(f"--max-new-tokens {options.max_new_tokens}: expected 1 or more")
    if options.prompt is not None and not options.prompt.strip():
        raise InvalidOption("--prompt is empty: expected a question")
    if options.model.startswith("tiny:"):
        tiny_folder(options.model.removeprefix("tiny:"))
    check_files(options, ("image", "calibration"), ("report", "overlay"))
    if options.overlay is not None:
        from vtprune._pictures import check_format

        check_format(options.overlay)


def _keep(options: argparse.Namespace) -> float | int | None:
    """What was asked for; None where nothing was."""
    return None if options.keep is None else share_or_number(options.keep)


def _methods(options: argparse.Namespace, console: Console) -> None:
    from vtprune import _console as helpers

    _print_table(helpers.METHOD_COLUMNS, helpers.method_rows(), options, console)


def _families(options: argparse.Namespace, console: Console) -> None:
    from vtprune import _console as helpers

    _print_table(helpers.FAMILY_COLUMNS, helpers.family_rows(), options, console)


def _print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], options: argparse.Namespace, console: Console
) -> None:
    from vtprune import _console as helpers

    if options.markdown:
        console.print(helpers.as_markdown(columns, rows), markup=False, soft_wrap=True)
    else:
        console.print(helpers.as_table(columns, rows, console.width))


def _describe(options: argparse.Namespace, console: Console) -> None:
    import vtprune

    console.print(str(vtprune.describe(options.name)), markup=False, soft_wrap=True)


def _doctor(options: argparse.Namespace, console: Console) -> None:
    from vtprune import _doctor as doctor

    for name, finding in doctor.machine():
        console.print(f"[bold]{name}[/bold] ", end="")
        console.print(finding, markup=False, soft_wrap=True)
    if options.model is not None:
        for name, finding in doctor.model(options.model):
            console.print(f"[bold]{name}[/bold] ", end="")
            console.print(finding, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
