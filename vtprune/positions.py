"""Position ids after a cut: kept as they are, or compacted by exactly the ids that pruning vacated. Pure."""

from __future__ import annotations

from torch import Tensor

from vtprune.kernels import reference as kernels


def compact(positions: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Close the gaps that a cut opened, and only those.

    An id is vacated when a token had it before and no kept token has it now, the t, h and w rows taken together. Each
    id moves down by the number of vacated ids below it, so gaps that were there before stay, and keeping everything
    is the identity.

    Args:
        positions: (B, L) ids, or (3, B, L) for (t, h, w).
        before: (B, L) bool, tokens that were there (no padding).
        after: (B, L) bool, tokens that are kept.

    Returns:
        `(new ids, shape of positions; shift (B, 1): number of vacated ids, by which later tokens move down)`.
    """
    if positions.ndim == 2:
        shift, vacated = kernels.vacated_below(positions, before, after)
        return positions - shift, vacated
    R, B, L = positions.shape
    ids, was, stays = (flags.expand(R, B, L).transpose(0, 1).reshape(B, R * L) for flags in (positions, before, after))
    shift, vacated = kernels.vacated_below(ids, was, stays)
    return positions - shift.view(B, R, L).transpose(0, 1), vacated
