"""What there is: methods and families by name, and what each method does."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vtprune.adapters import FAMILIES
from vtprune.errors import InvalidOption
from vtprune.methods import METHODS
from vtprune.pipeline import Pipeline


def build(
    method: str | Pipeline, parameters: Mapping[str, Any] | None = None, *, options: Iterable[str] = ()
) -> Pipeline:
    """The pipeline behind a method name, its parameters bound against the method's signature.

    `options` are other names the caller takes, for the near match of a misspelt one.

    Raises:
        InvalidOption: for an unknown method or parameter, with the nearest name.
    """
    parameters = dict(parameters or {})
    if isinstance(method, Pipeline):
        if parameters:
            raise InvalidOption(f"a Pipeline takes no parameters, got {', '.join(parameters)}: set them in its stages")
        return method
    builder = METHODS[_known(method, METHODS, "method")]
    allowed = inspect.signature(builder).parameters
    for name in parameters:
        if name not in allowed:
            choice = ", ".join(allowed) or "none"
            near = _nearest(name, [*allowed, *options])
            raise InvalidOption(f"method {method!r} has no parameter {name!r}{near}; it takes: {choice}")
    return builder(**parameters)


def list_methods() -> list[str]:
    """Names that `wrap` takes."""
    return list(METHODS)


def list_families() -> list[str]:
    """Families of models; `"generic"` serves every other one with the same seam, features only."""
    return list(FAMILIES)


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """What `describe` tells; `str(card)` is for people. `parameters` holds defaults, `meanings` what each is for."""

    name: str
    title: str
    source: str
    summary: str
    parameters: Mapping[str, Any]
    meanings: Mapping[str, str]
    needs: tuple[str, ...]
    picks: tuple[str, ...]
    deviations: str

    @property
    def arxiv(self) -> str | None:
        """The arXiv id, None where there is none."""
        return self.source.removeprefix("arXiv ") if self.source.startswith("arXiv ") else None

    def __str__(self) -> str:
        parameters = "; ".join(
            f"{name}={value!r}, {self.meanings.get(name, '')}".rstrip(", .") for name, value in self.parameters.items()
        )
        lines = (
            f"{self.name}: {self.title} ({self.source})",
            self.summary,
            f"parameters: {parameters or 'none'}",
            f"needs: {', '.join(self.needs) or 'features only'}",
            f"picks: {' then '.join(self.picks)}",
            f"deviations: {self.deviations}",
        )
        return "\n".join(lines)


def describe(name: str) -> MethodCard:
    """What a method does, its source, parameters, needs, and where it departs from its authors' code.

    Raises:
        InvalidOption: for an unknown method, with the nearest name.
    """
    builder = METHODS[_known(name, METHODS, "method")]
    summary, fields, meanings = _read_docstring(inspect.getdoc(builder) or "")
    pipeline = builder()
    defaults = {key: parameter.default for key, parameter in inspect.signature(builder).parameters.items()}
    return MethodCard(
        name=name,
        title=fields["Title"],
        source=fields["Source"],
        summary=summary,
        parameters=defaults,
        meanings=meanings,
        needs=tuple(sorted(pipeline.needs)),
        picks=tuple(pick.name for pick in pipeline.picks),
        deviations=fields["Deviations"],
    )


def _read_docstring(text: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """Summary, the fields Title, Source and Deviations, and the entries under `Args:`."""
    summary, *paragraphs = text.split("\n\n")
    fields: dict[str, str] = {}
    meanings: dict[str, str] = {}
    for paragraph in paragraphs:
        lines = inspect.cleandoc(paragraph.removeprefix("Args:\n")).splitlines()
        _read_entries(lines, meanings if paragraph.startswith("Args:") else fields)
    return " ".join(summary.split()), fields, meanings


def _read_entries(lines: list[str], entries: dict[str, str]) -> None:
    """`key: value` lines; an indented line goes on with the value before it."""
    for line in lines:
        key, colon, value = line.partition(":")
        if colon and not line.startswith(" "):
            entries[key] = value.strip()
        elif entries:
            last = next(reversed(entries))
            entries[last] = f"{entries[last]} {line.strip()}"


def _known(name: object, known: Iterable[str], what: str) -> str:
    names = list(known)
    if isinstance(name, str) and name in names:
        return name
    raise InvalidOption(f"unknown {what} {name!r}{_nearest(name, names)}; there are: {', '.join(names)}")


def _nearest(name: object, known: Iterable[str]) -> str:
    spelled = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(str(name).lower(), list(spelled), n=1)
    return f" (did you mean {spelled[near[0]]!r}?)" if near else ""


def features_only() -> list[str]:
    """Methods that need no evidence."""
    return [name for name, builder in METHODS.items() if not builder().needs]
