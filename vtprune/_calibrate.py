"""The command `vtprune calibrate`. Only `cli` imports it."""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune._arguments import check_writable, share_or_number, versions
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedModel

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from vtprune.calibration import Calibration

_TRIALS = 24
_EXAMPLES = """Methods that cut between decoder layers go by attention, and that favours late tokens, shifts at some
layers, and fades. This measures a model once: the trend of attention over a picture in every layer (for debias=True),
the layers where it shifts most (for adaptinfer), and the layer from which on answers need no picture any more (for
information_horizon). For vflowopt it searches, at each --keep, the shares, the threshold and the recycled share whose
last hidden state is most like that of the unpruned model; the published ones are tried first.

  vtprune calibrate                                                 the bundled model, on drawn scenes
  vtprune calibrate --model ./my-llava --data questions.jsonl --out my-llava.json
  vtprune calibrate --keep 0.5 0.25 0.1 --trials 48                 three budgets, more trials for each
  vtprune run --method vflowopt --calibration calibration.json      what was found, in use

In Python: vtprune.wrap(model, "fastv", debias=True, calibration="my-llava.json"). A line of questions.jsonl is
{"image": "a path beside the file", "question": "..."}.
"""


def add_calibrate(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser; `add` is that of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = add("calibrate", help="measure a model for cuts between layers", epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument(
        "--model", default="tiny:llava", help="tiny:NAME, a directory or a hub id (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="IN.jsonl", help="pictures and questions (default: drawn scenes)")
    parser.add_argument("--samples", type=int, default=64, help="at most so many questions (default: %(default)s)")
    parser.add_argument("--out", default="calibration.json", metavar="OUT.json", help="default: %(default)s")
    parser.add_argument(
        "--keep",
        nargs="+",
        default=("0.25",),
        metavar="SHARE",
        help="averages to search settings of vflowopt for (default: 0.25)",
    )
    parser.add_argument("--trials", type=int, help=f"settings tried for each, 0 for no search (default: {_TRIALS})")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="questions at once (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace, console: Console) -> None:
    if options.samples < 1 or options.batch < 1:
        raise InvalidOption("--samples and --batch: expected 1 or more")
    if options.seed < 0 or (options.trials or 0) < 0:
        raise InvalidOption("--seed and --trials: expected 0 or more")
    options.keeps = _shares(options.keep)
    out = Path(options.out)
    check_writable(out)
    questions, data = _drawn(options.samples) if options.data is None else _read(Path(options.data), options.samples)
    from vtprune._console import choose_device, load_model, quiet_transformers

    quiet_transformers()
    model, processor = load_model(options.model, choose_device(options.device))
    trials = _trials(options, model)
    found = _measured(options, model, _batches(options.batch, questions, model, processor), data, processor, trials)
    found.write(out)
    _tell(found, console)
    console.print(f"saved to {out}", markup=False, soft_wrap=True)


def _shares(texts: Sequence[str]) -> list[float]:
    """The averages to search for. Raises `InvalidOption` for what is no share below 1."""
    found = [share_or_number(text) for text in texts]
    for keep in found:
        if not isinstance(keep, float) or not 0 < keep < 1:
            raise InvalidOption(f"--keep {keep}: expected a share of the tokens above 0 and below 1, such as 0.25")
    return [float(keep) for keep in dict.fromkeys(found)]


def _trials(options: argparse.Namespace, model: Any) -> int:
    """How many settings to try: none where the model does not bear the method, unless somebody asked for them."""
    from vtprune.eval.schedules import METHOD, check_search

    asked: int = _TRIALS if options.trials is None else options.trials
    try:
        if asked:
            check_search(model, options.keeps)
    except (MissingEvidence, UnsupportedModel) as error:
        if options.trials is not None:
            raise
        warnings.warn(f"no settings of {METHOD} are searched: {error}", stacklevel=1)
        return 0
    return asked


def _batches(
    size: int, questions: Sequence[tuple[Image.Image, str]], model: Any, processor: Any
) -> list[Callable[[], dict[str, Any]]]:
    """What makes the inputs of so many questions at once."""
    from vtprune._prompts import prompt_text

    def made(first: int) -> dict[str, Any]:
        own = questions[first : first + size]
        inputs = processor(
            images=[picture for picture, _ in own],
            text=[prompt_text(processor, question) for _, question in own],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        moved: dict[str, Any] = inputs.to(model.device, model.dtype)
        return moved

    return [functools.partial(made, first) for first in range(0, len(questions), size)]


def _measured(
    options: argparse.Namespace, model: Any, batches: list[Any], data: str, processor: Any, trials: int
) -> Calibration:
    """The calibration, with a bar while it is made."""
    from rich.progress import Progress

    from vtprune.eval.calibrating import calibrate, steps_of

    depth = model.config.get_text_config().num_hidden_layers
    steps = steps_of(depth, len(batches), searches=len(options.keeps), trials=trials)
    with Progress(console=options.trouble) as progress:
        task = progress.add_task("calibrating", total=steps)
        found = calibrate(
            model,
            batches,
            name=options.model,
            data=data,
            versions=versions(),
            decode=lambda tokens: processor.batch_decode(tokens, skip_special_tokens=True),
            keeps=options.keeps,
            trials=trials,
            seed=options.seed,
            on_step=lambda: progress.advance(task),
        )
        progress.update(task, completed=steps)
    return found


def _tell(found: Calibration, console: Console) -> None:
    """What was measured, for people."""
    if found.few:
        few = f"{found.pictures} pictures are few: trends, layers, horizon and settings are rough"
        console.print(few, soft_wrap=True)
    last = [f"{trend.exponential[0]:.2f}" for trend in found.trends if trend.rows == "last"]
    console.print(f"trend of the last token, layer by layer, exp(k u) with k = {', '.join(last)}", soft_wrap=True)
    shifts = ", ".join(map(str, found.inflections)) or "none"
    console.print(f"attention shifts in front of layers {shifts}", soft_wrap=True)
    console.print(f"answers need no picture from layer {found.horizon} on" if found.horizon else "no horizon found")
    for setting in found.settings:
        parameters = ", ".join(f"{name}={value}" for name, value in setting.parameters.items())
        told = (
            f"vflowopt, keep {setting.keep:g}: cosine {setting.published:.4f} as published, {setting.cosine:.4f} with"
        )
        console.print(f"{told} {parameters}", markup=False, soft_wrap=True)


def _drawn(samples: int) -> tuple[list[tuple[Image.Image, str]], str]:
    """Questions about drawn development scenes."""
    from PIL import Image

    from vtprune.eval.questions import draw_items

    items = draw_items("dev", 0, samples)[:samples]
    return [(Image.fromarray(item.views[0].pixels), item.question.text) for item in items], "drawn scenes, split dev"


def _read(path: Path, samples: int) -> tuple[list[tuple[Image.Image, str]], str]:
    """Pictures and questions of a JSON lines file.

    Raises:
        InvalidOption: naming the line that makes no sense.
    """
    from vtprune._pictures import read_picture

    found: list[tuple[Image.Image, str]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"--data {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if len(found) == samples or not line.strip():
            continue
        try:
            data = json.loads(line)
            found.append((read_picture(path.parent / data["image"]), str(data["question"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidOption(f"--data {path}, line {number}: expected an image and a question ({error})") from error
    if not found:
        raise InvalidOption(f"--data {path}: no questions in it")
    return found, path.name
