"""The forms for host memory against the reference, which runs on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.test_reference import drawn
from vtprune.kernels import greedy as steps
from vtprune.kernels import host
from vtprune.kernels import reference as kernels


@pytest.fixture(autouse=True)
def products_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the small pictures of these tests are taken for large ones."""
    monkeypatch.setattr(host, "_CHEAP_PRODUCT", 0)


def by_reference(call: Any, *args: Any, **kwargs: Any) -> Any:
    """What the reference itself returns; inputs are left as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "holds", lambda tensor: False)
        return call(*args, **{name: x.clone() if torch.is_tensor(x) else x for name, x in kwargs.items()})


def greedy(S: int, N: int, m: int, seed: int = 0) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Arguments of a greedy selection with `m` tokens taken before and some that must not be chosen."""
    units, relevance = kernels.unit_rows(drawn(S, N, 7, seed=seed)), drawn(S, N, seed=seed + 1)
    available = drawn(S, N, seed=seed + 2) > -0.5
    taken = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:m]] * S) if m else None
    first = relevance.masked_fill(~available, float("-inf"))
    return (units, relevance, first), {"weight": 0.7, "taken": taken, "available": available}


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("N", [1, 2, 95, 96, 97, 200, 289, 577])
def test_mirrored_similarity_is_the_product(N: int, S: int) -> None:
    units = kernels.unit_rows(drawn(S, N, 5))
    torch.testing.assert_close(kernels.cosine_similarity(units), units @ units.transpose(1, 2), atol=1e-6, rtol=0)


def test_similarity_of_a_picture_does_not_depend_on_its_stack() -> None:
    units = kernels.unit_rows(drawn(3, 150, 9))
    assert torch.equal(kernels.cosine_similarity(units)[1], kernels.cosine_similarity(units[1:2])[0])


@pytest.mark.parametrize("reduce", ["min", "sum"])
@pytest.mark.parametrize("m", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 9, 30, 60])
@pytest.mark.parametrize("known", [True, False])
def test_greedy_choice_is_that_of_the_reference(k: int, m: int, reduce: str, known: bool) -> None:
    tensors, options = greedy(3, 200, m)
    options |= {"reduce": reduce}
    select: Any = steps.greedy_select
    if known:
        worths = kernels.cosine_similarity(tensors[0]).mul_(-options.pop("weight")).add_(tensors[1][:, None])
        select, tensors = steps.pairwise_select, (worths, tensors[2])
    expected = by_reference(select, *tensors, k, **options)
    chosen = select(*tensors, k, **options)
    assert torch.equal(chosen, expected)
    assert options["available"].gather(1, chosen).all()
    if m:
        assert not (chosen[:, :, None] == options["taken"][:, None]).any()


@pytest.mark.parametrize("reduce", ["min", "sum"])
@pytest.mark.parametrize("k", [1, 9, 30, 60])
def test_weights_of_tokens_and_the_most_isolated_one_to_start_from(k: int, reduce: Any) -> None:
    (features, relevance, _), options = greedy(3, 97, 0)
    options |= {"weight": drawn(3, 97, seed=5).abs(), "reduce": reduce}
    expected = by_reference(steps.greedy_select, features, relevance, None, k, **options)
    assert torch.equal(steps.greedy_select(features, relevance, None, k, **options), expected)


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("k", [1, 20])
def test_similarities_that_are_not_held_choose_the_same(k: int, m: int) -> None:
    tensors, options = greedy(2, 61, m)
    expected = by_reference(steps.greedy_select, *tensors, k, **options)
    assert torch.equal(by_reference(steps.greedy_select, *tensors, k, **options, held=None), expected)
    rough = by_reference(steps.greedy_select, *tensors, k, **options, held=torch.bfloat16)
    assert (rough.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("reduce", ["min", "sum"])
def test_what_must_not_be_chosen_is_not_chosen_first_either(reduce: Any) -> None:
    features, nothing = drawn(1, 9, 4), torch.zeros(1, 9)
    first = nothing.clone()
    first[0, 3] = float("inf")
    available = torch.arange(9)[None] != 3
    chosen = steps.greedy_select(features, nothing, first, 8, reduce=reduce, available=available)
    assert 3 not in chosen.tolist()[0]
    assert torch.equal(
        chosen, by_reference(steps.greedy_select, features, nothing, first, 8, reduce=reduce, available=available)
    )


def test_numbers_in_low_precision_are_taken() -> None:
    features, numbers = drawn(2, 30, 4).bfloat16(), drawn(2, 30, seed=1).abs().bfloat16()
    high = (features.float(), numbers.float())
    low = steps.greedy_select(features, numbers, numbers, 5, weight=numbers)
    assert torch.equal(low, steps.greedy_select(*high, high[1], 5, weight=high[1]))
    assert torch.equal(steps.facility_select(features, numbers, 5), steps.facility_select(*high, 5))
    into = torch.zeros(2, 30, dtype=torch.long)
    assert torch.equal(kernels.merge_rows(features, into, numbers, 1), kernels.merge_rows(high[0], into, high[1], 1))


@pytest.mark.parametrize("limit", [0, 2**27])
def test_products_that_are_cheap_choose_the_same(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = greedy(3, 120, 2)
    monkeypatch.setattr(host, "_CHEAP_PRODUCT", limit)
    expected = by_reference(steps.greedy_select, *tensors, 20, **options)
    assert torch.equal(steps.greedy_select(*tensors, 20, **options), expected)


@pytest.mark.parametrize(("N", "rows_at_once"), [(1, 1024), (7, 3), (40, 16)])
def test_isolation_is_the_distance_to_the_nearest_other(
    N: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_ROWS_AT_ONCE", rows_at_once)
    units = kernels.unit_rows(drawn(2, N, 5))
    expected = [
        [-max((float(a @ b) for j, b in enumerate(row) if j != i), default=-torch.inf) for i, a in enumerate(row)]
        for row in units
    ]
    torch.testing.assert_close(steps.isolation(units), torch.tensor(expected))


@pytest.mark.parametrize("at_once", [1, 2, 48])
def test_guesses_of_what_is_asked_next_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relevance that promises the opposite of what is chosen: guesses fail, and everything is computed in the end."""
    monkeypatch.setattr(host, "_ROWS_AT_ONCE", at_once)
    units = kernels.unit_rows(drawn(2, 120, 4))
    relevance = units[:, :1].matmul(units.transpose(1, 2))[:, 0]
    options = {"weight": 2.0}
    chosen = steps.greedy_select(units, relevance, relevance, 40, **options)
    assert torch.equal(chosen, by_reference(steps.greedy_select, units, relevance, relevance, 40, **options))


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize(("N", "k"), [(1, 1), (2, 1), (40, 17), (97, 60), (200, 9)])
def test_facility_location_is_that_of_the_reference(N: int, k: int, m: int) -> None:
    m = min(m, N - k)
    units, salience = kernels.unit_rows(drawn(3, N, 7)), drawn(3, N, seed=1).abs()
    available = torch.rand(3, N, generator=torch.Generator().manual_seed(2)) < (1 if N < 40 else 0.9)
    taken = available.byte().sort(dim=1, descending=True, stable=True).indices[:, :m] if m else None
    options = {"taken": taken, "available": available if taken is None else available.scatter(1, taken, False)}
    chosen = steps.facility_select(units, salience, k, **options)
    assert torch.equal(chosen, by_reference(steps.facility_select, units, salience, k, **options))
    assert options["available"].gather(1, chosen).all()
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("at_once", [1, 3, 500])
def test_bounds_brought_up_to_date_in_any_number_choose_the_same(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_GAINS_AT_ONCE", at_once)
    units, salience = kernels.unit_rows(drawn(2, 150, 5)), drawn(2, 150, seed=1).abs()
    expected = by_reference(steps.facility_select, units, salience, 80)
    assert torch.equal(steps.facility_select(units, salience, 80), expected)


def test_facility_location_of_equal_tokens_takes_the_lower_index() -> None:
    units, same = kernels.unit_rows(torch.ones(1, 100, 3)), torch.ones(1, 100)
    assert steps.facility_select(units, same, 20).tolist() == [list(range(20))]


def test_equal_tokens_are_chosen_by_the_lower_index() -> None:
    units = kernels.unit_rows(torch.ones(1, 100, 3))
    nothing = torch.zeros(1, 100)
    assert steps.greedy_select(units, nothing, nothing, 20, weight=1.0).tolist() == [list(range(20))]
    assert steps.greedy_select(units, nothing, nothing, 50, weight=1.0).tolist() == [list(range(50))]


@pytest.mark.parametrize("M", [1, 7, 60])
def test_vacated_ids_are_those_of_the_reference(M: int) -> None:
    generator = torch.Generator().manual_seed(M)
    ids = torch.randint(0, 40, (3, M), generator=generator)
    was = torch.rand(3, M, generator=generator) > 0.2
    was[2] = False
    stays = was & (torch.rand(3, M, generator=generator) > 0.5)
    below, count = kernels.vacated_below(ids, was, stays)
    expected, total = by_reference(kernels.vacated_below, ids, was, stays)
    assert torch.equal(below[stays], expected[stays])
    assert not below[~was].any()
    assert torch.equal(count, total)
