"""Hooks on decoder layers that give every head a mask of its own, or look where tokens of pictures attend to."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.decoder import Decoder
from vtprune.inside.hooks import Hooks, Thread, allowed_by, hidden_of, tables_at
from vtprune.inside.walk import Walk
from vtprune.kernels import attention as attentions
from vtprune.kernels import reference as kernels
from vtprune.protocols import HeadWatch, MaskEdit

_ROWS = 64
_PROJECTIONS = ("q_proj", "k_proj")


@dataclass
class Album:
    """The pictures of one call, in prompts that have several.

    Of the K tokens that enter, `pictures` (B, K) is the number of the picture each belongs to, -1 for text; `sinks`
    (B, K) are the first of the prompt and those around pictures. `rows` (B, R) are the tokens of later pictures, `real`
    (B, R) False at what fills up. `walk` is what is cut between layers, `done` the layers that were masked.
    """

    pictures: Tensor
    sinks: Tensor
    rows: Tensor
    real: Tensor
    walk: Walk | None = None
    done: set[int] = field(default_factory=set)
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def cuts(self) -> int:
        """How many cuts between layers are behind."""
        return 0 if self.walk is None else len(self.walk.slots)

    def now(self, past: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of the sequence as it is (B, K), and pictures and sinks of keys (B, past + K); none is cached."""
        pictures, sinks, walk = self.pictures, self.sinks, self.walk
        if walk is not None and walk.slots:
            pictures = pictures.gather(1, walk.index).masked_fill(~walk.valid, -1)
            sinks = sinks.gather(1, walk.index) & walk.valid
        return pictures, nn.functional.pad(pictures, (past, 0), value=-1), nn.functional.pad(sinks, (past, 0))


class _Thread(Thread):
    """The album of a call, and what the projections of a layer gave."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def clear(self) -> None:
        self.held.clear()


class HeadMasker(Hooks[Album]):
    """The hooks that mask heads, or look at them."""

    _thread: _Thread

    def __init__(self, decoder: Decoder, edit: MaskEdit | None, watch: HeadWatch | None, implementation: str) -> None:
        classes = () if edit is None else edit.classes or ()
        self.masked = tuple(number for number, own in enumerate(classes) if set(own) != {"dense"})
        super().__init__(decoder, _Thread())
        self._edit = edit
        self._watch = watch
        self._added = implementation == "eager"

    def hook(self) -> None:
        """Register the hooks."""
        for number in self.masked:
            self.note(number)
            mask = functools.partial(self._mask, number)
            self._handles.append(self._decoder.layers[number].register_forward_pre_hook(mask, with_kwargs=True))
        for number in range(len(self._decoder.layers)) if self._watch is not None else ():
            attention = self._decoder.attention(number)
            self.note(number, "self_attn", *(f"self_attn.{name}" for name in _PROJECTIONS))
            for name in _PROJECTIONS:
                hold = functools.partial(self._hold, name)
                self._handles.append(getattr(attention, name).register_forward_hook(hold))
            look = functools.partial(self._look, number)
            self._handles.append(attention.register_forward_hook(look, with_kwargs=True))

    @torch.compiler.disable
    @torch.no_grad()
    def _mask(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a layer with a mask (B, H, K, n), made once for all layers of equal classes."""
        album = self._thread.call
        if album is None:
            return None
        assert self._edit is not None and self._edit.classes is not None
        hidden = hidden_of(args, kwargs)
        cache, classes = kwargs.get("past_key_values"), self._edit.classes[number]
        past = 0 if cache is None or number >= len(cache.layers) else cache.layers[number].get_seq_length()
        key = (album.cuts, past, classes)
        if key not in album.masks:
            album.masks[key] = self._made(album, classes, past, hidden, kwargs.get("attention_mask"))
        album.done.add(number)
        return args, {**kwargs, "attention_mask": album.masks[key]}

    def _made(self, album: Album, classes: tuple[str, ...], past: int, hidden: Tensor, given: Any) -> Tensor:
        assert self._edit is not None
        rows, keys, sinks = album.now(past)
        K, n = hidden.shape[1], past + hidden.shape[1]
        places = torch.arange(K, device=hidden.device).expand(rows.shape)
        itself = places[..., None] + past == torch.arange(n, device=hidden.device)
        seen = {name: self._edit(name, rows, keys, sinks) | itself for name in set(classes)}
        shown = torch.stack([seen[name] for name in classes], dim=1)
        if torch.is_tensor(given) and given.is_floating_point():
            return given.masked_fill(~shown, torch.finfo(given.dtype).min)
        shown = shown & allowed_by(given, places, K, n)[:, None]
        if not self._added:
            return shown
        none = torch.zeros(shown.shape, dtype=hidden.dtype, device=hidden.device)
        return none.masked_fill(~shown, torch.finfo(hidden.dtype).min)

    @torch.compiler.disable
    def _hold(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._thread.call is not None:
            self._thread.held[name] = output

    @torch.compiler.disable
    @torch.no_grad()
    def _look(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Attention (B, H, 3) of tokens of later pictures to their own, to sinks and to others, on average."""
        album, held = self._thread.call, self._thread.held
        if album is None or self._watch is None:
            return
        rotary, rows = kwargs["position_embeddings"], album.rows
        pictures, keys, sinks = album.now(0)
        queries = self._decoder.queries(number, kernels.rows_at(held["q_proj"], rows), *tables_at(rotary, rows))
        stored = self._decoder.keys(number, held["k_proj"], *rotary)
        total = queries.new_zeros(*queries.shape[:2], 3, dtype=torch.float32)
        for start in range(0, rows.shape[1], _ROWS):
            tile = slice(start, start + _ROWS)
            allowed = allowed_by(kwargs.get("attention_mask"), rows[:, tile], keys.shape[1], keys.shape[1])
            weights = attentions.rows_attention(
                queries[:, :, tile], stored, allowed, scale=self._decoder.attention(number).scaling
            )
            same = pictures.gather(1, rows[:, tile])[..., None] == keys[:, None]
            kinds = torch.stack([same, sinks[:, None].expand_as(same), ~same & (keys >= 0)[:, None]], dim=3)
            counted = kinds * album.real[:, tile, None, None]
            total += torch.einsum("bhrn,brnk->bhk", weights, counted.to(weights.dtype))
        held.clear()
        count = album.real.sum(dim=1)
        self._watch(number, total / count.clamp_min(1)[:, None, None], count > 0)
