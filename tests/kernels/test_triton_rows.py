"""Gathering and merging rows in Triton, bit by bit and sum by sum, against the specification."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_reference import drawn
from vtprune.errors import BackendUnavailable
from vtprune.kernels import reference as kernels

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def indices_of(B: int, L: int, K: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(K)
    return torch.stack([torch.randperm(L, generator=generator)[:K].sort().values for _ in range(B)])


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """What lies in memory, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def check_cut(tensors: list[torch.Tensor], indices: torch.Tensor, valid: torch.Tensor | None) -> None:
    got = kernels.cut_sequence.triton(tensors, indices, valid)
    expected = kernels.cut_sequence.specification(tensors, indices, valid)
    for own, other in zip(got, expected, strict=True):
        assert own.dtype == other.dtype
        assert own.stride() == other.stride()
        assert torch.equal(bits_of(own), bits_of(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "L", "K", "D"), [(1, 1, 1, 1), (2, 7, 3, 5), (3, 11, 11, 67), (1, 5, 2, 2100)])
def test_every_dtype_is_copied_bit_by_bit(
    device: torch.device, B: int, L: int, K: int, D: int, dtype: torch.dtype
) -> None:
    rows = (drawn(B, L, D) * 100).to(device, dtype)
    if dtype.is_floating_point:
        rows[0, 0, 0] = float("nan")
    check_cut([rows], indices_of(B, L, K).to(device), None)


def test_all_inputs_of_a_prompt_go_together(device: torch.device) -> None:
    """Embeddings, four rows of position ids, a mask, deepstack rows of two layers side by side, with padding."""
    B, L, K = 3, 13, 6
    embeds = drawn(B, L, 40).to(device, torch.bfloat16)
    ids = torch.arange(4 * B * L, device=device).view(4, B, L)
    mask = (drawn(B, L, seed=2) > 0).to(device)
    deep = drawn(2, B, L, 10, seed=3).to(device).permute(1, 2, 0, 3)
    valid = torch.ones(B, K, dtype=torch.bool, device=device)
    valid[0, :2] = valid[2, 3:] = False
    tensors = [embeds, ids.permute(1, 2, 0), mask, deep[..., 0, :], deep.contiguous()]
    check_cut(tensors, indices_of(B, L, K).to(device), valid)
    check_cut(tensors, indices_of(B, L, K).to(device), None)
    short = kernels.cut_sequence.triton(tensors, indices_of(B, L, K).to(device), valid)
    assert not short[0][~valid].any()
    assert short[1].permute(2, 0, 1).is_contiguous()


@pytest.mark.parametrize("slice_of", ["every second row", "every second channel", "transposed", "expanded"])
def test_strided_inputs_are_read_where_they_lie(device: torch.device, slice_of: str) -> None:
    rows = drawn(4, 10, 12).to(device)
    views = {
        "every second row": rows[::2, ::2],
        "every second channel": rows[:, :, 1::2],
        "transposed": rows.transpose(0, 1),
        "expanded": rows[:1].expand(4, -1, -1),
    }
    tensor = views[slice_of]
    check_cut([tensor], indices_of(tensor.shape[0], tensor.shape[1], 3).to(device), None)


def test_nothing_is_cut_to_nothing(device: torch.device) -> None:
    check_cut([drawn(2, 5, 3).to(device)], torch.empty(2, 0, dtype=torch.long, device=device), None)


def test_what_cannot_be_copied_is_refused(device: torch.device) -> None:
    indices = torch.zeros(1, 1, dtype=torch.long, device=device)
    with pytest.raises(BackendUnavailable, match="16 bytes"):
        kernels.cut_sequence.triton([torch.zeros(1, 1, 1, dtype=torch.complex128, device=device)], indices)
    with pytest.raises(BackendUnavailable, match="17 tensors"):
        kernels.cut_sequence.triton([torch.zeros(1, 1, device=device)] * 17, indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("S", "N", "K", "D"), [(1, 1, 1, 1), (2, 7, 3, 5), (3, 31, 4, 33), (1, 13, 13, 1030)])
def test_groups_are_merged_as_specified(
    device: torch.device, S: int, N: int, K: int, D: int, dtype: torch.dtype
) -> None:
    features = drawn(S, N, D).to(device, dtype)
    generator = torch.Generator().manual_seed(N)
    into = torch.randint(-1, K, (S, N), generator=generator)
    into[:, :K] = torch.arange(K)
    into, weights = into.to(device), drawn(S, N, seed=3).to(device)
    got = kernels.merge_rows.triton(features, into, weights, K)
    expected = kernels.mixture_of(into, weights, K) @ features.float()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(got, kernels.merge_rows.triton(features, into, weights, K))


def test_tokens_without_a_number_count_as_zero_and_strides_do_not_matter(device: torch.device) -> None:
    features = drawn(2, 6, 8).to(device)
    features[0, 1, 2] = float("nan")
    features[1, 2, 3] = float("inf")
    into = torch.tensor([[0, 0, 1, 1, -1, 0], [1, 0, 0, -1, -1, -1]], device=device)
    weights = torch.tensor([[1.0, 2.0, 0.0, 0.0, 5.0, 0.5], [1.0, -1.0, 0.0, 1.0, 1.0, 1.0]], device=device)
    wide = torch.stack([features, features], dim=3)[..., 0]
    got = kernels.merge_rows.triton(wide, into, weights, 2)
    expected = kernels.mixture_of(into, weights, 2) @ features.nan_to_num(nan=0.0)
    torch.testing.assert_close(got, expected)
    on_host = kernels.merge_rows.specification(features.cpu(), into.cpu(), weights.cpu(), 2)
    torch.testing.assert_close(on_host, expected.cpu())
