"""What all benchmarks note: the state of the checkout, and rows that are added to a CSV file."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def commit() -> str:
    """Short hash of the checkout, with a mark where it has changes."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def machine(device: str) -> dict[str, str]:
    """What a row of times needs to be read: the clock, the device, the versions and the checkout."""
    return {
        "clock": "cuda events" if device == "cuda" else "process CPU time",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to `path`, under a header where it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
