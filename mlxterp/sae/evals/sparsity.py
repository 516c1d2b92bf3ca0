"""How sparse a code is: how many features fire on a token, and on how many tokens each fires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.evals.noise import Score, finite, redraw, spread_of
from mlxterp.sae.evals.sums import Parts
from mlxterp.sae.visualization import Table, plot_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)  # tokens
DENSE = (0.01, 0.1, 0.5)
RARE = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass
class CodeSums:
    """What is counted of the codes of all tokens.

    `scalars` `[n_groups, 3]` are tokens, L0 and L1; `l0_counts[l]` says on how many tokens l
    features fire; of each feature, `firings` are its tokens, `contexts` the contexts that it fires
    in, and `first` is the number of tokens up to its first firing, 0 before it.
    """

    n_groups: int
    n_features: int
    scalars: np.ndarray = field(init=False)
    l0_counts: np.ndarray = field(init=False)
    firings: np.ndarray = field(init=False)
    contexts: np.ndarray = field(init=False)
    first: np.ndarray = field(init=False)
    n_tokens: int = 0

    def __post_init__(self) -> None:
        self.scalars = np.zeros((self.n_groups, 3))
        self.l0_counts = np.zeros(self.n_features + 1, np.int64)
        self.firings = np.zeros(self.n_features, np.int64)
        self.contexts = np.zeros(self.n_features, np.int64)
        self.first = np.zeros(self.n_features, np.int64)

    def add(self, z: mx.array, groups: Parts, contexts: Parts | None) -> None:
        """The codes `[n, n_features]` of a batch, with all tokens of each of its contexts."""
        fires = z != 0
        l0, l1 = fires.sum(axis=-1), mx.abs(z).sum(axis=-1)
        values = mx.stack([mx.ones_like(l1), l0.astype(mx.float32), l1], axis=-1)
        np.add.at(self.scalars, groups.numbers, groups.sums(values))
        self.l0_counts += np.bincount(np.array(l0), minlength=len(self.l0_counts))
        count, earliest = np.array(fires.sum(axis=0)), np.array(mx.argmax(fires, axis=0))
        new = (self.first == 0) & (count > 0)
        self.first[new] = self.n_tokens + 1 + earliest[new]
        self.firings += count
        self.n_tokens += len(z)
        if contexts is not None:
            within = contexts.members @ fires.astype(mx.float32)
            self.contexts += np.array((within > 0).sum(axis=0))

    def l0_quantile(self, share: float) -> int:
        """The least L0 that so large a share of the tokens does not exceed."""
        return int(np.searchsorted(self.l0_counts.cumsum(), share * self.n_tokens))


@dataclass(frozen=True)
class Sparsity:
    """How sparse a coder's code is, over `n_tokens` tokens.

    `l0` is the mean number of features that are not zero, `l0_median` and `l0_95` its median and
    95th percentile over tokens; `l1` the mean of `sum_i |z_i|`, which depends on how decoder rows
    are scaled. Of each feature, `density` `[n_features]` is the share of tokens that it fires on,
    `first` the number of tokens up to its first firing (0: it never fired), and `per_context` how
    often it fires in a context in which it does (NaN where contexts are not known).
    """

    l0: Score
    l0_median: int
    l0_95: int
    l1: Score
    density: np.ndarray = field(repr=False)
    first: np.ndarray = field(repr=False)
    per_context: np.ndarray = field(repr=False)
    n_tokens: int

    @property
    def dead(self) -> float:
        """The share of features that fired on none of the tokens."""
        return float((self.density == 0).mean())

    @property
    def silent_within(self) -> Mapping[int, float]:
        """The share of features that did not fire within so many tokens: how many count as dead
        depends on how long one waits."""
        windows = [n for n in WINDOWS if n < self.n_tokens] + [self.n_tokens]
        return {n: float(((self.first == 0) | (self.first > n)).mean()) for n in windows}

    @property
    def denser_than(self) -> Mapping[float, float]:
        """The share of features that fire on more than such a share of the tokens."""
        return {share: float((self.density > share).mean()) for share in DENSE}

    @property
    def rarer_than(self) -> Mapping[float, float]:
        """The share of features that fire on less than such a share of the tokens, for shares of
        which these tokens can tell."""
        known = [share for share in RARE if share * self.n_tokens >= 1]
        return {share: float((self.density < share).mean()) for share in known}

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Names and numbers of a table."""
        shares = {f"silent in {n:,} tokens": x for n, x in self.silent_within.items()}
        shares |= {f"on over {share:.0%} of tokens": x for share, x in self.denser_than.items()}
        return [
            ("L0", *self.l0.cells(".2f")),
            ("L0, median and 95 %", f"{self.l0_median}, {self.l0_95}", "", ""),
            ("L1", *self.l1.cells(".2f")),
            *((name, f"{share:.1%}", "", "") for name, share in shares.items()),
        ]

    @property
    def table(self) -> Table:
        """The numbers, without those of each feature."""
        rows = tuple(row[:3] for row in self.rows)
        return Table(f"Sparsity over {self.n_tokens:,} tokens", ("", "value", "±"), rows)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without those of each feature."""
        return {
            "l0": self.l0.to_dict(),
            "l0_median": self.l0_median,
            "l0_95": self.l0_95,
            "l1": self.l1.to_dict(),
            "dead": finite(self.dead),
            "silent_within": {str(n): share for n, share in self.silent_within.items()},
            "denser_than": {str(x): share for x, share in self.denser_than.items()},
            "rarer_than": {str(x): share for x, share in self.rarer_than.items()},
            "n_tokens": self.n_tokens,
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of how many features fire on which share of the tokens."""
        return plot_density(self.density, ax)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def sparsity_of(sums: CodeSums) -> tuple[Sparsity, dict[str, np.ndarray]]:
    """The report on codes, and `l0` and `l1` of documents that were drawn again."""
    n, l0, l1 = sums.scalars.sum(axis=0)
    draws = redraw(sums.scalars, lambda totals: totals[:, 1:] / totals[:, :1])
    spreads = [spread_of(draws[:, i], sums.n_groups) for i in range(2)]
    in_contexts = np.where(sums.contexts > 0, sums.contexts, np.nan)
    report = Sparsity(
        l0=Score(float(l0 / n), spreads[0]),
        l0_median=sums.l0_quantile(0.5),
        l0_95=sums.l0_quantile(0.95),
        l1=Score(float(l1 / n), spreads[1]),
        density=sums.firings / sums.n_tokens,
        first=sums.first,
        per_context=sums.firings / in_contexts,
        n_tokens=sums.n_tokens,
    )
    return report, {"l0": draws[:, 0], "l1": draws[:, 1]}
