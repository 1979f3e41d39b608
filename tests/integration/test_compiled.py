"""Hooks on a compiled module are silently ignored by torch: wrapping one is refused, compiling a wrapped one works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig

import vtprune
from tests import models
from tests.integration.common import ONE, OTHER, expect, fingerprint, kept_of, llava, logits, write
from vtprune.errors import UnsupportedModel


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting_backend() -> tuple[list[int], Callable[..., Any]]:
    """The eager backend of the compiler, and a list that grows with every graph it gets."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    return graphs, backend


def _in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _base_in_place(model: nn.Module) -> nn.Module:
    model.model.compile(backend="eager")
    return model


def _tower_in_place(model: nn.Module) -> nn.Module:
    model.model.vision_tower.compile(backend="eager")
    return model


def _language_model_replaced(model: nn.Module) -> nn.Module:
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def _forward_of_the_model(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _forward_of_the_base(model: nn.Module) -> nn.Module:
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    return model


def _by_generate(model: nn.Module) -> nn.Module:
    model.get_compiled_call(CompileConfig(backend="eager", fullgraph=False, mode=None))
    return model


COMPILED = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": _in_place,
    "base.compile()": _base_in_place,
    "vision_tower.compile()": _tower_in_place,
    "language_model replaced": _language_model_replaced,
    "model.forward replaced": _forward_of_the_model,
    "base.forward replaced": _forward_of_the_base,
    "by generate": _by_generate,
}


@pytest.mark.parametrize("how", COMPILED)
def test_wrapping_a_compiled_model_is_refused(how: str) -> None:
    model = COMPILED[how](llava(layers=1))
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="wrap first, then compile"):
        vtprune.wrap(model, "random")
    assert fingerprint(model) == before


@pytest.mark.parametrize(("name", "method"), [("llava", "vtprune"), ("qwen2_5_vl", "fastervlm")])
def test_a_model_compiled_after_wrapping_prunes_as_in_eager(name: str, method: str) -> None:
    model = models.build(name, layers=1)
    inputs = models.inputs(model, ONE)
    vtprune.wrap(model, method)
    eager, tokens, kept = logits(model, inputs), write(model, inputs), kept_of(model.vtprune.last)
    graphs, backend = counting_backend()
    model.compile(backend=backend)
    torch.testing.assert_close(logits(model, inputs), eager, rtol=0, atol=1e-5)
    assert graphs
    assert write(model, inputs).tolist() == tokens.tolist()
    assert kept_of(model.vtprune.last) == kept


def test_a_compiled_view_of_a_wrapped_model_prunes_every_new_prompt() -> None:
    model = vtprune.wrap(llava(layers=1), "fastervlm")
    compiled = torch.compile(model, backend="aot_eager")
    for prompts in (ONE, OTHER):
        inputs = models.inputs(model, prompts)
        found = logits(compiled, inputs)
        kept = kept_of(model.vtprune.last)
        torch.testing.assert_close(found, logits(model, inputs), rtol=0, atol=1e-5)
        assert kept_of(model.vtprune.last) == kept


def test_decode_steps_that_generate_compiles_give_the_same_tokens() -> None:
    model = llava(layers=1)
    inputs = models.inputs(model, ONE)
    expected = expect(model, inputs, "fastervlm")
    vtprune.wrap(model, "fastervlm")
    graphs, backend = counting_backend()
    config = CompileConfig(backend=backend, fullgraph=False, mode=None)
    config._compile_all_devices = True
    tokens = write(model, inputs, cache_implementation="static", compile_config=config)
    assert graphs
    assert tokens.tolist() == expected.tokens.tolist()


def test_a_model_whose_decoding_was_compiled_under_a_wrap_can_be_wrapped_again() -> None:
    """On a GPU `generate` compiles by itself when the cache is static; nobody has to know."""
    model = llava(layers=1)
    inputs = models.inputs(model, ONE)
    expected = expect(model, inputs, "uniform", keep=2)
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    compiling = {"cache_implementation": "static", "compile_config": config}
    with vtprune.pruning(model, "fastervlm"):
        write(model, inputs, **compiling)
    with vtprune.pruning(model, "uniform", keep=2):
        assert write(model, inputs, **compiling).tolist() == expected.tokens.tolist()


def test_unwrapping_a_model_compiled_while_wrapped_gives_the_plain_model_back() -> None:
    model = llava(layers=1)
    inputs = models.inputs(model, ONE)
    plain = logits(model, inputs)
    vtprune.wrap(model, "random")
    model.compile(backend="eager")
    assert not torch.allclose(logits(model, inputs), plain, atol=1e-3)
    vtprune.unwrap(model)
    torch.testing.assert_close(logits(model, inputs), plain, rtol=0, atol=1e-5)


def test_a_compiled_view_follows_the_next_wrap() -> None:
    model = llava(layers=1)
    inputs = models.inputs(model, ONE)
    vtprune.wrap(model, "random")
    compiled = torch.compile(model, backend="eager")
    logits(compiled, inputs)
    vtprune.unwrap(model)
    vtprune.wrap(model, "uniform", keep=2)
    found = logits(compiled, inputs)
    assert model.vtprune.last is not None
    assert model.vtprune.last.kept == 2
    torch.testing.assert_close(found, logits(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["tome", "flowcut"])
def test_pruning_inside_the_encoder_survives_compilation(method: str) -> None:
    """The blocks stay eager, or their hooks would be passed by."""
    plain, compiled = llava(), llava()
    inputs = models.inputs(plain, ONE)
    vtprune.wrap(plain, method, keep=0.5)
    expected, kept = logits(plain, inputs), kept_of(plain.vtprune.last)
    vtprune.wrap(compiled, method, keep=0.5)
    compiled.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
        assert kept_of(compiled.vtprune.last) == kept
