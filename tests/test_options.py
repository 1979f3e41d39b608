"""Bad options get an error of ours that names what was got, and leave the model exactly as it was."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

import vtprune
from tests import models
from tests.integration.common import FRAMES, ONE, fingerprint, hooks_of, write
from vtprune.catalog import _picks, build
from vtprune.errors import BackendUnavailable, InvalidOption, MissingEvidence, UnsupportedModel, VtpruneError

NAN = float("nan")
INF = float("inf")


@pytest.fixture
def model() -> nn.Module:
    return models.build("llava")


def refusal(model: Any, error: type[VtpruneError], method: Any = "random", **options: Any) -> str:
    """The message of a failing `wrap`, after checking that it left the model alone."""
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        vtprune.wrap(model, method, **options)
    assert (fingerprint(model) if isinstance(model, nn.Module) else None) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "keep",
    [0, 0.0, -1, -0.25, NAN, INF, -INF, 1.0001, 2.5, True, False, "0.5", None, [0.5], 1j],
    ids=repr,
)
def test_keep_out_of_range_is_refused(model: nn.Module, keep: Any) -> None:
    message = refusal(model, InvalidOption, keep=keep)
    assert str(keep) in message
    assert "expected" in message


@pytest.mark.parametrize("keep", [1.0, 1e-9, 0.25, 2, 10**9, np.float64(0.5)])
def test_keep_in_range_is_taken(model: nn.Module, keep: Any) -> None:
    vtprune.wrap(model, "random", keep=keep)
    write(model, models.inputs(model, ONE))
    report = model.vtprune.last
    wanted = keep if isinstance(keep, int) else math.floor(keep * report.tokens + 0.5)
    assert report.kept == min(report.tokens, max(1, wanted))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("per", value) for value in ("frame", "Image", None, 1, ["image"])],
        *[("positions", value) for value in ("dense", "Keep", None, 0, True, ["auto"])],
        *[("backend", value) for value in ("cuda", "Torch", None, 0, ["torch"])],
        *[("history", value) for value in (-1, True, 1.5, "2", None, [1])],
        *[("on_report", value) for value in (5, "print", [])],
    ],
)
def test_other_options_out_of_range_are_refused(model: nn.Module, option: str, value: Any) -> None:
    message = refusal(model, InvalidOption, **{option: value})
    assert option in message
    assert repr(value) in message


@pytest.mark.usefixtures("without_triton")
def test_an_unavailable_backend_is_refused(model: nn.Module) -> None:
    assert "torch" in refusal(model, BackendUnavailable, backend="triton")


@pytest.mark.parametrize(
    ("method", "near"),
    [("divprun", "divprune"), ("FasterVLM", "fastervlm"), ("randon", "random"), ("vt-prune", "vtprune")],
)
def test_an_unknown_method_is_refused_with_the_near_match(model: nn.Module, method: str, near: str) -> None:
    message = refusal(model, InvalidOption, method)
    assert repr(method) in message
    assert f"did you mean {near!r}" in message


@pytest.mark.parametrize("method", [None, 5, "", "qqqq", object], ids=repr)
def test_what_resembles_no_method_is_refused_with_the_list(model: nn.Module, method: Any) -> None:
    message = refusal(model, InvalidOption, method)
    assert all(name in message for name in vtprune.list_methods())
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("method", "parameter", "near"),
    [
        ("random", "sed", "seed"),
        ("vtprune", "lamb", "lam"),
        ("random", "kep", "keep"),
        ("random", "position", "positions"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_near_match(
    model: nn.Module, method: str, parameter: str, near: str
) -> None:
    message = refusal(model, InvalidOption, method, **{parameter: 1})
    assert repr(parameter) in message
    assert f"did you mean {near!r}" in message


def test_a_parameter_of_another_method_is_refused(model: nn.Module) -> None:
    assert "seed" in refusal(model, InvalidOption, "uniform", seed=1)


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, "0.5", None, [0.5]], ids=repr)
def test_a_weight_out_of_range_is_refused(model: nn.Module, value: Any) -> None:
    assert "lam" in refusal(model, InvalidOption, "vtprune", lam=value)


@pytest.mark.parametrize("value", ["1", 1.5, None, [1]], ids=repr)
def test_a_seed_that_is_no_whole_number_is_refused(model: nn.Module, value: Any) -> None:
    assert "seed" in refusal(model, InvalidOption, "random", seed=value)


def test_a_parameter_next_to_a_pipeline_is_refused(model: nn.Module) -> None:
    assert "seed" in refusal(model, InvalidOption, FRAMES, seed=1)


@pytest.mark.parametrize("thing", [None, "llava", 5, {}, nn.Module, object()], ids=lambda thing: type(thing).__name__)
def test_what_is_no_module_is_refused(thing: Any) -> None:
    name = type(thing).__name__
    assert name in refusal(thing, UnsupportedModel)


def test_a_language_model_is_refused() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    message = refusal(LlamaForCausalLM(config), UnsupportedModel)
    assert "LlamaForCausalLM" in message
    assert "llava" in message


def test_a_two_tower_model_is_refused() -> None:
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 50}, vision_config={**tower, "image_size": 16, "patch_size": 8}
    )
    assert "CLIPModel" in refusal(CLIPModel(config), UnsupportedModel)


def test_a_plain_layer_is_refused() -> None:
    assert "Linear" in refusal(nn.Linear(2, 2), UnsupportedModel)


def test_part_of_a_supported_model_is_refused(model: nn.Module) -> None:
    refusal(model.model.language_model, UnsupportedModel)
    assert hooks_of(model) == []


def test_identity_below_one_is_refused(model: nn.Module) -> None:
    assert "1.0" in refusal(model, InvalidOption, "identity", keep=0.5)
    assert "1.0" in refusal(model, InvalidOption, "identity")


def test_a_tower_without_a_probe_is_refused_with_methods_that_need_none(model: nn.Module) -> None:
    model.model.vision_tower.config.model_type = "some_other_tower"
    message = refusal(model, MissingEvidence, "fastervlm")
    assert "divprune" in message
    vtprune.wrap(model, "divprune")
    assert model.vtprune.method == "divprune"


def test_a_wrap_that_dies_halfway_leaves_no_hook(model: nn.Module) -> None:
    del model.model.vision_tower.encoder.layers[-2].self_attn.k_proj
    before = fingerprint(model)
    with pytest.raises((VtpruneError, AttributeError)):
        vtprune.wrap(model, "fastervlm")
    assert fingerprint(model) == before


def test_wrapping_twice_is_refused_and_the_first_wrap_stays(model: nn.Module) -> None:
    vtprune.wrap(model, "uniform")
    assert "unwrap" in refusal(model, UnsupportedModel, "random")
    assert model.vtprune.method == "uniform"


def test_wrapping_the_base_of_a_wrapped_model_is_refused(model: nn.Module) -> None:
    vtprune.wrap(model, "uniform")
    refusal(model.model, UnsupportedModel)
    assert "wrapped already" in refusal(model, UnsupportedModel)


def test_wrapping_around_a_wrapped_base_is_refused(model: nn.Module) -> None:
    vtprune.wrap(model.model, "uniform")
    assert "wrapped already" in refusal(model, UnsupportedModel)


def test_a_refused_block_leaves_the_wrap_around_it(model: nn.Module) -> None:
    vtprune.wrap(model, "uniform")
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel), vtprune.pruning(model, "random"):
        pytest.fail("the block must not run")
    assert fingerprint(model) == before


def test_unwrapping_an_unwrapped_model_is_refused(model: nn.Module) -> None:
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="not wrapped"):
        vtprune.unwrap(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("thing", [None, "llava", 5])
def test_unwrapping_what_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModel):
        vtprune.unwrap(thing)


def test_wrap_hooks_in_place_and_unwrap_leaves_nothing(model: nn.Module) -> None:
    before = fingerprint(model)
    assert vtprune.wrap(model, "vtprune") is model
    assert fingerprint(model) != before
    assert vtprune.unwrap(model) is model
    assert fingerprint(model) == before


def test_the_base_model_alone_can_be_wrapped(model: nn.Module) -> None:
    inputs = models.inputs(model, ONE)
    whole = vtprune.wrap(model, "random")(**inputs).logits
    vtprune.unwrap(model)
    vtprune.wrap(model.model, "random")
    assert torch.equal(model(**inputs).logits, whole)
    assert model.model.vtprune.last.kept == 4


def test_a_wrap_through_one_name_is_undone_through_the_other(model: nn.Module) -> None:
    before = fingerprint(model)
    vtprune.wrap(model, "random")
    vtprune.unwrap(model.model)
    assert fingerprint(model) == before


def test_a_block_that_raises_is_undone(model: nn.Module) -> None:
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), vtprune.pruning(model, "random"):
        raise ZeroDivisionError
    assert fingerprint(model) == before


def test_keeping_one_token_warns_that_one_is_a_number(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="1.0"):
        vtprune.wrap(model, "random", keep=1)
    write(model, models.inputs(model, ONE))
    assert model.vtprune.last.kept == 1


@pytest.mark.parametrize("keep", [1.0, 2, 0.25])
def test_any_other_budget_does_not_warn(model: nn.Module, keep: float | int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtprune.wrap(model, "random", keep=keep)
    assert model.vtprune.budget.keep == keep


def test_wrap_alone_is_the_house_default_on_a_quarter(model: nn.Module) -> None:
    vtprune.wrap(model)
    write(model, models.inputs(model, ONE))
    assert model.vtprune.method == "vtprune"
    assert (model.vtprune.last.kept, model.vtprune.last.tokens) == (4, 16)


@pytest.mark.parametrize(("name", "scheme"), [("llava", "compact"), ("qwen2_5_vl", "keep")])
def test_automatic_positions_depend_on_the_rope(name: str, scheme: str) -> None:
    model = vtprune.wrap(models.build(name), "random")
    assert model.vtprune.positions == scheme


@pytest.mark.parametrize("scheme", ["compact", "keep"])
def test_named_positions_are_honoured(model: nn.Module, scheme: str) -> None:
    vtprune.wrap(model, "random", positions=scheme)
    write(model, models.inputs(model, ONE))
    assert model.vtprune.last.positions == scheme


@pytest.mark.parametrize(
    ("method", "scheme"), [("fastv", "keep"), ("pyramiddrop", "keep"), ("information_horizon", "compact")]
)
def test_positions_have_no_gaps_where_all_cuts_lie_between_layers(method: str, scheme: str) -> None:
    """The report says what becomes of the ids, and nothing without effect can be asked for."""
    model = vtprune.wrap(models.build("llava", layers=6), method, keep=0.6)
    write(model, models.inputs(model, ONE))
    assert model.vtprune.positions == model.vtprune.last.positions == scheme
    vtprune.unwrap(model)
    if scheme == "keep":
        with pytest.raises(
            InvalidOption, match=f"positions='compact': method '{method}' cuts nothing in front of the language model"
        ):
            vtprune.wrap(model, method, keep=0.6, positions="compact")
    vtprune.wrap(model, method, keep=0.6, positions=scheme)


@pytest.mark.parametrize("name", vtprune.list_methods())
def test_every_listed_method_is_described(name: str) -> None:
    card = vtprune.describe(name)
    text = str(card)
    assert card.name == name
    assert all(word in text for word in (name, card.title, card.summary, card.deviations))
    assert card.title
    assert card.summary
    assert card.deviations


@pytest.mark.parametrize(
    ("name", "cuts", "picks"),
    [
        ("identity", "nowhere", "all"),
        ("visionzip", "before the language model", "dominant then contextual"),
        ("tome", "inside the encoder", "merged"),
        ("fastv", "between layers", "attended in front of layer 6.25 % of the depth"),
        ("pyramiddrop", "between layers", "attended in front of layers 25 %, 50 %, 75 % of the depth"),
        ("atp", "between layers", "attended then spread in front of layers 12.5 %, 43.8 %, 75 % of the depth"),
        (
            "vflowopt",
            "before the language model and between layers",
            "best then recycled then deep in front of layers 32.1 %, 64.3 % of the depth",
        ),
    ],
)
def test_a_description_tells_where_a_method_cuts_and_names_every_pick_once(name: str, cuts: str, picks: str) -> None:
    lines = str(vtprune.describe(name)).splitlines()
    assert f"cuts: {cuts}" in lines
    assert f"picks: {picks}" in lines


def test_a_layer_that_has_a_number_is_told_by_it() -> None:
    assert _picks(build("fastv", {"layer": 2})) == ("attended in front of layer 2",)


def test_a_description_gives_parameters_with_their_defaults() -> None:
    assert dict(vtprune.describe("random").parameters) == {"seed": 0}
    assert vtprune.describe("divprune").arxiv == "2503.02175"
    assert vtprune.describe("uniform").arxiv is None


def test_describing_an_unknown_method_is_refused_with_the_near_match() -> None:
    with pytest.raises(InvalidOption, match="did you mean 'divprune'"):
        vtprune.describe("divprun")


def test_the_nine_families_and_the_methods_are_listed() -> None:
    assert {"vtprune", "fastervlm", "divprune", "random", "uniform", "identity"} <= set(vtprune.list_methods())
    assert {
        "llava",
        "llava_next",
        "llava_onevision",
        "llava_next_video",
        "video_llava",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "internvl",
    } <= set(vtprune.list_families())


def test_every_error_can_be_caught_as_one() -> None:
    kinds = (InvalidOption, UnsupportedModel, MissingEvidence, BackendUnavailable)
    assert all(issubclass(kind, vtprune.VtpruneError) for kind in kinds)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="wrapp"):
        _ = vtprune.wrapp
