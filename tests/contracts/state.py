"""Everything on a model that a wrap could leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.contracts.cases import Case, answer, unpruned


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Class, attribute names and hooks of every module, the configs, the state dict's names and the registry."""
    taken: dict[str, Any] = {
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "state": list(model.state_dict()),
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "implementation": model.config._attn_implementation,
    }
    for name, module in model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)}
        taken[name or "."] = (type(module), sorted(vars(module)), hooks)
    return taken


@contextmanager
def restored(case: Case) -> Iterator[None]:
    """The model is the same after the block as before it, and answers as if nothing had been."""
    expected = unpruned(case)
    before = snapshot(case.model)
    yield
    assert snapshot(case.model) == before
    after = answer(case.model, case.batch)
    assert torch.equal(after.logits, expected.logits)
    assert torch.equal(after.sequences, expected.sequences)
