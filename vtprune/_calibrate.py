"""The command `vtprune calibrate`. Only `cli` imports it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune._arguments import check_writable, versions
from vtprune.errors import InvalidOption

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

_FEW = 32
_EXAMPLES = """Methods that cut between decoder layers go by attention, and that favours late tokens, shifts at some
layers, and fades. This measures a model once: the trend of attention over a picture in every layer (for debias=True),
the layers where it shifts most (for adaptinfer), and the layer from which on answers need no picture any more (for
information_horizon).

  vtprune calibrate                                                 the bundled model, on drawn scenes
  vtprune calibrate --model ./my-llava --data questions.jsonl --out my-llava.json

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
    parser.add_argument("--batch", type=int, default=16, help="questions at once (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace, console: Console) -> None:
    if options.samples < 1 or options.batch < 1:
        raise InvalidOption("--samples and --batch: expected 1 or more")
    out = Path(options.out)
    check_writable(out)
    questions, data = _drawn(options.samples) if options.data is None else _read(Path(options.data), options.samples)
    from rich.progress import Progress

    from vtprune._console import choose_device, load_model, quiet_transformers
    from vtprune._prompts import prompt_text
    from vtprune.eval.calibrating import calibrate, steps_of

    quiet_transformers()
    model, processor = load_model(options.model, choose_device(options.device))

    def made(first: int) -> dict[str, Any]:
        own = questions[first : first + options.batch]
        inputs = processor(
            images=[picture for picture, _ in own],
            text=[prompt_text(processor, question) for _, question in own],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        moved: dict[str, Any] = inputs.to(model.device, model.dtype)
        return moved

    batches = [lambda first=first: made(first) for first in range(0, len(questions), options.batch)]
    depth = model.config.get_text_config().num_hidden_layers
    with Progress(console=options.trouble) as progress:
        task = progress.add_task("calibrating", total=steps_of(depth, len(batches)))
        found = calibrate(
            model,
            batches,
            name=options.model,
            data=data,
            versions=versions(),
            decode=lambda tokens: processor.batch_decode(tokens, skip_special_tokens=True),
            on_step=lambda: progress.advance(task),
        )
        progress.update(task, completed=steps_of(depth, len(batches)))
    found.write(out)
    if found.pictures < _FEW:
        console.print(f"{found.pictures} pictures are few: trends, layers and horizon are rough", soft_wrap=True)
    last = [f"{trend.exponential[0]:.2f}" for trend in found.trends if trend.rows == "last"]
    console.print(f"trend of the last token, layer by layer, exp(k u) with k = {', '.join(last)}", soft_wrap=True)
    shifts = ", ".join(map(str, found.inflections)) or "none"
    console.print(f"attention shifts in front of layers {shifts}", soft_wrap=True)
    console.print(f"answers need no picture from layer {found.horizon} on" if found.horizon else "no horizon found")
    console.print(f"saved to {out}", markup=False, soft_wrap=True)


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
