"""vtprune makes vision-language models see with fewer tokens: `model = vtprune.wrap(model)`."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from vtprune._version import __version__

logging.getLogger("vtprune").addHandler(logging.NullHandler())

_HOMES = {
    "wrap": "vtprune.api",
    "unpruned": "vtprune.api",
    "unwrap": "vtprune.api",
    "pruning": "vtprune.api",
    "compare": "vtprune.comparing",
    "list_methods": "vtprune.catalog",
    "list_families": "vtprune.catalog",
    "describe": "vtprune.catalog",
    "text_relevance": "vtprune.relevance",
    "load_tiny": "vtprune.tiny",
    "Pick": "vtprune.picking",
    "Pipeline": "vtprune.pipeline",
    "PruneReport": "vtprune.report",
    "VtpruneError": "vtprune.errors",
}

__all__ = [
    "Pick",
    "Pipeline",
    "PruneReport",
    "VtpruneError",
    "__version__",
    "compare",
    "describe",
    "list_families",
    "list_methods",
    "load_tiny",
    "pruning",
    "text_relevance",
    "unpruned",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from vtprune.api import pruning, unpruned, unwrap, wrap
    from vtprune.catalog import describe, list_families, list_methods
    from vtprune.comparing import compare
    from vtprune.errors import VtpruneError
    from vtprune.picking import Pick
    from vtprune.pipeline import Pipeline
    from vtprune.relevance import text_relevance
    from vtprune.report import PruneReport
    from vtprune.tiny import load_tiny


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vtprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
