"""MustDrop: windows merge in the encoder, words filter between layers, and caches keep what the last layer has."""

from __future__ import annotations

from vtprune._checks import check_share
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.stages.encoder import MergeWindows, Survivors
from vtprune.stages.filters import DualFilter, Passing
from vtprune.stages.glances import MeanAttention, PeakAttention
from vtprune.stages.scorers import Glanced, Importance, Read
from vtprune.stages.selectors import TopK

_POINTS = (3 / 32, 7 / 32, 11 / 32, 15 / 32)
_MERGED = 0.9


def mustdrop(
    *,
    vision: bool = True,
    least_overall: float = 0.001,
    least_single: float = 0.001,
    keys: float = 0.08,
    adaptive: bool = False,
) -> Pipeline:
    """Merge windows that look alike, drop at four depths what no word looks at, and trim the caches to what is left.

    Title: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model
    Source: arXiv 2411.10803
    Deviations: tokens keep their position ids (the authors number the rest anew at every cut, and decode at positions
        below those of cached words). The number that goes on halves from cut to cut, raised to one power for the
        average asked for, and tokens that pass the filter go first; the authors keep whatever passes, which
        `adaptive` does below the budget. As many windows merge as the budget needs, see `mustdrop_vision`; key tokens
        are those of most attention in the block that makes the features. Since caches are trimmed behind the prefill,
        answers with a cache and without one differ.

    Published:
        llava: keep=0.3333 | 0.2222 | 0.1111, least_overall=0.001 | 0.0012, adaptive=True

    Args:
        vision: merge windows inside the encoder; False for encoders that cannot be pruned inside.
        least_overall: share of all attention of the words to the picture from which a token passes.
        least_single: attention of any one word from which a token passes.
        keys: share of the tokens that encoder attention protects.
        adaptive: drop all that does not pass; the budget is the most then.
    """
    check_share("keys", keys)
    dual = DualFilter(
        overall=Glanced(rule=MeanAttention()),
        single=Glanced(rule=PeakAttention()),
        importance=Read(rule=Survivors()) if vision else Importance(),
        least_overall=least_overall,
        least_single=least_single,
        keys=keys,
    )
    pick = Pick(name="filtered", scorer=dual, selector=TopK())
    counter = Passing(filter=dual) if adaptive else None
    first = _MERGED if vision else 1.0
    inside = tuple(
        LayerStage(at=at, keep=first * 0.5**number, picks=(pick,), counter=counter)
        for number, at in enumerate(_POINTS, start=1)
    )
    windows = Pick(name="windows and attention", scorer=Read(rule=Survivors()), selector=TopK())
    return Pipeline(
        name="mustdrop",
        picks=(windows,) if vision else (),
        encoder=MergeWindows() if vision else None,
        before=first,
        inside=inside,
        trims=True,
    )
