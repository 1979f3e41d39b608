"""`Pruner`: the hooks on one model, from prefill to the last decoded token.

A call flows base model (remember the ids) -> encoder (`EncoderTap`) -> language model (read, decide, shorten, give the
caller's length back) -> cache (remember what decoding must know). Nothing flows back.
"""

from __future__ import annotations

import inspect
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Family, language_model
from vtprune.cache import check_prunable, mark_pruned
from vtprune.kernels import backends
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport
from vtprune.runtime.caching import inside_of
from vtprune.runtime.calls import Call, bind, with_positions
from vtprune.runtime.decide import Decision, decide
from vtprune.runtime.edits import Edits
from vtprune.runtime.encoded import Encoded
from vtprune.runtime.encoder import EncoderTap
from vtprune.runtime.evidence import Given, readings_of
from vtprune.runtime.placing import PromptReader
from vtprune.runtime.reporting import Reports
from vtprune.runtime.shorten import Scheme, resume, shorten
from vtprune.schedule import AnySchedule, in_front
from vtprune.seam import HANDLE, refuse_copy
from vtprune.types import Budget


class _Thread(threading.local):
    """What one thread is doing: the forward under way, and the evidence in force."""

    call: Call | None = None
    given: Given | None = None


class Pruner:
    """The handle behind `model.vtprune`: what is pruned how, and reports of what was.

    Attributes:
        method, pipeline, budget, family, positions, backend: what `wrap` was asked for, resolved.
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
        schedule: AnySchedule | None = None,
        on_report: Callable[[PruneReport], None] | None = None,
        history: int = 1,
    ) -> None:
        self.family = family
        self.method = pipeline.name
        self.pipeline = pipeline
        self.budget = budget
        self.positions = "compact" if compact else "keep"
        self.backend = backend
        self._inner = inner
        self._owner = uuid.uuid4().hex
        self._always_cut = False
        self._thread = _Thread()
        self._handles: list[RemovableHandle] = []
        self._shells: tuple[nn.Module, ...] = ()
        self._lm = language_model(inner)
        assert self._lm is not None
        self._tap = EncoderTap(inner, family, backend)
        self._reader = PromptReader(inner, family, self._tap.kinds)
        self._tap.on_encoded = self._encoded_now
        self._schedule = schedule
        self._deep = inside_of(pipeline, budget, schedule, inner, self._lm)
        self._edits = Edits(pipeline, schedule, inner, self._lm, self._owner)
        self._reports = Reports(
            pipeline,
            inner.config.get_text_config(),  # type: ignore[union-attr, operator]
            family=family.name,
            positions=self.positions,
            history=history,
            on_report=on_report,
        )
        self._inner_signature = inspect.signature(type(inner).forward)
        self._lm_signature = inspect.signature(type(self._lm).forward)

    @property
    def history(self) -> deque[PruneReport]:
        """The last reports, oldest first."""
        return self._reports.history

    @property
    def last(self) -> PruneReport | None:
        """Report of the last prefill, None before the first."""
        return self.history[-1] if self.history else None

    @contextmanager
    def using(self, **evidence: Sequence[Any]) -> Iterator[Pruner]:
        """Evidence for the calls of this thread inside the block, one entry per prompt row (repeated for beams).

        Blocks may be nested; the inner one adds to the outer one, and wins where both name the same.

        An entry is a list of numbers or a tensor for the picture of the row, a list of these for several pictures, or
        None. `protect` and `forbid` hold token indices: tokens to keep and tokens to drop whatever the method says, of
        several cuts to keep at all of them and to drop at the first. Any other name must be evidence that the method
        reads, as scores per token or per part; they take the place of the encoder's.

        Raises:
            InvalidOption: for a name the method does not read, lists of different length, or what is no number.
            UnsupportedCall: in the call, where entries do not fit its prompts and pictures, or a cut leaves fewer
                tokens than are protected, as where a method lets all leave.
        """
        before = self._thread.given
        self._thread.given = Given.check(evidence, self.pipeline.asked, outer=before)
        try:
            yield self
        finally:
            self._thread.given = before

    def install(self, shells: Sequence[nn.Module]) -> None:
        """Register every hook and become the handle of every module of `shells`; all or nothing."""
        try:
            self._install()
        except BaseException:
            self.remove()
            raise
        for shell in shells:
            shell.__dict__.update({HANDLE: self, "__getstate__": refuse_copy})
        self._shells = tuple(shells)

    def _install(self) -> None:
        lm = self._lm
        assert lm is not None
        if self.budget.keeps_all:
            self._tap.install({})
        else:
            front = in_front(self.budget, self._schedule)
            self._tap.install(readings_of(self.pipeline), stage=self.pipeline.encoder, budget=front)
        self._scheme = Scheme.of(self._inner, lm, owner=self._owner, compact=self.positions == "compact")
        self._handles += [
            self._inner.register_forward_pre_hook(self._before_base, with_kwargs=True),
            self._inner.register_forward_hook(self._after_base, with_kwargs=True, always_call=True),
            lm.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
            lm.register_forward_hook(self._after_language_model, with_kwargs=True, always_call=True),
        ]
        if self._deep is not None:
            self._deep.hook()
        self._edits.hook()
        if self._scheme.rotary:
            rotary: Any = lm.rotary_emb
            self._handles.append(rotary.register_forward_pre_hook(self._before_rotary, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook and handle off the model, and what `generate` compiled with the hooks in it."""
        for shell in self._shells:
            for name in (HANDLE, "__getstate__", "_compiled_call"):
                shell.__dict__.pop(name, None)
        self._shells = ()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._deep is not None:
            self._deep.remove()
        self._edits.remove()
        self._tap.remove()

    def __repr__(self) -> str:
        budget = f"keep={self.budget.keep}, per={self.budget.per!r}, positions={self.positions!r}"
        return f"Pruner(method={self.method!r}, {budget}, family={self.family.name!r}, backend={self.backend!r})"

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    @torch.compiler.disable
    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call.begin(bind(self._inner_signature, module, args, kwargs), self._owner, self.backend)
        self._thread.call = call.put_in_force(cut_short=self._thread.call)
        call.check_cut(self._tap.cut)
        self._reader.read(call)

    @torch.compiler.disable
    def _encoded_now(self, encoded: Encoded) -> None:
        if self._thread.call is not None:
            self._thread.call.encoded[encoded.kind] = encoded
            self._reader.read(self._thread.call)

    @torch.compiler.disable
    def _after_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._thread.call is not None:
            backends.put_in_force(self._thread.call.outer)
        self._thread.call = None

    @torch.compiler.disable
    def _before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._thread.call
        if call is None:
            return None
        given = bind(self._lm_signature, module, args, kwargs)
        embeds = given.get("inputs_embeds")
        if embeds is None:
            return None
        if call.prompt is not None:
            changed = self._prefill(call, given)
        else:
            call.check_no_hidden_pictures()
            if call.prefill:
                self._reports.publish(call, embeds)
            changed = None if call.state is None else resume(given, call.state)
            if self._deep is not None:
                self._deep.resume(changed, call.state)
            self._edits.resume(call, given)
        call.enter_language_model(embeds)
        return None if changed is None else ((), changed)

    def _prefill(self, call: Call, given: dict[str, Any]) -> dict[str, Any] | None:
        embeds, cache = given["inputs_embeds"], given.get("past_key_values")
        check_prunable(cache)
        prompt = call.prompt
        assert prompt is not None
        with call.stopwatch.measure("select", like=embeds):
            decision = decide(
                prompt,
                embeds,
                pipeline=self.pipeline,
                budget=self.budget,
                given=self._thread.given,
                counts=None if self._deep is None else self._deep.counts,
            )
        pictures = torch.from_numpy(prompt.pictures).to(embeds.device, non_blocking=True)
        whole = decision.row_lengths == prompt.layout.row_lengths
        if whole and self._deep is None and not self._always_cut:
            self._publish(call, embeds, decision)
            self._edits.prefill(call, given)
            if call.state is None:
                return None
            call.state.pictures = pictures
            return resume(given, call.state)
        with call.stopwatch.measure("cut", like=embeds):
            call.short = shorten(
                given,
                layout=prompt.layout,
                decision=decision,
                state=call.state,
                pictures=pictures,
                scheme=self._scheme,
            )
        if self._deep is None:
            self._publish(call, embeds, decision)
        else:
            self._deep.prefill(prompt, decision, call.short, cache, call.state)
            call.pending = (embeds, decision)
        self._edits.prefill(call, given, call.short.cut, None if self._deep is None else self._deep.passage)
        return call.short.arguments

    @torch.compiler.disable
    def _before_rotary(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._thread.call
        positions = None if call is None or call.short is None else call.short.rotary_positions
        return None if positions is None else with_positions(args, kwargs, positions)

    @torch.compiler.disable
    def _after_language_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._thread.call
        if call is None:
            return None
        short, state = call.leave_language_model()
        cache = None if output is None else output.past_key_values
        passed = None if self._deep is None else self._deep.finish(None if short is None else short.state, cache)
        self._edits.finish(state or call.state, done=output is not None)
        if output is None or state is None:
            return None
        if passed is not None:
            assert call.pending is not None
            self._publish(call, *call.pending, passed)
            output.last_hidden_state = passed.restore(output.last_hidden_state)
        if output.past_key_values is not None:
            check_prunable(output.past_key_values)
            mark_pruned(output.past_key_values, state)
        if short is not None:
            output.last_hidden_state = short.cut.restore(output.last_hidden_state)
        return output

    def _publish(self, call: Call, embeds: Tensor, decision: Decision, passed: Any = None) -> None:
        self._reports.publish(call, embeds, decision, given=self._thread.given, passed=passed)
