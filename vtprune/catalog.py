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
    """What `describe` tells; `str(card)` is for people.

    `parameters` holds defaults, `meanings` what each is for. `cuts` says where tokens leave, `picks` what chooses those
    that stay, between layers with the places where it does. `published` says per family what the authors set, as
    arguments of `wrap`, with ` | ` between several budgets. `adaptive` methods take the budget for the most they keep;
    those `in_encoder` drop patches while pictures are encoded, those `in_layers` between decoder layers: for these
    `keep` is an average over layers. Those `in_cache` only store fewer. Those that do not `drop` keep every token;
    `in_attention` says that they change attention inside the language model.
    """

    name: str
    title: str
    source: str
    summary: str
    parameters: Mapping[str, Any]
    meanings: Mapping[str, str]
    needs: tuple[str, ...]
    cuts: tuple[str, ...]
    picks: tuple[str, ...]
    published: Mapping[str, str]
    deviations: str
    adaptive: bool
    in_encoder: bool
    in_layers: bool
    in_attention: bool
    in_cache: bool
    drops: bool

    @property
    def arxiv(self) -> str | None:
        """The arXiv id, None where there is none."""
        return self.source.removeprefix("arXiv ") if self.source.startswith("arXiv ") else None

    @property
    def reads(self) -> str:
        """What it decides by, for people."""
        alone = "blocks of the encoder, which it cuts" if self.in_encoder else "features only"
        if self.in_attention:
            alone = "layers of the language model, whose attention it changes"
        return ", ".join(self.needs) or alone

    @property
    def where(self) -> str:
        """Where tokens leave, for people."""
        return " and ".join(self.cuts) or "nowhere"

    @property
    def _keeps(self) -> str:
        if not self.drops:
            return "everything: no other `keep` than 1.0 is taken"
        if self.adaptive:
            return "at most `keep`, as the picture says"
        if self.in_cache:
            return "everything; the KV cache of every layer stores `keep`"
        return "`keep` on average over decoder layers" if self.in_layers else "exactly `keep`"

    def __str__(self) -> str:
        parameters = "; ".join(
            f"{name}={value!r}, {self.meanings.get(name, '')}".rstrip(", .") for name, value in self.parameters.items()
        )
        published = "; ".join(f"{family}: {settings}" for family, settings in self.published.items())
        lines = (
            f"{self.name}: {self.title} ({self.source})",
            self.summary,
            f"keeps: {self._keeps}",
            f"cuts: {self.where}",
            f"parameters: {parameters or 'none'}",
            f"needs: {self.reads}",
            f"picks: {' then '.join(self.picks) or 'none'}",
            f"published: {published or 'nothing known for the families here'}",
            f"deviations: {self.deviations}",
        )
        return "\n".join(lines)


def describe(name: str) -> MethodCard:
    """What a method does, its source, parameters, needs, published settings, and where it departs from its authors.

    Raises:
        InvalidOption: for an unknown method, with the nearest name.
    """
    builder = METHODS[_known(name, METHODS, "method")]
    summary, sections = _read_docstring(inspect.getdoc(builder) or "")
    pipeline = builder()
    defaults = {key: parameter.default for key, parameter in inspect.signature(builder).parameters.items()}
    return MethodCard(
        name=name,
        title=sections[""]["Title"],
        source=sections[""]["Source"],
        summary=summary,
        parameters=defaults,
        meanings=sections["Args"],
        needs=tuple(sorted(pipeline.needs - {pipeline.survivors})),
        cuts=_cuts(pipeline),
        picks=_picks(pipeline),
        published=sections["Published"],
        deviations=sections[""]["Deviations"],
        adaptive=pipeline.adaptive,
        in_encoder=pipeline.encoder is not None,
        in_layers=bool(pipeline.inside),
        in_attention=pipeline.attention is not None,
        in_cache=pipeline.cache is not None,
        drops=pipeline.drops,
    )


def _cuts(pipeline: Pipeline) -> tuple[str, ...]:
    """Where tokens leave."""
    if pipeline.name == "identity":
        return ()
    front = "before the language model" if pipeline.encoder is None else "inside the encoder"
    places = {front: pipeline.picks, "between layers": pipeline.inside, "in the KV cache": pipeline.cache}
    return tuple(place for place, cut in places.items() if cut)


def _picks(pipeline: Pipeline) -> tuple[str, ...]:
    """What chooses: names, and those that choose at the same drop points together, with the layers."""
    points: dict[str, list[float | int]] = {}
    for stage in pipeline.inside:
        for name in dict.fromkeys(pick.name for pick in stage.picks):
            points.setdefault(name, []).append(stage.at)
    together: dict[tuple[float | int, ...], list[str]] = {}
    for name, own in points.items():
        together.setdefault(tuple(own), []).append(name)
    inside = (f"{' then '.join(names)} in front of {_layers(own)}" for own, names in together.items())
    cached = () if pipeline.cache is None else (f"{pick.name} in every layer" for pick in pipeline.cache.picks)
    return (*(pick.name for pick in pipeline.picks), *inside, *cached)


def _layers(points: tuple[float | int, ...]) -> str:
    """Layers by their number or their share of the depth, for people."""
    told = [str(at) if isinstance(at, int) else f"{100 * at:.3g} %" for at in points]
    share = " of the depth" if isinstance(points[-1], float) else ""
    return f"layer{'s' if len(points) > 1 else ''} {', '.join(told)}{share}"


def _read_docstring(text: str) -> tuple[str, dict[str, dict[str, str]]]:
    """Summary, and the entries under `Published:`, under `Args:`, and under no heading."""
    summary, *paragraphs = text.split("\n\n")
    sections: dict[str, dict[str, str]] = {"": {}, "Published": {}, "Args": {}}
    for paragraph in paragraphs:
        heading = next((name for name in ("Published", "Args") if paragraph.startswith(f"{name}:\n")), "")
        lines = inspect.cleandoc(paragraph.removeprefix(f"{heading}:\n")).splitlines()
        _read_entries(lines, sections[heading])
    return " ".join(summary.split()), sections


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
    return [name for name, builder in METHODS.items() if not builder().needs and builder().attention is None]
