"""Devices and models by name: for commands, and for workers that load a model of their own."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from vtprune._version import __version__
from vtprune.errors import InvalidOption, VtpruneError


def quiet_transformers() -> None:
    """Only errors of transformers on the terminal, and no progress bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def choose_device(requested: str) -> Any:
    """The torch device; `auto` is a GPU where there is one. Raises `InvalidOption` for one that is not there."""
    import torch

    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise InvalidOption(f"--device {requested}: no such device; expected auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "meta":
        raise InvalidOption("--device meta: not usable here (it holds no numbers); try --device cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...")
        raise InvalidOption(f"--device {requested}: not usable here ({reason}); try --device cpu") from error
    return device


def load_model(source: str, device: Any) -> tuple[Any, Any]:
    """Model and processor from `tiny:NAME`, a directory or a hub id."""
    from vtprune._torchvision import heal
    from vtprune.tiny import load_tiny

    if source.startswith("tiny:"):
        model, processor = load_tiny(source.removeprefix("tiny:"))
        return model.to(device), processor
    local = is_local(source)
    heal()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with explained(f"cannot load {source!r}"):
        processor = AutoProcessor.from_pretrained(source, local_files_only=local)
        model = AutoModelForImageTextToText.from_pretrained(source, local_files_only=local, dtype="auto")
        return model.to(device).eval(), processor


def is_local(source: str) -> bool:
    """True for a directory; False for a hub id that is cached or can be reached, and a `VtpruneError` for neither."""
    if Path(source).is_dir():
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise VtpruneError(f"cannot load {source!r}: there is no such directory")
    import huggingface_hub

    with explained(f"cannot load {source!r}"):
        if isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
            return False
    try:
        # One request without retries: a missing network would otherwise be told after minutes.
        huggingface_hub.model_info(source, timeout=10)
    except Exception as error:  # the client's own errors have no common base, and differ between its versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VtpruneError(
            f"cannot load {source!r}: no such directory, not in the hub's cache here, and the hub says: {reason}"
        ) from error
    return False


class explained:
    """Turn what loaders and processors raise into a `VtpruneError` of one line."""

    def __init__(self, trouble: str) -> None:
        self._trouble = trouble

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Whatever a stored configuration holds comes out here, and errors of libraries have no common base.
        if isinstance(error, Exception) and not isinstance(error, VtpruneError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else type(error).__name__
            raise VtpruneError(f"{self._trouble}: {reason}") from error


def versions() -> str:
    """Those that answers depend on, in a line."""
    import torch
    import transformers

    return f"vtprune {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
