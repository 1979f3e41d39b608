"""The kinds of stages: callables of these forms, frozen values if they are to be printed, compared and stored."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from vtprune.glances import Need, SinkRule
from vtprune.readings import BlockAttention
from vtprune.types import EncoderCut, Groups, Per, Selection, VisualTokens


class Scorer(Protocol):
    """Scores (S, N) of tokens, higher is better. `needs` names the evidence it reads, or says how to take it."""

    @property
    def needs(self) -> frozenset[Need]: ...

    def __call__(self, tokens: VisualTokens) -> Tensor: ...


class Debiaser(Protocol):
    """Scores (S, N) with a known bias removed."""

    def __call__(self, tokens: VisualTokens, scores: Tensor) -> Tensor: ...


class Selector(Protocol):
    """Indices (S, k), distinct, none of them in `taken` (S, m). Scores of -inf must not be picked.

    That they are distinct is not checked: it would wait for the device.
    """

    def __call__(self, tokens: VisualTokens, scores: Tensor, k: int, taken: Tensor | None) -> Tensor: ...


class Merger(Protocol):
    """How dropped tokens live on in kept ones: each in one of them, as `Groups`, or as weights (S, K, N) of mixtures.

    A row of weights is what the kept token of that number becomes; one that takes nothing over has a single 1, at
    itself. What a merger needs besides the features it names in `needs`, as a scorer does.
    """

    def __call__(self, tokens: VisualTokens, selection: Selection) -> Groups | Tensor: ...


class Counter(Protocol):
    """How many tokens (S,) a row is worth, from what they hold: at most `k`, the budget."""

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor: ...


class FrameBudget(Protocol):
    """How `k` tokens are shared among the T parts of a clip or picture: (S, T), each row of sum `k`."""

    def __call__(self, tokens: VisualTokens, k: int) -> Tensor: ...


class Allowance(Protocol):
    """How many of n patches an encoder may leave: a `Budget`, or what it comes to in front of the language model."""

    @property
    def per(self) -> Per: ...
    def resolve(self, n: int) -> int: ...
    def at_least(self, n: int) -> int: ...


class EncoderStage(Protocol):
    """Prunes inside the vision encoder, at the outputs of its blocks.

    `counts(n, k, blocks)` says how many of n patches are left after each of so many blocks, k after the last. The call
    gets the attention of a block, the patches that come out of it (B, n, D), CLS token left out, how many stay, and
    what it remembered (B, n). `needs_cls` says that only an encoder with a CLS token will do.
    """

    @property
    def needs_cls(self) -> bool: ...
    def counts(self, n: int, k: int, blocks: int) -> tuple[int, ...]: ...
    def __call__(self, seen: BlockAttention, patches: Tensor, count: int, memory: Tensor | None) -> EncoderCut: ...


class AttentionEdit(Protocol):
    """Changes attention inside the language model; no token is dropped.

    `name` is for reports. `neutral` says that it changes nothing, so that nothing is hooked. What it changes is told by
    `of`: see `WeightEdit`, `MaskEdit` and, which only looks, `HeadWatch`.
    """

    @property
    def name(self) -> str: ...
    @property
    def of(self) -> Literal["weights", "mask", "masses"]: ...
    @property
    def neutral(self) -> bool: ...


class WeightEdit(AttentionEdit, Protocol):
    """Changes what tokens of text attend to, in all decoder layers from the third to the last but one.

    The call gets attention (B, H, R, n) of rows of text, which of the n keys belong to pictures and which `sinks` tells
    from the others, (B, n) each, and returns attention whose rows have the same sums.
    """

    @property
    def sinks(self) -> SinkRule: ...
    def __call__(self, weights: Tensor, visual: Tensor, sinks: Tensor) -> Tensor: ...


class MaskEdit(AttentionEdit, Protocol):
    """Hides keys from tokens of pictures in a prefill with several, head by head.

    `classes` names that of every head of every layer. The call says which of the keys the tokens of a prompt may see in
    heads of a class, (B, K, n) bool: `rows` (B, K) and `keys` (B, n) are the numbers of their pictures, -1 for text,
    `sinks` (B, n) which keys are sinks. Keys that the model hides stay hidden, and every token sees itself.
    """

    @property
    def classes(self) -> tuple[tuple[str, ...], ...] | None: ...
    def __call__(self, name: str, rows: Tensor, keys: Tensor, sinks: Tensor) -> Tensor: ...


class HeadWatch(AttentionEdit, Protocol):
    """Looks where tokens of pictures attend to in a prefill with several, and changes nothing.

    The call gets the number of a layer and the attention (B, H, 3) of the tokens of later pictures: to their own
    picture, to sinks and to other pictures, on average. `found` (B,) is False where a prompt has but one picture.
    """

    def __call__(self, layer: int, masses: Tensor, found: Tensor) -> None: ...
