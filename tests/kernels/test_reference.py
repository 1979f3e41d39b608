"""The specification of the kernels against loops, at odd sizes."""

from __future__ import annotations

import pytest
import torch

from tests.fidelity import loops
from vtprune.errors import BackendUnavailable
from vtprune.kernels import attention, host
from vtprune.kernels import reference as kernels
from vtprune.kernels.backends import choose_backend
from vtprune.readings import BlockAttention
from vtprune.runtime.encoded import by_segment
from vtprune.stages.rules import Received


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("B", "H", "N", "d"), [(1, 1, 2, 1), (2, 3, 7, 5), (1, 4, 33, 8)])
def test_cls_attention_is_the_loop(B: int, H: int, N: int, d: int) -> None:
    query, key = drawn(B, H, N, d), drawn(B, H, N, d, seed=1)
    got = attention.cls_attention(query, key, scale=d**-0.5)
    expected = [loops.cls_attention(q.numpy(), k.numpy(), d**-0.5) for q, k in zip(query, key, strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pictures", [[7], [3, 4], [1, 5, 1]])
@pytest.mark.parametrize("block", [2, 256])
def test_received_attention_is_the_loop(pictures: list[int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERIES_PER_BLOCK", block)
    query, key = drawn(1, 2, 7, 4), drawn(1, 2, 7, 4, seed=1)
    seen = BlockAttention(query=query, key=key, scale=0.5, has_cls=False)
    got = by_segment(Received(), seen, tuple(pictures))
    expected = loops.received_attention(query[0].numpy(), key[0].numpy(), 0.5, pictures)
    torch.testing.assert_close(got[0], torch.tensor(expected).float(), atol=1e-6, rtol=1e-5)
    assert got.sum() == pytest.approx(len(pictures), abs=1e-5)


def test_attention_of_low_precision_inputs_is_accumulated_in_fp32() -> None:
    query, key = drawn(1, 2, 9, 16).bfloat16(), drawn(1, 2, 9, 16, seed=1).bfloat16()
    for read in (attention.cls_attention, attention.received_attention, attention.attention_from):
        low, high = read(query, key, scale=0.25), read(query.float(), key.float(), scale=0.25)
        assert low.dtype == torch.float32
        assert torch.equal(low, high)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("left_padded", [True, False])
def test_kept_indices_are_those_of_the_loop(left_padded: bool, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "holds", lambda tensor: on_host)
    kept = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    indices, valid, slots = kernels.kept_indices(kept, 3, left_padded=left_padded)
    for row, own, ok, slot in zip(kept, indices, valid, slots, strict=True):
        expected = row.nonzero()[:, 0].tolist()
        assert own[ok].tolist() == expected
        where = ok.nonzero()[:, 0].tolist()
        assert where == list(range(3 - len(expected), 3) if left_padded else range(len(expected)))
        assert slot[row].tolist() == where
        start = where[0] - 1 if where else 2 * left_padded
        assert slot.tolist() == [max(start + int(row[: i + 1].sum()), 0) for i in range(len(row))]


def test_rows_are_cut_bit_for_bit() -> None:
    for rows in (drawn(3, 7, 5), drawn(3, 7, 5).bfloat16(), drawn(3, 5, 7).transpose(1, 2), drawn(6, 7, 5)[::2]):
        indices = torch.tensor([[0, 6, 3], [1, 1, 1], [5, 4, 2]])
        assert torch.equal(
            kernels.rows_at(rows, indices), torch.stack([r[i] for r, i in zip(rows, indices, strict=True)])
        )
        at = indices[:2] + torch.tensor([[2], [0]]) * rows.shape[1]
        assert torch.equal(kernels.take_rows(rows, at), torch.stack([rows[2, indices[0]], rows[0, indices[1]]]))


def test_top_select_breaks_ties_by_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0]])
    assert kernels.top_select(scores, 4).tolist() == [[1, 2, 3, 0]]


def test_an_explicit_backend_is_honoured_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_backend(name) for name in ("auto", "torch")] == ["auto", "torch"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="triton"):
        choose_backend("triton")
