"""Where a model can be hooked: the base model whose language model receives the merged embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import nn

from vtprune.adapters import FAMILIES
from vtprune.adapters.base import language_model, placeholder_id
from vtprune.errors import UnsupportedCall, UnsupportedModel

HANDLE = "vtprune"


def find_base(model: object) -> nn.Module:
    """The base model that merges features into embeddings; raises `UnsupportedModel` where it cannot be hooked."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"expected a transformers image-text-to-text model, got {type(model).__name__}")
    _refuse_compiled("this model", model)
    full = without_adapters(model)
    inner = getattr(full, "model", None) if getattr(full, "base_model_prefix", "model") == "model" else None
    inner = inner if isinstance(inner, nn.Module) else full
    missing = missing_seam(inner)
    if missing:
        raise UnsupportedModel(
            f"{type(full).__name__} has no seam to prune at: {missing}. Known families: {', '.join(FAMILIES)}"
        )
    if any(HANDLE in module.__dict__ for module in (model, *full.modules())):
        raise UnsupportedModel("this model is wrapped already: call vtprune.unwrap(model) first")
    for name, module in full.named_modules():
        _refuse_compiled(name or "this model", module)
    return inner


def _refuse_compiled(name: str, module: nn.Module) -> None:
    if is_compiled(module):
        raise UnsupportedModel(f"{name} is compiled, and hooks added now would be ignored: wrap first, then compile")


def missing_seam(inner: nn.Module) -> str | None:
    """What a base model lacks to be pruned, None where it lacks nothing."""
    if language_model(inner) is None:
        return "the base model has no language_model"
    if not hasattr(type(inner), "get_image_features"):
        return "the base model has no get_image_features"
    if placeholder_id(inner.config, "image") is None:
        return "the config names no image_token_id"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` was compiled: itself, its call, its `forward`, or its decoding inside `generate`."""
    own = module.__dict__
    itself = hasattr(module, "_orig_mod") or own.get("_compiled_call_impl") or own.get("_compiled_call")
    return bool(itself) or hasattr(own.get("forward"), "_torchdynamo_inline")


def shells(model: nn.Module, inner: nn.Module) -> list[nn.Module]:
    """The modules a user may hold: the one given, and what is inside a PEFT model."""
    return list(dict.fromkeys((model, without_adapters(model), inner)))


def without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    get_base_model: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def refuse_copy(*args: object) -> NoReturn:
    """Raise `UnsupportedCall`: a copy of a wrapped model, or of a part of it, would carry hooks of the original."""
    raise UnsupportedCall(
        "a wrapped model cannot be copied or pickled (its hooks would stay on the original): call "
        "vtprune.unwrap(model) first, or save it with model.save_pretrained(...)"
    )
