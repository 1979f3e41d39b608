"""The public calls: wrap a model, unwrap it, compare methods, and look up what there is."""

from __future__ import annotations

import difflib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from vtprune.adapters import FAMILIES, family_of
from vtprune.adapters.base import Family, language_model, placeholder_ids
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedModel
from vtprune.kernels import choose_backend
from vtprune.methods import METHODS
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport
from vtprune.runtime.encoder import encode_once
from vtprune.runtime.evidence import FROM_ENCODER
from vtprune.runtime.pruner import Pruner
from vtprune.types import Budget, Per

ModelT = TypeVar("ModelT", bound=nn.Module)
_HANDLE = "vtprune"


def wrap(
    model: ModelT,
    method: str | Pipeline = "vtprune",
    *,
    keep: float | int = 0.25,
    per: Per = "image",
    positions: str = "auto",
    backend: str = "auto",
    on_report: Callable[[PruneReport], None] | None = None,
    history: int = 1,
    **parameters: Any,
) -> ModelT:
    """Hook `model` so that only a part of its visual tokens reaches the language model; returns the same object.

    Args:
        model: a transformers image-text-to-text model (or a PEFT model around one).
        method: a name from `list_methods()`, or a `Pipeline`.
        keep: share of the tokens as a float in (0, 1], or their number as an int.
        per: what `keep` applies to: each `"image"` (a clip counts as one), each `"part"` (crop, tile, frame), or the
            whole `"prompt"`.
        positions: `"compact"` closes the gaps that pruning leaves in the position ids, `"keep"` leaves the ids alone,
            `"auto"` compacts on 1-D RoPE and keeps on M-RoPE.
        backend: `"auto"`, `"torch"` or `"triton"`.
        on_report: called with the `PruneReport` of every prefill.
        history: how many reports `model.vtprune.history` remembers.
        **parameters: parameters of the method, see `describe(method)`.

    Raises:
        InvalidOption: for an option out of range or an unknown method or parameter.
        UnsupportedModel: for a model without the seam, compiled, or wrapped already.
        MissingEvidence: where the method needs encoder attention and the family offers none.
        BackendUnavailable: for `backend="triton"`, which this version does not have.
    """
    inner = _find_base(model)
    budget = Budget(keep=keep, per=per)
    pipeline = build(method, parameters)
    family = family_of(inner.config)
    _check_options(pipeline, budget, history)
    _check_evidence(pipeline, budget, family, inner)
    if type(keep) is int and keep == 1:
        warnings.warn("keep=1 keeps a single token per picture; 1.0 keeps all of them", stacklevel=2)
    pruner = Pruner(
        inner,
        family=family,
        pipeline=pipeline,
        budget=budget,
        compact=_compacts(positions, family),
        backend=choose_backend(backend),
        on_report=on_report,
        history=history,
    )
    pruner.install()
    for module in _shells(model, inner):
        object.__setattr__(module, _HANDLE, pruner)
        object.__setattr__(module, "__getstate__", pruner.refuse_copy)
    return model


def unwrap(model: ModelT) -> ModelT:
    """Take every hook and attribute of `wrap` off the model; returns it. Raises `UnsupportedModel` if not wrapped."""
    pruner = model.__dict__.get(_HANDLE)
    if pruner is None:
        raise UnsupportedModel("unwrap: this model is not wrapped")
    pruner.remove()
    for module in _shells(model, pruner._inner):
        module.__dict__.pop(_HANDLE, None)
        module.__dict__.pop("__getstate__", None)
    return model


@contextmanager
def pruning(model: nn.Module, method: str | Pipeline = "vtprune", **options: Any) -> Iterator[Pruner]:
    """`wrap` for the length of a block, undone also when the block raises; takes the options of `wrap`."""
    wrap(model, method, **options)
    try:
        yield model.vtprune  # type: ignore[misc]
    finally:
        unwrap(model)


def build(method: str | Pipeline, parameters: Mapping[str, Any] | None = None) -> Pipeline:
    """The pipeline behind a method name, its parameters bound against the method's signature.

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
            near = _nearest(name, allowed)
            raise InvalidOption(f"method {method!r} has no parameter {name!r}{near}; it takes: {choice}")
    return builder(**parameters)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of `compare`: `answer` (B, new tokens) and the share of prompts answered as without pruning."""

    method: str
    keep: float | int
    tokens: int
    kept: int
    answer: Tensor
    agreement: float
    report: PruneReport


def compare(
    model: nn.Module,
    inputs: Mapping[str, Any],
    methods: Sequence[str | Pipeline] | None = None,
    keep: Sequence[float | int] = (0.5, 0.25, 0.11),
    *,
    on_row: Callable[[Comparison], None] | None = None,
    max_new_tokens: int = 32,
    **options: Any,
) -> list[Comparison]:
    """Answer one batch of prompts under every method and budget; pictures are encoded once.

    Args:
        model: an unwrapped model; it is unwrapped again when this returns or raises.
        inputs: what the processor returned.
        methods: names or pipelines; all but `identity` by default.
        keep: shares or numbers, as in `wrap`.
        on_row: called with every row as it comes (for a progress bar, say).
        max_new_tokens: length of the greedy answers.
        **options: options of `wrap` for every row: `per`, `positions`, `backend`.

    Returns:
        The unpruned row first (`identity`, keep 1.0), then one row per method and budget, each with its report.

    Raises:
        The errors of `wrap`.
    """
    pipelines = [build(method) for method in methods or [name for name in METHODS if name != "identity"]]
    inner = _find_base(model)
    probing = any(pipeline.needs & FROM_ENCODER for pipeline in pipelines)
    shared = encode_once(model, inner, family_of(inner.config), inputs, probing=probing)
    rows: list[Comparison] = []
    unpruned: Tensor | None = None
    for pipeline, budget in [(build("identity"), 1.0), *itertools.product(pipelines, keep)]:
        with pruning(model, pipeline, keep=budget, **options) as pruner:
            written = model.generate(**shared(), max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
            report = pruner.last
        answer = written[:, inputs["input_ids"].shape[1] :]
        unpruned = answer if unpruned is None else unpruned
        rows.append(
            Comparison(
                method=pipeline.name,
                keep=budget,
                tokens=report.tokens,
                kept=report.kept,
                answer=answer,
                agreement=_agreement(answer, unpruned),
                report=report,
            )
        )
        if on_row is not None:
            on_row(rows[-1])
    return rows


def _agreement(answer: Tensor, reference: Tensor) -> float:
    length = min(answer.shape[1], reference.shape[1])
    same = (answer[:, :length] == reference[:, :length]).all(dim=1)
    return same.float().mean().item()


def list_methods() -> list[str]:
    """Names that `wrap` takes."""
    return list(METHODS)


def list_families() -> list[str]:
    """Families with an adapter of their own; other models with the same seam are served features-only."""
    return list(FAMILIES)


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """What `describe` tells; `str(card)` is for people."""

    name: str
    title: str
    source: str
    summary: str
    parameters: Mapping[str, Any]
    needs: tuple[str, ...]
    picks: tuple[str, ...]
    deviations: str

    @property
    def arxiv(self) -> str | None:
        """The arXiv id, None where there is none."""
        return self.source.removeprefix("arXiv ") if self.source.startswith("arXiv ") else None

    def __str__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items()) or "none"
        lines = (
            f"{self.name}: {self.title} ({self.source})",
            self.summary,
            f"parameters: {parameters}",
            f"needs: {', '.join(self.needs) or 'features only'}",
            f"picks: {' then '.join(self.picks)}",
            f"deviations: {self.deviations}",
        )
        return "\n".join(lines)


def describe(name: str) -> MethodCard:
    """What a method does, its source, parameters, needs, and where it departs from its authors' code."""
    builder = METHODS[_known(name, METHODS, "method")]
    summary, fields = _read_docstring(inspect.getdoc(builder) or "")
    pipeline = builder()
    defaults = {key: parameter.default for key, parameter in inspect.signature(builder).parameters.items()}
    return MethodCard(
        name=name,
        title=fields["Title"],
        source=fields["Source"],
        summary=summary,
        parameters=defaults,
        needs=tuple(sorted(pipeline.needs)),
        picks=tuple(pick.name for pick in pipeline.picks),
        deviations=fields["Deviations"],
    )


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    summary, *paragraphs = text.split("\n\n")
    fields: dict[str, str] = {}
    for line in "\n".join(p for p in paragraphs if not p.startswith("Args:")).splitlines():
        key, colon, value = line.partition(":")
        if colon and key in ("Title", "Source", "Deviations"):
            fields[key] = value.strip()
        elif fields:
            last = next(reversed(fields))
            fields[last] = f"{fields[last]} {line.strip()}"
    return " ".join(summary.split()), fields


def _known(name: object, known: Iterable[str], what: str) -> str:
    names = list(known)
    if isinstance(name, str) and name in names:
        return name
    raise InvalidOption(f"unknown {what} {name!r}{_nearest(name, names)}; there are: {', '.join(names)}")


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _check_options(pipeline: Pipeline, budget: Budget, history: int) -> None:
    if isinstance(history, bool) or not isinstance(history, int) or history < 0:
        raise InvalidOption(f"history={history!r}: expected how many reports to remember, 0 or more")
    if pipeline.name == "identity" and not budget.keeps_all:
        raise InvalidOption(f"method 'identity' keeps everything, got keep={budget.keep}: use keep=1.0")


def _check_evidence(pipeline: Pipeline, budget: Budget, family: Family, inner: nn.Module) -> None:
    wanted = pipeline.needs & FROM_ENCODER
    if not wanted or budget.keeps_all:
        return
    for kind in family.kinds:
        probe = family.probe(inner, kind)
        if probe is None:
            raise MissingEvidence(
                f"method {pipeline.name!r} needs encoder attention, and there is no probe for the {kind} encoder of "
                f"{type(inner).__name__} (family {family.name!r}); methods without it: {', '.join(_features_only())}"
            )
        named = wanted - {"importance", probe.evidence}
        if named:
            raise MissingEvidence(
                f"method {pipeline.name!r} needs {', '.join(named)}, the {kind} encoder gives {probe.evidence}"
            )


def _features_only() -> list[str]:
    return [name for name, builder in METHODS.items() if not builder().needs]


def _compacts(positions: str, family: Family) -> bool:
    if positions not in ("auto", "compact", "keep"):
        raise InvalidOption(f"positions={positions!r}: expected 'auto', 'compact' or 'keep'")
    return positions == "compact" or (positions == "auto" and not family.mrope)


def _find_base(model: object) -> nn.Module:
    """The base model that merges features into embeddings; raises `UnsupportedModel` where it cannot be hooked."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"expected a transformers image-text-to-text model, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel("this model is compiled, and hooks added now would be ignored: wrap first, then compile")
    full = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(full, "model", None) if getattr(full, "base_model_prefix", "model") == "model" else None
    inner = inner if isinstance(inner, nn.Module) else full
    missing = _missing_seam(inner)
    if missing:
        raise UnsupportedModel(
            f"{type(full).__name__} has no seam to prune at: {missing}. Known families: {', '.join(FAMILIES)}"
        )
    if any(_HANDLE in module.__dict__ for module in (model, full, inner)):
        raise UnsupportedModel("this model is wrapped already: call vtprune.unwrap(model) first")
    compiled = [name or "the model" for name, module in full.named_modules() if _is_compiled(module)]
    if compiled:
        raise UnsupportedModel(
            f"{compiled[0]} is compiled, and hooks added now would be ignored: wrap first, then compile"
        )
    return inner


def _missing_seam(inner: nn.Module) -> str | None:
    if language_model(inner) is None:
        return "the base model has no language_model"
    if not hasattr(type(inner), "get_image_features"):
        return "the base model has no get_image_features"
    if not placeholder_ids(inner.config, "image"):
        return "the config names no image_token_id"
    return None


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None


def _shells(model: nn.Module, inner: nn.Module) -> list[nn.Module]:
    """The modules a user may hold: the one given, and what is inside a PEFT model."""
    shells = [model]
    if hasattr(model, "get_base_model"):
        shells.append(model.get_base_model())
    return shells if any(shell is inner for shell in shells) else [*shells, inner]
