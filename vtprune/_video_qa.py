"""The command `vtprune video-qa`. Only `cli` imports it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune import _video_answers as shown
from vtprune._arguments import (
    add_attention,
    check_debias,
    check_files,
    parameters_of,
    share_or_number,
    write_outputs,
)
from vtprune.errors import InvalidOption

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.video.journal import Record
    from vtprune.video.qa import Counts
    from vtprune.video.questions import Malformed, Question
    from vtprune.video.sampling import Sampling
    from vtprune.video.task import Task

_TINY = "tiny:llava_next_video"
_EXAMPLES = """Every question about every clip, from fewer visual tokens. Without arguments: the bundled clip, its ten
questions and the bundled model for clips.

  vtprune video-qa
  vtprune video-qa questions.jsonl --videos clips --model ./my-llava-next-video --out answers.jsonl
  vtprune video-qa questions.csv --videos clips --model ./my-qwen --frames 32 --method temporal --out answers.jsonl
  vtprune video-qa q.jsonl --videos clips --method quota --scoring yes --out a.jsonl      tokens by the question
  vtprune video-qa q.jsonl --videos clips --sampling question --frames 8 --out a.jsonl    frames by the question
  vtprune video-qa q.jsonl --videos clips --model ./my-llava --engine ray --replicas 4 --out a.jsonl

Questions are lines of JSON, or a table with a head line, with id, video, question and, if it is known, answer:

  {"id": "7", "video": "kitchen/001.mp4", "question": "What is on the table?", "answer": "a cup"}

Answers are lines of JSON in OUT, in the order in which they come: the first line says under which settings, every
other is one question with its answer or error, the tokens kept of each frame, and seconds. Run the same command again
to go on where a run ended, whatever ended it: each question is answered once. Other settings are refused.

The exit code is 0 when every question has an answer, 1 when some have none (they are counted and told), 2 for a mistake
in the command, 130 when interrupted.
"""


def add_video_qa(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser; `add` is that of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = add("video-qa", help="answer questions about clips, in batches", epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("questions", nargs="?", help="a .jsonl or .csv file (default: about the bundled clip)")
    parser.add_argument("--videos", metavar="DIR", help="where the clips lie (default: beside the questions)")
    parser.add_argument(
        "--out",
        metavar="OUT.jsonl",
        help="append answers here, and go on from what is there; needed with questions of your own",
    )
    parser.add_argument("--csv", metavar="OUT.csv", help="at the end, all answers as a table")
    parser.add_argument("--model", default=_TINY, help="tiny:NAME, a directory or a hub id (default: %(default)s)")
    _add_pruning(parser)
    _add_frames(parser)
    _add_running(parser)
    parser.set_defaults(command=_video_qa)


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument("--method", default="vtprune", help="a name from `vtprune methods` (default: %(default)s)")
    group.add_argument("--keep", help="share (0.25) or number (64) of the tokens of a clip (default: 0.25)")
    group.add_argument("--per", choices=("image", "part", "prompt"), default="image", help="what --keep applies to")
    group.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    group.add_argument("--positions", choices=("auto", "compact", "keep"), default="auto", help="what becomes of ids")
    group.add_argument("--backend", choices=("auto", "torch", "triton"), default="auto", help="what kernels run on")
    add_attention(group)
    group.add_argument(
        "--scoring",
        default="yes",
        metavar="HOW",
        help="of frames, for quota and --sampling question: yes (how surely the model sees in a frame what is asked "
        "about), change (between frames, no text), open_clip:ARCHITECTURE:WEIGHTS, or a CLIP by directory or hub id "
        "(default: %(default)s)",
    )
    group.add_argument("--ask-things", action="store_true", help="let the model itself say what to look for in frames")


def _add_frames(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("frames")
    group.add_argument("--frames", type=int, default=8, help="of each clip, at most (default: %(default)s)")
    group.add_argument(
        "--sampling",
        choices=("uniform", "scenes", "question"),
        default="uniform",
        help="evenly in time, the middle of each scene, or the best by --scoring of four times as many "
        "(default: %(default)s)",
    )
    group.add_argument("--fps", type=float, help="so many a second, --frames at most (uniform sampling only)")
    group.add_argument(
        "--reader", choices=("auto", "pyav", "decord", "torchcodec"), default="auto", help="what decodes"
    )
    group.add_argument("--timeout", type=float, default=60.0, help="seconds to decode a clip (default: %(default)s)")
    group.add_argument("--strict", action="store_true", help="truncated files are errors, not warnings")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--batch", type=int, default=8, help="questions answered at once (default: %(default)s)")
    group.add_argument("--max-new-tokens", type=int, help="longest answer (default: 3 for a tiny model, else 64)")
    group.add_argument("--instruction", default="", metavar="TEXT", help='put behind each question ("One word only.")')
    group.add_argument("--limit", type=int, help="only the first so many questions")
    group.add_argument("--retry-errors", action="store_true", help="answer again what ended in an error")
    group.add_argument("--decoders", type=int, help="processes that decode ahead (default: 1)")
    group.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: %(default)s)")
    group.add_argument("--threads", type=int, help="threads of one operation on the CPU (default: as torch decides)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or a Ray cluster")
    group.add_argument("--replicas", type=int, help="models at work, at most, with --engine ray (default: 1)")


def _video_qa(options: argparse.Namespace, console: Console) -> int:
    _check(options)
    questions, malformed = _questions(options)
    for bad in malformed:
        options.trouble.print(f"line {bad.line} of {options.questions}: {bad.reason}", markup=False, style="yellow")
    with options.trouble.status("importing torch and transformers"):
        task = _task(options)
    with _out(options) as out:
        counts, records = _answer(options, task, questions, out)
        found = [records[question.id] for question in questions if question.id in records]
        if options.out is None or options.questions is None:
            console.print(shown.answer_table(found[: shown.FEW]))
        shown.tell(counts, found, len(malformed), console)
        if options.out is not None:
            console.print(f"answers in {options.out}", markup=False, soft_wrap=True)
        write_outputs({"table saved to": (options.csv, lambda path: shown.write_csv(found, path))}, console)
    return 1 if malformed or any(record.error is not None for record in found) else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything heavy, what can be refused by then; file names become paths."""
    least = {
        "frames": 1,
        "batch": 1,
        "max_new_tokens": 1,
        "limit": 1,
        "decoders": 1,
        "seed": 0,
        "replicas": 1,
        "threads": 1,
    }
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise InvalidOption(f"--{name.replace('_', '-')} {value}: expected {low} or more")
    for name, engine in (("replicas", "ray"), ("decoders", "local"), ("threads", "local")):
        value = getattr(options, name)
        if value is not None and options.engine != engine:
            raise InvalidOption(f"--{name} {value}: expected --engine {engine} with it")
    if not 0 < options.timeout < float("inf"):
        raise InvalidOption(f"--timeout {options.timeout}: expected seconds above 0")
    if options.fps is not None and (options.sampling != "uniform" or not 0 < options.fps < float("inf")):
        raise InvalidOption(f"--fps {options.fps}: expected a number above 0, with --sampling uniform")
    options.keep = None if options.keep is None else share_or_number(options.keep)
    check_files(options, ("questions", "videos", "calibration"), ("out", "csv"))
    if options.questions is None and options.videos is not None:
        raise InvalidOption("--videos without a file of questions: expected both, or none for the bundled clip")
    if options.questions is not None and not options.questions.is_file():
        raise InvalidOption(f"no file of questions at {options.questions}")
    if options.questions is not None and options.out is None:
        raise InvalidOption("--out is missing: expected the name of a file for the answers, for example answers.jsonl")
    if options.videos is not None and not options.videos.is_dir():
        raise InvalidOption(f"--videos {options.videos}: there is no such directory")


def _questions(options: argparse.Namespace) -> tuple[tuple[Question, ...], tuple[Malformed, ...]]:
    from vtprune.tiny.bundled_clip import QUESTIONS
    from vtprune.video.questions import read_questions

    path: Path = options.questions or QUESTIONS
    options.videos = options.videos or path.absolute().parent
    questions, malformed = read_questions(path)
    return questions[: options.limit], malformed


def _task(options: argparse.Namespace) -> Task:
    import torch

    from vtprune.catalog import build
    from vtprune.types import Budget
    from vtprune.video.task import CANDIDATES, Task

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    check_debias(options.debias)
    parameters = parameters_of(options.set)
    keep = options.keep if options.keep is not None else 0.25 if build(options.method, parameters).drops else 1.0
    Budget(keep=keep, per=options.per)
    by_question = options.sampling == "question"
    names = ("model", "method", "per", "positions", "backend", "debias", "scoring", "reader", "timeout", "instruction")
    return Task(
        **{name: getattr(options, name) for name in names},
        **{name: getattr(options, name) for name in ("batch", "seed", "device")},
        parameters=parameters,
        keep=keep,
        calibration=None if options.calibration is None else str(options.calibration),
        sampling=_sampling(options, CANDIDATES if by_question else 1),
        best=options.frames if by_question else None,
        asked=options.ask_things,
        on_truncated="raise" if options.strict else "warn",
        max_new_tokens=options.max_new_tokens or (3 if options.model.startswith("tiny:") else 64),
    )


def _sampling(options: argparse.Namespace, times: int) -> Sampling:
    from vtprune.video.sampling import ByRate, Scenes, Uniform

    if options.fps is not None:
        return ByRate(options.fps, options.frames)
    return Scenes(options.frames) if options.sampling == "scenes" else Uniform(options.frames * times)


def _answer(
    options: argparse.Namespace, task: Task, questions: Sequence[Question], out: Path
) -> tuple[Counts, dict[str, Record]]:
    ray = options.engine == "ray"
    with options.trouble.status("starting Ray" if ray else f"loading {task.model}"):
        if ray:
            from vtprune.video.ray_engine import answer_with_ray, start

            start()
            answer: Any = functools.partial(answer_with_ray, replicas=options.replicas or 1)
        else:
            from vtprune.video.qa import answer_questions

            answer = functools.partial(answer_questions, decoders=options.decoders or 1, answerer=task.load())
    with shown.progress_bar(options.trouble) as progress:
        bar = progress.add_task("questions", total=len(questions), failed="")

        log = shown.Log(options.trouble)

        def show(counts: Counts, records: Sequence[Record]) -> None:
            told = f"{counts.failed} failed" if counts.failed else ""
            done = counts.answered + counts.failed
            progress.update(bar, total=counts.total - counts.before, completed=done, failed=told)
            log.tell(counts)

        try:
            found: tuple[Counts, dict[str, Record]] = answer(
                task, questions, options.videos, out, retry=options.retry_errors, on_records=show
            )
        except KeyboardInterrupt:
            options.trouble.print(f"{log.line()}; the same command goes on from there", markup=False)
            raise
        return found


class _out:
    """The file of answers; where none was named, one that is gone behind the block."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._named: Path | None = options.out

    def __enter__(self) -> Path:
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        return self._named or Path(self._folder.name) / "answers.jsonl"

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()
