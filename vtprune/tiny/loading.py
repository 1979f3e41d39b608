"""Load bundled checkpoints from the package directory, after checking that they are whole."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune._torchvision import heal, torchvision_installed
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_HOME = Path(__file__).parent
_WEIGHTS = _HOME / "weights"
_CLIP = "clip"
_SUMS = "SHA256SUMS"
_NAMES = ("llava", "llava_next_video", "qwen2_5_vl")
TEXT_TOWERS = ("llava",)
"""Models with a text tower aligned to their vision tower."""
_WITH_VIDEO = ("llava_next_video", "qwen2_5_vl")
"""Models whose processors come with one for video."""
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)

PICTURE = _HOME / "picture.png"
QUESTION = "what color is the cross ?"
ANSWER = "orange"


def list_tiny() -> list[str]:
    """Names that `load_tiny` takes."""
    return list(_NAMES)


def tiny_folder(name: str) -> Path:
    """Where the checkpoint of that name lies. Raises `InvalidOption` for a name nobody knows, with the nearest one."""
    if not isinstance(name, str) or name not in list_tiny():
        near = difflib.get_close_matches(str(name), list_tiny(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InvalidOption(f"unknown tiny model {name!r}{hint}; there are: {', '.join(list_tiny())}")
    return _WEIGHTS / name


def load_tiny(name: str = "llava") -> tuple[PreTrainedModel, ProcessorMixin]:
    """A trained tiny model and its processor, in fp32 on the CPU, without network.

    What the model can and cannot do is told by `CARD.md` next to its weights.

    Raises:
        InvalidOption: for a name nobody knows, with the nearest one.
        BackendUnavailable: where the processor takes clips and torchvision is not there.
        VtpruneError: where the bundled files are missing or damaged.
    """
    folder = tiny_folder(name)
    check_processors(name)
    _check_files(folder)
    heal()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return _load(folder, AutoModelForImageTextToText, AutoProcessor)


def load_tiny_model(name: str) -> PreTrainedModel:
    """The same model without a processor. Raises as `load_tiny` does."""
    folder = tiny_folder(name)
    _check_files(folder)
    heal()
    from transformers import AutoModelForImageTextToText

    return _load_model(folder, AutoModelForImageTextToText)


def check_processors(name: str) -> None:
    """Raise `BackendUnavailable` where the processor of a model takes clips and torchvision is not there."""
    if name in _WITH_VIDEO and not torchvision_installed():
        raise BackendUnavailable(f"the processor of {name} needs torchvision: pip install 'vtprune[processors]'")


def load_tiny_clip(name: str = "llava") -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """The vision tower of a tiny model with a text tower aligned to it, and the tokenizer, in fp32 on the CPU.

    Like CLIP, it tells how near a text is to a picture; unlike CLIP, it was trained so that the patches which show what
    a question is about lie nearest to the question.

    Raises:
        InvalidOption: for a name nobody knows, with the nearest one, or a model without such a text tower.
        VtpruneError: where the bundled files are missing or damaged.
    """
    folder = tiny_folder(name) / _CLIP
    if name not in TEXT_TOWERS:
        raise InvalidOption(f"{name} has no aligned text tower; there is one for: {', '.join(TEXT_TOWERS)}")
    _check_files(folder)
    heal()
    from transformers import AutoTokenizer, CLIPModel

    return _load(folder, CLIPModel, AutoTokenizer)


def _load(folder: Path, model_class: Any, processor_class: Any) -> tuple[Any, Any]:
    try:
        processor = processor_class.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise BackendUnavailable(
            f"the processor does not import ({error}): pip install 'vtprune[processors]'"
        ) from error
    except _UNREADABLE as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    return _load_model(folder, model_class), processor


def _load_model(folder: Path, model_class: Any) -> Any:
    import torch

    try:
        return model_class.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    except _UNREADABLE as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error


def write_sums(folder: Path) -> None:
    """Note the SHA-256 of every file of a checkpoint, in the form that `sha256sum -c` reads."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
    (folder / _SUMS).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files))


def _check_files(folder: Path) -> None:
    """Checksums find missing and truncated files, Git LFS pointers and flipped bits alike."""
    try:
        lines = (folder / _SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, f"cannot read {_SUMS}: {error}") from error
    sums = {name: expected for expected, _, name in (line.partition("  ") for line in lines)}
    if "model.safetensors" not in sums or "" in sums:
        raise _damaged(folder, f"{_SUMS} is cut")
    for name, expected in sums.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise _damaged(folder, f"cannot read {name}: {error.strerror or error}") from error
        if found != expected:
            raise _damaged(folder, f"{name} has SHA-256 {found[:12]}..., expected {expected[:12]}...")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _damaged(folder: Path, reason: str) -> VtpruneError:
    return VtpruneError(f"the bundled model in {folder} is missing or damaged ({reason}): install vtprune again")
