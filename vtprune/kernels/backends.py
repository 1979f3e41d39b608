"""Which implementation of a kernel runs: its specification in PyTorch, or Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from vtprune.errors import BackendUnavailable, InvalidOption

BACKENDS = ("auto", "torch", "triton")
_NO_COMPILER = "Failed to find C compiler"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Use:
    """What a call of a model asked for, and what it got: which kernels ran on Triton, and why others did not."""

    requested: str = "auto"
    on_triton: set[str] = field(default_factory=set)
    on_torch: dict[str, str] = field(default_factory=dict)

    def absorb(self, other: Use) -> None:
        """Add what ran elsewhere for the same call."""
        self.on_triton |= other.on_triton
        self.on_torch |= other.on_torch

    def __str__(self) -> str:
        """As reports name it: `torch`, `triton`, or either with what ran on torch and why."""
        whys = ", ".join(f"{name}: {why}" for name, why in sorted(self.on_torch.items()) if why)
        if self.on_triton or self.requested == "triton":
            return f"triton, but torch for {whys}" if whys else "triton"
        return f"torch ({whys})" if whys else "torch"


class _Thread(threading.local):
    """The use in force in one thread, None outside of `using`."""

    use: Use | None = None


_thread = _Thread()


def put_in_force(use: Use | None) -> Use | None:
    """Let `use` be in force in this thread; returns what was before."""
    before, _thread.use = _thread.use, use
    return before


def requested_now() -> str:
    """The backend in force."""
    return "auto" if _thread.use is None else _thread.use.requested


@contextmanager
def using(requested: str) -> Iterator[Use]:
    """A block whose kernels run on the backend `requested`."""
    use = Use(requested)
    outer = put_in_force(use)
    try:
        yield use
    finally:
        put_in_force(outer)


def choose_backend(requested: str, place: str = "cuda") -> str:
    """The same name, once it is known that it can be honoured on a device of the type `place`: `auto` always can.

    Raises:
        InvalidOption: for an unknown name.
        BackendUnavailable: for `triton` where it is not installed, or has no device to run on, or not this one.
    """
    if requested not in BACKENDS:
        raise InvalidOption(f"backend={requested!r}: expected 'auto', 'torch' or 'triton'")
    if requested == "triton" and (why := unavailable() or _elsewhere(place)):
        raise BackendUnavailable(f"backend='triton': {why}; use backend='auto' or 'torch'")
    return requested


def _elsewhere(place: str) -> str:
    return "" if place != "cpu" or interpreted() else "the model is on the CPU: move it first"


def unavailable() -> str:
    """Why no kernel runs on Triton here, empty where it can."""
    if interpreted() or torch.cuda.is_available():
        return missing()
    return "there is no CUDA or ROCm device"


@functools.cache
def missing() -> str:
    """Why Triton cannot be imported, empty where it can."""
    return "" if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, step by step, to try them out."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernel(Generic[P, R]):
    """A kernel by its specification, the function it decorates, and the module that has it in Triton.

    Calls go to Triton where the tensors lie on a GPU and it can take them, elsewhere to the specification; where
    `triton` was asked for, what it cannot take is refused.
    """

    def __init__(self, specification: Callable[P, R], module: str) -> None:
        functools.update_wrapper(self, specification)
        self.name = specification.__name__
        self.specification = specification
        self._module = module
        self._broken = ""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        use, requested = _thread.use, requested_now()
        first = _first_tensor([*args, *kwargs.values()])
        if first is None or requested == "torch" or (requested == "auto" and not first.is_cuda):
            return self.specification(*args, **kwargs)
        try:
            found = self.triton(*args, **kwargs)
        except BackendUnavailable as error:
            if requested == "triton":
                raise BackendUnavailable(f"backend='triton': {self.name}: {error}; use backend='auto'") from error
            if use is not None:
                use.on_torch[self.name] = str(error)
            return self.specification(*args, **kwargs)
        if use is not None:
            use.on_triton.add(self.name)
        return found

    def triton(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same by Triton.

        Raises:
            BackendUnavailable: where it cannot be, with the reason.
        """
        if why := missing() or self._broken:
            raise BackendUnavailable(why)
        values = [*args, *kwargs.values()]
        check_tensors(values)
        form = self._form()
        from triton.errors import TritonError

        try:
            with torch.cuda.device_of(_first_tensor(values)):
                return form(*args, **kwargs)
        except TritonError as error:
            raise BackendUnavailable(f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:
            if _NO_COMPILER not in str(error):
                raise
            self._broken = str(error)
            raise BackendUnavailable(self._broken) from error

    def _form(self) -> Callable[P, R]:
        """The function in Triton; a version of Triton that does not know what it is written in is remembered."""
        try:
            module = importlib.import_module(f"vtprune.kernels.{self._module}")
        except (ImportError, AttributeError, TypeError) as error:
            self._broken = f"this version of triton cannot be used ({error})"
            raise BackendUnavailable(self._broken) from error
        form: Callable[P, R] = getattr(module, self.name)
        return form


def kernel(module: str) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Make the decorated specification a `Kernel`, whose Triton form of the same name is in `module`."""
    return lambda specification: Kernel(specification, module)


def check_tensors(values: list[Any]) -> None:
    """Raise `BackendUnavailable` for arguments that no kernel in Triton takes."""
    for value in values:
        if isinstance(value, (list, tuple)):
            check_tensors(list(value))
        elif isinstance(value, Tensor):
            if value.device.type != "cuda" and not interpreted():
                raise BackendUnavailable(f"tensors are on {value.device.type}")
            if value.requires_grad and torch.is_grad_enabled():
                raise BackendUnavailable("gradients flow through it")


def _first_tensor(values: list[Any]) -> Tensor | None:
    """The tensor that says where a kernel runs, None where there is none."""
    for value in values:
        if isinstance(value, (list, tuple)):
            value = _first_tensor(list(value))
        if isinstance(value, Tensor):
            return value
    return None
