"""What all benchmarks note: the state of the checkout, and rows that are added to a CSV file."""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).resolve().parent
INTERRUPTED = 130
MEASURED, NOT_MEASURED = "yes", "not measured"
_CIRCUMSTANCES = ("measured", "torch", "transformers", "commit")

# The folder of a script is where Python looks first, and transformers asks whether there is a package called `kernels`:
# it would import the benchmark of that name. None says that there is no such module.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; neither Ctrl-C nor a mistake of the user ends it with a traceback."""
    from vtprune.errors import VtpruneError

    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except VtpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def commit() -> str:
    """Short hash of the checkout, with a mark where it has changes; the version where it is installed instead."""
    if HERE.name == "_benchmarks":
        import vtprune

        return f"v{vtprune.__version__}"
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def machine(device: str) -> dict[str, str]:
    """What a row of times needs to be read: the clock, the device, the versions and the checkout."""
    return {
        "clock": "cuda events" if device == "cuda" else "process CPU time",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def csv_path(text: str) -> Path:
    """The file that rows go to, as the type of an option; its folder is made now, before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror or error}") from error
    return path


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to `path`, under a header where it is new.

    Where they have columns that the file lacks, it is written anew with the columns of both; what is not known is
    empty. A row that says that something was not measured is left out where the file has it already, and goes where
    one comes that was.
    """
    before, columns = _read(path)
    asked = {_question(row) for row in before if _is_open(row)}
    rows = [row for row in rows if not _is_open(row) or _question(row) not in asked]
    if not rows:
        return
    answers = [_question(row) for row in rows if not _is_open(row)]
    old = [row for row in before if not _is_open(row) or not any(_question(row) <= answer for answer in answers)]
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    if names == columns and len(old) == len(before):
        with path.open("a", newline="") as file:
            csv.DictWriter(file, names, restval="").writerows(rows)
        return
    anew = path.with_name(path.name + ".new")
    with anew.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows([*old, *rows])
    os.replace(anew, path)


def _read(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a file and its columns, none of either where there is no file."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if any(None in row for row in rows):
        raise SystemExit(f"{path}: a row has more cells than the header has names; move the file away or mend it")
    return rows, list(reader.fieldnames or ())


def _is_open(row: Mapping[str, Any]) -> bool:
    """Whether a row says that something was not measured."""
    return row.get("measured") == NOT_MEASURED


def _question(row: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """What a row tells besides when, with what versions and whether it was measured: more, where it was."""
    told = ((name, "" if value is None else str(value)) for name, value in row.items())
    return frozenset(pair for pair in told if pair[1] and pair[0] not in _CIRCUMSTANCES)
