"""Stages as JSON-ready values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vtprune.errors import InvalidOption


def to_plain(stage: Any) -> Any:
    """A stage with all its fields, or a tuple of them."""
    if isinstance(stage, tuple):
        return [to_plain(item) for item in stage]
    if hasattr(stage, "__dataclass_fields__"):
        values = {field.name: to_plain(getattr(stage, field.name)) for field in fields(stage)}
        return {"stage": type(stage).__name__, **values}
    return stage


def from_plain(data: Any, known: Mapping[str, type]) -> Any:
    """What `to_plain` stored; `known` are the classes that may appear in it, by name."""
    if isinstance(data, list):
        return tuple(from_plain(item, known) for item in data)
    if isinstance(data, Mapping):
        name = data["stage"]
        if name not in known:
            raise InvalidOption(f"unknown stage {name!r}: expected one of {', '.join(sorted(known))}")
        return known[name](**{key: from_plain(value, known) for key, value in data.items() if key != "stage"})
    return data
