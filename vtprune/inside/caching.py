"""The hooks on attention that choose, layer by layer, what of the pictures stays in the KV cache of a prefill."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtprune import masks
from vtprune.adapters.decoder import Decoder
from vtprune.errors import UnsupportedCall
from vtprune.glances import Glance
from vtprune.inside.glances import seen_by
from vtprune.inside.hooks import Hooks, Thread, hidden_of, tables_at, with_hidden
from vtprune.inside.keeping import Keeping, Kept, choose
from vtprune.inside.walk import Walk
from vtprune.kernels import reference as kernels
from vtprune.pipeline import CacheStage

_ROWS_AT_ONCE = 256


class _Thread(Thread):
    """The prefill under way, and what belongs to the layer that runs."""

    queries: Tensor | None = None
    kept: Kept | None = None

    def clear(self) -> None:
        self.queries = self.kept = None


class CacheCutter(Hooks[Keeping]):
    """The hooks that choose in a prefill with pictures."""

    _thread: _Thread

    def __init__(self, decoder: Decoder, stage: CacheStage, implementation: str) -> None:
        super().__init__(decoder, _Thread())
        self._stage = stage
        self._implementation = implementation

    def hook(self) -> None:
        """Register the hooks."""
        for number in range(len(self._decoder.layers)):
            attention = self._decoder.attention(number)
            self.note(number, "self_attn", *(() if self._stage.sparse else ("self_attn.q_proj",)))
            if self._stage.sparse:
                before, after = functools.partial(self._before, number), self._spread
                self._handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(attention.register_forward_hook(after))
                continue
            after = functools.partial(self._after, number)
            self._handles.append(attention.q_proj.register_forward_hook(self._projected))
            self._handles.append(attention.register_forward_hook(after, with_kwargs=True))

    @torch.compiler.disable
    def _projected(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._thread.call is not None:
            self._thread.queries = output.detach()

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Shorten what the layer has just stored."""
        keeping, queries = self._thread.call, self._thread.queries
        if keeping is None or queries is None:
            return
        stored = cached_layer(kwargs.get("past_key_values"), number)
        past = stored.keys.shape[2] - keeping.valid.shape[1]
        scores = self._look(number, keeping, queries, stored.keys, kwargs["position_embeddings"], kwargs)
        fresh = [stored.keys[:, :, past:], stored.values[:, :, past:]]
        kept = choose(keeping, fresh, scores)
        keeping.kept.append(kept)
        for name, states in zip(("keys", "values"), fresh, strict=True):
            short = _of_heads(states, kept.places)
            setattr(stored, name, torch.cat([getattr(stored, name)[:, :, :past], short], dim=2) if past else short)
        self._thread.queries = None

    @torch.compiler.disable
    @torch.no_grad()
    def _chosen(self, number: int, keeping: Keeping, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Kept:
        """What takes part in the attention of a layer, by its own queries and keys, made once more for it."""
        rotary = kwargs["position_embeddings"]
        keys = own = self._decoder.keys(number, module.k_proj(hidden), *rotary)
        stored = cached_layer(kwargs.get("past_key_values"), number)
        if keeping.known is not None:
            keys = torch.cat([stored.keys, own], dim=2)
        scores = self._look(number, keeping, hidden, keys, rotary, kwargs)
        return choose(keeping, [own], scores)

    @torch.compiler.disable
    def _before(
        self, number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the attention of a layer the chosen tokens alone."""
        keeping = self._thread.call
        if keeping is None:
            return None
        hidden = hidden_of(args, kwargs)
        kept = self._thread.kept = self._chosen(number, keeping, module, hidden, kwargs)
        keeping.kept.append(kept)
        short = kernels.rows_at(hidden, kept.places)
        rotary = tables_at(kwargs["position_embeddings"], kept.places)
        mask = self._mask(keeping.past_valid(number), keeping.valid, kept, short, kwargs.get("attention_mask"))
        changed = {**kwargs, "position_embeddings": rotary, "attention_mask": mask, "position_ids": None}
        return with_hidden(args, changed, short)

    def _mask(self, past: Tensor | None, whole: Tensor, kept: Kept, short: Tensor, given: Any) -> Any:
        """The mask of the chosen tokens (B, K', D) behind those that are cached, (B, past)."""
        if past is None and torch.is_tensor(given) and given.ndim == 4:
            return masks.cut_square(given, kept.places, kept.valid, 0, whole.shape[1])
        padded = past is not None or any(length != kept.valid.shape[1] for length in kept.lengths)
        real = kept.valid if past is None else torch.cat([past, kept.valid], dim=1)
        return masks.over_keys(
            real if padded else None,
            queries=kept.valid.shape[1],
            keys=real.shape[1],
            like=short,
            implementation=self._implementation,
        )

    @torch.compiler.disable
    def _spread(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output of attention at the length of the sequence: nothing is added to what took no part."""
        kept, self._thread.kept = self._thread.kept, None
        if self._thread.call is None or kept is None:
            return None
        whole = kernels.rows_at(output[0], kept.slots).masked_fill(~kept.kept[..., None], 0)
        return (whole, *output[1:])

    def _look(
        self, number: int, keeping: Keeping, source: Tensor, keys: Tensor, rotary: Any, kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """What each glance sees of the K tokens, (B, G, K), or (B, 1, K) where heads choose together.

        `source` (B, K, ...) are hidden states, or queries as `q_proj` gave them.
        """
        groups = keys.shape[1] if self._stage.heads else 1
        past = keys.shape[2] - keeping.valid.shape[1]
        found: dict[str, Tensor] = {}
        for of_rows, glances in _by_rows(self._stage.choice.glances).items():
            sums: dict[str, Tensor] = {}
            count = torch.zeros(len(source), 1, 1, device=source.device)
            for rows, real in keeping.blocks(of_rows, _ROWS_AT_ONCE):
                own = kernels.rows_at(source, rows)
                seen = seen_by(
                    keeping,
                    rows,
                    real,
                    decoder=self._decoder,
                    layer=number,
                    queries=self._decoder.attention(number).q_proj(own) if self._stage.sparse else own,
                    keys=keys,
                    rotary=rotary,
                    mask=None if self._stage.sparse and past else kwargs.get("attention_mask"),
                    past_valid=keeping.past_valid(number),
                    divides=any(glance.divides for glance in glances.values()),
                ).of_groups(groups)
                weight = real.sum(dim=1)[:, None, None]
                count = count + weight
                for name, glance in glances.items():
                    values = glance.rule(seen).unflatten(0, (-1, groups)) * weight
                    sums[name] = sums[name] + values if name in sums else values
            found |= {name: (total / count.clamp_min(1))[..., past:] for name, total in sums.items()}
        return found


def _by_rows(glances: Mapping[str, Glance]) -> dict[str, dict[str, Glance]]:
    """Glances by the rows they look from."""
    found: dict[str, dict[str, Glance]] = {}
    for name, glance in glances.items():
        found.setdefault(glance.rows, {})[name] = glance
    return found


def cached_layer(cache: Any, number: int) -> Any:
    """One layer of the cache of a call.

    Raises:
        UnsupportedCall: without a cache.
    """
    if cache is None:
        raise UnsupportedCall("this method decides what a KV cache stores, and this call has none: pass use_cache=True")
    return cache.layers[number]


def trim(cache: Any, walk: Walk, cached: tuple[int, ...]) -> None:
    """Let layers between cuts store what is left behind the last one; `cached` tokens of each were there before."""
    for point, (start, stop) in enumerate(itertools.pairwise(walk.layers)):
        places = walk.left_of(point)
        if places is None:
            continue
        walk.stored[point] = walk.stored[-1]
        for number in range(start, stop):
            stored, past = cached_layer(cache, number), cached[point]
            for name in ("keys", "values"):
                states = getattr(stored, name)
                short = _of_heads(states[:, :, past:], places)
                setattr(stored, name, torch.cat([states[:, :, :past], short], dim=2))


def _of_heads(states: Tensor, places: Tensor) -> Tensor:
    """Rows (B, G, K', d) of `states` (B, G, K, d) at `places` (B * G, K') or, the same for all heads, (B, K')."""
    B, G = states.shape[:2]
    if len(places) != B * G:
        places = places[:, None].expand(B, G, -1).flatten(0, 1)
    return kernels.rows_at(states.flatten(0, 1), places).unflatten(0, (B, G))
