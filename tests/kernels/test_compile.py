"""Every kernel compiles ahead of time, with no GPU present, for NVIDIA's and AMD's."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vtprune
from tests.kernels.variants import SHARED, TARGETS

KERNELS = Path(vtprune.__file__).parent / "kernels"


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def launched() -> set[tuple[str, str]]:
    """Modules and names of all functions that are launched on a grid."""
    found = set()
    for path in KERNELS.glob("triton_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert isinstance(node.func.value, ast.Name), (
                    f"{path.name}: line {node.lineno} launches what has no name"
                )
                found.add((path.stem, node.func.value.id))
    return found


@needs_triton
def test_every_kernel_that_is_launched_is_compiled() -> None:
    from tests.kernels.compile_variants import SETS

    assert launched() == {(variant.module, variant.kernel) for variant in SETS["core"]}


@needs_triton
@pytest.mark.parametrize("variants", ["core", pytest.param("more", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_for_a_device_that_is_not_there(target: str, variants: str, tmp_path: Path) -> None:
    """In a process of its own: this one interprets. Nothing that was compiled before is taken for it."""
    from tests.kernels.compile_variants import SETS

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_variants", target, variants],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [str(variant) for variant in SETS[variants]]
    for line in lines:
        size, _, shared, *_ = line.split()
        assert int(size) > 1000
        assert int(shared) <= SHARED[target], line
