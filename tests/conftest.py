"""Hooks of the whole test run: the count of the laws at its end."""

from __future__ import annotations

from tests.contracts.counting import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "pytest_terminal_summary"]
