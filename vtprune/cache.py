"""The pruned KV cache: a logical length for position bookkeeping, a physical one for masks and storage.

`generate` and chat loops count the tokens they wrote (logical); attention masks must count what is stored (physical).
A cache becomes pruned in place, when the prefill that shortened it ends. It refuses updates outside the wrapped model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from vtprune.errors import UnsupportedCall


def each_once(change: Callable[..., Tensor], *columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What `change` makes of each row of the columns; rows of the same tensors become one tensor.

    Behind neighbouring drop points that cut nothing the same is stored, and one mask will do.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    rows = list(zip(*columns, strict=True))
    keys = [tuple(map(id, row)) for row in rows]
    for key, row in zip(keys, rows, strict=True):
        if key not in made:
            made[key] = change(*row)
    return tuple(made[key] for key in keys)


@dataclass
class DeepState:
    """What is stored behind each drop point between layers: `valid` (B, P) tells real tokens from padding there.

    They are as many as those that `CacheState.valid` covers in front of the first drop point, less what was cut.
    """

    valid: tuple[Tensor, ...]
    padded: bool

    def cached(self, later: int) -> tuple[int, ...]:
        """Tokens behind each drop point, `later` of them stored after the last cut."""
        return tuple(valid.shape[1] + later for valid in self.valid)


@dataclass(frozen=True, kw_only=True)
class SinkState:
    """What layers that look for attention sinks know of cached tokens.

    `marks` (B, 2, P) by layer: which tokens belong to pictures, and which are sinks. In front of the first drop point
    they are of the first `covered` tokens; what comes after those was written by the model, and is neither. `massive`
    (B, D) by layer and rule: the channels that tell sinks. `pictures` says whether there was any.
    """

    marks: Mapping[int, Tensor]
    massive: Mapping[tuple[int, str], Tensor]
    covered: int
    pictures: bool

    def select_rows(self, rows: Callable[[Tensor], Tensor]) -> SinkState:
        """The same of a choice of batch rows."""
        marks = {layer: rows(own) for layer, own in self.marks.items()}
        return replace(self, marks=marks, massive={key: rows(own) for key, own in self.massive.items()})

    def up_to(self, length: int) -> SinkState:
        """The same where only the first `length` tokens are left in front of the first drop point."""
        gone = max(0, self.covered - length)
        marks = {layer: own[..., : own.shape[2] - gone] for layer, own in self.marks.items()}
        return replace(self, marks=marks, covered=self.covered - gone)


@dataclass
class CacheState:
    """What decoding must know about earlier cuts.

    `removed` is logical minus physical length; `valid` (B, P) tells real tokens from padding among the first P stored
    ones and `padded` whether any is padding; `shift` (B, 1) is subtracted from later position ids; `pictures` (B,)
    counts the segments of the conversation per row. `stored` is the physical length, counted on the host, and
    `cut_length` what it was up to the last picture that was cut; `owner` names the pruner that made it. `deep` is there
    where it cuts between layers too; all else is then about the layers in front of the first drop point. `sinks` is
    there where layers look for attention sinks.
    """

    owner: str
    removed: int
    stored: int
    cut_length: int
    valid: Tensor
    padded: bool
    shift: Tensor | None
    pictures: Tensor
    entered: bool = False
    deep: DeepState | None = None
    sinks: SinkState | None = None

    @classmethod
    def whole(cls, owner: str, valid: Tensor, pictures: Tensor, *, padded: bool) -> CacheState:
        """That of a cache of the tokens `valid` (B, P), of which nothing was cut."""
        stored = valid.shape[1]
        return cls(
            owner=owner,
            removed=0,
            stored=stored,
            cut_length=0,
            valid=valid,
            padded=padded,
            shift=None,
            pictures=pictures,
        )

    def select_rows(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Apply a choice of batch rows to every tensor."""
        self.pictures = rows(self.pictures)
        self.valid = rows(self.valid)
        if self.shift is not None:
            self.shift = rows(self.shift)
        if self.deep is not None:
            self.deep.valid = each_once(rows, self.deep.valid)
        if self.sinks is not None:
            self.sinks = self.sinks.select_rows(rows)


class _PrunedCache:
    """Mixed into a transformers cache class; `pruned` holds the state."""

    pruned: CacheState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Logical length outside the language model, physical length inside it."""
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        if self.pruned is None or self.pruned.entered or (isinstance(length, int) and length == 0):
            return length
        return length + self.pruned.removed

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        """Physical length: what masks count from."""
        return self.physical_length(layer_idx)

    def physical_length(self, layer_idx: int = 0) -> int | Tensor:
        """Number of stored tokens."""
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Store keys and values; only the wrapped model may."""
        if self.pruned is not None and not self.pruned.entered:
            raise UnsupportedCall(
                "this KV cache was pruned by a wrapped model and is used outside of it: positions and masks would be "
                "wrong. Continue the chat before unwrap, or start with a fresh cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, but none up to the last picture that was cut: there is no telling what is left."""
        state = self.pruned
        left = self.physical_length() + tokens_to_remove
        if state is not None and left < state.cut_length:
            raise UnsupportedCall(
                f"crop({tokens_to_remove}) reaches into a picture that was pruned: only the text after it can be "
                "removed. Start the chat again with a fresh cache"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if state is not None:
            gone = max(0, state.valid.shape[1] - left)
            state.sinks = None if state.sinks is None else state.sinks.up_to(int(left))
            state.valid = state.valid[:, :left]
            if state.deep is not None:
                state.deep.valid = each_once(lambda valid: valid[:, : valid.shape[1] - gone], state.deep.valid)

    def reset(self) -> None:
        """Forget everything, the cuts included."""
        super().reset()  # type: ignore[misc]
        self.pruned = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._select_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select_rows(lambda rows: rows[indices.to(rows.device)])

    def _select_rows(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.pruned is not None:
            self.pruned.select_rows(rows)


class PrunedDynamicCache(_PrunedCache, DynamicCache):  # type: ignore[misc]
    """A `DynamicCache` after a cut."""


class PrunedStaticCache(_PrunedCache, StaticCache):  # type: ignore[misc]
    """A `StaticCache` after a cut.

    Where a cache is compileable, `generate` builds 4-D masks, by logical columns; this one stores physical ones. The
    language model must know it all the same, or it leaves out the mask that hides the room not filled yet.
    """

    @property
    def is_compileable(self) -> bool:
        """True inside the language model only."""
        return super().is_compileable and (self.pruned is None or self.pruned.entered)


_PRUNED: dict[type, type] = {DynamicCache: PrunedDynamicCache, StaticCache: PrunedStaticCache}


def is_prunable(cache: object) -> bool:
    """Whether a cache can hold a pruned prompt; so does none at all."""
    return cache is None or isinstance(cache, _PrunedCache) or type(cache) in _PRUNED


def check_prunable(cache: object) -> None:
    """Raise `UnsupportedCall` for a cache class that cannot hold a pruned prompt."""
    if not is_prunable(cache):
        names = " or ".join(kind.__name__ for kind in _PRUNED)
        raise UnsupportedCall(f"cache of class {type(cache).__name__}: expected {names}, or leave past_key_values out")


def state_of(cache: object, owner: str) -> CacheState | None:
    """The state of a pruned cache, None for any other; raises `UnsupportedCall` where another pruner made it."""
    state = cache.pruned if isinstance(cache, _PrunedCache) else None
    if state is not None and state.owner != owner:
        raise UnsupportedCall(
            "this KV cache was built under another pruning of the model: its positions and masks belong to that one. "
            "Start the chat again with a fresh cache"
        )
    return state


def mark_pruned(cache: Cache, state: CacheState) -> None:
    """Turn `cache` into its pruned class, in place, and give it `state`."""
    if not isinstance(cache, _PrunedCache):
        cache.__class__ = _PRUNED[type(cache)]
    cache.pruned = state  # type: ignore[attr-defined]


def physical_length(cache: Cache | None) -> int:
    """Number of tokens stored in `cache`."""
    if cache is None:
        return 0
    length = cache.physical_length() if isinstance(cache, _PrunedCache) else cache.get_seq_length()
    if isinstance(length, int):
        return length
    state = getattr(cache, "pruned", None)
    return int(length) if state is None else state.stored
