"""Load a bundled checkpoint from the package directory, after checking that it is whole."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune._torchvision import heal
from vtprune.errors import InvalidOption, VtpruneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_HOME = Path(__file__).parent
_WEIGHTS = _HOME / "weights"
_SHA256 = {"llava": "d4ec62beb82f4fe87ee7a20d17a5e397ebee9d6c73b96b5f2144d5d654e5d64b"}

PICTURE = _HOME / "picture.png"
QUESTION = "what color is the cross ?"
ANSWER = "orange"


def list_tiny() -> list[str]:
    """Names that `load_tiny` takes."""
    return list(_SHA256)


def tiny_folder(name: str) -> Path:
    """Where the checkpoint of that name lies. Raises `InvalidOption` for a name nobody knows, with the nearest one."""
    if not isinstance(name, str) or name not in _SHA256:
        near = difflib.get_close_matches(str(name), list_tiny(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InvalidOption(f"unknown tiny model {name!r}{hint}; there are: {', '.join(list_tiny())}")
    return _WEIGHTS / name


def load_tiny(name: str = "llava") -> tuple[PreTrainedModel, ProcessorMixin]:
    """A trained tiny model and its processor, in fp32 on the CPU, without network.

    What the model can and cannot do is told by `CARD.md` next to its weights.

    Raises:
        InvalidOption: for a name nobody knows, with the nearest one.
        VtpruneError: where the bundled files are missing or damaged.
    """
    folder = tiny_folder(name)
    _check_weights(folder / "model.safetensors", _SHA256[name])
    heal()
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    return model.eval(), processor


def _check_weights(path: Path, expected: str) -> None:
    """The checksum finds truncated files, Git LFS pointers and flipped bits alike."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise _damaged(path.parent, f"cannot read {path.name}: {error.strerror or error}") from error
    if found != expected:
        raise _damaged(path.parent, f"{path.name} has SHA-256 {found[:12]}..., expected {expected[:12]}...")


def _damaged(folder: Path, reason: str) -> VtpruneError:
    return VtpruneError(f"the bundled model in {folder} is missing or damaged ({reason}): install vtprune again")
