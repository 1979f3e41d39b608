"""Hooks of the whole test run: the table of the sweep and the count of the laws at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: without a GPU its kernels are tried step by step on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.adapters.sweep import print_table
from tests.contracts import counting
from tests.contracts.counting import pytest_addoption, pytest_collection_modifyitems, pytest_configure
from vtprune._torchvision import heal
from vtprune.kernels import backends

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "pytest_terminal_summary"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Both tables; here and not beside their tests, since workers of xdist do the collecting."""
    print_table(terminalreporter)
    counting.pytest_terminal_summary(terminalreporter, config)


@pytest.fixture(autouse=True)
def _no_backend_stays_in_force() -> Iterator[None]:
    """Whatever becomes of a call, what it asked of kernels ends with it."""
    yield
    left = backends.put_in_force(None)
    assert left is None, f"backend {left.requested!r} is still in force"


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU where Triton does not interpret."""
    monkeypatch.setattr(backends, "unavailable", lambda: "there is no CUDA or ROCm device")


# The models are tiny: threads of one operation would only fight those of the other workers.
torch.set_num_threads(1)
# Tests that import processors of transformers by themselves get a torchvision that imports.
heal()
