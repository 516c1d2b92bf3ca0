"""Sums over tokens of one site, by group of documents, from which all of its scores follow."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

# Of each token: 1, |r|^2, |y|^2, |y - shift|^2, |y'|^2, y . y', |y|, |y'|, their ratio, the cosine,
# |r|^2 / |y|^2, and |r|^2 / |y - mean of the batch|^2.
SCALARS = (
    "n", "error", "squares", "shifted", "written", "products", "norms", "written_norms",
    "norm_ratios", "cosines", "error_shares", "error_parts",
)  # fmt: skip
SMALL = 1e-4  # a norm that nothing is divided by


@dataclass
class Parts:
    """Which tokens of a batch belong together: `members` `[n_parts, n_tokens]` of 0 and 1."""

    numbers: np.ndarray
    members: mx.array

    @classmethod
    def of(cls, labels: np.ndarray) -> Parts:
        """The tokens that have the same label."""
        numbers, index = np.unique(labels, return_inverse=True)
        members = np.arange(len(numbers))[:, None] == index
        return cls(numbers, mx.array(members.astype(np.float32)))

    def sums(self, values: mx.array) -> np.ndarray:
        """The sums over each part, `[n_parts, ...]`, of `[n_tokens, ...]`."""
        return np.array(self.members @ values, np.float64)


@dataclass
class SiteSums:
    """Sums over the tokens of a site, `y` `[n, width]`, and of what a coder writes there.

    `scalars` `[n_groups, len(SCALARS)]`, `shifted_sums` and `error_sums` `[n_groups, width]` are in
    float64. Activations are taken relative to `shift`, their mean in the first batch, so that
    nothing is lost where they are far from zero. `batches` and `prompts` are the variance
    unexplained within each batch and each context.
    """

    n_groups: int
    width: int
    scalars: np.ndarray = field(init=False)
    shifted_sums: np.ndarray = field(init=False)
    error_sums: np.ndarray = field(init=False)
    shift: mx.array | None = None
    batches: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scalars = np.zeros((self.n_groups, len(SCALARS)))
        self.shifted_sums = np.zeros((self.n_groups, self.width))
        self.error_sums = np.zeros((self.n_groups, self.width))

    def add(self, y: mx.array, y_hat: mx.array, groups: Parts, contexts: Parts | None) -> None:
        """One batch of tokens, of some groups and contexts."""
        if self.shift is None:
            self.shift = y.mean(axis=0)
        shifted, residual = y - self.shift, y - y_hat
        error, from_shift = _squares(residual), _squares(shifted)
        values = _of_tokens(y, y_hat, error, from_shift, _squares(y - y.mean(axis=0)))
        np.add.at(self.scalars, groups.numbers, _exact_sums(groups, values))
        np.add.at(self.shifted_sums, groups.numbers, groups.sums(shifted))
        np.add.at(self.error_sums, groups.numbers, groups.sums(residual))
        both = mx.stack([mx.ones_like(error), error, from_shift], axis=-1)
        everything = Parts(np.zeros(1, int), mx.ones((1, len(y))))
        self.batches += _unexplained(everything, both, shifted)
        if contexts is not None:
            self.prompts += _unexplained(contexts, both, shifted)

    @property
    def totals(self) -> dict[str, float]:
        """The sums over all groups, by name, and the variance of activations and of errors."""
        totals = self.scalars.sum(axis=0).tolist()
        found: dict[str, float] = dict(zip(SCALARS, totals, strict=True))
        n = found["n"]
        for name, squares, sums in (
            ("variance", found["shifted"], self.shifted_sums),
            ("error_variance", found["error"], self.error_sums),
        ):
            found[name] = squares - float(np.square(sums.sum(axis=0)).sum()) / n
        return found


def _of_tokens(
    y: mx.array, y_hat: mx.array, error: mx.array, from_shift: mx.array, from_mean: mx.array
) -> mx.array:
    """The values that are summed, `[n, len(SCALARS)]`."""
    squares, written = _squares(y), _squares(y_hat)
    products = (y * y_hat).sum(axis=-1)
    norms, written_norms = mx.sqrt(squares), mx.sqrt(written)
    known = mx.where(norms < SMALL, 1, norms)
    lengths = norms * written_norms
    cosines = mx.where(lengths > 0, products / mx.where(lengths > 0, lengths, 1), 0)
    values = [
        mx.ones_like(error), error, squares, from_shift, written, products, norms, written_norms,
        written_norms / known, cosines, error / mx.square(known),
        error / mx.where(from_mean > 0, from_mean, 1),
    ]  # fmt: skip
    return mx.stack(values, axis=-1)


def _squares(x: mx.array) -> mx.array:
    return x.square().sum(axis=-1)


def _exact_sums(groups: Parts, values: mx.array) -> np.ndarray:
    """In float64 from the first addition on: the variance is a difference of such sums."""
    return np.array(groups.members, np.float64) @ np.array(values, np.float64)


def _unexplained(parts: Parts, both: mx.array, shifted: mx.array) -> list[float]:
    """`sum |r|^2 / sum |y - mean|^2` within each part in which activations vary."""
    n, error, squares = _exact_sums(parts, both).T
    variance = squares - np.square(parts.sums(shifted)).sum(axis=-1) / n
    varies = variance > 1e-6 * squares
    return (error[varies] / variance[varies]).tolist()
