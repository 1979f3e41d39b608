"""Evidence for one call: honoured, checked, repeated for beams, gone when its block ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests import models
from tests.integration.common import (
    CACHING,
    FRAMES,
    GIVEN,
    IN_LAYERS,
    LOSSLESS,
    ONE,
    TEXT,
    Fails,
    assert_answers,
    expect,
    failing,
    kept_of,
    llava,
    logits,
    write,
)
from tests.models import Prompt
from vtprune.catalog import build
from vtprune.errors import InvalidOption, MissingEvidence, UnsupportedCall, VtpruneError

CLIP = (Prompt(clips=((32, 32, 4),), seed=3),)
K = 4


@pytest.fixture
def model() -> nn.Module:
    return vtprune.wrap(llava(), "fastervlm", keep=K)


def kept_with(model: nn.Module, inputs: dict[str, Any], **evidence: Any) -> list[list[int]]:
    with model.vtprune.using(**evidence):
        write(model, inputs)
    return kept_of(model.vtprune.last)


def least_wanted(model: nn.Module, inputs: dict[str, Any]) -> list[int]:
    """Tokens of the first picture that the method would drop."""
    write(model, inputs)
    return sorted(set(range(16)) - set(kept_of(model.vtprune.last)[0]))


BETWEEN = [
    name
    for name in vtprune.list_methods()
    if name not in (*LOSSLESS, *GIVEN, *IN_LAYERS, *CACHING) and build(name).encoder is None
]
"""Methods that prune between encoder and language model and need no evidence but the model's.

Inside the encoder no token can be forced, see law 6, nor in caches, see below; inside the language model see
`tests/inside/test_forced.py`.
"""


@pytest.mark.parametrize("method", BETWEEN)
def test_protected_tokens_are_kept_and_forbidden_ones_dropped(method: str) -> None:
    model = vtprune.wrap(llava(), method, keep=K)
    inputs = models.inputs(model, ONE)
    dropped = least_wanted(model, inputs)
    wanted = kept_of(model.vtprune.last)[0]
    kept = kept_with(model, inputs, protect=[torch.tensor(dropped[:2])], forbid=[torch.tensor(wanted[:1])])[0]
    assert len(kept) == K
    assert set(dropped[:2]) <= set(kept)
    assert wanted[0] not in kept


@pytest.mark.parametrize("method", CACHING)
@pytest.mark.parametrize("evidence", ["protect", "forbid"])
def test_tokens_of_a_cache_cannot_be_forced(method: str, evidence: str) -> None:
    """Every layer stores its own. The call is refused, and the next one stores what it did before."""
    model = vtprune.wrap(llava(), method, keep=K)
    inputs = models.inputs(model, ONE)
    expected = write(model, inputs)
    stored = model.vtprune.last.segments[0].cached
    with pytest.raises(UnsupportedCall, match="cuts the cache, where no token can be forced"):
        kept_with(model, inputs, **{evidence: [torch.tensor([3])]})
    assert torch.equal(write(model, inputs), expected)
    assert torch.equal(model.vtprune.last.segments[0].cached, stored)
    assert (model.vtprune.last.kept, model.vtprune.last.average) == (16, pytest.approx(K))


def test_the_report_tells_protected_tokens_from_picked_ones(model: nn.Module) -> None:
    inputs = models.inputs(model, ONE)
    protected = least_wanted(model, inputs)[:2]
    kept_with(model, inputs, protect=[torch.tensor(protected)])
    segment = model.vtprune.last.segments[0]
    by_rule = dict(zip(segment.keep.tolist(), segment.taken.tolist(), strict=True))
    assert {token for token, rule in by_rule.items() if rule == -1} == set(protected)
    assert sorted(by_rule.values()) == [-1, -1, 0, 0]


def test_protecting_as_many_as_are_kept_keeps_exactly_those(model: nn.Module) -> None:
    chosen = [1, 5, 9, 13]
    assert kept_with(model, models.inputs(model, ONE), protect=[torch.tensor(chosen)]) == [chosen]


def test_forbidding_all_but_the_budget_keeps_the_rest(model: nn.Module) -> None:
    rest = [0, 3, 10, 15]
    forbidden = sorted(set(range(16)) - set(rest))
    assert kept_with(model, models.inputs(model, ONE), forbid=[torch.tensor(forbidden)]) == [rest]


def test_every_picture_of_every_row_gets_its_own(model: nn.Module) -> None:
    inputs = models.inputs(model)
    wanted = [[3, 4], [5, 6], [7, 8]]
    tensors = [torch.tensor(indices) for indices in wanted]
    kept = kept_with(model, inputs, protect=[tensors[0], tensors[1:]])
    assert all(set(indices) <= set(found) for indices, found in zip(wanted, kept, strict=True))


def test_a_picture_may_be_left_out(model: nn.Module) -> None:
    inputs = models.inputs(model)
    write(model, inputs)
    free = kept_of(model.vtprune.last)
    kept = kept_with(model, inputs, protect=[None, [None, torch.tensor([2, 3, 5, 7])]])
    assert kept[:2] == free[:2]
    assert kept[2] == [2, 3, 5, 7]


def test_budgets_of_parts_honour_protection() -> None:
    model = vtprune.wrap(models.build("llava_next"), "divprune", keep=2, per="part")
    inputs = models.inputs(model, ONE)
    write(model, inputs)
    n, free = model.vtprune.last.segments[0].n, model.vtprune.last.kept
    kept = kept_with(model, inputs, protect=[torch.tensor([0, n - 1])], forbid=[torch.tensor([1, n - 2])])[0]
    assert {0, n - 1} <= set(kept)
    assert not {1, n - 2} & set(kept)
    assert len(kept) == free


def test_the_budget_of_a_prompt_honours_protection_over_its_pictures() -> None:
    model = vtprune.wrap(llava(), "divprune", keep=6, per="prompt")
    inputs = models.inputs(model, models.ONE_AND_TWO[1:])
    kept = kept_with(model, inputs, protect=[[torch.tensor([1, 2]), torch.tensor([3, 4])]])
    assert {1, 2} <= set(kept[0])
    assert {3, 4} <= set(kept[1])
    assert len(kept[0]) + len(kept[1]) == 6


def test_evidence_is_repeated_for_beams(model: nn.Module) -> None:
    inputs = models.inputs(model)
    evidence = {"protect": [torch.tensor([0]), [torch.tensor([1]), torch.tensor([2])]]}
    greedy = kept_with(model, inputs, **evidence)
    with model.vtprune.using(**evidence):
        write(model, inputs, num_beams=3)
    assert kept_of(model.vtprune.last) == [*greedy[:1] * 3, *greedy[1:] * 3]


REFUSED: dict[str, tuple[type[VtpruneError], dict[str, Any], str]] = {
    "more protected than kept": (UnsupportedCall, {"protect": [torch.arange(K + 1)]}, "protect"),
    "more forbidden than dropped": (UnsupportedCall, {"forbid": [torch.arange(16 - K + 1)]}, "forbid"),
    "both protected and forbidden": (
        UnsupportedCall,
        {"protect": [torch.tensor([1])], "forbid": [torch.tensor([1])]},
        "both",
    ),
    "protected beyond the end": (UnsupportedCall, {"protect": [torch.tensor([16])]}, "16"),
    "protected before the start": (UnsupportedCall, {"protect": [torch.tensor([-1])]}, "-1"),
    "forbidden beyond the end": (UnsupportedCall, {"forbid": [torch.tensor([99])]}, "99"),
    "an index that is no whole number": (VtpruneError, {"protect": [torch.tensor([0.5])]}, "protect"),
    "more rows than prompts": (UnsupportedCall, {"protect": [torch.tensor([1])] * 2}, "1 prompt"),
    "no rows": (VtpruneError, {"protect": []}, "1 prompt"),
    "more pictures than the prompt has": (UnsupportedCall, {"protect": [[torch.tensor([1])] * 2]}, "picture"),
    "fewer pictures than the prompt has": (UnsupportedCall, {"protect": [[]]}, "picture"),
    "an unknown name": (InvalidOption, {"importances": [torch.ones(16)]}, "importances"),
    "a tensor in place of a list": (InvalidOption, {"protect": torch.tensor([1])}, "list"),
    "a string in place of a list": (InvalidOption, {"protect": "all"}, "list"),
    "a string in place of indices": (VtpruneError, {"protect": ["all"]}, "protect"),
    "rows that differ in number": (
        InvalidOption,
        {"protect": [torch.tensor([1])], "forbid": [torch.tensor([2])] * 2},
        "row",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_evidence_that_cannot_be_honoured_is_refused_and_the_next_call_is_right(model: nn.Module, case: str) -> None:
    error, evidence, match = REFUSED[case]
    inputs = models.inputs(model, ONE)
    expected = expect(llava(), inputs, "fastervlm", keep=K)
    with pytest.raises(error, match=match), model.vtprune.using(**evidence):
        write(model, inputs)
    assert_answers(model, inputs, expected)


def test_one_row_for_two_prompts_is_refused(model: nn.Module) -> None:
    """The prompts are no beams of one another: silently repeating the row would be a guess."""
    with pytest.raises(UnsupportedCall, match="2 prompts"):
        kept_with(model, models.inputs(model, (*ONE, Prompt(images=((30, 64),), seed=2))), protect=[torch.tensor([1])])


def test_a_plain_list_of_indices_is_honoured_whole_or_refused(model: nn.Module) -> None:
    inputs = models.inputs(model, ONE)
    wanted = least_wanted(model, inputs)[:2]
    try:
        kept = kept_with(model, inputs, protect=[wanted])[0]
    except VtpruneError as error:
        assert "protect" in str(error)
    else:
        assert set(wanted) <= set(kept)


def test_scores_given_for_encoder_evidence_are_honoured_or_refused(model: nn.Module) -> None:
    """`fastervlm` reads importance from the encoder; a user's own must not be dropped in silence."""
    inputs = models.inputs(model, ONE)
    wanted = least_wanted(model, inputs)[:K]
    scores = torch.zeros(16)
    scores[wanted] = 1.0
    try:
        kept = kept_with(model, inputs, importance=[scores])[0]
    except VtpruneError as error:
        assert "importance" in str(error)
    else:
        assert kept == wanted


def test_evidence_is_gone_after_its_block(model: nn.Module) -> None:
    inputs = models.inputs(model, ONE)
    expected = expect(llava(), inputs, "fastervlm", keep=K)
    assert kept_with(model, inputs, protect=[torch.tensor([1, 5, 9, 13])]) != expected.kept
    assert_answers(model, inputs, expected)


def test_evidence_is_gone_after_a_block_that_raised(model: nn.Module) -> None:
    inputs = models.inputs(model, ONE)
    expected = expect(llava(), inputs, "fastervlm", keep=K)
    with pytest.raises(ZeroDivisionError), model.vtprune.using(protect=[torch.tensor([1, 5, 9, 13])]):
        raise ZeroDivisionError
    assert_answers(model, inputs, expected)


def test_evidence_is_gone_after_a_stage_that_raised() -> None:
    selector = Fails()
    model = vtprune.wrap(llava(), failing(selector), keep=K)
    inputs = models.inputs(model, ONE)
    expected = expect(llava(), inputs, failing(Fails()), keep=K)
    selector.armed.append(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError), model.vtprune.using(protect=[torch.tensor([9])]):
        write(model, inputs)
    assert_answers(model, inputs, expected)


def test_a_block_inside_another_replaces_it_and_gives_it_back(model: nn.Module) -> None:
    inputs = models.inputs(model, ONE)
    outer, inner = [1, 5, 9, 13], [0, 2, 4, 6]
    with model.vtprune.using(protect=[torch.tensor(outer)]):
        assert kept_with(model, inputs, protect=[torch.tensor(inner)]) == [inner]
        write(model, inputs)
        assert kept_of(model.vtprune.last) == [outer]


def test_evidence_does_not_disturb_a_prompt_without_pictures(model: nn.Module) -> None:
    text = models.inputs(model, TEXT)
    plain = logits(llava(), text)
    with model.vtprune.using(protect=[torch.tensor([1])] * 2):
        assert torch.equal(logits(model, text), plain)


def test_keeping_everything_with_protection_is_the_identity() -> None:
    model = llava()
    inputs = models.inputs(model, ONE)
    plain = logits(model, inputs)
    vtprune.wrap(model, "fastervlm", keep=1.0)
    with model.vtprune.using(protect=[torch.tensor([1, 2])]):
        assert torch.equal(logits(model, inputs), plain)


def video() -> tuple[nn.Module, dict[str, Tensor], tuple[int, int]]:
    """A model that ranks frames, one clip, and its frames and tokens per frame."""
    model = vtprune.wrap(models.build("llava_next_video"), FRAMES, keep=0.5)
    inputs = models.inputs(model, CLIP, "video")
    with model.vtprune.using(frames=[torch.zeros(4)]):
        logits(model, inputs)
    parts = model.vtprune.last.segments[0].parts
    return model, inputs, (len(parts), parts[0].tokens)


def test_a_score_per_frame_is_shared_by_its_tokens() -> None:
    model, inputs, (frames, size) = video()
    assert frames == 4
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8])
    kept = kept_with(model, inputs, frames=[scores])[0]
    assert kept == [*range(size, 2 * size), *range(3 * size, 4 * size)]


def test_a_score_per_token_decides_within_frames() -> None:
    model, inputs, (frames, size) = video()
    scores = torch.rand(frames * size, generator=torch.Generator().manual_seed(0))
    kept = kept_with(model, inputs, frames=[scores])[0]
    assert kept == sorted(scores.argsort(descending=True)[: frames * size // 2].tolist())


def test_frame_scores_follow_their_prompts_in_a_batch_with_beams() -> None:
    model = vtprune.wrap(models.build("llava_next_video"), FRAMES, keep=0.5)
    inputs = models.inputs(model, kind="video")
    first, second, third = (torch.tensor(s) for s in ([4.0, 3, 2, 1], [1.0, 2, 3, 4], [1.0, 4, 3, 2]))
    evidence = {"frames": [first, [second, third]]}
    greedy = kept_with(model, inputs, **evidence)
    size = model.vtprune.last.segments[0].parts[0].tokens
    frames = [sorted({token // size for token in kept}) for kept in greedy]
    assert frames == [[0, 1], [2, 3], [1, 2]]
    with model.vtprune.using(**evidence):
        write(model, inputs, num_beams=2)
    assert kept_of(model.vtprune.last) == [*greedy[:1] * 2, *greedy[1:] * 2]


@pytest.mark.parametrize("length", [0, 1, 3, 5, 17])
def test_scores_of_another_length_are_refused(length: int) -> None:
    model, inputs, _ = video()
    with pytest.raises(UnsupportedCall, match="frames"):
        kept_with(model, inputs, frames=[torch.ones(length)])


def test_scores_that_are_not_finite_are_refused_or_still_give_the_count() -> None:
    model, inputs, (frames, size) = video()
    scores = torch.tensor([float("nan"), 1.0, float("-inf"), 0.5])
    try:
        kept = kept_with(model, inputs, frames=[scores])[0]
    except VtpruneError as error:
        assert "frames" in str(error)
    else:
        assert len(kept) == frames * size // 2


def test_a_method_without_the_evidence_it_reads_says_how_to_give_it() -> None:
    model = vtprune.wrap(models.build("llava_next_video"), FRAMES, keep=0.5)
    inputs = models.inputs(model, CLIP, "video")
    with pytest.raises(MissingEvidence, match=r"using\(frames"):
        logits(model, inputs)
    assert len(kept_with(model, inputs, frames=[torch.arange(4.0)])[0]) > 0


@pytest.mark.parametrize("method", ["pool", "visionzip", "prumerge_plus"])
def test_forbidden_tokens_live_on_nowhere(method: str) -> None:
    """Not kept, and not merged into what is kept."""
    model = vtprune.wrap(llava(), method, keep=K)
    inputs = models.inputs(model, ONE)
    forbidden = [0, 3, 7]
    kept_with(model, inputs, forbid=[torch.tensor(forbidden)])
    into = model.vtprune.last.segments[0].into
    assert into[forbidden].tolist() == [-1] * 3
    assert (into >= 0).sum() > K
