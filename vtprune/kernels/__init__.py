"""Kernels: tensors in, tensors out. `reference` is the specification and, so far, the only backend."""

from __future__ import annotations

from vtprune.errors import BackendUnavailable, InvalidOption


def choose_backend(requested: str) -> str:
    """The backend that runs: `auto` falls back, an explicit request is honoured or refused.

    Raises:
        InvalidOption: for an unknown name.
        BackendUnavailable: for `triton`, which this version does not have.
    """
    if requested not in ("auto", "torch", "triton"):
        raise InvalidOption(f"backend={requested!r}: expected 'auto', 'torch' or 'triton'")
    if requested == "triton":
        raise BackendUnavailable("backend='triton': this version has no Triton kernels; use backend='auto' or 'torch'")
    return "torch"
