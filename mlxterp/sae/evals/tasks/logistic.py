"""Logistic regression of a label on activations, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ITERATIONS = 100
TOLERANCE = 1e-14
HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier: it says yes where `x @ weights + bias > 0`, `weights` `[d]`."""

    weights: np.ndarray
    bias: float

    def decide(self, x: np.ndarray) -> np.ndarray:
        """`x @ weights + bias` of `[n, d]`."""
        return np.asarray(x, np.float64) @ self.weights + self.bias


def fit_probe(x: np.ndarray, y: np.ndarray, *, C: float = 1.0, balanced: bool = False) -> Probe:
    """The classifier `[d]` of `y` `[n]` (true or false) from `x` `[n, d]` with the least

        |w|^2 / 2 + C * sum_i s_i * log(1 + exp(-t_i * (u_i @ w + b)))

    where `t_i` is 1 or -1 and `u` is `x` with mean 0 and standard deviation 1 in every column, so
    that units do not matter; the result is for `x` itself. `s_i` is 1 or, where `balanced`, such
    that both labels weigh n / 2. Raises `ValueError` where only one label occurs.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, bool)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x must be [n, d] and y [n], got {list(x.shape)} and {list(y.shape)}.")
    if not 0 < y.sum() < len(y):
        raise ValueError(f"y must hold both labels, got {y.sum()} true of {len(y)}.")
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    # A column that does not vary would be divided by its rounding.
    varies = deviation > 1e-12 * np.abs(mean)
    scale = np.divide(1.0, deviation, np.zeros_like(mean), where=varies & (deviation > 0))
    shares = np.where(y, y.mean(), 1 - y.mean())
    w, b = _minimise((x - mean) * scale, y, C * (0.5 / shares if balanced else np.ones(len(y))))
    return Probe(w * scale, float(b - mean @ (w * scale)))


def _minimise(u: np.ndarray, y: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, float]:
    """The weights and the bias, by Newton's method."""
    if u.shape[1] > len(u):  # weights lie among the rows, and rotating these changes no length
        rotation, rows = np.linalg.qr(u.T)
        w, b = _minimise(rows.T, y, costs)
        return rotation @ w, b
    design, signs = np.concatenate([u, np.ones((len(u), 1))], axis=1), np.where(y, 1.0, -1.0)
    pull = np.append(np.ones(u.shape[1]), 0.0)  # the bias is free

    def loss(w: np.ndarray) -> float:
        margins = signs * (design @ w)
        return float(pull @ np.square(w) / 2 + costs @ np.logaddexp(0, -margins))

    w = np.zeros(design.shape[1])
    now = loss(w)
    for _ in range(ITERATIONS):
        yes = 0.5 * (1 + np.tanh(design @ w / 2))
        gradient = pull * w + design.T @ (costs * (yes - y))
        curvature = np.diag(pull) + design.T @ ((costs * yes * (1 - yes))[:, None] * design)
        # Where the bias alone is left its curvature may vanish.
        step = np.linalg.solve(curvature + 1e-12 * np.eye(len(w)), gradient)
        if gradient @ step < TOLERANCE * max(1.0, now):
            break
        before = now
        w, now = _shorter(loss, w, step, now, float(gradient @ step))
        if now >= before:  # to within rounding
            break
    return w[:-1], float(w[-1])


def _shorter(loss, w: np.ndarray, step: np.ndarray, now: float, slope: float):
    """A step that lowers the loss enough, halved until it does."""
    size = 1.0
    for _ in range(HALVINGS):
        if (then := loss(w - size * step)) <= now - 1e-4 * size * slope:
            return w - size * step, then
        size /= 2
    return w, now


@dataclass(frozen=True)
class Quality:
    """What a classifier gets right: the shares of all (`accuracy`), the harmonic mean of precision
    and recall (`f1`), and how often it ranks a yes above a no (`auc`), of ties half."""

    accuracy: float
    f1: float
    auc: float


def quality(decisions: np.ndarray, y: np.ndarray) -> Quality:
    """Accuracy, F1 and area under the ROC curve of decisions `[n]`, yes where above 0."""
    y, said = np.asarray(y, bool), decisions > 0
    hits = int((said & y).sum())
    f1 = 2 * hits / max(1, int(said.sum() + y.sum()))
    return Quality(float((said == y).mean()), f1, area(decisions, y))


def area(values: np.ndarray, y: np.ndarray) -> float:
    """How often a value of a yes is above that of a no, ties counting half; NaN without either."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    n_yes, n_no = int(y.sum()), int((~y).sum())
    if not n_yes or not n_no:
        return float("nan")
    return float((ranks[y].sum() - n_yes * (n_yes + 1) / 2) / (n_yes * n_no))
