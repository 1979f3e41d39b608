"""Hooks of the whole test run: the count of the laws at its end."""

from __future__ import annotations

import torch

from tests.contracts.counting import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "pytest_terminal_summary"]

# The models are tiny: threads of one operation would only fight those of the other workers.
torch.set_num_threads(1)
