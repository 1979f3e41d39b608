"""The methods as their papers write them: one picture, plain Python loops, numpy. Imports nothing of vtprune."""

from __future__ import annotations

import numpy as np


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine similarity of two vectors; 0 where one of them is zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0


def cls_attention(query: np.ndarray, key: np.ndarray, scale: float) -> np.ndarray:
    """(H, N, d) queries and keys with CLS first -> head mean of the CLS row over the patches (N - 1,)."""
    rows = []
    for q, k in zip(query, key, strict=True):
        logits = np.array([float(q[0] @ k[j]) * scale for j in range(len(k))])
        weights = np.exp(logits - logits.max())
        rows.append((weights / weights.sum())[1:])
    return np.mean(rows, axis=0)


def received_attention(query: np.ndarray, key: np.ndarray, scale: float, pictures: list[int]) -> np.ndarray:
    """(H, N, d) -> mean over heads and over the queries of the same picture of what each key gets."""
    owner = [number for number, length in enumerate(pictures) for _ in range(length)]
    total = np.zeros(key.shape[1])
    for q, k in zip(query, key, strict=True):
        for i in range(len(q)):
            own = [j for j in range(len(k)) if owner[j] == owner[i]]
            logits = np.array([float(q[i] @ k[j]) * scale for j in own])
            weights = np.exp(logits - logits.max())
            total[own] += weights / weights.sum()
    return total / (query.shape[0] * np.array([pictures[number] for number in owner]))


def fastervlm(importance: np.ndarray, k: int) -> list[int]:
    """arXiv 2412.01818: the k patches with the highest CLS attention, in raster order."""
    order = sorted(range(len(importance)), key=lambda i: (-importance[i], i))
    return sorted(order[:k])


def divprune(features: np.ndarray, k: int) -> list[int]:
    """arXiv 2503.02175: greedy max-min distance; first the token whose nearest other token is farthest."""
    n = len(features)
    distance = [[1 - cosine(features[i], features[j]) for j in range(n)] for i in range(n)]
    nearest = [min((distance[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
    chosen = [nearest.index(max(nearest))]
    while len(chosen) < k:
        best, best_worth = -1, -np.inf
        for i in range(n):
            worth = min(distance[i][c] for c in chosen)
            if i not in chosen and worth > best_worth:
                best, best_worth = i, worth
        chosen.append(best)
    return sorted(chosen)


def mmr(importance: np.ndarray, features: np.ndarray, k: int, lam: float) -> list[int]:
    """Carbonell and Goldstein 1998 on min-max importance: the best balance of importance and novelty, one by one."""
    span = importance.max() - importance.min()
    relevance = (importance - importance.min()) / span if span > 0 else np.zeros_like(importance)
    chosen: list[int] = []
    while len(chosen) < k:
        best, best_worth = -1, -np.inf
        for i in range(len(features)):
            if i in chosen:
                continue
            worth = lam * relevance[i]
            if chosen:
                worth -= (1 - lam) * max(cosine(features[i], features[c]) for c in chosen)
            if worth > best_worth:
                best, best_worth = i, worth
        chosen.append(best)
    return sorted(chosen)


def uniform(n: int, k: int) -> list[int]:
    """The middles of k equal stretches of n tokens."""
    return [(2 * step + 1) * n // (2 * k) for step in range(k)]
