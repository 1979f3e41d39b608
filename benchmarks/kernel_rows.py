"""The cases of `kernels.py` that gather rows, merge rows, and read attention; and the encoder with its probe."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from kernel_cases import OURS, Arm, Case, Disagreement, Inputs, Setting, Work, bounds, same_numbers, specification
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

import vtprune
from vtprune.kernels import attention, backends, reference

ROWS_OF_POSITIONS = 3
SDPA, WHOLE_MAP, IMAGE_LOOP, MIXTURE, REFERENCE = "sdpa", "whole map", "per-image loop", "dense mixture", "reference"
SIDE = 336
STATISTICS_BYTES = 64
"""The most that is kept of a query of a head beside what is asked for."""


def cut_case(setting: Setting, shape: Mapping[str, int]) -> Case:
    """Embeddings (B, L, D), position ids of M-RoPE (B, L, 3) and a mask (B, L), down to K a row and fewer, in one go.

    The ids lie in memory as (3, B, L), the way models hand them on.
    """
    B, L, K, D = (shape[letter] for letter in "BLKD")
    counts = [K - row * K // (10 * B) for row in range(B)]

    def draw(generator: torch.Generator) -> Inputs:
        device = setting.device
        embeds = torch.randn(B, L, D, generator=generator, device=device).to(setting.dtype)
        ids = torch.randint(0, L, (ROWS_OF_POSITIONS, B, L), generator=generator, device=device)
        mask = torch.rand(B, L, generator=generator, device=device) > 0.1
        order = torch.rand(B, L, generator=generator, device=device).argsort(dim=1)
        valid = torch.stack([torch.arange(K, device=device) >= K - count for count in counts])
        chosen = [order[row, :count].sort().values for row, count in enumerate(counts)]
        indices = pad_sequence(chosen, batch_first=True, padding_side="left")
        return {"tensors": [embeds, ids.permute(1, 2, 0), mask], "indices": indices, "valid": valid}

    def ours(inputs: Inputs) -> list[Tensor]:
        return reference.cut_sequence(inputs["tensors"], inputs["indices"], inputs["valid"])

    def plain(inputs: Inputs) -> list[Tensor]:
        return specification(reference.cut_sequence)(inputs["tensors"], inputs["indices"], inputs["valid"])

    def loop(inputs: Inputs) -> list[Tensor]:
        kept = [own[real] for own, real in zip(inputs["indices"], inputs["valid"], strict=True)]
        return [
            pad_sequence(
                [row[own] for row, own in zip(tensor, kept, strict=True)], batch_first=True, padding_side="left"
            )
            for tensor in inputs["tensors"]
        ]

    def check(inputs: Inputs) -> None:
        with backends.using(setting.backend):
            found = ours(inputs)
        for one, other in zip(found, loop(inputs), strict=True):
            if not torch.equal(one, other):
                raise Disagreement("cut_sequence and the loop do not give the same rows")

    row = D * setting.dtype.itemsize + ROWS_OF_POSITIONS * 8 + 1
    work = Work(bytes=(sum(counts) + B * K) * row + B * K * 9)
    wanted = bounds(setting, ("share_of_floor", ">=", 0.8))
    arms = [
        Arm(name=OURS, run=ours, work=work, bounds=wanted, around=partial(backends.using, setting.backend)),
        Arm(name=IMAGE_LOOP, run=loop),
    ]
    if setting.device == "cuda":
        arms.append(Arm(name=REFERENCE, run=plain))
    return Case(kernel="cut_sequence", letters=shape, dtype=setting.dtype, draw=draw, arms=tuple(arms), check=check)


def merge_case(setting: Setting, shape: Mapping[str, int]) -> Case:
    """Weighted means of N tokens in K groups, against the product with a dense S x K x N mixture."""
    S, N, K, D = (shape[letter] for letter in "SNKD")

    def draw(generator: torch.Generator) -> Inputs:
        features = torch.randn(S, N, D, generator=generator, device=setting.device).to(setting.dtype)
        own = torch.arange(K, device=setting.device).expand(S, K)
        others = torch.randint(-1, K, (S, N - K), generator=generator, device=setting.device)
        weights = torch.rand(S, N, generator=generator, device=setting.device)
        return {"features": features, "into": torch.cat([own, others], dim=1), "weights": weights}

    def ours(inputs: Inputs) -> Tensor:
        return reference.merge_rows(inputs["features"], inputs["into"], inputs["weights"], K)

    def mixed(inputs: Inputs) -> Tensor:
        belongs = inputs["into"][:, None] == torch.arange(K, device=setting.device)[:, None]
        mixture = belongs * inputs["weights"][:, None]
        return (mixture / mixture.sum(dim=2, keepdim=True)) @ inputs["features"].float()

    def check(inputs: Inputs) -> None:
        with backends.using(setting.backend):
            same_numbers(ours(inputs), mixed(inputs), "merge_rows")

    work = Work(bytes=S * N * (D * setting.dtype.itemsize + 12) + S * K * D * 4)
    arms = (
        Arm(name=OURS, run=ours, work=work, around=partial(backends.using, setting.backend)),
        Arm(name=MIXTURE, run=mixed),
    )
    return Case(kernel="merge_rows", letters=shape, dtype=setting.dtype, draw=draw, arms=arms, check=check)


def attention_case(setting: Setting, name: str, shape: Mapping[str, int]) -> Case:
    """What is read of an attention, against one call of SDPA for the same layer, and against the map of all rows.

    `cls_attention` and `received_attention` are of an encoder (every token sees all), `rows_attention` of R last rows
    of a decoder, which see what is in front of them, with H heads over G of keys.
    """
    read = _READ[name]
    B, H, N, d = (shape[letter] for letter in "BHNd")
    G, R, size = shape.get("G", H), shape.get("R", 0), setting.dtype.itemsize

    def draw(generator: torch.Generator) -> Inputs:
        heads = [
            torch.randn(B, count, N, d, generator=generator, device=setting.device).to(setting.dtype)
            for count in (H, G, G)
        ]
        inputs = dict(zip(("query", "key", "value"), heads, strict=True))
        allowed = torch.ones(N, N, dtype=torch.bool, device=setting.device).tril()[N - R :].expand(B, R, N)
        return inputs | {"allowed": allowed, "scale": d**-0.5}

    def sdpa(inputs: Inputs) -> Tensor:
        return scaled_dot_product_attention(
            inputs["query"], inputs["key"], inputs["value"], is_causal=R > 0, enable_gqa=G != H
        )

    def check(inputs: Inputs) -> None:
        exact = inputs | {part: inputs[part].float() for part in ("query", "key")}
        with backends.using(setting.backend):
            same_numbers(read(inputs), _of_map(name, exact), name)

    keys = B * G * N * d * size
    work = {
        "cls_attention": Work(bytes=keys + B * N * 4),
        "rows_attention": Work(bytes=keys + B * H * R * (N * 4 + d * size), operations=2 * B * H * R * N * d),
        "received_attention": Work(bytes=2 * keys, operations=2 * B * H * N * N * d),
    }[name]
    most = 2.0 if name == "received_attention" else 0.3
    extra = STATISTICS_BYTES * B * H * N + (5 * B * H * R * N if name == "rows_attention" else 0)
    wanted = bounds(setting, ("ratio", "<=", most), ("extra_bytes", "<=", extra))
    arms = (
        Arm(
            name=OURS,
            run=read,
            over=SDPA,
            work=work,
            bounds=wanted,
            around=partial(backends.using, setting.backend),
        ),
        Arm(name=SDPA, run=sdpa, over=SDPA),
        Arm(name=WHOLE_MAP, run=partial(_of_map, name)),
    )
    return Case(kernel=name, letters=shape, dtype=setting.dtype, draw=draw, arms=arms, check=check)


def _rows(inputs: Inputs) -> Tensor:
    R = inputs["allowed"].shape[1]
    query = inputs["query"][:, :, -R:]
    return attention.rows_attention(query, inputs["key"], inputs["allowed"], scale=inputs["scale"])


_READ = {
    "cls_attention": lambda inputs: attention.cls_attention(inputs["query"], inputs["key"], scale=inputs["scale"]),
    "rows_attention": _rows,
    "received_attention": lambda inputs: attention.received_attention(
        inputs["query"], inputs["key"], scale=inputs["scale"]
    ),
}


def _of_map(name: str, inputs: Inputs) -> Tensor:
    """The same from the map of all rows, as eager attention makes it."""
    query, key = inputs["query"], inputs["key"]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * inputs["scale"]
    if name == "rows_attention":
        R, N = inputs["allowed"].shape[1:]
        future = torch.ones(N, N, dtype=torch.bool, device=query.device).triu(1)
        return torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1, dtype=torch.float32)[:, :, N - R :]
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return probabilities.mean(dim=(1, 2)) if name == "received_attention" else probabilities.mean(dim=1)[:, 0, 1:]


def encoder_case(setting: Setting, shape: Mapping[str, int]) -> Case:
    """The vision tower of LLaVA-1.5 (CLIP-L/336) with its projector, and the same while its CLS row is read."""

    @functools.cache
    def model() -> nn.Module:
        return _llava(shape["layers"], setting)

    def draw(generator: torch.Generator) -> Inputs:
        pixels = torch.randn(shape["B"], 3, SIDE, SIDE, generator=generator, device=setting.device)
        return {"pixels": pixels.to(setting.dtype)}

    def encode(inputs: Inputs) -> Tensor:
        features = model().model.get_image_features(inputs["pixels"], return_dict=True).pooler_output
        return torch.stack(list(features))

    def probed() -> Any:
        return vtprune.pruning(model(), "fastervlm", keep=0.5, backend=setting.backend)

    def check(inputs: Inputs) -> None:
        plain = encode(inputs)
        with probed():
            if not torch.equal(plain, encode(inputs)):
                raise Disagreement("the encoder with its probe gives other features than without")

    wanted = bounds(setting, ("ratio", "<=", 1.02))
    arms = (
        Arm(name=OURS, run=encode, over="no probe", bounds=wanted, around=probed),
        Arm(name="no probe", run=encode, over="no probe"),
    )
    return Case(kernel="encoder-probe", letters=shape, dtype=setting.dtype, draw=draw, arms=arms, check=check)


def _llava(layers: int, setting: Setting) -> nn.Module:
    """Random weights, CLIP-L/336 of so many layers in front of next to no language model."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers, "num_attention_heads": 16}
    text = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=SIDE, patch_size=14),
        text_config=transformers.LlamaConfig(**text, vocab_size=64),
        image_token_index=5,
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = transformers.LlavaForConditionalGeneration._from_config(config, dtype=setting.dtype)
    return model.eval()
