"""What the command line shows and loads: tables and models. Only `cli` imports it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InvalidOption, VtpruneError

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from vtprune.report import PruneReport

REPEATS = 5
_SLOW = 1.0
_NARROW = 120
PARTS = ("encode", "layout", "select", "cut", "prefill")


def quiet_transformers() -> None:
    """Only errors of transformers on the terminal, and no progress bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def choose_device(requested: str) -> Any:
    """The torch device; `auto` is a GPU where there is one. Raises `InvalidOption` for one that is not there."""
    import torch

    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise InvalidOption(f"--device {requested}: no such device; expected auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "meta":
        raise InvalidOption("--device meta: not usable here (it holds no numbers); try --device cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...")
        raise InvalidOption(f"--device {requested}: not usable here ({reason}); try --device cpu") from error
    return device


def load_model(source: str, device: Any) -> tuple[Any, Any]:
    """Model and processor from `tiny:NAME`, a directory or a hub id."""
    from vtprune._torchvision import heal
    from vtprune.tiny import load_tiny

    if source.startswith("tiny:"):
        model, processor = load_tiny(source.removeprefix("tiny:"))
        return model.to(device), processor
    local = _is_local(source)
    heal()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with explained(f"cannot load {source!r}"):
        processor = AutoProcessor.from_pretrained(source, local_files_only=local)
        model = AutoModelForImageTextToText.from_pretrained(source, local_files_only=local, dtype="auto")
        return model.to(device).eval(), processor


def model_skeleton(source: str) -> Any:
    """The model without weights, on the meta device: enough to see what can be pruned."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vtprune.tiny.loading import tiny_folder

    folder = str(tiny_folder(source.removeprefix("tiny:"))) if source.startswith("tiny:") else source
    local = _is_local(folder)
    with explained(f"cannot read the config of {source!r}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=local)
        return AutoModelForImageTextToText.from_config(config)


def _is_local(source: str) -> bool:
    """True for a directory; False for a hub id that is cached or can be reached, and a `VtpruneError` for neither."""
    if Path(source).is_dir():
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise VtpruneError(f"cannot load {source!r}: there is no such directory")
    import huggingface_hub

    with explained(f"cannot load {source!r}"):
        if isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
            return False
    try:
        # One request without retries: a missing network would otherwise be told after minutes.
        huggingface_hub.model_info(source, timeout=10)
    except Exception as error:  # the client's own errors have no common base, and differ between its versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VtpruneError(
            f"cannot load {source!r}: no such directory, not in the hub's cache here, and the hub says: {reason}"
        ) from error
    return False


class explained:
    """Turn what loaders and processors raise into a `VtpruneError` of one line."""

    def __init__(self, trouble: str) -> None:
        self._trouble = trouble

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError, IndexError)
        if isinstance(error, expected) and not isinstance(error, VtpruneError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else type(error).__name__
            raise VtpruneError(f"{self._trouble}: {reason}") from error


def build_inputs(processor: Any, picture: Image.Image, prompt: str, model: Any) -> Any:
    """What the processor makes of one picture and one question, by the chat template where there is one."""
    from vtprune._prompts import prompt_text

    with explained("the processor does not take this prompt and picture"):
        text = prompt_text(processor, prompt)
        return processor(images=picture, text=text, return_tensors="pt").to(model.device, model.dtype)


class Asker:
    """Greedy answers of one model to one prompt under different prunings, timed."""

    def __init__(self, model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> None:
        self._model, self._processor, self._inputs = model, processor, inputs
        self._length = max_new_tokens
        self.repeats: int | None = None

    def __call__(self, method: str, **options: Any) -> tuple[str, PruneReport]:
        """The answer and the report of its fastest prefill, after one that only warms up.

        The first call settles how often: `REPEATS` times, or twice where one prefill takes long.
        """
        import vtprune

        with vtprune.pruning(self._model, method, **options) as pruner:
            self._generate(1)
            written = self._generate(self._length)
            assert pruner.last is not None
            reports = [pruner.last]
            if self.repeats is None:
                self.repeats = REPEATS if total_seconds(pruner.last) < _SLOW else 2
            while len(reports) < self.repeats:
                self._generate(1)
                reports.append(pruner.last)
        new = written[:, self._inputs["input_ids"].shape[1] :]
        answer = self._processor.batch_decode(new, skip_special_tokens=True)[0].strip()
        return answer, min(reports, key=total_seconds)

    def _generate(self, length: int) -> Any:
        import torch

        try:
            return self._model.generate(**self._inputs, max_new_tokens=length, do_sample=False)
        except torch.OutOfMemoryError as error:
            raise VtpruneError("out of memory: try a smaller picture or model, or --device cpu") from error


def run_table(before: tuple[str, PruneReport], after: tuple[str, PruneReport]) -> Table:
    """Answer, tokens and milliseconds of an unpruned and a pruned run, side by side."""
    from rich.table import Table
    from rich.text import Text

    (full_answer, full), (short_answer, short) = before, after
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("all tokens", justify="right", overflow="fold")
    table.add_column(f"{short.method}", justify="right", overflow="fold")
    table.add_row("answer", Text(full_answer or "(empty)"), Text(short_answer or "(empty)"))
    table.add_row("visual tokens", str(full.kept), f"{short.kept} of {short.tokens}")
    if short.separators:
        table.add_row("separator tokens", str(full.separators), str(short.separators))
    table.add_row("prompt length", str(sum(full.length_after)), str(sum(short.length_after)))
    table.add_row("KV cache saved", mebibytes(full.kv_bytes_saved), mebibytes(short.kv_bytes_saved))
    table.add_row("kernels", "", Text(short.backend))
    timed = [part_seconds(report) for report in (full, short)]
    for part in PARTS:
        table.add_row(f"{part} [dim]ms[/dim]", *(milliseconds(seconds.get(part)) for seconds in timed))
    table.add_row("total [dim]ms[/dim]", *(milliseconds(sum(seconds.values())) for seconds in timed))
    return table


def part_seconds(report: PruneReport) -> dict[str, float]:
    """Seconds of what a method does; `identity` chooses nothing and cuts nothing."""
    idle = ("select", "cut") if report.method == "identity" else ()
    return {part: seconds for part, seconds in report.seconds.items() if part in PARTS and part not in idle}


def total_seconds(report: PruneReport) -> float:
    """Seconds from the picture to the first token, as far as they are measured."""
    return sum(part_seconds(report).values())


def milliseconds(seconds: float | None) -> str:
    """Seconds for people; a dash for what was not done."""
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def mebibytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.2f} MiB"


METHOD_COLUMNS = ("method", "what it does", "cuts", "source", "needs", "parameters")
FAMILY_COLUMNS = ("family", "model types", "inputs", "notes", "tested on")


def method_rows() -> list[tuple[str, ...]]:
    """One row per method."""
    from vtprune.catalog import describe, list_methods

    rows: list[tuple[str, ...]] = []
    for name in list_methods():
        card = describe(name)
        parameters = ", ".join(f"{key}={value!r}" for key, value in card.parameters.items()) or "-"
        rows.append((name, card.summary.rstrip("."), card.where, card.source, card.reads, parameters))
    return rows


def family_rows() -> list[tuple[str, ...]]:
    """One row per family."""
    from vtprune.adapters import FAMILIES

    return [
        (
            name,
            ", ".join(family.model_types) or "any other with the seam",
            ", ".join(family.kinds),
            family.notes or "-",
            family.tested,
        )
        for name, family in FAMILIES.items()
    ]


def as_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table for a terminal of that width; where it is narrow, all but the name stand below each other."""
    from rich.table import Table
    from rich.text import Text

    narrow = width < _NARROW
    table = Table(header_style="bold", box=None, pad_edge=False, show_header=not narrow)
    table.add_column(columns[0], no_wrap=True)
    for column in ["about"] if narrow else columns[1:]:
        table.add_column(column, overflow="fold")
    for name, *cells in rows:
        if narrow:
            lines = zip(columns[1:], cells, strict=True)
            cells = ["\n".join(f"{column}: {cell}" for column, cell in lines)]
        table.add_row(Text(name, style="bold" if narrow else ""), *(Text(cell) for cell in cells))
    return table


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a README; the first cell of a row in code style."""
    lines = [columns, ["---"] * len(columns), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
