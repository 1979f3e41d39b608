"""Every arm does what its docstring says, against references that are built by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.eval.common import TOKENS, batch_of, bundled, llava, qwen
from vtprune._evaluate import _relevance
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedCall
from vtprune.eval.arms import OWN, WHOLE, about, arm_of, coarser_grid, plan
from vtprune.eval.questions import coverage, draw_items, in_turn, judged
from vtprune.eval.subject import Subject

ITEMS = draw_items("test", 0, 3)
FEW = (*ITEMS[:2], *ITEMS[-2:])
SUBJECTS = {"llava": llava, "qwen2_5_vl": lambda: qwen("qwen2_5_vl"), "qwen3_vl": lambda: qwen("qwen3_vl")}


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("arm", [*OWN, "divprune", "fastervlm"])
def test_every_arm_keeps_what_the_budget_allows(name: str, arm: str) -> None:
    batch = batch_of(SUBJECTS[name](), FEW)
    answers = arm_of(arm)(batch, 0.3)
    k = batch.count(0.3)
    assert answers.kept == (int(k**0.5) ** 2 if arm == "downsample" else k,) * len(FEW)
    assert len(answers.words) == len(FEW) and all(answers.words)
    assert (answers.tokens is None) == (arm in ("downsample", "pool"))


def test_everything_kept_is_the_unpruned_answer() -> None:
    batch = batch_of(llava(), FEW)
    for arm in (*OWN, "divprune", "identity"):
        assert arm_of(arm)(batch, 1.0).words == batch.whole[0].words, arm


def test_pictures_are_encoded_once_for_all_arms() -> None:
    batch, calls = batch_of(llava(), FEW), []
    handle = llava().base.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        for arm in ("identity", "random", "uniform", "pool", "oracle", "fastervlm"):
            arm_of(arm)(batch, 0.3)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_oracle_keeps_the_tokens_of_things_first() -> None:
    batch = batch_of(llava(), ITEMS)
    for keep in (1, 3, 12):
        with pytest.warns(UserWarning) if keep == 1 else _nothing():
            answers = arm_of("oracle")(batch, keep)
        for item, kept in zip(ITEMS, answers.tokens):
            wanted = in_turn(coverage(item.views, batch.parts))
            assert set(wanted[:keep]) <= set(kept.tolist())


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_random_draws_anew_for_every_scene_and_alike_in_every_batch() -> None:
    together = arm_of("random")(batch_of(llava(), FEW), 0.3).tokens
    alone = [arm_of("random")(batch_of(llava(), [item]), 0.3).tokens[0] for item in FEW]
    assert all(a.tolist() == b.tolist() for a, b in zip(together, alone))
    assert together[0].tolist() == together[1].tolist() != together[2].tolist()


def test_blind_is_the_answer_to_the_next_picture() -> None:
    answers = arm_of("blind")(batch_of(llava(), ITEMS), 1.0)
    swapped = [dataclasses.replace(item, views=item.other) for item in ITEMS]
    assert answers.words == batch_of(llava(), swapped).whole[0].words
    assert answers.words != batch_of(llava(), ITEMS).whole[0].words
    assert answers.kept == (TOKENS,) * len(ITEMS) and answers.tokens is None


@pytest.mark.parametrize(
    ("grid", "count", "expected"),
    [
        ((16, 16), 128, {(8, 16), (16, 8)}),
        ((16, 16), 64, {(8, 8)}),
        ((16, 16), 28, {(4, 7), (7, 4)}),
        ((16, 16), 13, {(3, 4), (4, 3)}),
        ((16, 16), 1, {(1, 1)}),
        ((16, 16), 256, {(16, 16)}),
        ((8, 16), 2, {(1, 2)}),
        ((1, 9), 3, {(1, 3)}),
    ],
)
def test_the_grid_of_a_smaller_picture(grid: tuple[int, int], count: int, expected: set[tuple[int, int]]) -> None:
    assert coarser_grid(grid, count) in expected


def test_pool_is_a_prompt_of_means() -> None:
    """Transformers alone, fed the means in place of the picture."""
    subject = llava()
    for item in FEW:
        batch = batch_of(subject, [item])
        answers = arm_of("pool")(batch, 4)
        with torch.no_grad():
            features = subject.base.get_image_features(batch.inputs["pixel_values"]).pooler_output[0]
            means = features.view(2, 2, 2, 2, -1).mean(dim=(1, 3)).flatten(0, 1)
            ids = batch.inputs["input_ids"][0]
            embeds = subject.model.get_input_embeddings()(ids)
            places = (ids == subject.processor.image_token_id).nonzero()[:, 0]
            short = torch.cat([embeds[: places[0]], means, embeds[places[-1] + 1 :]])[None]
            written = subject.model.generate(inputs_embeds=short, max_new_tokens=3, do_sample=False)
        expected = subject.processor.batch_decode(written, skip_special_tokens=True)[0]
        assert answers.words == (judged(expected),)


def test_downsample_is_a_smaller_picture_of_a_shorter_prompt() -> None:
    """Transformers alone, fed what its tower makes of the picture at half the size."""
    subject = llava()
    half = {"height": 64, "width": 64}
    for item in FEW:
        answers = arm_of("downsample")(batch_of(subject, [item]), 5)
        inputs = subject.inputs([item], [item.views], size=half)
        with torch.no_grad():
            encoded = subject.base.get_image_features(inputs.pop("pixel_values"), interpolate_pos_encoding=True)
            assert len(encoded.pooler_output[0]) == 4
            written = subject.model.generate(
                **inputs, mm_encoder_outputs={"image": encoded}, max_new_tokens=3, do_sample=False
            )
        text = subject.processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answers.words == (judged(text[0]),) and answers.kept == (4,)


class _OneSize:
    """A processor that scales every picture to its own size."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, *, size: Any = None, **options: Any) -> Any:
        return self._inner(**options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_downsample_on_a_model_of_one_size_is_refused() -> None:
    subject = Subject(model=llava().model, processor=_OneSize(llava().processor))
    with pytest.raises(UnsupportedCall, match="more than 5 tokens"):
        arm_of("downsample")(batch_of(subject, FEW), 5)


def test_positions_of_the_subject_reach_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "vtprune.eval.subject.pruning",
        lambda *a, **options: seen.append(options["positions"]) or pytest.fail("enough"),
    )
    subject = Subject(model=llava().model, processor=llava().processor, positions="keep")
    with pytest.raises(pytest.fail.Exception):
        batch_of(subject, FEW).answer("divprune", 0.3)
    assert seen == ["keep"]


def test_a_text_tower_tells_what_is_relevant() -> None:
    """The bundled one finds the things asked about; without one there is no evidence."""
    asked = [item for item in ITEMS if item.question.kind in ("color", "where")]
    subject = dataclasses.replace(bundled(), relevance=_relevance("tiny:llava"))
    batch = batch_of(subject, asked)
    answers = arm_of("cdpruner")(batch, 0.11)
    assert answers.kept == (28,) * len(asked)
    nearest = (-batch.relevance).argmax(dim=1)
    shown = [
        coverage(item.views, batch.parts)[list(item.question.about)][:, at].max() for item, at in zip(asked, nearest)
    ]
    assert sum(share > 0 for share in shown) >= 0.8 * len(asked)
    with pytest.raises(MissingEvidence, match="relevance"):
        arm_of("cdpruner")(batch_of(bundled(), asked), 0.11)
    assert _relevance("tiny:llava_next_video") is None is _relevance("tiny")


def test_the_bundled_model_sees() -> None:
    batch = batch_of(bundled(), [item for item in ITEMS if item.question.kind in ("color", "shape")])
    truth = [judged(item.question.answer) for item in batch.items]

    def right(arm: str, keep: float) -> float:
        return sum(map(str.__eq__, arm_of(arm)(batch, keep).words, truth)) / len(truth)

    assert right("identity", 1.0) >= 0.7
    assert right("oracle", 0.11) >= right("identity", 1.0) - 0.2
    assert right("blind", 1.0) <= 0.5


def test_the_plan() -> None:
    steps = plan(["divprune", "random", "divprune"], [0.5, 2, 0.5])
    assert steps[:4] == (("identity", 1.0), ("blind", 1.0), ("divprune", 0.5), ("divprune", 2))
    assert [name for name, keep in steps if keep == 2] == ["divprune", *OWN]
    assert [str(keep) for name, keep in plan([], [1, 1.0]) if name == "pool"] == ["1", "1.0"]
    assert {name for name, _ in plan(None, [0.5])} >= {"vtprune", "fastervlm", *OWN, *WHOLE}
    for wrong, says in ((["divprun"], "did you mean 'divprune'"), ([], "keep=0")):
        with pytest.raises(InvalidOption, match=says):
            plan(wrong, [0] if not wrong else [0.5])
    with pytest.raises(InvalidOption, match="keep is empty"):
        plan(None, [])


def test_every_own_arm_tells_what_it_does() -> None:
    assert all(about(name) for name in (*WHOLE, *OWN))
    assert about("divprune") == ""
