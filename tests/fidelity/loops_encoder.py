"""What stages inside a vision encoder do, as the papers write it: one picture, plain loops, double precision.

Imports nothing of vtprune. Queries, keys and values are (H, n, d), a CLS token first where there is one, patches (N, D)
without it. A cut is the patches that stay, ascending, and for each patch the place in that list of the one that holds
it, or None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tests.fidelity.loops import cosine
from tests.fidelity.loops_stages import attention_map, importance, page_rank

Cut = tuple[list[int], list[int | None]]


def best(scores: np.ndarray, count: int) -> list[int]:
    """The `count` highest, best first; the lower index wins a tie."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def dropping(scores: np.ndarray, count: int) -> Cut:
    """The `count` highest stay, nobody takes the others in."""
    keep = sorted(best(scores, count))
    return keep, [keep.index(i) if i in keep else None for i in range(len(scores))]


def merging(holder: dict[int, int], n: int) -> Cut:
    """Each patch that `holder` names goes to the one it names."""
    keep = [i for i in range(n) if holder.get(i, i) == i]
    return keep, [keep.index(holder.get(i, i)) for i in range(n)]


def tome_counts(n: int, k: int, blocks: int) -> list[int] | None:
    """Evenly many in every block, by no more than halves; None where halving does not get there."""
    if math.ceil(n / 2**blocks) > k:
        return None
    found = []
    for block in range(blocks):
        left = blocks - block
        possible = [m for m in range(math.ceil(n / 2), n + 1) if m >= k and math.ceil(m / 2 ** (left - 1)) <= k]
        even = n - math.ceil((n - k) / left)
        n = min(possible, key=lambda m: abs(m - even))
        found.append(n)
    return found


def tome(keys: np.ndarray, first: int, gone: int) -> Cut:
    """arXiv 2210.09461: patches of even number, by head means of keys, into the most similar one of odd number."""
    mean = keys.mean(axis=0)[first:]
    even, odd = range(0, len(mean), 2), range(1, len(mean), 2)
    match = {i: max(odd, key=lambda j: (cosine(mean[i], mean[j]), -j)) for i in even} if odd else {}
    nearest = sorted(match, key=lambda i: (-cosine(mean[i], mean[match[i]]), i))
    return merging({i: match[i] for i in nearest[:gone]}, len(mean))


def flow_counts(n: int, k: int, blocks: int, pace: float) -> list[int]:
    """arXiv 2505.19536: r = (n - K) / sqrt(blocks to go) times `pace`, when their number is even; at the end all."""
    found = []
    for index in range(blocks):
        to_go = blocks - 1 - index - 1
        if to_go <= 0:
            n = k
        elif to_go % 2 == 0:
            n = max(n - int((n - k) / math.sqrt(to_go) * pace + 0.5), k)
        found.append(n)
    return found


def flow(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    """arXiv 2505.19536: (attention + likeness of values to that of CLS) times the L1 norm of the mean value."""
    attention, likeness = _cls_row(query, key, scale), _cls_row(value, value, 1.0)
    size = [sum(abs(entry) for entry in own) for own in value.mean(axis=0)[1:]]
    shares = [a / sum(attention) + g / sum(likeness) for a, g in zip(attention, likeness, strict=True)]
    return np.array([share * w for share, w in zip(shares, size, strict=True)])


def _cls_row(query: np.ndarray, key: np.ndarray, scale: float) -> np.ndarray:
    """Softmax of the first row over all, averaged over heads, without what it pays to itself."""
    total = np.zeros(key.shape[1])
    for q, k in zip(query, key, strict=True):
        raised = [math.exp(float(q[0] @ own) * scale) for own in k]
        total += np.array(raised) / sum(raised) / len(query)
    return total[1:]


def window_counts(n: int, k: int, blocks: int, side: int) -> list[int]:
    """As many windows as the budget needs after the first block, the rest after the last."""
    edge = math.isqrt(n)
    there = len(windows(edge, side)) if edge**2 == n else 0
    merged = 0
    while merged < there and n - (merged + 1) * (side**2 - 1) >= k:
        merged += 1
    return [n - merged * (side**2 - 1)] * (blocks - 1) + [k]


def windows(edge: int, side: int) -> list[list[int]]:
    """Patches of every window of a square grid that fits, the one at the bottom right last."""
    corners = range(0, edge - side + 1, side)
    inside = [(down, right) for down in range(side) for right in range(side)]
    return [[(r + down) * edge + c + right for down, right in inside] for r in corners for c in corners]


def mustdrop(patches: np.ndarray, side: int, merged: int) -> Cut:
    """arXiv 2411.10803: the windows of highest mean off-diagonal cosine, each into its patch at the bottom right."""
    n = len(patches)
    found = windows(math.isqrt(n), side)
    alike = [np.mean([cosine(patches[a], patches[b]) for a in own for b in own if a != b]) for own in found]
    chosen = [found[i] for i in best(np.array(alike), merged)]
    return merging({i: own[-1] for own in chosen for i in own}, n)


def ranked_counts(n: int, k: int, blocks: int, every: int) -> list[int]:
    """Evenly many at every `every`-th block, counted from the last."""
    turns = [block for block in range(blocks) if (blocks - 1 - block) % every == 0]
    found = []
    for block in range(blocks):
        if block in turns:
            n -= (n - k) // sum(turn >= block for turn in turns)
        found.append(n)
    return found


def zero_tprune(rank: np.ndarray, keys: np.ndarray, first: int, count: int) -> Cut:
    """arXiv 2305.17328: half of what goes are those of the lower half most like one of the upper, half the lowest."""
    mean, n = keys.mean(axis=0)[first:], len(rank)
    order = best(rank, n)
    upper, lower = order[: n - n // 2], order[n - n // 2 :]
    nearest = [max((cosine(mean[i], mean[j]) for j in upper), default=0.0) for i in lower]
    gone = [lower[i] for i in best(np.array(nearest), min(len(lower), (n - count) // 2))]
    left = [i for i in order if i not in gone][:count]
    return dropping(np.array([1.0 if i in left else 0.0 for i in range(n)]), count)


@dataclass
class Walk:
    """Patches of one picture on their way: their numbers at first, the lists they hold, what is remembered of them."""

    n: int
    alive: list[int] = field(default_factory=list)
    holds: list[list[int]] = field(default_factory=list)
    memory: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.alive, self.holds = list(range(self.n)), [[i] for i in range(self.n)]

    def advance(self, patches: np.ndarray, cut: Cut) -> np.ndarray:
        """What goes on: means of patches, each counted as often as patches it stands for."""
        keep, into = cut
        members = [[i for i in range(len(patches)) if into[i] == place] for place in range(len(keep))]
        sizes = [len(own) for own in self.holds]
        rows = [sum(sizes[i] * patches[i] for i in own) / sum(sizes[i] for i in own) for own in members]
        self.alive = [self.alive[i] for i in keep]
        self.holds = [sorted(j for i in own for j in self.holds[i]) for own in members]
        self.memory = None if self.memory is None else self.memory[keep]
        return np.array(rows)

    def worth(self) -> np.ndarray:
        """Of all patches at first: 0 where gone, the others by memory, or by how many they hold, less by rank."""
        judged = np.array([len(own) for own in self.holds]) if self.memory is None else self.memory
        worth = np.zeros(self.n)
        for rank, place in enumerate(best(judged, len(self.alive))):
            worth[self.alive[place]] = 2 - rank / len(self.alive)
        return worth


@dataclass
class Block:
    """What one block did: its attention (H, n, d) each and what came out of it (N, D)."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scale: float
    first: int
    patches: np.ndarray


def cut_of(method: str, walk: Walk, block: Block, count: int, number: int, side: int = 3) -> Cut:
    """What a method with its default parameters leaves of a block; notes in `walk` what it remembers."""
    n, gone = len(block.patches), len(block.patches) - count
    if method == "tome":
        return tome(block.key, block.first, gone)
    if method == "flowcut":
        score = flow(block.query, block.key, block.value, block.scale)
        walk.memory = score if walk.memory is None else 0.5 * walk.memory + 0.5 * score
        return dropping(walk.memory, count)
    if gone == 0:
        return merging({}, n)
    weights = attention_map(block.query, block.key, block.scale)
    if method == "zero_tprune":
        walk.memory = page_rank(weights, bool(block.first), 5)
        return zero_tprune(walk.memory, block.key, block.first, count)
    if number == 0:
        return mustdrop(block.patches, side, gone // (side**2 - 1))
    walk.memory = importance(weights, bool(block.first))
    return dropping(walk.memory, count)


def counts_of(method: str, n: int, k: int, blocks: int) -> list[int]:
    """The schedule of a method with its default parameters."""
    found = {
        "tome": lambda: tome_counts(n, k, blocks),
        "flowcut": lambda: flow_counts(n, k, blocks, 0.2),
        "mustdrop_vision": lambda: window_counts(n, k, blocks, 3),
        "zero_tprune": lambda: ranked_counts(n, k, blocks, 2),
    }[method]()
    assert found is not None, "not to be reached by halving"
    return found
