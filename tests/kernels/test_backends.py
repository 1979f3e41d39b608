"""Which backend runs: what was asked for, and what reports say of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.kernels.test_reference import drawn
from vtprune.errors import BackendUnavailable, InvalidOption
from vtprune.kernels import backends, reference
from vtprune.kernels.backends import Use, choose_backend, kernel, using
from vtprune.tiny import PICTURE


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(99, 64, "shared memory")


def indices(device: torch.device) -> torch.Tensor:
    return torch.tensor([[0, 2]], device=device)


def test_what_is_asked_for_runs(device: torch.device) -> None:
    rows = drawn(1, 4, 3).to(device)
    for requested, on_triton in (("torch", set()), ("triton", {"cut_sequence"})):
        with using(requested) as use:
            short = reference.cut_sequence([rows], indices(device))
        assert use.on_triton == on_triton
        assert torch.equal(short[0], rows[:, [0, 2]])


def test_auto_stays_with_torch_on_the_host() -> None:
    with using("auto") as use:
        reference.cut_sequence([drawn(1, 4, 3)], indices(torch.device("cpu")))
    assert str(use) == "torch"


def test_gradients_are_a_reason_to_refuse(device: torch.device) -> None:
    rows = drawn(1, 4, 3).to(device).requires_grad_()
    with using("triton"), pytest.raises(BackendUnavailable, match=r"cut_sequence: gradients flow"):
        reference.cut_sequence([rows], indices(device))
    with using("triton"), torch.no_grad():
        reference.cut_sequence([rows], indices(device))


def test_without_an_interpreter_host_tensors_are_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with using("triton"), pytest.raises(BackendUnavailable, match="tensors are on cpu"):
        reference.cut_sequence([drawn(1, 4, 3)], indices(torch.device("cpu")))


def test_a_missing_triton_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda: "triton is not installed")
    with using("triton"), pytest.raises(BackendUnavailable, match="not installed; use backend='auto'"):
        reference.cut_sequence([drawn(1, 4, 3)], indices(torch.device("cpu")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match="not installed"):
        choose_backend("triton")


def test_where_auto_falls_back_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(backends, "missing", lambda: "triton is not installed")
    with using("auto") as use:
        found = reference.cut_sequence([drawn(1, 4, 3)], indices(torch.device("cpu")))
    assert found[0].shape == (1, 2, 3)
    assert str(use) == "torch (cut_sequence: triton is not installed)"
    use.absorb(Use(on_triton={"cls_attention"}))
    assert str(use) == "triton, but torch for cut_sequence: triton is not installed"
    assert str(Use(on_triton={"cls_attention"})) == "triton"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (out_of_resources, "cut_sequence: OutOfResources: out of resource"),
        (lambda: RuntimeError("Failed to find C compiler. Please specify via CC"), "cut_sequence: Failed to find C"),
    ],
    ids=["out of resources", "no compiler"],
)
def test_what_triton_itself_cannot_do_is_a_reason_too(
    error: Any, message: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error()

    monkeypatch.setattr("vtprune.kernels.triton_rows.cut_sequence", fail)
    monkeypatch.setattr(reference.cut_sequence, "_broken", "")
    with using("triton"), pytest.raises(BackendUnavailable, match=message):
        reference.cut_sequence([drawn(1, 4, 3).to(device)], indices(device))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with using("auto") as use:
        assert reference.cut_sequence([drawn(1, 4, 3)], indices(torch.device("cpu")))[0].shape == (1, 2, 3)
    assert message in str(use)


def test_errors_that_are_no_reason_are_raised(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr("vtprune.kernels.triton_rows.cut_sequence", fail)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with using("auto"), pytest.raises(RuntimeError, match="device-side"):
        reference.cut_sequence([drawn(1, 4, 3)], indices(torch.device("cpu")))


def test_a_triton_that_does_not_know_the_words_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = kernel("no_such_module")(lambda rows: rows)
    with using("triton"), pytest.raises(BackendUnavailable, match="this version of triton cannot be used"):
        broken(drawn(1, 4, 3))


def test_nothing_to_cut_and_words_instead_of_places(device: torch.device) -> None:
    for requested in ("auto", "triton"):
        with using(requested) as use:
            assert reference.cut_sequence([], indices(device)) == []
            short = reference.cut_sequence(tensors=[drawn(1, 4, 3).to(device)], indices=indices(device))
            assert short[0].shape == (1, 2, 3)
        assert requested in ("auto", str(use))


def test_blocks_nest() -> None:
    with using("torch") as outer:
        with using("triton"):
            assert backends.requested_now() == "triton"
        with pytest.raises(ZeroDivisionError), using("auto"):
            raise ZeroDivisionError
        assert backends.put_in_force(outer) is outer
    assert backends.requested_now() == "auto"


def test_a_kernel_keeps_the_name_and_the_text_of_its_specification() -> None:
    @kernel("triton_rows")
    def twice(value: torch.Tensor) -> torch.Tensor:
        """Two of it."""
        return value * 2

    assert (twice.name, twice.__doc__) == ("twice", "Two of it.")
    assert twice(torch.ones(1)).item() == 2


@pytest.fixture
def tiny() -> Any:
    from PIL import Image

    model, processor = vtprune.load_tiny("llava")
    text = "user : <image> what color is the cross ? assistant :"
    return model, processor(images=Image.open(PICTURE), text=text, return_tensors="pt")


def test_a_model_answers_alike_on_both_backends(device: torch.device, tiny: Any) -> None:
    """Scores, a greedy choice and the cut of a whole prefill, and the same tokens in the end."""
    model, inputs = tiny[0].to(device), tiny[1].to(device)
    found = {}
    for backend in ("torch", "triton"):
        with vtprune.pruning(model, "vtprune", keep=12, backend=backend) as pruner, torch.no_grad():
            logits = model(**inputs).logits[:, -1]
            found[backend] = logits, pruner.last.segments[0].keep.tolist()
            assert pruner.last.backend == backend
    assert found["torch"][1] == found["triton"][1]
    torch.testing.assert_close(found["torch"][0], found["triton"][0], atol=1e-4, rtol=1e-4)


def test_a_model_on_the_cpu_is_refused_before_its_first_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("triton", "cuda") == "triton"
    with pytest.raises(BackendUnavailable, match="the model is on the CPU"):
        choose_backend("triton", "cpu")
    assert choose_backend("auto", "cpu") == "auto"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InvalidOption, match="cuda"):
        choose_backend("cuda")
