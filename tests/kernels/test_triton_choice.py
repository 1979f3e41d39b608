"""Choosing step by step in Triton: the same tokens as by the specification, where no two are equally good."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.kernels.test_host import by_reference
from tests.kernels.test_reference import drawn
from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.kernels import graphs, greedy, reference
from vtprune.kernels.directions import Directions

SIZES = [(1, 1, 1), (1, 2, 2), (2, 7, 3), (3, 31, 13), (2, 67, 9)]
"""Pictures, tokens, and how many to choose of them."""
HELD = [torch.float32, None]


def moved(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}


def stack(S: int, N: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, Any]]:
    """Features (S, N, 9), and options: `m` tokens taken before, and some that are not to be had where N is large."""
    generator = torch.Generator().manual_seed(N + m)
    taken = torch.stack([torch.randperm(N, generator=generator)[:m] for _ in range(S)]) if m else None
    available = torch.rand(S, N, generator=generator) < (0.8 if N > 20 else 1)
    if taken is not None:
        available.scatter_(1, taken, False)
    return drawn(S, N, 9, seed=N).to(dtype), {"taken": taken, "available": available}


def agree(device: torch.device, select: Any, tensors: tuple[Any, ...], k: int, **options: Any) -> torch.Tensor:
    """Both choose the same; returns it."""
    expected = by_reference(select.specification, *tensors, k, **options)
    there = tuple(x.to(device) if torch.is_tensor(x) else x for x in tensors)
    got = select.triton(*there, k, **moved(device, options)).cpu()
    assert got.tolist() == expected.tolist()
    assert options["available"] is None or bool(options["available"].gather(1, got).all())
    return got


@pytest.mark.parametrize("held", HELD, ids=["held", "computed"])
@pytest.mark.parametrize("reduce", ["min", "sum"])
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize(("S", "N", "k"), SIZES)
def test_greedy_choice(device: torch.device, S: int, N: int, k: int, m: int, reduce: str, held: Any) -> None:
    features, options = stack(S, N, min(m, N - k))
    relevance, first = drawn(S, N, seed=1), drawn(S, N, seed=2)
    agree(
        device, greedy.greedy_select, (features, relevance, first), k, weight=0.7, reduce=reduce, held=held, **options
    )


@pytest.mark.parametrize("held", HELD, ids=["held", "computed"])
@pytest.mark.parametrize(("S", "N", "k"), SIZES)
def test_score_times_distance_from_the_most_isolated_token(
    device: torch.device, S: int, N: int, k: int, held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.kernels.triton_greedy.MOST_HELD", 16 * 4 * S * N * 5)
    features, options = stack(S, N, 0)
    worth = drawn(S, N, seed=1).abs()
    agree(device, greedy.greedy_select, (features, worth, None), k, weight=worth, held=held, **options)


@pytest.mark.parametrize("held", HELD, ids=["held", "computed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_multiplied_without_loss(device: torch.device, dtype: torch.dtype, held: Any) -> None:
    features, options = stack(2, 41, 0, dtype)
    nothing = torch.zeros(2, 41)
    agree(device, greedy.greedy_select, (features, nothing, None), 20, held=held, **options)


def test_similarities_held_in_bf16_are_those_of_the_specification(device: torch.device) -> None:
    features, options = stack(2, 41, 1)
    relevance = drawn(2, 41, seed=1)
    agree(device, greedy.greedy_select, (features, relevance, relevance), 20, held=torch.bfloat16, **options)


@pytest.mark.parametrize("block", [16, 32])
def test_more_tokens_than_fit_a_block(device: torch.device, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.kernels.triton_greedy._BLOCK", block)
    features, options = stack(2, 67, 1)
    relevance = drawn(2, 67, seed=1)
    agree(device, greedy.greedy_select, (features, relevance, relevance), 20, **options)
    same = torch.ones(1, 67, 3, device=device)
    nothing = torch.zeros(1, 67, device=device)
    assert greedy.greedy_select.triton(same, nothing, nothing, 60).tolist() == [list(range(60))]


@pytest.mark.parametrize("select", [greedy.dpp_select, greedy.facility_select], ids=lambda kernel: kernel.name)
def test_pictures_go_in_groups_where_memory_is_short(
    device: torch.device, select: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, options = stack(3, 13, 1)
    agree(device, select, (features, drawn(3, 13, seed=1).abs() + 0.1), 4, **options)
    monkeypatch.setattr("vtprune.kernels.triton_common.MOST_HELD", 2 * 4 * 13 * 13)
    agree(device, select, (features, drawn(3, 13, seed=1).abs() + 0.1), 4, **options)


@pytest.mark.parametrize("m", [0, 2])
def test_pairs_of_known_worth(device: torch.device, m: int) -> None:
    places, options = stack(2, 37, m)
    worths = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    agree(device, greedy.pairwise_select, (worths, drawn(2, 37, seed=3)), 12, **options)


@pytest.mark.parametrize("held", HELD, ids=["held", "computed"])
def test_of_equal_tokens_the_first_is_chosen(device: torch.device, held: Any) -> None:
    features, nothing = torch.ones(2, 70, 3, device=device), torch.zeros(2, 70, device=device)
    got = greedy.greedy_select.triton(features, nothing, nothing, 40, held=held)
    assert got.tolist() == [list(range(40))] * 2


@pytest.mark.parametrize("held", HELD, ids=["held", "computed"])
def test_what_has_no_direction_is_similar_to_nothing(device: torch.device, held: Any) -> None:
    features = drawn(1, 6, 4)
    features[0, 1], features[0, 2, 0], features[0, 4, 1] = 0, float("inf"), float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        nothing = torch.zeros(1, 6)
        options = {"available": None, "held": held}
        agree(device, greedy.greedy_select, (features.to(dtype), nothing, nothing), 6, **options)


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize(("S", "N", "k"), [*SIZES, (1, 30, 26)])
def test_determinantal_choice(device: torch.device, S: int, N: int, k: int, m: int) -> None:
    """Features have 9 channels: beyond 9 tokens nothing is novel, and the most relevant follow."""
    features, options = stack(S, N, min(m, N - k))
    if k > 20:
        options["available"] = None
    relevance = drawn(S, N, seed=1).clamp(min=0)
    relevance += torch.arange(N) * 1e-6
    agree(device, greedy.dpp_select, (features, relevance), k, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize(("S", "N", "k"), SIZES)
def test_facility_location(device: torch.device, S: int, N: int, k: int, m: int, dtype: torch.dtype) -> None:
    features, options = stack(S, N, min(m, N - k), dtype)
    agree(device, greedy.facility_select, (features, drawn(S, N, seed=1).abs() + 0.1), k, **options)


@pytest.mark.parametrize(("S", "k"), [(0, 2), (2, 0)])
def test_nothing_is_chosen_of_nothing(device: torch.device, S: int, k: int) -> None:
    features, numbers = torch.ones(S, 5, 3, device=device), torch.ones(S, 5, device=device)
    for select in (greedy.greedy_select.triton, greedy.greedy_select.specification):
        assert select(features, numbers, numbers, k).shape == (S, k)
    for kernel in (greedy.dpp_select, greedy.facility_select):
        assert kernel.triton(features, numbers, k).shape == kernel.specification(features, numbers, k).shape == (S, k)
    worths = torch.ones(S, 5, 5, device=device)
    for select in (greedy.pairwise_select.triton, greedy.pairwise_select.specification):
        assert select(worths, numbers, k).shape == (S, k)


class Launches:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.count = 0

    def __getitem__(self, grid: Any) -> Any:
        self.count += 1
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("module", "kernels", "run"),
    [
        ("triton_rows", {"_cut": 1}, lambda x, n: reference.cut_sequence.triton([x, n], torch.ones_like(n).long())),
        ("triton_rows", {"_merge": 1}, lambda x, n: reference.merge_rows.triton(x, torch.zeros_like(n).long(), n, 1)),
        ("triton_greedy", {"_greedy": 1, "_farthest": 0}, lambda x, n: greedy.greedy_select.triton(x, n, n, 5)),
        ("triton_greedy", {"_greedy": 1, "_farthest": 1}, lambda x, n: greedy.greedy_select.triton(x, n, None, 5)),
        (
            "triton_unheld",
            {"_look": 5, "_take": 4},
            lambda x, n: greedy.greedy_select.triton(x, n, n, 5, held=None),
        ),
        ("triton_facility", {"_gains": 1, "_facility": 1}, lambda x, n: greedy.facility_select.triton(x, n, 5)),
        ("triton_dpp", {"_determinantal": 1}, lambda x, n: greedy.dpp_select.triton(x, n, 5)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kernels_are_launched_as_often_as_they_say(
    device: torch.device, module: str, kernels: dict[str, int], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for every picture or step, but for what is computed step by step."""
    found = importlib.import_module(f"vtprune.kernels.{module}")
    counting = {name: Launches(getattr(found, name)) for name in kernels}
    for name, kernel in counting.items():
        monkeypatch.setattr(found, name, kernel)
    run(drawn(3, 8, 4).to(device), drawn(3, 8, seed=1).abs().to(device))
    assert {name: kernel.count for name, kernel in counting.items()} == kernels


def test_too_many_tokens_for_one_program_are_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.kernels.triton_common.MOST_TOKENS", 8)
    features, nothing = drawn(1, 9, 2).to(device), torch.zeros(1, 9, device=device)
    for select in (greedy.dpp_select, greedy.facility_select):
        with pytest.raises(BackendUnavailable, match="at most 8"):
            select.triton(features, nothing, 2)
    with pytest.raises(BackendUnavailable, match="float64"):
        greedy.dpp_select.triton(features[:, :8].double(), nothing[:, :8], 2)


def test_similarities_are_held_as_asked() -> None:
    assert greedy.held_dtype(1, 100, "auto") == torch.float32
    assert greedy.held_dtype(1, 10**5, "auto") is None
    assert greedy.held_dtype(1, 10**5, torch.bfloat16) == torch.bfloat16
    with pytest.raises(InvalidOption, match="float16"):
        greedy.held_dtype(1, 4, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_of_directions_are_cosines(device: torch.device, dtype: torch.dtype) -> None:
    features = (drawn(2, 11, 6) * 3).to(device, dtype)
    directions = Directions.of(features)
    cosines = directions.products() * directions.inverse[..., None] * directions.inverse[:, None]
    wide = features.float()
    expected = torch.nn.functional.cosine_similarity(wide[:, :, None], wide[:, None], dim=3)
    torch.testing.assert_close(cosines, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(directions.products(3, 7), directions.products()[:, 3:7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_nothing_is_held_features_are_not_copied_either(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    look = importlib.import_module("vtprune.kernels.triton_unheld").unheld_select
    monkeypatch.setattr(
        "vtprune.kernels.triton_greedy.unheld_select",
        lambda directions, *rest, **options: seen.append(directions.rows) or look(directions, *rest, **options),
    )
    features, nothing = drawn(2, 9, 4).to(device, dtype), torch.zeros(2, 9, device=device)
    greedy.greedy_select.triton(features, nothing, nothing, 3, held=None)
    assert [rows.data_ptr() for rows in seen] == [features.data_ptr()]


@pytest.mark.parametrize("count", [0, 1, graphs.WORTH_A_GRAPH, 40])
def test_steps_are_repeated_as_often_as_asked(device: torch.device, count: int) -> None:
    number = torch.zeros((), device=device)
    graphs.repeat(lambda: number.add_(1), count, device)
    assert number.item() == count
