"""The command `vtprune compare`. Only `cli` imports it."""

from __future__ import annotations

from vtprune._compare.command import add_compare

__all__ = ["add_compare"]
