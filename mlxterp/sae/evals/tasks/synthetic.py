"""Activations that are sums of features that are known, to see whether they are found."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

import numpy as np

Kind = Literal["sparse", "zipfian", "correlated", "hierarchical"]

FAMILY = 4  # features that go together, or a parent and its children
SHARED = 0.6  # of the variance of correlated features
GIVEN_PARENT = 0.25
STEEPNESS, OFFSET = 1.0, 5.0  # of Zipf's law
SMALLEST, LARGEST = 0.5, 1.5  # of the values of features
MOST = 0.5  # of a feature's rate


class Drawn(NamedTuple):
    """Codes `[n_tokens, n_features]`, and the activations `[n_tokens, width]` made of them."""

    codes: np.ndarray
    activations: np.ndarray


@dataclass(frozen=True, eq=False)
class SyntheticFeatures:
    """Features whose directions and firing are known; `draw` gives tokens.

        x = z @ directions + bias + noise * n(0, 1)

    `directions` are `[n_features, width]`, of norm 1, and `rates` `[n_features]` how often each
    fires; a value is uniform in [.5, 1.5] where it does.

    - `sparse`: all fire equally often and independently.
    - `zipfian`: independently, feature i in proportion to 1 / (i + 5).
    - `correlated`: in families of four that tend to fire together, by a Gaussian copula that
      shares .6 of its variance within a family.
    - `hierarchical`: in families of four, of which the first is the parent; the others fire only
      where it does, on a quarter of these tokens. It is here that absorption pays.
    """

    directions: np.ndarray
    rates: np.ndarray
    kind: Kind
    bias: np.ndarray
    noise: float

    @classmethod
    def make(
        cls,
        kind: Kind = "sparse",
        n_features: int = 64,
        width: int = 32,
        active: float = 3.0,
        *,
        bias: float = 0.0,
        noise: float = 0.01,
        seed: int = 0,
    ) -> SyntheticFeatures:
        """Random features of which `active` fire on a token on average.

        Directions are orthogonal where the width has room for them, and else random. `bias` is the
        norm of what all tokens have in common. Raises `ValueError` for numbers out of range.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {list(get_args(Kind))}, got {kind!r}.")
        if n_features < FAMILY or n_features % FAMILY or width < 2:
            raise ValueError(
                f"n_features must be a multiple of {FAMILY} and width >= 2, got {n_features} and "
                f"{width}."
            )
        if bias < 0 or noise < 0:
            raise ValueError(f"bias and noise must be >= 0, got {bias} and {noise}.")
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(n_features, width))
        if n_features <= width:
            rows = np.linalg.qr(rows.T)[0].T
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rates = active * _shares(kind, n_features)
        if not active > 0 or rates.max() > MOST:
            most = MOST / _shares(kind, n_features).max()
            raise ValueError(f"active must be in (0, {most:g}] here, got {active}.")
        offset = rng.normal(size=width)
        return cls(rows, rates, kind, bias * offset / np.linalg.norm(offset), noise)

    @property
    def n_features(self) -> int:
        """The number of features."""
        return len(self.directions)

    @property
    def width(self) -> int:
        """The width of an activation."""
        return self.directions.shape[1]

    def draw(self, n_tokens: int, seed: int = 0) -> Drawn:
        """So many tokens, float32."""
        rng = np.random.default_rng([19, seed])
        fires = self._fires(rng, n_tokens)
        codes = fires * rng.uniform(SMALLEST, LARGEST, fires.shape)
        x = codes @ self.directions + self.bias
        x += self.noise * rng.normal(size=x.shape)
        return Drawn(codes.astype(np.float32), x.astype(np.float32))

    def _fires(self, rng: np.random.Generator, n: int) -> np.ndarray:
        if self.kind == "hierarchical":
            parents = self.rates.reshape(-1, FAMILY)[:, :1]
            parent = rng.random((n, len(parents), 1)) < parents
            children = rng.random((n, len(parents), FAMILY - 1)) < GIVEN_PARENT
            return np.concatenate([parent, parent & children], axis=2).reshape(n, -1)
        if self.kind == "correlated":
            family = np.repeat(rng.normal(size=(n, self.n_features // FAMILY)), FAMILY, axis=1)
            own = rng.normal(size=(n, self.n_features))
            limits = [NormalDist().inv_cdf(1 - rate) for rate in self.rates.tolist()]
            return SHARED**0.5 * family + (1 - SHARED) ** 0.5 * own > limits
        return rng.random((n, self.n_features)) < self.rates

    def __repr__(self) -> str:
        return (
            f"SyntheticFeatures({self.kind}, n_features={self.n_features}, width={self.width}, "
            f"{self.rates.sum():.2f} active)"
        )


def _shares(kind: Kind, n: int) -> np.ndarray:
    """The rates of features of which one is active on average."""
    weights = np.ones(n)
    if kind == "zipfian":
        weights = 1 / (np.arange(n) + OFFSET) ** STEEPNESS
    elif kind == "hierarchical":
        weights = np.tile([1.0, *[GIVEN_PARENT] * (FAMILY - 1)], n // FAMILY)
    return weights / weights.sum()
