"""The guard for a torchvision built for another torch, in processes of their own with a fake package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

HEALTHY = "VERSION = 'healthy'\n"
NEEDS_TWO = """
import torch
import torchvision.half_imported
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::novel_op")(lambda input: input)
"""
OTHERWISE_BROKEN = "import torchvision.half_imported\nraise RuntimeError('out of luck')\n"


def run(code: str, package: str | None, tmp_path: Path) -> str:
    """Output of `code` in a new process whose torchvision is `package`."""
    if package is not None:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(package)
        (tmp_path / "torchvision" / "half_imported.py").touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAL = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", level=logging.INFO)
from vtprune._torchvision import heal
print(heal(), sorted(name for name in sys.modules if name.startswith("torchvision")))
"""


def test_missing_operators_are_declared_and_the_import_works(tmp_path: Path) -> None:
    code = HEAL + "import torchvision, torch\nprint(torch.ops.torchvision.novel_op.default._schema, heal())"
    shown = run(code, NEEDS_TWO, tmp_path)
    assert "declared nms, novel_op" in shown
    assert "True ['torchvision', 'torchvision.half_imported']" in shown
    assert "torchvision::novel_op(Tensor input) -> Tensor False" in shown


def test_without_the_guard_that_import_dies(tmp_path: Path) -> None:
    code = "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)"
    assert "operator torchvision::nms does not exist" in run(code, NEEDS_TWO, tmp_path)


def test_a_healthy_torchvision_is_left_alone(tmp_path: Path) -> None:
    assert run(HEAL, HEALTHY, tmp_path) == "False ['torchvision']\n"


def test_other_trouble_is_told_and_left_to_the_import(tmp_path: Path) -> None:
    shown = run(HEAL, OTHERWISE_BROKEN, tmp_path)
    assert shown == "WARNING torchvision does not import: out of luck\nFalse []\n"


def test_an_absent_torchvision_is_no_trouble(tmp_path: Path) -> None:
    hide = "import importlib.util as u\nfind = u.find_spec\n"
    hide += "u.find_spec = lambda name, package=None: None if name == 'torchvision' else find(name, package)\n"
    assert run(hide + HEAL, None, tmp_path) == "False []\n"


def test_importing_vtprune_does_not_run_the_guard(tmp_path: Path) -> None:
    code = "import vtprune, sys\nprint([name for name in sys.modules if name.startswith('torch')])"
    assert run(code, NEEDS_TWO, tmp_path) == "[]\n"
