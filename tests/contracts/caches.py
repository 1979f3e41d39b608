"""Methods that store fewer tokens than pass, in the reference: transformers alone, its cache rewritten by loops here.

Nothing of vtprune is imported. One prompt without padding; queries and keys of every layer are made once more from what
its attention gets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.contracts.oracle import Merged

SAMPLED = 64


@dataclass
class Layer:
    """Attention of one layer: rotated queries (H, n, d), and keys and values (G, past + n, d)."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float

    @property
    def past(self) -> int:
        return self.keys.shape[1] - self.queries.shape[1]

    def weights(self, rows: list[int]) -> Tensor:
        """(H, rows, past + n), a causal softmax."""
        H = len(self.queries)
        keys = self.keys.repeat_interleave(H // len(self.keys), dim=0)
        logits = self.queries[:, rows] @ keys.transpose(1, 2) * self.scaling
        future = torch.arange(keys.shape[1]) > self.past + torch.tensor(rows)[:, None]
        return logits.masked_fill(future, float("-inf")).softmax(dim=2)


def layer_of(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, cached: Any) -> Layer:
    """What an attention makes of the first row of normed hidden states (B, n, D), behind a layer of a cache."""

    def heads(name: str) -> Tensor:
        made = getattr(attention, f"{name}_proj")(hidden)[0].unflatten(1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return (made if norm is None else norm(made)).transpose(0, 1)

    def turned(states: Tensor) -> Tensor:
        half = states.shape[-1] // 2
        return states * cos[0] + torch.cat([-states[..., half:], states[..., :half]], dim=-1) * sin[0]

    def behind(name: str, fresh: Tensor) -> Tensor:
        there = getattr(cached, name, None)
        return fresh if there is None or not there.numel() else torch.cat([there[0], fresh], dim=1)

    keys, values = behind("keys", turned(heads("k"))), behind("values", heads("v"))
    return Layer(turned(heads("q")), keys, values, attention.scaling)


def best(scores: Tensor, among: list[int], k: int) -> list[int]:
    """The k of these places with the highest scores, ascending; ties to the first."""
    return sorted(sorted(among, key=lambda place: (-float(scores[place]), place))[:k])


def look_m(layer: Layer, pictures: list[list[int]], counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (G, n', d) after eviction, and how much of each new place stays, (n,)."""
    groups, past = len(layer.keys), layer.past
    n = layer.keys.shape[1] - past
    weights = layer.weights(list(range(n))).unflatten(0, (groups, -1)).mean(dim=(1, 2))[:, past:]
    keys, values, share = [], [], torch.zeros(n)
    for g in range(groups):
        stays = [place for place in range(n) if not any(place in picture for picture in pictures)]
        key, value = layer.keys[g].clone(), layer.values[g].clone()
        old_key, old_value = layer.keys[g, past:], layer.values[g, past:]
        for picture, k in zip(pictures, counts, strict=True):
            kept = best(weights[g], picture, k)
            near = nn.functional.cosine_similarity(old_key[picture][:, None], old_key[kept][None], dim=2)
            holders = [kept[int(number)] for number in near.argmax(dim=1)]
            for place in kept:
                members = [p for p, holder in zip(picture, holders, strict=True) if holder == place and p not in kept]
                for old, new in ((old_key, key), (old_value, value)):
                    pulled = [(old[place] + old[member]) / 2 for member in members]
                    new[past + place] = torch.stack([old[place], *pulled]).mean(dim=0)
            stays += kept
        share[stays] += 1 / groups
        places = [*range(past), *(past + place for place in sorted(stays))]
        keys.append(key[places])
        values.append(value[places])
    return torch.stack(keys), torch.stack(values), share


def zipvl(layer: Layer, pictures: list[list[int]], counts: list[int], *, mass: float) -> list[int]:
    """The new places that take part in the attention of a layer."""
    past = layer.past
    n = layer.keys.shape[1] - past
    front, last = list(range(n))[:-SAMPLED], list(range(n))[-SAMPLED:]
    step = max(len(front) - 1, 0) / max(min(SAMPLED, len(front)) - 1, 1)
    rows = [front[int(step * number + 0.5)] for number in range(min(SAMPLED, len(front)))] + last
    weights = layer.weights(rows).mean(dim=0)[:, past:]
    sees = torch.tensor([sum(row >= key for row in rows) for key in range(n)]).clamp(min=1)
    stays = [place for place in range(n) if not any(place in picture for picture in pictures)]
    for picture, most in zip(pictures, counts, strict=True):
        lost, wanted = 0.0, 0
        for value in sorted(float(weights.mean(dim=0)[place]) for place in picture):
            lost += value
            wanted += lost > 1 - mass
        stays += best(weights.sum(dim=0) / sees, picture, min(most, wanted))
    return sorted(stays)


@dataclass
class Reference:
    """Transformers with caches rewritten after every call that shows pictures.

    `mass` is that of ZipVL, None for LOOK-M. `stored` (n,) counts the layers that store each place of the last such
    call. All rows of a call are alike, as beams of one prompt are at first.
    """

    model: nn.Module
    mass: float | None
    pictures: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    stored: Tensor | float = 0.0
    cache: DynamicCache = field(default_factory=DynamicCache)
    taken: list[list[int]] = field(default_factory=list)
    made: list[Layer] = field(default_factory=list)

    def show(self, pictures: list[list[int]], keep: float) -> None:
        """The places of the pictures of the next call, and the share of each that is stored."""
        self.pictures = pictures
        self.counts = [max(1, math.floor(keep * len(places) + 0.5)) for places in pictures]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The language model of the block rewrites the caches of its calls."""
        language_model = self.model.model.language_model
        handles = [language_model.register_forward_hook(self._rewrite)]
        for layer in language_model.layers:
            handles.append(layer.self_attn.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(layer.self_attn.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = kwargs["hidden_states"]
        n = hidden.shape[1]
        if n == 1:
            return args, {**kwargs, "attention_mask": None}
        cached = kwargs["past_key_values"].layers
        known = cached[len(self.made)] if len(self.made) < len(cached) else None
        cos, sin = kwargs["position_embeddings"]
        self.made.append(layer_of(module, hidden, cos, sin, known))
        past = self.made[-1].past
        part = torch.ones(past + n, dtype=torch.bool)
        if self.mass is not None:
            self.taken.append(zipvl(self.made[-1], self.pictures, self.counts, mass=self.mass))
            part[past:] = False
            part[[past + place for place in self.taken[-1]]] = True
        rows, keys = torch.arange(past, past + n)[:, None], torch.arange(past + n)
        seen = (keys <= rows) & part | (keys == rows)
        return args, {**kwargs, "attention_mask": seen.expand(len(hidden), 1, n, past + n)}

    def _after(self, module: Any, args: Any, output: Any) -> Any:
        if self.mass is None or output[0].shape[1] == 1:
            return None
        left = torch.zeros_like(output[0])
        left[:, self.taken[-1]] = output[0][:, self.taken[-1]]
        return (left, *output[1:])

    def _rewrite(self, module: Any, args: Any, output: Any) -> None:
        if not self.made:
            return
        n = self.made[0].queries.shape[1]
        self.stored = torch.zeros(n)
        for number, (made, layer) in enumerate(zip(self.made, output.past_key_values.layers, strict=True)):
            if self.mass is None:
                keys, values, share = look_m(made, self.pictures, self.counts)
                layer.keys, layer.values = (
                    new.expand(len(layer.keys), *new.shape).contiguous() for new in (keys, values)
                )
                self.stored += share
            else:
                stays = [*range(made.past), *(made.past + place for place in self.taken[number])]
                layer.keys, layer.values = (states[:, :, stays] for states in (layer.keys, layer.values))
                self.stored[self.taken[number]] += 1
        self.made, self.taken, self.pictures, self.counts = [], [], [], []

    @torch.no_grad()
    def decode(self, prompt: Merged, *, steps: int, forbidden: list[int], after: int = 0) -> tuple[list[int], Tensor]:
        """Greedy tokens and raw logits (steps, V); the first `after` tokens of the prompt were heard before.

        All words but the last are heard by then, as in a chat.
        """
        call = functools.partial(self.model.model.language_model, past_key_values=self.cache, use_cache=True)
        extra = {}
        if prompt.visual is not None and prompt.deepstack is not None:
            known = int(prompt.visual[:, :after].sum())
            extra = {
                "visual_pos_masks": prompt.visual[:, after:],
                "deepstack_visual_embeds": [rows[known:] for rows in prompt.deepstack],
            }
        axes = len(prompt.positions)
        ids = prompt.positions[:, after:]
        next_id = int(prompt.positions[0, -1]) + 1
        tokens, logits = [], []
        with self.hooked():
            ids = ids if axes == 1 else ids[:, None]
            hidden = call(inputs_embeds=prompt.embeds[:, after:], position_ids=ids, **extra).last_hidden_state
            for step in range(steps):
                logits.append(self.model.lm_head(hidden[:, -1])[0])
                allowed = logits[-1].clone()
                allowed[forbidden] = float("-inf")
                tokens.append(int(allowed.argmax()))
                if step == steps - 1:
                    break
                word = self.model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
                ids = torch.full((1, 1) if axes == 1 else (axes, 1, 1), next_id + step)
                hidden = call(inputs_embeds=word, position_ids=ids).last_hidden_state
        return tokens, torch.stack(logits)
