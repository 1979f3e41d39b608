"""The command `vtprune bench`. Only `cli` imports it."""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import InvalidOption, VtpruneError

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS = ("benchmark", "what it measures", "rows")
_SHARED = "recording.py"
_NOT_MEASURED = "not measured"
_PATIENCE = 1.0
"""Seconds that an interrupted benchmark has to end: by itself first, then told so, then told for good."""
_TELLING = (None, signal.SIGTERM) if os.name == "nt" else (None, signal.SIGINT, signal.SIGTERM)
_EXAMPLES = """Times in the documentation come from these: each is a row of results, with commit, hardware and versions.
What follows the name goes to the benchmark; its own --help tells all about it.

  vtprune bench                                        which there are, and how many rows of each are committed
  vtprune bench prefill --help                         what one of them measures, and how
  vtprune bench kernels --csv kernels.csv              run it again, and append the rows to a file
  vtprune bench prefill --shape llava-next-7b          on a GPU
"""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A script, what it says of itself in a line, and its committed rows, `unmeasured` of them without times."""

    script: Path
    about: str
    rows: int
    unmeasured: int

    @property
    def count(self) -> str:
        """The rows, as the table has them."""
        return f"{self.rows} ({self.unmeasured} not measured)" if self.unmeasured else str(self.rows)


def add_bench(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser; `add` is that of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = add("bench", help="rerun a benchmark", epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--list", action="store_true", help="list the benchmarks, as without a name")
    parser.add_argument("name", nargs="?", metavar="NAME", help="which benchmark (default: list them)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark")
    parser.set_defaults(command=_bench)


def _bench(options: argparse.Namespace, console: Console) -> int:
    place = folder()
    found = benchmarks(place)
    if options.list or options.name is None:
        from vtprune._console import as_table

        rows = [(name, benchmark.about, benchmark.count) for name, benchmark in found.items()]
        console.print(as_table(_COLUMNS, rows, console.width))
        return 0
    if options.name not in found:
        near = difflib.get_close_matches(options.name, found, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InvalidOption(f"there is no benchmark {options.name!r}{hint}: expected one of {', '.join(found)}")
    return run([sys.executable, str(found[options.name].script), *options.rest], _environment(place))


def folder() -> Path:
    """Where the scripts are: in the package where it was installed, next to it in a checkout.

    Raises:
        VtpruneError: where there are none.
    """
    package = Path(__file__).resolve().parent
    places = (package / "_benchmarks", package.parent / "benchmarks")
    for place in places:
        if (place / _SHARED).is_file():
            return place
    looked = " nor ".join(map(str, places))
    raise VtpruneError(f"the benchmarks are neither in {looked}: install vtprune again, or run this in a checkout")


def benchmarks(place: Path) -> dict[str, Benchmark]:
    """The scripts of the folder by name: the files that have a `main`, the others are what they share."""
    found = {}
    for script in sorted(place.glob("*.py")):
        tree = ast.parse(script.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            about = (ast.get_docstring(tree) or "").partition("\n")[0]
            rows = _rows(place / "results" / f"{script.stem}.csv")
            unmeasured = sum(row.get("measured") == _NOT_MEASURED for row in rows)
            found[script.stem] = Benchmark(script=script, about=about, rows=len(rows), unmeasured=unmeasured)
    return found


def _rows(results: Path) -> list[dict[str, str]]:
    if not results.exists():
        return []
    with results.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _environment(place: Path) -> dict[str, str]:
    """That of this process; scripts of a checkout import the vtprune of that checkout, installed or not."""
    if place.name == "_benchmarks":
        return dict(os.environ)
    paths = [str(place.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; its exit code, 128 and the number of the signal where one ended it.

    When interrupted, the command has ended too before `KeyboardInterrupt` goes on.
    """
    process = subprocess.Popen(command, env=environment)
    try:
        with _told_to_end():
            code = process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise
    return code if code >= 0 else 128 - code


@contextmanager
def _told_to_end() -> Iterator[None]:
    """A block that SIGTERM ends as Ctrl-C does, so that no benchmark is left behind without a parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a command that was interrupted; a terminal has told it as well, others have not."""
    try:
        for tell in _TELLING:
            if tell is not None:
                process.send_signal(tell)
            try:
                process.wait(_PATIENCE)
                return
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
