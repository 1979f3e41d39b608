"""Arguments that several commands share: numbers, and files to write."""

from __future__ import annotations

import argparse
import ast
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune._loading import versions as versions
from vtprune.errors import InvalidOption

if TYPE_CHECKING:
    from rich.console import Console


def share_or_number(text: str) -> float | int:
    """A share as a float, or a number of tokens as an int. Raises `InvalidOption` for anything else."""
    try:
        if not text.isascii() or "_" in text:
            raise ValueError
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise InvalidOption(f"--keep {text}: expected a share such as 0.25 or a number of tokens such as 64") from None


def parameters_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is a Python literal, or else text."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidOption(f"--set {pair}: expected NAME=VALUE, for example --set lam=0.3")
        if name in parameters:
            raise InvalidOption(f"--set {name} is given twice")
        try:
            parameters[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parameters[name] = text
    return parameters


def add_attention(parser: argparse._ActionsContainer, *, then: str = "") -> None:
    """The options `--debias` and `--calibration`; `then` tells what more becomes of them."""
    parser.add_argument(
        "--debias",
        metavar="NAME",
        help="take off attention what is there for other reasons than the question: recency (late tokens), cubic (the "
        "same, of another form), sinks (a few tokens far above all), padding (bars at the edges), trend (of rows and "
        "columns)" + then,
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="a file of `vtprune calibrate` for this model: trends for --debias between decoder layers, layers for "
        "adaptinfer and information_horizon, shares for vflowopt" + then,
    )


def check_debias(name: str | None) -> None:
    """Raise `InvalidOption` for what `--debias` does not know."""
    from vtprune.debiasing import DEBIASERS

    if name is not None and name not in DEBIASERS:
        raise InvalidOption(f"--debias {name}: expected one of {', '.join(DEBIASERS)}")


def check_files(options: argparse.Namespace, reads: Sequence[str], writes: Sequence[str]) -> None:
    """File names become paths; refuses one that is empty, one that stands under two options, and outputs that cannot be
    written."""
    found: dict[str, str] = {}
    for name in (*reads, *writes):
        text, flag = getattr(options, name), name.replace("_", "-")
        if text is None:
            continue
        if not text.strip():
            raise InvalidOption(f"--{flag} is empty: expected the name of a file")
        same = next((other for known, other in found.items() if _same_file(known, text)), None)
        if same is not None:
            raise InvalidOption(f"--{flag} {text}: this is the file of --{same}, expected another one")
        found[text] = flag
        setattr(options, name, Path(text))
    for name in writes:
        if getattr(options, name) is not None:
            check_writable(getattr(options, name))


def _same_file(one: str, other: str) -> bool:
    """By its name, or where both are there as the system says: hard links are the same file too."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def check_writable(path: Path) -> None:
    """Refuse an output that cannot be written; what is there stays as it is."""
    try:
        if path.is_dir():
            raise InvalidOption(f"cannot write {path}: it is a directory")
        if not path.absolute().parent.is_dir():
            raise InvalidOption(f"cannot write {path}: there is no directory {path.parent}")
        if path.is_file():
            with path.open("ab"):
                pass
        elif not path.exists():  # not made and removed again: another run may have begun to write it by then
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                pass
    except OSError as error:
        raise InvalidOption(f"cannot write {path}: {error.strerror or error}") from error


def write_outputs(writers: Mapping[str, tuple[Path | None, Callable[[Path], object]]], console: Console) -> None:
    """Write every output that was asked for, whatever becomes of the others; keys tell what was done.

    Raises:
        InvalidOption: naming all that could not be written.
    """
    troubles: list[str] = []
    for done, (path, write) in writers.items():
        if path is None:
            continue
        try:
            write(path)
            console.print(f"{done} {path}", markup=False, soft_wrap=True)
        except OSError as error:
            troubles.append(f"cannot write {path}: {error.strerror or error}")
        except InvalidOption as error:
            troubles.append(str(error))
    if troubles:
        raise InvalidOption("; ".join(troubles))
