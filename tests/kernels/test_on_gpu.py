"""What only a GPU can tell: graphs, tensor cores, and that nothing waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import vtprune
from tests.kernels.test_reference import drawn
from vtprune.kernels import attention, graphs, greedy, reference
from vtprune.tiny import PICTURE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("held", [torch.float32, None], ids=["held", "computed"])
def test_large_pictures_choose_as_on_the_host(dtype: torch.dtype, held: Any) -> None:
    """Steps enough for a graph, products on tensor cores, and tokens for more than one block."""
    features, relevance = drawn(2, 5003, 64).to(dtype), drawn(2, 5003, seed=1)
    expected = greedy.greedy_select.specification(features, relevance, relevance, 60)
    got = greedy.greedy_select.triton(*on_gpu(features, relevance, relevance), 60, held=held)
    assert got.cpu().tolist() == expected.tolist()


def test_a_graph_is_let_go_when_it_has_run() -> None:
    number = torch.zeros((), device="cuda")
    for _ in range(3):
        graphs.repeat(lambda: number.add_(1), 100, number.device)
        torch.cuda.synchronize()
    assert number.item() == 300
    assert len(graphs._running.graphs) <= 1


def test_steps_are_captured_in_a_graph_of_the_caller() -> None:
    number, graph = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    graphs.repeat(lambda: number.add_(1), 2, number.device)
    with torch.cuda.graph(graph):
        graphs.repeat(lambda: number.add_(1), 50, number.device)
    graph.replay()
    torch.cuda.synchronize()
    assert number.item() == 52


def test_no_kernel_waits_for_the_device() -> None:
    x, n = on_gpu(drawn(2, 300, 64).bfloat16(), drawn(2, 300, seed=1).abs())
    query, key = (drawn(1, 4, 300, 64, seed=seed).cuda().bfloat16() for seed in (2, 3))
    at = torch.arange(3, device="cuda").expand(2, -1)
    allowed = torch.ones(1, 5, 300, dtype=torch.bool, device="cuda")

    def everything() -> None:
        greedy.greedy_select.triton(x, n, None, 40)
        greedy.greedy_select.triton(x, n, n, 40, held=None)
        greedy.dpp_select.triton(x, n, 9)
        greedy.facility_select.triton(x, n, 9)
        reference.cut_sequence.triton([x, n], at)
        reference.merge_rows.triton(x, torch.zeros_like(n).long(), n, 1)
        greedy.greedy_select.triton(x, n, n, 40, taken=at)
        greedy.pairwise_select.triton(torch.cdist(x.float(), x.float()), n, 9)
        reference.cut_sequence.triton([x, n], at, at == 0)
        attention.cls_attention.triton(query, key, scale=0.1)
        attention.attention_from.triton(query, key, scale=0.1)
        attention.rows_attention.triton(query[:, :, :5], key[:, :2], allowed, scale=0.1)
        attention.attention_to.triton(query, key, torch.ones(1, 1, 300, device="cuda"), scale=0.1)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_runs_on_triton_by_itself() -> None:
    model, processor = vtprune.load_tiny("llava")
    text = "user : <image> what color is the cross ? assistant :"
    inputs = processor(images=Image.open(PICTURE), text=text, return_tensors="pt").to("cuda")
    model.to("cuda")
    kept = {}
    for backend in ("auto", "torch"):
        with vtprune.pruning(model, "divprune", keep=0.25, backend=backend) as pruner, torch.no_grad():
            model(**inputs)
            kept[backend] = pruner.last.segments[0].keep.tolist()
            assert pruner.last.backend == ("triton" if backend == "auto" else "torch")
    assert kept["auto"] == kept["torch"]
