"""One wrapped model under several threads: each call keeps its own state."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.models import Prompt

THREADS, ROUNDS = 4, 6


@torch.no_grad()
def answers(model: nn.Module, batch: dict[str, Tensor]) -> list[list[int]]:
    return model.generate(**batch, max_new_tokens=5).tolist()


def test_threads_on_one_wrapped_model_answer_as_alone() -> None:
    model = models.build("llava_next")
    batches = [models.inputs(model, (Prompt(images=((30, 64),), text_after=2 + i, seed=i),)) for i in range(THREADS)]
    vtprune.wrap(model, keep=0.3)
    expected = [answers(model, batch) for batch in batches]
    found: list[list[object]] = [[] for _ in batches]

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            found[number].append(answers(model, batches[number]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [[answer] * ROUNDS for answer in expected]


def test_evidence_belongs_to_the_thread_that_gave_it() -> None:
    model = models.build("llava")
    batch = models.inputs(model, (Prompt(images=((32, 32),), seed=1),))
    vtprune.wrap(model, "uniform", keep=4)
    answers(model, batch)
    plain = model.vtprune.last.segments[0].keep.tolist()
    seen: list[list[int]] = []

    def work() -> None:
        answers(model, batch)
        seen.append(model.vtprune.last.segments[0].keep.tolist())

    with model.vtprune.using(protect=[[0]]):
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        answers(model, batch)
    assert seen == [plain]
    assert 0 in model.vtprune.last.segments[0].keep.tolist()
    assert 0 not in plain
