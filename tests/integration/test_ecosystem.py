"""What people put around a model: PEFT, offloading, half precision, int8 weights, pipelines, streamers, decoding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import TextStreamer, pipeline

import vtprune
from tests import models
from tests.integration.common import (
    ONE,
    OTHER,
    STEPS,
    assert_answers,
    expect,
    fingerprint,
    hooks_of,
    kept_of,
    llava,
    logits,
    write,
)
from vtprune.errors import UnsupportedCall, UnsupportedModel
from vtprune.tiny import ANSWER, PICTURE, QUESTION

METHODS = ("vtprune", "fastervlm", "divprune")
Tiny = tuple[nn.Module, Any]


def lora(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with adapters on queries and keys of tower and language model that change what it does."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.5)
    return adapted.eval()


def test_wrapping_a_lora_model_prunes_by_the_adapted_attention() -> None:
    base = llava()
    inputs = models.inputs(base)
    without = expect(copy.deepcopy(base), inputs, "fastervlm", keep=0.5)
    adapted = lora(base)
    merged = expect(copy.deepcopy(adapted).merge_and_unload(), inputs, "fastervlm", keep=0.5)
    assert vtprune.wrap(adapted, "fastervlm", keep=0.5) is adapted
    assert_answers(adapted, inputs, merged)
    assert merged.kept != without.kept


def test_a_lora_model_is_wrapped_in_all_its_shells_and_unwrapped_from_all() -> None:
    adapted = lora(llava())
    before = fingerprint(adapted)
    vtprune.wrap(adapted, "random")
    assert adapted.vtprune is adapted.get_base_model().vtprune
    for shell in (adapted, adapted.get_base_model(), adapted.get_base_model().model):
        with pytest.raises(UnsupportedModel, match="wrapped already"):
            vtprune.wrap(shell, "random")
    vtprune.unwrap(adapted)
    assert fingerprint(adapted) == before


def test_a_lora_model_unwrapped_through_its_base_is_unwrapped() -> None:
    adapted = lora(llava())
    before = fingerprint(adapted)
    vtprune.wrap(adapted, "random")
    vtprune.unwrap(adapted.get_base_model())
    assert fingerprint(adapted) == before


def test_adapters_put_on_a_wrapped_model_are_refused_until_it_is_wrapped_again() -> None:
    """The probe would go on listening to the projections without their adapters."""
    model = llava()
    inputs = models.inputs(model)
    expected = expect(lora(copy.deepcopy(model)).merge_and_unload(), inputs, "fastervlm", keep=0.5)
    vtprune.wrap(model, "fastervlm", keep=0.5)
    adapted = lora(model)
    with pytest.raises(UnsupportedCall, match="wrap it again"):
        write(adapted, inputs)
    vtprune.unwrap(model)
    assert_answers(vtprune.wrap(adapted, "fastervlm", keep=0.5), inputs, expected)


def test_a_wrapped_lora_model_trains_its_adapters() -> None:
    adapted = vtprune.wrap(lora(llava()), "fastervlm").train()
    inputs = models.inputs(adapted.get_base_model())
    ids = inputs["input_ids"]
    adapted(**inputs, labels=ids.masked_fill((ids == models.IMAGE) | (ids == models.PAD), -100)).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert grads
    assert all("lora_" in name for name in grads)
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "language_model" in name)


def test_a_wrapped_lora_model_saves_the_same_adapter(tmp_path: Path) -> None:
    adapted = lora(llava())
    adapted.save_pretrained(tmp_path / "plain")
    vtprune.wrap(adapted, "fastervlm").save_pretrained(tmp_path / "wrapped")
    plain, wrapped = (
        {file.name: file.read_bytes() for file in (tmp_path / kind).iterdir()} for kind in ("plain", "wrapped")
    )
    assert wrapped == plain


@pytest.mark.parametrize("wrap_first", [False, True])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_a_model_offloaded_to_the_cpu_answers_as_in_memory(name: str, wrap_first: bool) -> None:
    model = models.build(name)
    inputs = models.inputs(model)
    expected, plain = expect(model, inputs, "fastervlm"), write(model, inputs)
    if wrap_first:
        vtprune.wrap(model, "fastervlm")
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    if not wrap_first:
        vtprune.wrap(model, "fastervlm")
    assert_answers(model, inputs, expected)
    vtprune.unwrap(model)
    assert not hasattr(model, "vtprune")
    assert [hook for hook in hooks_of(model) if "forward_pre" in hook] == []
    assert write(model, inputs).tolist() == plain.tolist()


def test_a_hook_of_accelerate_put_on_the_probed_attention_survives_unwrap() -> None:
    model = vtprune.wrap(llava(), "fastervlm")
    attention = model.model.vision_tower.encoder.layers[-2].self_attn
    inputs = models.inputs(model, ONE)
    expected = expect(llava(), inputs, "fastervlm")
    seen: list[str] = []

    class Notes(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append("call")
            return args, kwargs

    add_hook_to_module(attention, Notes())
    assert_answers(model, inputs, expected)
    assert seen == ["call"]
    vtprune.unwrap(model)
    logits(model, inputs)
    assert seen == ["call", "call"]
    remove_hook_from_module(attention)
    assert torch.equal(logits(model, inputs), logits(llava(), inputs))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_one_forward_of_an_offloaded_model_prunes_as_in_memory(name: str) -> None:
    model = models.build(name)
    inputs = models.inputs(model)
    with vtprune.pruning(model, "fastervlm") as pruner:
        in_memory, kept = logits(model, inputs), kept_of(pruner.last)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with vtprune.pruning(model, "fastervlm") as pruner:
        assert torch.equal(logits(model, inputs), in_memory)
        assert kept_of(pruner.last) == kept


def test_a_device_map_with_parts_on_disk_answers_as_in_memory(tmp_path: Path) -> None:
    model = llava()
    inputs = models.inputs(model)
    expected = expect(model, inputs, "fastervlm")
    places = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.device.type == "meta"
    vtprune.wrap(model, "fastervlm")
    assert_answers(model, inputs, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_keeping_everything_in_half_precision_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    model = models.build(name).to(dtype)
    inputs = models.inputs(model)
    plain, written = logits(model, inputs), write(model, inputs)
    vtprune.wrap(model, "vtprune", keep=1.0)
    found = logits(model, inputs)
    assert found.dtype == dtype
    assert torch.equal(found, plain)
    assert write(model, inputs).tolist() == written.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_half_precision_keeps_as_many_tokens_as_asked(name: str, method: str, dtype: torch.dtype) -> None:
    model = models.build(name).to(dtype)
    vtprune.wrap(model, method, keep=0.4)
    found = logits(model, models.inputs(model))
    report = model.vtprune.last
    assert [segment.k for segment in report.segments] == [
        max(1, math.floor(0.4 * segment.n + 0.5)) for segment in report.segments
    ]
    assert found.isfinite().all()


def test_under_autocast_keeping_everything_is_identical_and_pruning_works() -> None:
    model = llava()
    inputs = models.inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(model, inputs)
        with vtprune.pruning(model, "vtprune", keep=1.0):
            assert torch.equal(logits(model, inputs), plain)
        with vtprune.pruning(model, "vtprune", keep=4) as pruner:
            assert logits(model, inputs).isfinite().all()
            assert [segment.k for segment in pruner.last.segments] == [4, 4, 4]


def test_under_inference_mode_the_answer_is_the_same() -> None:
    model = llava()
    inputs = models.inputs(model)
    expected = expect(model, inputs, "fastervlm")
    vtprune.wrap(model, "fastervlm")
    with torch.inference_mode():
        assert_answers(model, inputs, expected)


class Int8Linear(nn.Module):
    """A linear layer with weights in int8 and one scale for each output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("stored", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        return self.stored.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def quantise(module: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, change(child)) if isinstance(child, nn.Linear) else quantise(child, change)
    return module


def rounded(linear: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        linear.weight.copy_(Int8Linear(linear).weight)
    return linear


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_int8_weights_answer_like_the_same_weights_in_fp32(name: str) -> None:
    model = models.build(name)
    inputs = models.inputs(model)
    reference = quantise(copy.deepcopy(model), rounded)
    quantise(model, Int8Linear)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert_answers(vtprune.wrap(model, "vtprune"), inputs, expect(reference, inputs, "vtprune"))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_outputs_as_tuples_equal_outputs_as_objects(name: str) -> None:
    model = vtprune.wrap(models.build(name), "random")
    inputs = models.inputs(model)
    by_object, kept = logits(model, inputs), kept_of(model.vtprune.last)
    with torch.no_grad():
        by_tuple = model(**inputs, return_dict=False)
    assert isinstance(by_tuple, tuple)
    assert torch.equal(by_tuple[0], by_object)
    assert kept_of(model.vtprune.last) == kept


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("prompts", [ONE, None], ids=["one", "batch"])
def test_a_static_cache_writes_what_a_dynamic_one_does(name: str, prompts: Any) -> None:
    model = vtprune.wrap(models.build(name), "fastervlm")
    inputs = models.inputs(model, prompts)
    dynamic, kept = write(model, inputs), kept_of(model.vtprune.last)
    assert write(model, inputs, cache_implementation="static").tolist() == dynamic.tolist()
    assert kept_of(model.vtprune.last) == kept


LENGTH = {"max_new_tokens": 24, "min_new_tokens": 24}
LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1, **LENGTH}
CYCLE = [20, 21, 22, 23, 24]


@pytest.fixture
def repetitive() -> nn.Module:
    """A model that writes the words of `CYCLE` in turn, so that looked-up tokens are accepted."""
    model = llava()
    embed = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
        for word, following in zip(CYCLE, CYCLE[1:] + CYCLE[:1], strict=True):
            model.lm_head.weight[following] += embed[word]
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(0.4)
            layer.mlp.down_proj.weight.mul_(0.4)
    return model


def test_prompt_lookup_writes_what_greedy_decoding_does(repetitive: nn.Module) -> None:
    vtprune.wrap(repetitive, "fastervlm")
    inputs = models.inputs(repetitive, OTHER)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    fed: list[int] = []
    embed = repetitive.model.language_model.embed_tokens
    handle = embed.register_forward_hook(lambda module, args, output: fed.append(output.shape[1]))
    greedy = repetitive.generate(**inputs, **LENGTH, **wanted)
    steps = len(fed)
    fed.clear()
    looked_up = repetitive.generate(**inputs, **LOOKUP, **wanted)
    handle.remove()
    assert looked_up.sequences.tolist() == greedy.sequences.tolist()
    torch.testing.assert_close(torch.stack(looked_up.logits), torch.stack(greedy.logits), rtol=0, atol=1e-4)
    assert any(length > 1 for length in fed[1:]), "no step tried several tokens"
    assert len(fed) < steps, "no looked-up token was accepted"


def test_prompt_lookup_reports_the_prefill_alone(repetitive: nn.Module) -> None:
    reports: list[vtprune.PruneReport] = []
    vtprune.wrap(repetitive, "fastervlm", on_report=reports.append)
    write(repetitive, models.inputs(repetitive, OTHER), **LOOKUP)
    assert len(reports) == 1
    assert repetitive.vtprune.last is reports[0]
    assert (reports[0].kept, reports[0].tokens) == (4, 16)


def test_an_assistant_model_writes_what_greedy_decoding_does() -> None:
    model, assistant = llava(), llava(layers=1)
    vtprune.wrap(model, "fastervlm")
    inputs = models.inputs(model, ONE)
    greedy, kept = write(model, inputs), kept_of(model.vtprune.last)
    assisted = write(model, inputs, assistant_model=assistant)
    assert assisted.tolist() == greedy.tolist()
    assert kept_of(model.vtprune.last) == kept


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return vtprune.load_tiny("llava")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(PICTURE)


def conversation(picture: Image.Image) -> list[dict[str, Any]]:
    question = {"type": "text", "text": QUESTION}
    return [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]


def processed(processor: Any, picture: Image.Image) -> dict[str, Any]:
    text = processor.apply_chat_template(conversation(picture), add_generation_prompt=True)
    return dict(processor(images=picture, text=text, return_tensors="pt"))


def test_the_tiny_model_answers_alike_on_half_of_its_tokens(tiny: Tiny, picture: Image.Image) -> None:
    model, processor = tiny
    inputs = processed(processor, picture)
    plain = model.generate(**inputs, max_new_tokens=STEPS)
    with vtprune.pruning(model, "vtprune", keep=0.5) as pruner:
        assert model.generate(**inputs, max_new_tokens=STEPS).tolist() == plain.tolist()
        assert (pruner.last.kept, pruner.last.tokens) == (128, 256)
    assert ANSWER in processor.decode(plain[0])


def test_the_pipeline_of_transformers_prunes(tiny: Tiny, picture: Image.Image) -> None:
    model, processor = tiny
    reports: list[vtprune.PruneReport] = []
    with vtprune.pruning(model, "fastervlm", keep=64, on_report=reports.append):
        tokens = model.generate(**processed(processor, picture), max_new_tokens=STEPS)
        answer = processor.decode(tokens[0], skip_special_tokens=True)
        ask = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
        found = ask(text=conversation(picture), max_new_tokens=STEPS, return_full_text=False)
    assert [report.kept for report in reports] == [64, 64]
    assert kept_of(reports[0]) == kept_of(reports[1])
    assert found[0]["generated_text"].strip()
    assert answer.endswith(found[0]["generated_text"].strip())


def test_a_pipeline_made_before_wrapping_prunes_too(tiny: Tiny, picture: Image.Image) -> None:
    model, processor = tiny
    ask = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    with vtprune.pruning(model, "fastervlm", keep=64) as pruner:
        ask(text=[conversation(picture)] * 2, max_new_tokens=STEPS, batch_size=2)
        assert [segment.k for segment in pruner.last.segments] == [64, 64]


def test_a_streamer_prints_what_generate_returns(
    tiny: Tiny, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = tiny
    inputs = processed(processor, picture)
    with vtprune.pruning(model, "vtprune"):
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        tokens = model.generate(**inputs, max_new_tokens=STEPS, streamer=streamer)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip()
    assert capsys.readouterr().out.strip() == answer.strip()
