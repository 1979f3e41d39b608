"""Fixtures of the law files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

import vtprune
from tests.contracts import cases
from tests.contracts.state import snapshot
from vtprune.errors import InvalidOption, UnsupportedModel


@pytest.fixture(autouse=True)
def _leave_models_unwrapped(request: pytest.FixtureRequest) -> Iterator[None]:
    """A failure in one test must not show up as 'wrapped already' in the next."""
    torch.manual_seed(0)
    yield
    callspec = getattr(request.node, "callspec", None)
    case = callspec.params.get("case") if callspec is not None else None
    if isinstance(case, cases.Case) and hasattr(case.model, "vtprune"):
        vtprune.unwrap(case.model)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Where the library refuses to prune a case, a test may end in that refusal, and is counted as refused."""
    params = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
    case = params.get("case")
    if not isinstance(case, cases.Case):
        return (yield)
    said = "inside the encoder" if case.refused else ""
    if not case.honours(params.get("positions", "auto")):
        said = "cuts nothing in front of the language model"
    if not said:
        return (yield)
    before = snapshot(case.model)
    try:
        return (yield)
    except (UnsupportedModel, InvalidOption) as error:
        if said not in str(error):
            raise
        pyfuncitem.user_properties.append(("refused", str(error)))
        assert snapshot(case.model) == before
        return True


@pytest.fixture
def refuses(request: pytest.FixtureRequest) -> Callable[..., AbstractContextManager[None]]:
    """`with refuses(error, match):` asserts that one of our errors is raised, and counts the cell as refused."""

    @contextmanager
    def check(error: type[vtprune.VtpruneError], match: str) -> Iterator[None]:
        assert issubclass(error, vtprune.VtpruneError)
        with pytest.raises(error, match=match):
            yield
        request.node.user_properties.append(("refused", match))

    return check
