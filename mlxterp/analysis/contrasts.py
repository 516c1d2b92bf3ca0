"""What tells two sets of activations apart: one direction, and how well it does so on others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxterp.sae.evals.tasks.logistic import area

Method = Literal["mean", "pca"]
FOLDS, SHUFFLES = 5, 20


@dataclass(frozen=True)
class Separation:
    """How often a held-out positive prompt lies above a held-out negative one along a vector of the
    others, ties half: the area under the ROC curve, mean over `folds` of the data. `shuffled` is
    the mean of the same with labels shuffled, `shuffled_max` the largest of these."""

    area: float
    shuffled: float
    shuffled_max: float
    folds: int

    def __repr__(self) -> str:
        return (
            f"{self.area:.3f} (labels shuffled: {self.shuffled:.3f}, at most "
            f"{self.shuffled_max:.3f})"
        )


def contrast(p: np.ndarray, n: np.ndarray, method: str) -> np.ndarray:
    """The vector `[d]` of rows `[n_positive, d]` and `[n_negative, d]`."""
    if method == "mean":
        return p.mean(axis=0) - n.mean(axis=0)
    differences = p - n
    if len(differences) <= differences.shape[1]:
        # The pairs weigh the differences as the largest eigenvector of their products says.
        u = np.linalg.eigh(differences @ differences.T)[1][:, -1] @ differences
    else:
        u = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    u = u / max(float(np.linalg.norm(u)), 1e-300)
    return u * (differences @ u).mean()


def separation(p: np.ndarray, n: np.ndarray, method: str, seed: int) -> Separation | None:
    """How well vectors of some rows separate the others; None where there are too few."""
    folds = min(FOLDS, len(p), len(n))
    if folds < 2:
        return None
    rng = np.random.default_rng(seed)
    # The prompts of a pair stay together.
    pairs = len(p) == len(n)
    orders = (
        [rng.permutation(len(p))] * 2 if pairs else list(map(rng.permutation, map(len, (p, n))))
    )
    p, n = p[orders[0]], n[orders[1]]
    found = _held_out(p, n, method, folds)
    shuffled = [_held_out(*_shuffled(p, n, rng, pairs), method, folds) for _ in range(SHUFFLES)]
    return Separation(found, float(np.mean(shuffled)), max(shuffled), folds)


def _held_out(p: np.ndarray, n: np.ndarray, method: str, folds: int) -> float:
    areas = []
    for fold in range(folds):
        out = [np.arange(len(rows)) % folds == fold for rows in (p, n)]
        v = contrast(p[~out[0]], n[~out[1]], method)
        values = np.concatenate([p[out[0]], n[out[1]]]) @ v
        areas.append(area(values, np.arange(len(values)) < out[0].sum()))
    return float(np.mean(areas))


def _shuffled(
    p: np.ndarray, n: np.ndarray, rng: np.random.Generator, pairs: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The same rows with other labels, within pairs where there are such."""
    if pairs:
        swap = rng.random(len(p))[:, None] < 0.5
        return np.where(swap, n, p), np.where(swap, p, n)
    rows = rng.permutation(np.concatenate([p, n]))
    return rows[: len(p)], rows[len(p) :]
