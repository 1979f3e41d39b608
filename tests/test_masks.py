"""The masks of layers behind a cut."""

from __future__ import annotations

import pytest
import torch

from vtprune import masks


@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
def test_without_padding_every_implementation_sees_causally(implementation, queries):
    """None is left to those that are causal by themselves: eager attention with no mask sees everything."""
    keys = 5
    mask = masks.over_keys(
        None, queries=queries, keys=keys, like=torch.zeros(2, queries, 4), implementation=implementation
    )
    causal = torch.ones(keys, keys, dtype=torch.bool).tril()[keys - queries :]
    by_itself = {"sdpa": queries in (1, keys), "eager": queries == 1, "flash_attention_2": True}
    assert (mask is None) == by_itself[implementation]
    if mask is not None:
        assert torch.equal(mask if mask.dtype == torch.bool else mask == 0, causal.expand(2, 1, queries, keys))
