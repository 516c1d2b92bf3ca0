"""Linear classifiers of activations, and how well they do on others than those they learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxterp.sae.evals.tasks.logistic import area, fit_probe
from mlxterp.sae.labels.scores import wilson

Method = Literal["logistic", "ridge", "mean_difference"]


@dataclass(frozen=True, eq=False)
class Fit:
    """The decisions `x @ weights.T + bias`: of two classes one, above 0 for the second, of more
    one for each, `weights [1 or n_classes, d]`, of which the largest wins."""

    weights: np.ndarray
    bias: np.ndarray

    def decide(self, x: np.ndarray) -> np.ndarray:
        """The decisions `[n, 1 or n_classes]` of `x [n, d]`, in float64."""
        return np.asarray(x, np.float64) @ self.weights.T + self.bias

    def classify(self, decisions: np.ndarray) -> np.ndarray:
        """The number of the class of each row `[n]`."""
        if decisions.shape[1] == 1:
            return (decisions[:, 0] > 0).astype(int)
        return decisions.argmax(axis=1)


def fit(x: np.ndarray, y: np.ndarray, n_classes: int, method: str, l2: float) -> Fit:
    """The classifier of rows `x [n, d]` with classes `y [n]`, every one of which occurs.

        logistic          sum_i log(1 + exp(-t_i (u_i . w + b))) + l2 |w|^2 / 2
        ridge             sum_i (t_i - u_i . w - b)^2 + l2 |w|^2
        mean_difference   w = mean of the class, b = -|w|^2 / 2: the class with the nearest mean

    `u` is `x` with mean 0 and standard deviation 1 in every column; `t_i` is 1 for the second of
    two classes or else, of more classes, for each of them in turn, and -1 for the others.
    """
    if method == "mean_difference":
        return _nearest_mean(x, y, n_classes)
    targets = [y == k for k in (range(n_classes) if n_classes > 2 else [1])]
    if method == "ridge":
        return _ridge(x, np.stack([np.where(t, 1.0, -1.0) for t in targets], axis=1), l2)
    found = [fit_probe(x, target, C=1 / l2) for target in targets]
    return Fit(np.stack([f.weights for f in found]), np.array([f.bias for f in found]))


def _ridge(x: np.ndarray, t: np.ndarray, l2: float) -> Fit:
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    # A column that does not vary would be divided by its rounding.
    varies = deviation > 1e-12 * np.abs(mean)
    scale = np.divide(1.0, deviation, np.zeros_like(mean), where=varies & (deviation > 0))
    u, middle = (x - mean) * scale, t.mean(axis=0)
    if l2 == 0:
        w = np.linalg.lstsq(u, t - middle, rcond=None)[0]
    elif u.shape[1] > len(u):
        w = u.T @ np.linalg.solve(u @ u.T + l2 * np.eye(len(u)), t - middle)
    else:
        w = np.linalg.solve(u.T @ u + l2 * np.eye(u.shape[1]), u.T @ (t - middle))
    w = (w * scale[:, None]).T
    return Fit(w, middle - w @ mean)


def _nearest_mean(x: np.ndarray, y: np.ndarray, n_classes: int) -> Fit:
    means = np.stack([x[y == k].mean(axis=0) for k in range(n_classes)])
    origin = means.mean(axis=0)  # nearer to it the squares are smaller, and so is their rounding
    w = means - origin
    b = -np.square(w).sum(axis=1) / 2 - w @ origin
    return Fit(w, b) if n_classes > 2 else Fit(w[1:] - w[:1], b[1:] - b[:1])


@dataclass(frozen=True)
class ProbeScore:
    """How well a probe does on `n_test` held-out examples, of `n_test_groups` texts or groups.

    `accuracy` is the share that is right, `interval` its 95 % confidence interval (Wilson's, of as
    many independent examples as the texts amount to). `majority` is the accuracy of always saying
    the class that is most frequent in training, `shuffled` the mean accuracy of probes of shuffled
    labels and `shuffled_max` the largest. `f1` is that of the second of two classes, of more the
    mean over them; `auc` how often a second class is ranked above a first, None of more than two.
    """

    accuracy: float
    interval: tuple[float, float]
    majority: float
    shuffled: float
    shuffled_max: float
    f1: float
    auc: float | None
    n_train: int
    n_test: int
    n_test_groups: int


def score(
    made: Fit, x: np.ndarray, y: np.ndarray, groups: np.ndarray, y_train: np.ndarray,
    shuffled: list[float],
) -> ProbeScore:  # fmt: skip
    """The score on held-out rows `x [n, d]` of classes `y`, of texts, or groups, `groups [n]`."""
    decisions = made.decide(x)
    said = made.classify(decisions)
    right = said == y
    two = decisions.shape[1] == 1
    return ProbeScore(
        accuracy=float(right.mean()),
        interval=_interval(right, groups),
        majority=float((y == np.bincount(y_train).argmax()).mean()),
        shuffled=float(np.mean(shuffled)),
        shuffled_max=max(shuffled),
        f1=_f1(said, y, [1] if two else np.unique(y)),
        auc=area(decisions[:, 0], y == 1) if two else None,
        n_train=len(y_train),
        n_test=len(y),
        n_test_groups=len(np.unique(groups)),
    )


def _f1(said: np.ndarray, y: np.ndarray, classes: object) -> float:
    found = []
    for k in np.asarray(classes):
        hits = ((said == k) & (y == k)).sum()
        found.append(2 * hits / max(1, (said == k).sum() + (y == k).sum()))
    return float(np.mean(found))


def _interval(right: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The ends of the 95 % interval of a share; examples of one group are no independent ones."""
    p, n = float(right.mean()), len(right)
    _, numbers = np.unique(groups, return_inverse=True)
    n_groups = int(numbers.max()) + 1
    if n == n_groups:
        independent = float(n)
    elif 0 < p < 1:
        sums = np.bincount(numbers, right - p)
        independent = min(float(n), n * n * p * (1 - p) / max(float(sums @ sums), 1e-12))
    else:
        independent = float(n_groups)
    # A whole number, of which the share may be any.
    trials = max(1, int(independent))
    _, low, high = wilson(p * trials, trials)  # type: ignore[arg-type]
    return low, high
