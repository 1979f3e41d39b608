"""What the command line shows and asks: tables and answers. Only `cli` imports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtprune._loading import choose_device as choose_device
from vtprune._loading import explained, is_local
from vtprune._loading import load_model as load_model
from vtprune._loading import quiet_transformers as quiet_transformers
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from vtprune.report import PruneReport

REPEATS = 5
_SLOW = 1.0
_NARROW = 120
PARTS = ("encode", "layout", "select", "cut", "prefill")


def model_skeleton(source: str) -> Any:
    """The model without weights, on the meta device: enough to see what can be pruned."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vtprune.tiny.loading import tiny_folder

    folder = str(tiny_folder(source.removeprefix("tiny:"))) if source.startswith("tiny:") else source
    local = is_local(folder)
    with explained(f"cannot read the config of {source!r}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=local)
        return AutoModelForImageTextToText.from_config(config)


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
