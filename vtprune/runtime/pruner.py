"""`Pruner`: the hooks on one model, and the bookkeeping from prefill to the last decoded token.

A call flows base model (remember the ids) -> encoder (`EncoderTap`) -> language model (decide, cut, run short, give the
caller's length back) -> cache (remember what decoding must know). Nothing flows back.
"""

from __future__ import annotations

import inspect
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Family, language_model, placeholder_ids
from vtprune.cache import CacheState, check_prunable, mark_pruned, physical_length, state_of
from vtprune.errors import UnsupportedCall
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport, SegmentReport, Stopwatch, kv_bytes_per_token
from vtprune.runtime import masks
from vtprune.runtime.encoder import CARRIED, Encoded, EncoderTap
from vtprune.runtime.evidence import FROM_ENCODER, Given
from vtprune.runtime.prefill import (
    Cut,
    Decision,
    cut_deepstack,
    cut_mask,
    cut_positions,
    decide,
    plan_cut,
    read_layout,
)
from vtprune.types import Budget, Layout, Modality


@dataclass
class _Call:
    """One forward of the base model, from its pre-hook to its end."""

    ids: Tensor | None
    embeds: Tensor | None
    mask: Any
    encoded: dict[Modality, Encoded]
    prefill: bool
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    cut: Cut | None = None
    next_state: CacheState | None = None
    entered: CacheState | None = None
    rotary_positions: Tensor | None = None


class Pruner:
    """The handle behind `model.vtprune`: what is pruned how, and reports of what was.

    Attributes:
        method, pipeline, budget, family, positions, backend: what `wrap` was asked for, resolved.
        history: the last reports, oldest first.
    """

    def __init__(
        self,
        inner: nn.Module,
        *,
        family: Family,
        pipeline: Pipeline,
        budget: Budget,
        compact: bool,
        backend: str,
        on_report: Callable[[PruneReport], None] | None = None,
        history: int = 1,
    ) -> None:
        self.family = family
        self.pipeline = pipeline
        self.budget = budget
        self.positions = "compact" if compact else "keep"
        self.backend = backend
        self.history: deque[PruneReport] = deque(maxlen=history)
        self._inner = inner
        self._on_report = on_report
        self._owner = uuid.uuid4().hex
        self._always_cut = False
        self._given: Given | None = None
        self._call: _Call | None = None
        self._handles: list[RemovableHandle] = []
        self._lm = language_model(inner)
        assert self._lm is not None
        self._tap = EncoderTap(inner, family)
        self._tokens = {kind: placeholder_ids(inner.config, kind) for kind in self._tap.kinds}
        self._tap.on_encoded = self._encoded_now
        self._inner_signature = inspect.signature(type(inner).forward)
        self._lm_signature = inspect.signature(type(self._lm).forward)

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.pipeline.name

    @property
    def last(self) -> PruneReport | None:
        """Report of the last prefill, None before the first."""
        return self.history[-1] if self.history else None

    @contextmanager
    def using(self, **evidence: Sequence[Any]) -> Iterator[Pruner]:
        """Evidence for the calls inside the block, one entry per prompt row (repeated for beams).

        `protect` and `forbid` hold, for each row, token indices of its picture (or a list of them, one per picture):
        tokens to keep and tokens to drop whatever the method says. Any other name must be evidence that the method
        reads: scores per token, or per part.

        Raises:
            InvalidOption: for a name the method does not read, or lists of different length.
        """
        given = Given.check(evidence, self.pipeline.needs)
        before, self._given = self._given, given
        try:
            yield self
        finally:
            self._given = before

    def install(self) -> None:
        """Register every hook; `remove` undoes it."""
        lm = self._lm
        assert lm is not None
        self._tap.install(probing=bool(self.pipeline.needs & FROM_ENCODER) and not self.budget.keeps_all)
        rotary = getattr(lm, "rotary_emb", None)
        self._has_rotary = isinstance(rotary, nn.Module)
        self._handles += [
            self._inner.register_forward_pre_hook(self._before_base, with_kwargs=True),
            self._inner.register_forward_hook(self._after_base, with_kwargs=True, always_call=True),
            lm.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
            lm.register_forward_hook(self._after_language_model, with_kwargs=True, always_call=True),
        ]
        if isinstance(rotary, nn.Module):
            self._handles.append(rotary.register_forward_pre_hook(self._before_rotary, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tap.remove()

    @property
    def evidence_sources(self) -> dict[Modality, str]:
        """Which encoder attention is recorded for each kind of input."""
        return {kind: probe.evidence for kind, probe in self._tap.probes.items()}

    def refuse_copy(self, *args: object) -> NoReturn:
        """Raise `UnsupportedCall`: a copy of a wrapped model, or of a part of it, would carry hooks of the original."""
        raise UnsupportedCall(
            "a wrapped model cannot be copied or pickled (its hooks would stay on the original): call "
            "vtprune.unwrap(model) first, or save it with model.save_pretrained(...)"
        )

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    @torch.compiler.disable
    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _bind(self._inner_signature, module, args, kwargs)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        encoded = {kind: self._carried(kind, output) for kind, output in (given.get("mm_encoder_outputs") or {}).items()}
        length = (ids if ids is not None else embeds).shape[1]
        self._call = _Call(
            ids=ids,
            embeds=embeds,
            mask=given.get("attention_mask"),
            encoded={kind: entry for kind, entry in encoded.items() if entry is not None},
            prefill=length > 1 or given.get("past_key_values") is None,
        )

    def _encoded_now(self, encoded: Encoded) -> None:
        if self._call is not None:
            self._call.encoded[encoded.kind] = encoded

    @staticmethod
    def _carried(kind: str, output: Any) -> Encoded | None:
        if output is None or getattr(output, "pooler_output", None) is None:
            return None
        encoded = getattr(output, CARRIED, None)
        if encoded is None:
            raise UnsupportedCall(
                f"mm_encoder_outputs[{kind!r}] was not made by this model while wrapped (or was sliced by chunked "
                "prefill): pass the pixels, encode while wrapped, and leave prefill_chunk_size out"
            )
        return encoded

    def _after_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._call = None

    @torch.compiler.disable
    def _before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._call
        if call is None:
            return None
        given = _bind(self._lm_signature, module, args, kwargs)
        cache, embeds = given.get("past_key_values"), given.get("inputs_embeds")
        if embeds is None:
            return None
        state = state_of(cache, self._owner)
        if call.encoded:
            changed = self._prefill(call, given, state)
        else:
            self._check_no_hidden_pictures(call)
            if call.prefill:
                self._publish_empty(call, embeds)
            changed = None if state is None else self._continue(call, given, state)
        if state is not None:
            state.entered = True
            call.entered = state
        call.stopwatch.start("prefill", like=embeds)
        return None if changed is None else ((), changed)

    def _check_no_hidden_pictures(self, call: _Call) -> None:
        if call.prefill and call.ids is None:
            raise UnsupportedCall(
                "inputs_embeds without pictures: there is no telling where visual tokens lie. Pass input_ids, or "
                "inputs_embeds with placeholders together with the pixels"
            )

    def _prefill(self, call: _Call, given: dict[str, Any], state: CacheState | None) -> dict[str, Any] | None:
        embeds, cache = given["inputs_embeds"], given.get("past_key_values")
        check_prunable(cache)
        past = physical_length(cache)
        B, L = embeds.shape[:2]
        with call.stopwatch.measure("layout", like=embeds):
            layout, encodings = self._layout(call, B, L, past)
        seen = _pictures_seen(state, B)
        with call.stopwatch.measure("select", like=embeds):
            decision = decide(
                pipeline=self.pipeline,
                budget=self.budget,
                layout=layout,
                embeds=embeds,
                encodings=encodings,
                encoded=call.encoded,
                family=self.family,
                inner=self._inner,
                given=self._given,
                seen=seen,
            )
        before = tuple(int(length) for length in layout.valid.sum(axis=1))
        self._publish(call, layout, decision, before, embeds)
        if decision.row_lengths == before and not self._always_cut:
            return None if state is None else self._continue(call, given, state, pictures=_count(layout, seen))
        with call.stopwatch.measure("cut", like=embeds):
            return self._cut(call, given, layout, decision, state, past, _count(layout, seen))

    def _layout(self, call: _Call, B: int, L: int, past: int) -> tuple[Layout, dict[Modality, Any]]:
        ids = call.ids if call.ids is not None else self._ids_from_embeds(call)
        valid = masks.valid_tokens(call.mask, B, L, past)
        layout, encodings = read_layout(
            ids=ids, valid=valid, encoded=call.encoded, tokens=self._tokens, family=self.family, inner=self._inner
        )
        return layout, encodings

    def _ids_from_embeds(self, call: _Call) -> Tensor:
        embeds = call.embeds
        assert embeds is not None
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        lookup = self._inner.get_input_embeddings()  # type: ignore[operator]
        for tokens in self._tokens.values():
            for token in tokens:
                row = lookup(torch.tensor(token, device=embeds.device))
                ids = ids.masked_fill((embeds == row).all(dim=-1), token)
        return ids

    def _cut(
        self,
        call: _Call,
        given: dict[str, Any],
        layout: Layout,
        decision: Decision,
        state: CacheState | None,
        past: int,
        pictures: tuple[int, ...],
    ) -> dict[str, Any]:
        embeds, cache, mask = given["inputs_embeds"], given.get("past_key_values"), given.get("attention_mask")
        B, L = embeds.shape[:2]
        cut = plan_cut(decision, layout)
        before = torch.from_numpy(layout.valid).to(embeds.device)
        positions = self._incoming_positions(given, state, past)
        new, shift = cut_positions(positions, cut, before, compact=self.positions == "compact")
        stored = self._stored(mask, state, past, L, B, embeds.device)
        uneven = any(length != decision.size for length in decision.row_lengths)
        past_padded = state.padded if state is not None else past > 0 and torch.is_tensor(mask)
        padded = uneven or past_padded
        changed = dict(given)
        changed["inputs_embeds"] = embeds.gather(1, cut.indices[..., None].expand(-1, -1, embeds.shape[-1]))
        changed["attention_mask"] = cut_mask(
            mask, cut, stored=stored, past=past, padded=padded, optional=cache is not None or self._has_rotary
        )
        changed["position_ids"] = self._outgoing_positions(call, new, cut, past)
        cut_deepstack(changed, cut, layout, decision)
        call.cut = replace(cut, shift=shift)
        old_shift = state.shift if state is not None else None
        call.next_state = CacheState(
            owner=self._owner,
            removed=(state.removed if state else 0) + L - decision.size,
            stored=past + decision.size,
            valid=cut.valid if stored is None else torch.cat([stored, cut.valid], dim=1),
            padded=padded,
            shift=shift if old_shift is None else old_shift + (0 if shift is None else shift),
            pictures=pictures,
        )
        return changed

    def _incoming_positions(self, given: dict[str, Any], state: CacheState | None, past: int) -> Tensor:
        embeds, positions = given["inputs_embeds"], given.get("position_ids")
        if positions is None:
            logical = past + (state.removed if state is not None else 0)
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + logical
        if state is not None and state.shift is not None:
            positions = positions - state.shift
        return positions

    def _outgoing_positions(self, call: _Call, new: Tensor, cut: Cut, past: int) -> Tensor:
        """Ids for the language model: masks and packing detection see a contiguous count, the rotary the real ids."""
        contiguous = (cut.valid.cumsum(dim=1) - 1).clamp(min=0) + past
        if new.ndim == 2 and self.family.mrope:
            return torch.stack([contiguous, new, new, new])
        if new.ndim == 3 and new.shape[0] == 4:
            return torch.cat([contiguous[None], new[1:]])
        if new.ndim == 2 and self._has_rotary:
            call.rotary_positions = new
            return contiguous
        return new

    @staticmethod
    def _stored(
        mask: Any, state: CacheState | None, past: int, new: int, B: int, device: torch.device
    ) -> Tensor | None:
        if past == 0:
            return None
        if state is not None:
            return masks.stored_valid(mask, state.valid, past, new)
        if torch.is_tensor(mask) and mask.ndim == 2 and mask.shape[1] == past + new:
            return mask[:, :past].bool()
        return torch.ones(B, past, dtype=torch.bool, device=device)

    def _continue(
        self, call: _Call, given: dict[str, Any], state: CacheState, pictures: tuple[int, ...] | None = None
    ) -> dict[str, Any]:
        """A later call on a pruned cache: its mask counts stored tokens, its positions skip the vacated ids."""
        embeds, mask = given["inputs_embeds"], given.get("attention_mask")
        B, new = embeds.shape[:2]
        stored = physical_length(given["past_key_values"])
        changed = dict(given)
        positions = self._incoming_positions(given, state, stored)
        changed["position_ids"] = positions.expand(*positions.shape[:-2], B, new)
        flat = torch.is_tensor(mask) and mask.ndim == 2
        state.padded = state.padded or (new > 1 and flat)
        state.stored = stored + new
        state.pictures = pictures or state.pictures
        if not state.padded:
            changed["attention_mask"] = None
            return changed
        known = masks.stored_valid(mask, state.valid, stored, new)
        fresh = mask[:, -new:].bool() if flat else known.new_ones(B, new)
        changed["attention_mask"] = torch.cat([known, fresh.to(known.device)], dim=1).long()
        return changed

    @torch.compiler.disable
    def _before_rotary(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        positions = None if self._call is None else self._call.rotary_positions
        if positions is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    @torch.compiler.disable
    def _after_language_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._call
        if call is None:
            return None
        call.rotary_positions = None
        call.stopwatch.stop("prefill")
        if call.entered is not None:
            call.entered.entered = False
        if output is None or call.cut is None:
            return None
        if output.past_key_values is not None and call.next_state is not None:
            check_prunable(output.past_key_values)
            mark_pruned(output.past_key_values, call.next_state)
        output.last_hidden_state = call.cut.restore(output.last_hidden_state)
        return output

    def _publish(
        self, call: _Call, layout: Layout, decision: Decision, before: tuple[int, ...], embeds: Tensor
    ) -> None:
        config = self._inner.config.get_text_config()  # type: ignore[union-attr, operator]
        for encoded in call.encoded.values():
            call.stopwatch.absorb(encoded.stopwatch)
        segments = tuple(
            SegmentReport(row=segment.row, kind=segment.kind, parts=segment.parts, stages=stages)
            for segment, stages in zip(layout.segments, decision.stages, strict=True)
        )
        removed = sum(before) - sum(decision.row_lengths)
        self._record(call, segments, before, decision.row_lengths, removed * kv_bytes_per_token(config, embeds.itemsize))

    def _publish_empty(self, call: _Call, embeds: Tensor) -> None:
        B, L = embeds.shape[:2]
        self._record(call, (), (L,) * B, (L,) * B, 0)

    def _record(
        self,
        call: _Call,
        segments: tuple[SegmentReport, ...],
        before: tuple[int, ...],
        after: tuple[int, ...],
        kv_bytes_saved: int,
    ) -> None:
        sources = {e.evidence for e in call.encoded.values() if e.evidence and self.pipeline.needs & FROM_ENCODER}
        report = PruneReport(
            method=self.method,
            family=self.family.name,
            backend=self.backend,
            positions=self.positions,
            importance=", ".join(sorted(sources)) or None,
            picks=tuple(pick.name for pick in self.pipeline.picks),
            segments=segments,
            length_before=before,
            length_after=after,
            kv_bytes_saved=kv_bytes_saved,
            stopwatch=call.stopwatch,
        )
        self.history.append(report)
        if self._on_report is not None:
            self._on_report(report)


def _bind(
    signature: inspect.Signature, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name, extra keyword arguments flattened in."""
    if not args:
        return dict(kwargs)
    given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    given.pop("self", None)
    extra = given.pop("kwargs", {})
    return {**given, **extra}


def _pictures_seen(state: CacheState | None, B: int) -> tuple[int, ...]:
    return state.pictures if state is not None else (0,) * B


def _count(layout: Layout, seen: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(
        before + sum(segment.row == row for segment in layout.segments) for row, before in enumerate(seen)
    )
