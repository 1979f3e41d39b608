"""Choices by hidden states, as their papers write them: one prompt, plain loops, numpy. Imports nothing of vtprune."""

from __future__ import annotations

import math

import numpy as np

from tests.fidelity.loops import cosine


def transition(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """arXiv 2507.20630: of (N, D) that a module gets and gives, |y| / |x| times the softmax over tokens of 1 - cos."""
    turns = [1 - cosine(x, y) for x, y in zip(inputs, outputs, strict=True)]
    total = sum(math.exp(turn) for turn in turns)
    longer = [math.sqrt(y @ y) / math.sqrt(x @ x) for x, y in zip(inputs, outputs, strict=True)]
    return np.array([length * math.exp(turn) / total for length, turn in zip(longer, turns, strict=True)])


def shared(values: np.ndarray) -> np.ndarray:
    """As shares of their sum."""
    return np.array([value / (sum(values) + 1e-8) for value in values])


def transprune(changes: np.ndarray, attention: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Both as shares of their sum, `alpha` on the first."""
    pairs = zip(shared(changes), shared(attention), strict=True)
    return np.array([alpha * change + (1 - alpha) * seen for change, seen in pairs])


def turn(earlier: np.ndarray, entering: np.ndarray) -> float:
    """1 - cos between what two layers get of the last token, the last row."""
    return 1 - cosine(earlier[-1], entering[-1])


def margin(entering: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """arXiv 2411.19628: staying over leaving, by the mean of the text (R, D) but for its last token, and that one."""
    *others, last = entering
    mean = sum(others) / len(others) if others else np.zeros(len(last))
    hidden = [float(row @ np.concatenate([mean, last])) for row in first]
    hidden = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in hidden]
    stays, leaves = (sum(w * h for w, h in zip(row, hidden, strict=True)) for row in second)
    return stays - leaves


def leaves(found: dict[int, float], below: float, patience: int, last: int) -> int:
    """The layer in front of which a picture leaves: checks are by layer, from the first on."""
    streak = 0
    for layer, value in found.items():
        if layer >= last:
            break
        streak = streak + 1 if value < below else 0
        if streak == patience:
            return layer
    return last
