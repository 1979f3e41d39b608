"""What several families share: grids, crops and frames as parts, and rows next to a CLS token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters.base import Encoding, square_grid
from vtprune.errors import UnsupportedCall
from vtprune.types import Part, PartKind

Parts = tuple[Part, ...]


def checked(parts: Iterable[Parts], encoding: Encoding) -> list[Parts]:
    """The parts, if there are as many as entries and each covers its entry.

    Raises:
        UnsupportedCall: where they do not; the pictures were packed in a way the family does not know.
    """
    parts = list(parts)
    got = tuple(entry[-1].stop for entry in parts)
    if got != encoding.lengths:
        raise UnsupportedCall(
            f"the encoder made {list(encoding.lengths[:8])} tokens per {encoding.kind}, the sizes given make "
            f"{list(got[:8])}: pass all of the processor's output (image_sizes or *_grid_thw, batch_num_images), with "
            "the vision_feature_select_strategy of the checkpoint"
        )
    return parts


def vision_grid(config: Any) -> tuple[int, int]:
    """Patches of one crop (rows, columns) by the vision config."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def patch_part(n: int, grid: tuple[int, int], *, kind: PartKind = "image", start: int = 0) -> Part:
    """A part of `n` tokens that come one per patch of the grid, with a CLS token before them, or without the first."""
    h, w = grid
    if n == h * w:
        return Part(start=start, stop=start + n, kind=kind, grid=grid)
    if n == h * w + 1:
        return Part(start=start, stop=start + n, kind=kind, grid=grid, separators=(start,))
    if n == h * w - 1:
        return Part(start=start, stop=start + n, kind=kind, grid=(1, n))
    raise UnsupportedCall(
        f"the encoder made {n} tokens for {h} x {w} patches: expected {h * w}, or one more with a CLS token"
    )


def patch_rows(raw: Tensor, n: int) -> Tensor:
    """Rows of patches (rows, N, C) as those of `n` tokens: NaN at a CLS token, or without a first patch that is cut."""
    if n == raw.shape[1] + 1:
        return torch.nn.functional.pad(raw, (0, 0, 1, 0), value=float("nan"))
    return raw[:, 1:] if n == raw.shape[1] - 1 else raw


def rows_part(start: int, grid: tuple[int, int], crops: tuple[tuple[int, ...], tuple[int, ...]]) -> Part:
    """The stitched crops: `h` rows of `w` tokens, each row ended by a newline; `crops` are where they end."""
    h, w = grid
    newlines = tuple(start + w + row * (w + 1) for row in range(h))
    return Part(start=start, stop=start + h * (w + 1), kind="crop", grid=grid, separators=newlines, crops=crops)


def crop_ends(side: int, count: int, unpadded: int, length: int) -> tuple[int, ...]:
    """Where `count` crops of `side` tokens end along one axis, once padding is off both ends and all is scaled.

    `unpadded` of their tokens were left, which became `length`; crops of nothing but padding are gone.
    """
    padding = (count * side - unpadded) // 2
    ends = (min(max(number * side - padding, 0), unpadded) for number in range(count + 1))
    return tuple(sorted({round(end * length / unpadded) for end in ends}))


def frame_parts(frames: int, grid: tuple[int, int], *, newline: bool = False) -> Parts:
    """One part for every frame; with `newline` one separator after the last."""
    h, w = grid
    n = h * w
    parts = [Part(start=f * n, stop=(f + 1) * n, kind="frame", grid=grid) for f in range(frames)]
    if newline:
        last = parts[-1]
        parts[-1] = Part(start=last.start, stop=last.stop + 1, kind="frame", grid=grid, separators=(last.stop,))
    return tuple(parts)


def unpadded(grid: tuple[int, int], size: tuple[int, ...]) -> tuple[int, int]:
    """What is left of a crop grid (rows, columns) once the padding around a picture (height, width) is removed."""
    (rows, columns), (height, width) = grid, size
    if width / height > columns / rows:
        filled = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - filled) // 2), columns
    filled = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - filled) // 2)


def square_parts(kind: PartKind, encoding: Encoding) -> list[Parts]:
    """One part for each entry, square where it can be."""
    return [(Part(start=0, stop=n, kind=kind, grid=square_grid(n)),) for n in encoding.lengths]
