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

from vtprune.adapters.base import Family, language_model, placeholder_id, rope_axes, sliding_window
from vtprune.cache import check_prunable, mark_pruned
from vtprune.pipeline import Pipeline
from vtprune.report import PruneReport, kv_bytes_per_token
from vtprune.runtime import masks
from vtprune.runtime.calls import Call, bind
from vtprune.runtime.decide import Decision, decide
from vtprune.runtime.encoded import Encoded
from vtprune.runtime.encoder import EncoderTap
from vtprune.runtime.evidence import Given, readings_of
from vtprune.runtime.reading import Prompt, placeholders_in, read_prompt
from vtprune.runtime.reporting import report_of
from vtprune.runtime.shorten import Scheme, resume, shorten
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
        self._thread = _Thread()
        self._handles: list[RemovableHandle] = []
        self._shells: tuple[nn.Module, ...] = ()
        self._lm = language_model(inner)
        assert self._lm is not None
        self._tap = EncoderTap(inner, family)
        self._tokens = {kind: placeholder_id(inner.config, kind) for kind in self._tap.kinds}
        self._tap.on_encoded = self._encoded_now
        self._kv_bytes_per_element = kv_bytes_per_token(inner.config.get_text_config(), 1)  # type: ignore[union-attr, operator]
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
        """Evidence for the calls of this thread inside the block, one entry per prompt row (repeated for beams).

        Blocks may be nested; the inner one adds to the outer one, and wins where both name the same.

        An entry is a list of numbers or a tensor for the picture of the row, a list of these for several pictures, or
        None. `protect` and `forbid` hold token indices: tokens to keep and tokens to drop whatever the method says. Any
        other name must be evidence that the method reads, as scores per token or per part; they take the place of the
        encoder's.

        Raises:
            InvalidOption: for a name the method does not read, lists of different length, or what is no number.
            UnsupportedCall: in the call, where entries do not fit its prompts and pictures.
        """
        before = self._thread.given
        self._thread.given = Given.check(evidence, self.pipeline.needs, outer=before)
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
            self._tap.install(readings_of(self.pipeline), stage=self.pipeline.encoder, budget=self.budget)
        rotary = getattr(lm, "rotary_emb", None)
        self._scheme = Scheme(
            owner=self._owner,
            compact=self.positions == "compact",
            axes=rope_axes(self._inner.config),
            rotary=isinstance(rotary, nn.Module),
            window=sliding_window(self._inner.config),
        )
        self._handles += [
            self._inner.register_forward_pre_hook(self._before_base, with_kwargs=True),
            self._inner.register_forward_hook(self._after_base, with_kwargs=True, always_call=True),
            lm.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
            lm.register_forward_hook(self._after_language_model, with_kwargs=True, always_call=True),
        ]
        if isinstance(rotary, nn.Module):
            self._handles.append(rotary.register_forward_pre_hook(self._before_rotary, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook and handle off the model, and what `generate` compiled with the hooks in it."""
        for shell in self._shells:
            shell.__dict__.pop(HANDLE, None)
            shell.__dict__.pop("__getstate__", None)
            shell.__dict__.pop("_compiled_call", None)
        self._shells = ()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tap.remove()

    def __repr__(self) -> str:
        budget = f"keep={self.budget.keep}, per={self.budget.per!r}, positions={self.positions!r}"
        return f"Pruner(method={self.method!r}, {budget}, family={self.family.name!r}, backend={self.backend!r})"

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    @torch.compiler.disable
    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._thread.call = Call.begin(bind(self._inner_signature, module, args, kwargs), self._owner)
        self._thread.call.check_cut(self._tap.cut)
        self._read(self._thread.call)

    @torch.compiler.disable
    def _encoded_now(self, encoded: Encoded) -> None:
        if self._thread.call is not None:
            self._thread.call.encoded[encoded.kind] = encoded
            self._read(self._thread.call)

    def _after_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
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
                self._publish(call, None, None, embeds)
            changed = None if call.state is None else resume(given, call.state)
        call.enter_language_model(embeds)
        return None if changed is None else ((), changed)

    def _prefill(self, call: Call, given: dict[str, Any]) -> dict[str, Any] | None:
        embeds, cache = given["inputs_embeds"], given.get("past_key_values")
        check_prunable(cache)
        prompt = call.prompt
        assert prompt is not None
        with call.stopwatch.measure("select", like=embeds):
            decision = decide(prompt, embeds, pipeline=self.pipeline, budget=self.budget, given=self._thread.given)
        self._publish(call, prompt, decision, embeds)
        pictures = torch.from_numpy(prompt.pictures).to(embeds.device, non_blocking=True)
        if decision.row_lengths == prompt.layout.row_lengths and not self._always_cut:
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
        return call.short.arguments

    def _read(self, call: Call) -> None:
        """Lay the pictures out as soon as all of them are encoded, before transformers merge them into the prompt."""
        words = call.ids if call.ids is not None else call.embeds
        if not call.complete or words is None:
            return
        with call.stopwatch.measure("layout", like=words):
            call.prompt = read_prompt(
                ids=call.ids if call.ids is not None else self._ids_of(words),
                valid=masks.valid_tokens(call.mask, words.shape[0], words.shape[1], call.past),
                seen=None if call.state is None else call.state.pictures,
                encoded=call.encoded,
                tokens=self._tokens,
                family=self.family,
                inner=self._inner,
            )

    def _ids_of(self, embeds: Tensor) -> Tensor:
        lookup = self._inner.get_input_embeddings()  # type: ignore[operator]
        return placeholders_in(embeds, lookup, [token for token in self._tokens.values() if token is not None])

    @torch.compiler.disable
    def _before_rotary(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._thread.call
        positions = None if call is None or call.short is None else call.short.rotary_positions
        if positions is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    @torch.compiler.disable
    def _after_language_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._thread.call
        if call is None:
            return None
        short = call.leave_language_model()
        if output is None or short is None:
            return None
        if output.past_key_values is not None:
            check_prunable(output.past_key_values)
            mark_pruned(output.past_key_values, short.state)
        output.last_hidden_state = short.cut.restore(output.last_hidden_state)
        return output

    def _publish(self, call: Call, prompt: Prompt | None, decision: Decision | None, embeds: Tensor) -> None:
        report = report_of(
            prompt,
            decision,
            embeds,
            given=self._thread.given,
            pipeline=self.pipeline,
            family=self.family.name,
            backend=self.backend,
            positions=self.positions,
            kv_bytes_per_element=self._kv_bytes_per_element,
            stopwatch=call.stopwatch,
        )
        self.history.append(report)
        if self._on_report is not None:
            self._on_report(report)
