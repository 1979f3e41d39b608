"""The hooks on attention that choose, layer by layer, what of the pictures stays in the KV cache of a prefill."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune import masks
from vtprune.adapters.decoder import Decoder
from vtprune.errors import UnsupportedCall
from vtprune.inside.glances import find_raters, seen_by
from vtprune.inside.walk import Entry, Walk
from vtprune.kernels import host
from vtprune.kernels import reference as kernels
from vtprune.pipeline import CacheStage
from vtprune.readings import Glance
from vtprune.seam import refuse_copy
from vtprune.types import Ordinal, Part, VisualTokens


@dataclass(frozen=True, kw_only=True)
class CachedStack:
    """Equal pictures: `at` (S, N) are the places of their tokens, counted through all B * K of the sequence.

    At most `count` of each stay in a cache. `numbers` are those of the pictures.
    """

    at: Tensor
    prompt_rows: tuple[int, ...]
    parts: tuple[Part, ...]
    ordinals: tuple[Ordinal, ...]
    numbers: tuple[int, ...]
    count: int

    def tokens(self, keys: Tensor, scores: Mapping[str, Tensor]) -> VisualTokens:
        """What stages see of keys (B, G, K, d) and scores (B, G, K): a picture for each head, (S * G, N)."""
        where = self.of_heads(keys.shape[1], keys.shape[2])
        return VisualTokens(
            features=keys.flatten(0, 2)[where],
            parts=self.parts,
            ordinals=tuple(ordinal for ordinal in self.ordinals for _ in range(keys.shape[1])),
            evidence={name: values.reshape(-1)[where] for name, values in scores.items()},
        )

    def of_heads(self, heads: int, K: int) -> Tensor:
        """Places (S * G, N) counted through all B * G * K."""
        row, column = self.at // K, self.at % K
        each = torch.arange(heads, device=self.at.device)[:, None]
        return ((row[:, None] * heads + each) * K + column[:, None]).flatten(0, 1)

    def part(self, rows: list[int], count: int) -> CachedStack:
        """Some of the pictures, with `count` tokens each."""
        chosen = torch.tensor(rows).to(self.at.device, non_blocking=True)
        return replace(
            self,
            at=self.at[chosen],
            prompt_rows=tuple(self.prompt_rows[row] for row in rows),
            ordinals=tuple(self.ordinals[row] for row in rows),
            numbers=tuple(self.numbers[row] for row in rows),
            count=count,
        )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a layer keeps: `places` (B * G, K') of the sequence, in which `valid` (B, K') is no padding.

    `slots` (B * G, K) says where in them each token stands, or the last kept one before it; `kept` (B * G, K) which do.
    """

    places: Tensor
    valid: Tensor
    slots: Tensor
    kept: Tensor
    lengths: tuple[int, ...]


@dataclass
class Keeping:
    """One prefill: `entry` is the sequence, `rows` (B, R) those that are looked from, `kept` what each layer keeps.

    `known` tells for each layer which of the tokens cached before are real, None where none are.
    """

    stage: CacheStage
    entry: Entry
    stacks: list[CachedStack]
    known: tuple[Tensor, ...] | None
    kept: list[Kept] = field(default_factory=list)
    tally: dict[int, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        """(B, K), which tokens of the sequence are real."""
        return self.entry.valid

    @functools.cached_property
    def visual(self) -> Tensor:
        """(B, K), True at the tokens of pictures."""
        found = torch.zeros_like(self.valid)
        for stack in self.stacks:
            found.view(-1)[stack.at] = True
        return found

    @property
    def cached(self) -> dict[int, Tensor]:
        """Of every picture, by its number, in how many layers each of its tokens is stored, (N,)."""
        return self.tally

    @property
    def average_stored(self) -> float:
        """Length of what layers store, averaged over them."""
        return sum(one.valid.shape[1] for one in self.kept) / max(len(self.kept), 1)

    def past_valid(self, layer: int) -> Tensor | None:
        """(B, past), which cached tokens of a layer are real; None where nothing is cached."""
        return None if self.known is None else self.known[layer]

    def find_raters(self, embeds: Tensor) -> None:
        """Learn which rows of text rate the pictures, from what enters the language model (B, K, D)."""
        self.entry = replace(self.entry, raters=find_raters(embeds, self.entry.rows, self.entry.real, self.visual))

    def blocks(self, rows: str, size: int) -> list[tuple[Tensor, Tensor]]:
        """Rows (B, R) that are looked from and which of them are real, at most `size` at once."""
        places, real = self.entry.rows, self.entry.real
        if rows == "last":
            places, real = places[:, -1:], real[:, -1:]
        elif rows == "raters":
            assert self.entry.raters is not None
            real = self.entry.raters
        elif rows == "all":
            B, K = self.valid.shape
            places, real = torch.arange(K, device=self.valid.device).expand(B, K), self.valid
        return list(zip(places.split(size, dim=1), real.split(size, dim=1), strict=True))


class _Thread(threading.local):
    """The prefill of one thread that is under way, and what belongs to the layer that runs."""

    keeping: Keeping | None = None
    queries: Tensor | None = None
    kept: Kept | None = None


_ROWS_AT_ONCE = 256


class CacheCutter:
    """Hooks of one stage on one decoder; `begin` and `end` enclose a prefill with pictures."""

    def __init__(self, decoder: Decoder, stage: CacheStage, implementation: str) -> None:
        self._decoder = decoder
        self._stage = stage
        self._implementation = implementation
        self._handles: list[RemovableHandle] = []
        self._thread = _Thread()

    __deepcopy__ = refuse_copy
    __reduce_ex__ = refuse_copy  # type: ignore[assignment]

    def hook(self) -> None:
        """Register the hooks."""
        for number in range(len(self._decoder.layers)):
            attention = self._decoder.attention(number)
            if self._stage.sparse:
                before, after = functools.partial(self._before, number), self._spread
                self._handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(attention.register_forward_hook(after))
                continue
            after = functools.partial(self._after, number)
            self._handles.append(attention.q_proj.register_forward_hook(self._projected))
            self._handles.append(attention.register_forward_hook(after, with_kwargs=True))

    def remove(self) -> None:
        """Undo `hook`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, keeping: Keeping) -> None:
        """Choose in the call that comes now."""
        self._thread.keeping = keeping

    def end(self) -> Keeping | None:
        """Leave the call alone that comes next; returns what there was."""
        keeping, self._thread.keeping = self._thread.keeping, None
        self._thread.queries = self._thread.kept = None
        return keeping

    @torch.compiler.disable
    def _projected(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._thread.keeping is not None:
            self._thread.queries = output.detach()

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Shorten what the layer has just stored."""
        keeping, queries = self._thread.keeping, self._thread.queries
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
        keeping = self._thread.keeping
        if keeping is None:
            return None
        hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        kept = self._thread.kept = self._chosen(number, keeping, module, hidden, kwargs)
        keeping.kept.append(kept)
        short = kernels.cut_sequence(hidden, kept.places)
        tables = kwargs["position_embeddings"]
        rotary = tuple(kernels.cut_sequence(table.expand(len(hidden), -1, -1), kept.places) for table in tables)
        mask = self._mask(keeping.past_valid(number), keeping.valid, kept, short, kwargs.get("attention_mask"))
        changed = {**kwargs, "position_embeddings": rotary, "attention_mask": mask, "position_ids": None}
        if args:
            return (short, *rest), changed
        return (), {**changed, "hidden_states": short}

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
        if self._thread.keeping is None or kept is None:
            return None
        whole = kernels.cut_sequence(output[0], kept.slots).masked_fill(~kept.kept[..., None], 0)
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
                own = kernels.cut_sequence(source, rows)
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


def choose(keeping: Keeping, states: list[Tensor], scores: Mapping[str, Tensor]) -> Kept:
    """What of the pictures a layer keeps; `states` (B, G, K, d), keys first, get merged rows in place of kept ones."""
    keys = states[0]
    heads = keys.shape[1] if keeping.stage.heads else 1
    seen = keys if heads > 1 or keys.shape[1] == 1 else keys.transpose(1, 2).flatten(2)[:, None]
    stacks = keeping.stacks
    if keeping.stage.counter is not None:
        stacks = [part for stack in stacks for part in _counted(keeping, stack, seen, scores)]
    B, K = keeping.valid.shape
    kept = keeping.valid[:, None].expand(B, heads, K).clone()
    lengths = list(keeping.entry.lengths)
    for stack in stacks:
        n = stack.at.shape[1]
        k = min(stack.count, n)
        for row in stack.prompt_rows:
            lengths[row] -= n - k
        where = stack.of_heads(heads, K)
        kept.view(-1)[where] = False
        stays = _stays(keeping, stack, k, seen, scores, states)
        kept.view(-1)[where.gather(1, stays)] = True
        _count_in(keeping, stack, stays, heads)
    width = max(lengths)
    places, valid, slots = kernels.kept_indices(kept.flatten(0, 1), width, left_padded=keeping.entry.left_padded)
    return Kept(
        places=places,
        valid=valid.view(B, heads, width)[:, 0],
        slots=slots,
        kept=kept.flatten(0, 1),
        lengths=tuple(lengths),
    )


def _stays(
    keeping: Keeping, stack: CachedStack, k: int, seen: Tensor, scores: Mapping[str, Tensor], states: list[Tensor]
) -> Tensor:
    """Ascending indices (S * G, k) of the tokens of a stack that stay; merged rows are written to `states`."""
    where = stack.of_heads(seen.shape[1], seen.shape[2])
    if k == where.shape[1]:
        return torch.arange(k, device=where.device).expand(where.shape)
    stage = keeping.stage
    with kernels.exact(seen.device):
        tokens = stack.tokens(seen, scores)
        selection = stage.choice.run(tokens, k)
        if stage.merger is not None and k:
            weights = stage.merger(tokens, selection)
            at = where.gather(1, selection.keep)
            for number, tensor in enumerate(states):
                flat = tensor.flatten(0, 2)
                merged = (weights @ flat[where].float()).to(flat.dtype)
                states[number] = flat.index_copy(0, at.flatten(), merged.flatten(0, 1)).view(tensor.shape)
    return selection.keep


def _counted(keeping: Keeping, stack: CachedStack, seen: Tensor, scores: Mapping[str, Tensor]) -> list[CachedStack]:
    """The pictures of a stack by how many of their tokens an adaptive stage lets stay: it waits for the device."""
    counter = keeping.stage.counter
    assert counter is not None
    with kernels.exact(seen.device):
        wanted = counter(stack.tokens(seen, scores), stack.count).clamp(0, stack.count)
    rows: dict[int, list[int]] = {}
    for row, count in enumerate(host.read_counts(wanted)):
        rows.setdefault(count, []).append(row)
    return [stack.part(own, count) for count, own in rows.items()]


def _count_in(keeping: Keeping, stack: CachedStack, stays: Tensor, heads: int) -> None:
    """Add to the tally of every picture (N,) the share of the heads that keep each token."""
    S, N = stack.at.shape
    ones = torch.zeros(S * heads, N, device=stays.device).scatter_(1, stays, 1.0)
    shares = ones.view(S, heads, N).mean(dim=1)
    for number, own in zip(stack.numbers, shares.unbind(), strict=True):
        keeping.tally[number] = keeping.tally[number] + own if number in keeping.tally else own


def _of_heads(states: Tensor, places: Tensor) -> Tensor:
    """Rows (B, G, K', d) of `states` (B, G, K, d) at `places` (B * G, K') or, the same for all heads, (B, K')."""
    B, G = states.shape[:2]
    if len(places) != B * G:
        places = places[:, None].expand(B, G, -1).flatten(0, 1)
    return kernels.cut_sequence(states.flatten(0, 1), places).unflatten(0, (B, G))
