"""Law 6: what is not supported raises an error of ours, and leaves the model as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from tests.contracts.cases import (
    CACHING,
    EDITING,
    FAMILIES,
    GIVEN,
    IN_LAYERS,
    IN_TOWER,
    MARKING,
    NEUTRAL,
    PIPELINES,
    PRUNING_METHODS,
    Case,
    answer,
    assert_close,
    cells,
    model_of,
)
from tests.contracts.state import restored, snapshot
from tests.models import IMAGE, VIDEO
from vtprune.errors import BackendUnavailable, InvalidOption, MissingEvidence, UnsupportedCall, UnsupportedModel

pytestmark = pytest.mark.law("6 refusal")
Refuses = Callable[..., Any]

UNFORCED = (*IN_TOWER, *CACHING)
"""Methods to which no token can be forced: patches are gone before there are tokens, and every layer stores its own."""
BAD_KEEPS = (0, 0.0, -1, -0.5, 1.5, float("nan"), float("inf"), True, False, "half", None)


@pytest.mark.usefixtures("without_triton")
@cells(kinds=("image",))
def test_options(case: Case, refuses: Refuses) -> None:
    with restored(case):
        before = snapshot(case.model)
        for keep in BAD_KEEPS:
            with refuses(InvalidOption, "keep="):
                case.wrap(case.model, keep=keep)
        for options, message in (
            ({"per": "crop"}, "per='crop'"),
            ({"positions": "dense"}, "positions='dense'"),
            ({"history": -1}, "history=-1"),
            ({"no_such_parameter": 1}, "no_such_parameter" if isinstance(case.asked, str) else "no parameters"),
        ):
            with refuses(InvalidOption, message):
                case.wrap(case.model, **options)
        if isinstance(case.asked, str):
            with refuses(InvalidOption, f"did you mean '{case.name}'"):
                case.wrap(case.model, method=case.name + "x")
        with refuses(BackendUnavailable, "triton"):
            case.wrap(case.model, backend="triton")
        assert snapshot(case.model) == before


@cells(methods=NEUTRAL)
def test_the_neutral_method_refuses_to_prune(case: Case, refuses: Refuses) -> None:
    with restored(case):
        for keep in (0.4, 5):
            with refuses(InvalidOption, "keep=1.0"):
                case.wrap(case.model, keep=keep)


@cells(kinds=("image",))
def test_wrapping_twice_and_copies(case: Case, refuses: Refuses) -> None:
    with restored(case):
        with refuses(UnsupportedModel, "not wrapped"):
            vtprune.unwrap(case.model)
        with case.pruned():
            wrapped = snapshot(case.model)
            with refuses(UnsupportedModel, "wrapped already"):
                case.wrap(case.model)
            for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
                with refuses(UnsupportedCall, "cannot be copied"):
                    duplicate(case.model)
            assert snapshot(case.model) == wrapped


@cells(kinds=("image",))
def test_compiled_models_and_models_without_the_seam(case: Case, refuses: Refuses) -> None:
    compiled = torch.compile(case.model, backend="eager")
    with restored(case):
        with refuses(UnsupportedModel, "wrap first"):
            case.wrap(compiled)
        for part in (case.model.model.language_model, torch.nn.Linear(2, 2), None):
            with refuses(UnsupportedModel, "seam|expected"):
                case.wrap(part)


@cells()
def test_placeholders_that_do_not_match_the_features(case: Case, refuses: Refuses) -> None:
    """Row 0 claims a token that belongs to row 1: transformers count the batch and see nothing wrong."""
    batch = case.batch
    placeholder = IMAGE if case.kind == "image" else VIDEO
    ids = batch["input_ids"].clone()
    ids[0, -1] = placeholder
    ids[1, (ids[1] == placeholder).nonzero()[0]] = 7
    moved = {**batch, "input_ids": ids}
    with restored(case), case.pruned(), refuses(UnsupportedCall, "placeholders"), torch.no_grad():
        case.model.model(**{**moved, "position_ids": torch.arange(ids.shape[1])[None]})


@cells()
def test_embeddings_without_ids_or_pictures(case: Case, refuses: Refuses) -> None:
    embeds = case.model.get_input_embeddings()(case.batch["input_ids"]).detach()
    with restored(case), case.pruned(), refuses(UnsupportedCall, "inputs_embeds"), torch.no_grad():
        case.model(inputs_embeds=embeds, attention_mask=case.batch["attention_mask"])


@cells(methods=(*PRUNING_METHODS, *MARKING))
def test_a_pruned_cache_elsewhere(case: Case, refuses: Refuses) -> None:
    with restored(case):
        with case.pruned(case.prompts[:1]):
            cache = answer(case.model, case.rows[0]).cache
            word = torch.tensor([[7]])
        with case.pruned(), refuses(UnsupportedCall, "another pruning"):
            case.model(input_ids=word, past_key_values=cache)
        with refuses(UnsupportedCall, "outside"):
            case.model(input_ids=word, past_key_values=cache)


@cells(methods=(*PRUNING_METHODS, *EDITING))
def test_chunked_prefill(case: Case, refuses: Refuses) -> None:
    with restored(case), case.pruned(case.prompts[:1]):
        with refuses(UnsupportedCall, "prefill_chunk_size"):
            answer(case.model, case.rows[0], prefill_chunk_size=6)
        answer(case.model, case.rows[0])


@cells(methods=[method for method in PRUNING_METHODS if method not in (*IN_LAYERS, *UNFORCED)])
def test_evidence_that_does_not_fit(case: Case, refuses: Refuses) -> None:
    with restored(case), case.pruned(case.prompts[:1], keep=4) as pruner:
        first = answer(case.model, case.rows[0])
        with refuses(InvalidOption, "does not read"), pruner.using(mood=[torch.zeros(3)]):
            pass
        for evidence, message in (
            ({"protect": [torch.arange(5)]}, "5 tokens protected"),
            ({"protect": [torch.tensor([10_000])]}, "indices must lie"),
            ({"forbid": [torch.arange(pruner.last.segments[0].n)]}, "forbidden"),
        ):
            with refuses(UnsupportedCall, message), pruner.using(**evidence):
                answer(case.model, case.rows[0])
        five = {name: [torch.tensor([1])] * 5 for name in ("protect", *pruner.pipeline.needs)}
        with refuses(UnsupportedCall, "5 rows"), pruner.using(**five):
            answer(case.model, case.rows[0])
        again = answer(case.model, case.rows[0])
        assert torch.equal(again.logits, first.logits)


@cells(methods=[method for method in IN_LAYERS if method not in UNFORCED])
def test_evidence_that_does_not_fit_between_layers(case: Case, refuses: Refuses) -> None:
    """Glances cannot be given, and tokens are forced only as far as every cut can honour it."""
    with restored(case), case.pruned(case.prompts[:1]) as pruner:
        first = answer(case.model, case.rows[0])
        n = pruner.last.segments[0].n
        glances = {name: [torch.zeros(3)] for name in pruner.pipeline.needs - pruner.pipeline.asked}
        for evidence in ({"mood": [torch.zeros(3)]}, *({name: scores} for name, scores in glances.items())):
            with refuses(InvalidOption, "does not read"), pruner.using(**evidence):
                pass
        for evidence, message in (
            ({"protect": [torch.arange(n)]}, f"{n} tokens protected, but only"),
            ({"protect": [torch.tensor([10_000])]}, "indices must lie"),
            ({"forbid": [torch.arange(n)]}, f"{n} of {n} tokens forbidden"),
        ):
            with refuses(UnsupportedCall, message), pruner.using(**evidence):
                answer(case.model, case.rows[0])
        five = {name: [torch.tensor([1])] * 5 for name in ("protect", *(pruner.pipeline.needs - glances.keys()))}
        with refuses(UnsupportedCall, "5 rows"), pruner.using(**five):
            answer(case.model, case.rows[0])
        again = answer(case.model, case.rows[0])
        assert torch.equal(again.logits, first.logits)


@cells(methods=UNFORCED)
def test_where_no_token_can_be_forced(case: Case, refuses: Refuses) -> None:
    """Not a single one, and neither in nor out; what does not fit for other reasons is refused for these."""
    with restored(case), case.pruned(case.prompts[:1]) as pruner:
        first = answer(case.model, case.rows[0])
        with refuses(InvalidOption, "does not read"), pruner.using(mood=[torch.zeros(3)]):
            pass
        why = "prunes inside the encoder, before" if case.method in IN_TOWER else "cuts the cache, where no token"
        for name in ("protect", "forbid"):
            for tokens in (torch.tensor([1]), torch.arange(5), torch.tensor([10_000])):
                with refuses(UnsupportedCall, why), pruner.using(**{name: [tokens]}):
                    answer(case.model, case.rows[0])
        again = answer(case.model, case.rows[0])
        assert torch.equal(again.logits, first.logits)


@cells(methods=(*IN_LAYERS, *CACHING), kinds=("image",))
def test_gaps_that_there_are_not(case: Case, refuses: Refuses) -> None:
    """Tokens that leave between layers have had their position ids; only what goes before leaves gaps to close."""
    with restored(case):
        if case.honours("compact"):
            with case.pruned(positions="compact") as pruner:
                answer(case.model, case.batch)
            assert pruner.last.positions == pruner.positions == "compact"
            return
        for keep in (case.keep, 1.0):
            with refuses(InvalidOption, "positions='compact': method .* cuts nothing in front of the language model"):
                case.wrap(case.model, keep=keep, positions="compact")
        for positions in ("auto", "keep"):
            with case.pruned(positions=positions) as pruner:
                answer(case.model, case.batch)
            assert pruner.last.positions == pruner.positions == "keep"


@cells(methods=IN_LAYERS, kinds=("image",))
def test_an_average_out_of_reach(case: Case, refuses: Refuses) -> None:
    """Layers in front of the first cut see all tokens, unless some are dropped before the language model."""
    keep = 0.16
    shallow = model_of(case.family)
    with restored(case):
        if PIPELINES[case.method].picks:
            with case.pruned(keep=keep) as pruner:
                answer(case.model, case.batch)
                assert pruner.last.average < 0.25 * pruner.last.tokens
            return
        with refuses(InvalidOption, f"keep={keep} is the average over 6 decoder layers"):
            case.wrap(case.model, keep=keep)
        before = snapshot(shallow)
        with refuses(InvalidOption, "this method reaches 0.5 .*to 1"):
            case.wrap(shallow, keep=0.4)
        assert snapshot(shallow) == before
        with case.pruned(keep=1):
            for _ in range(2):
                with refuses(InvalidOption, "average over 6 decoder layers"):
                    answer(case.model, case.batch)


@cells(methods=IN_LAYERS, kinds=("image",))
def test_a_question_before_the_picture(case: Case, refuses: Refuses) -> None:
    """Methods that look at the text behind the last picture refuse prompts without, the others take them."""
    pipeline = PIPELINES[case.method]
    looks = {glance.rows for glance in (*pipeline.glances.values(), *pipeline.states.values())} & {"text", "raters"}
    batch = case.inputs((replace(case.prompts[0], text_after=0),))
    end = (batch["input_ids"][0] == IMAGE).nonzero()[-1, 0] + 1
    batch = {
        name: v[:, :end] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else v
        for name, v in batch.items()
    }
    with restored(case), case.pruned(case.prompts[:1]) as pruner:
        if looks:
            with refuses(UnsupportedCall, "ends with a picture"):
                answer(case.model, batch)
        else:
            answer(case.model, batch)
            assert pruner.last.average < pruner.last.tokens


@cells(methods=tuple(GIVEN))
def test_evidence_that_is_missing(case: Case, refuses: Refuses) -> None:
    name = GIVEN[case.method]
    with restored(case), vtprune.pruning(case.model, case.asked, keep=case.keep) as pruner:
        with refuses(MissingEvidence, f"using\\({name}="):
            answer(case.model, case.rows[0])
        with refuses(UnsupportedCall, "got nothing"), pruner.using(**{name: [None]}):
            answer(case.model, case.rows[0])
        with refuses(UnsupportedCall, "got 7 scores"), pruner.using(**{name: [torch.zeros(7)]}):
            answer(case.model, case.rows[0])


@cells(methods=IN_TOWER, kinds=("image",))
def test_an_encoder_that_cannot_be_cut(case: Case, refuses: Refuses) -> None:
    with restored(case):
        if case.refused:
            with refuses(UnsupportedModel, "inside the encoder"):
                case.wrap(case.model)
        else:
            with case.pruned() as pruner:
                answer(case.model, case.batch)
            assert pruner.last.kept < pruner.last.tokens
            with refuses(InvalidOption, "must be a share"):
                case.wrap(case.model, per="prompt", keep=5)


@cells(methods=("tome",))
def test_more_than_pairs_can_merge(case: Case, refuses: Refuses) -> None:
    with restored(case), case.pruned(keep=3):
        for _ in range(2):
            with refuses(InvalidOption, "merging pairs"):
                answer(case.model, case.batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refused_calls_are_fine_without_vtprune(family: str) -> None:
    """So it is a wrapped model that has to refuse them. No cell of its own: nothing is wrapped."""
    model, row = model_of(family), Case(method="random", family=family, kind="image").rows[0]
    expected = answer(model, row).logits
    assert_close(answer(model, row, prefill_chunk_size=6).logits, expected)
    assert torch.equal(answer(copy.deepcopy(model), row).logits, expected)
