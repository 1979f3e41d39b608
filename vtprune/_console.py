"""What the command line shows and reads: tables, models and pictures. Only `cli` imports it."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InvalidOption, VtpruneError

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from vtprune.report import PruneReport

MAX_PIXELS = 50_000_000
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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
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
    except Exception as error:
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


def read_picture(path: Path) -> Image.Image:
    """An RGB picture from a file; raises `InvalidOption` for anything else, and for one too large to be decoded."""
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise InvalidOption(f"no picture at {path}")
    if not path.is_file():
        raise InvalidOption(f"{path} is not a file: expected one picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise InvalidOption(_too_large(path, f"{width} x {height} pixels"))
                return picture.convert("RGB")
    except Image.DecompressionBombError as error:
        raise InvalidOption(_too_large(path, "an enormous picture")) from error
    except UnidentifiedImageError as error:
        raise InvalidOption(f"{path} is not a picture that Pillow can read") from error
    except (OSError, EOFError, SyntaxError, ValueError, struct.error) as error:
        if isinstance(error, VtpruneError):
            raise
        raise InvalidOption(f"cannot read the picture {path}: {error}") from error


def _too_large(path: Path, size: str) -> str:
    return f"{path} holds {size}: at most {MAX_PIXELS / 1e6:.0f} megapixels are read, scale it down first"


def build_inputs(processor: Any, picture: Image.Image, prompt: str, model: Any) -> Any:
    """What the processor makes of one picture and one question, by the chat template where there is one."""
    token = getattr(processor, "image_token", None) or "<image>"
    with explained("the processor does not take this prompt and picture"):
        if token in prompt:
            text = prompt
        elif getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            chat = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        else:
            text = f"{token}\n{prompt}"
        return processor(images=picture, text=text, return_tensors="pt").to(model.device, model.dtype)


class Asker:
    """Greedy answers of one model to one prompt under different prunings."""

    def __init__(self, model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> None:
        self._model, self._processor, self._inputs = model, processor, inputs
        self._length = max_new_tokens

    def __call__(self, method: str, **options: Any) -> tuple[str, PruneReport]:
        """The answer and its report; one token is generated before, so that times are not those of a cold start."""
        import vtprune

        with vtprune.pruning(self._model, method, **options) as pruner:
            self._generate(1)
            written = self._generate(self._length)
            report = pruner.last
        assert report is not None
        new = written[:, self._inputs["input_ids"].shape[1] :]
        return self._processor.batch_decode(new, skip_special_tokens=True)[0].strip(), report

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
    table.add_column("")
    table.add_column("all tokens", justify="right", overflow="fold")
    table.add_column(f"{short.method}", justify="right", overflow="fold")
    table.add_row("answer", Text(full_answer or "(empty)"), Text(short_answer or "(empty)"))
    table.add_row("visual tokens", str(full.kept), f"{short.kept} of {short.tokens}")
    if short.separators:
        table.add_row("separator tokens", str(full.separators), str(short.separators))
    table.add_row("prompt length", str(sum(full.length_after)), str(sum(short.length_after)))
    table.add_row("KV cache saved", mebibytes(full.kv_bytes_saved), mebibytes(short.kv_bytes_saved))
    full_seconds, short_seconds = full.seconds, short.seconds
    for part in PARTS:
        cells = [milliseconds(seconds, part) for seconds in (full_seconds, short_seconds)]
        table.add_row(f"{part} [dim]ms[/dim]", *cells)
    return table


def milliseconds(seconds: Mapping[str, float], part: str) -> str:
    """One part of a report's seconds."""
    return f"{1000 * seconds[part]:.1f}" if part in seconds else "-"


def mebibytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.2f} MiB" if count else "-"


METHOD_COLUMNS = ("method", "what it does", "source", "needs", "parameters")
FAMILY_COLUMNS = ("family", "model types", "inputs", "notes", "tested on")


def method_rows() -> list[tuple[str, ...]]:
    """One row per method."""
    from vtprune.catalog import describe, list_methods

    rows: list[tuple[str, ...]] = []
    for name in list_methods():
        card = describe(name)
        parameters = ", ".join(f"{key}={value!r}" for key, value in card.parameters.items()) or "-"
        rows.append((name, card.summary.rstrip("."), card.source, ", ".join(card.needs) or "features only", parameters))
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


def as_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a README; the first cell of a row in code style."""
    lines = [columns, ["---"] * len(columns), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
