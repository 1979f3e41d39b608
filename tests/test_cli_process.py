"""The command line in processes of its own: what is imported when, and what a shell sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def row(output: str, name: str) -> list[str]:
    return next(line.removeprefix(name).split() for line in output.splitlines() if line.startswith(name))


def python(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )


def test_as_a_module(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "vtprune", "run", "--keep", "0.11")
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "visual tokens") == ["256", "28", "of", "256"]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_run_where_torchvision_is_absent(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torchvision" else find(name, package)
from vtprune.cli import main
code = main(["run"])
assert not any(name.startswith("torchvision") for name in sys.modules)
sys.exit(code)
"""
    done = python(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "answer") == ["orange", "orange"]


def test_mistakes_that_need_no_torch_are_told_without_it(tmp_path: Path) -> None:
    code = """
import sys
from vtprune.cli import main
for wrong in ("--keep=lots", "--prompt=", "--image=nowhere", "--model=tiny:x", "--overlay=x.psd", "--calibration="):
    assert main(["run", wrong]) == 2
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = python(tmp_path, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_and_the_parser_import_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from vtprune.cli import main, _parser; _parser()\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'PIL', 'rich') if name in sys.modules])"
    done = python(tmp_path, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr
