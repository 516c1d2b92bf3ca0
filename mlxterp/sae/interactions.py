"""What sites have in common: features that matter at all of them, and how much any two share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.sharing import (
    SHARED,
    dead,
    decoder_cosines,
    norms_of,
    ratio,
    relative_norms,
    site_batches,
)
from mlxterp.sae.visualization import Table, plot_matrix


class Usage(NamedTuple):
    """Sums over `n_tokens` tokens: firings, `z` and `z^2` of every feature `[n_features]`, and the
    variance of every write site, `E |y_m - E y_m|^2` `[n_sites]`."""

    n_tokens: int
    firings: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    variances: np.ndarray


def _usage(coder: SparseCoder, dataset: ActivationDataset, max_tokens: int | None) -> Usage:
    firings, sums, squares = (np.zeros(coder.n_features) for _ in range(3))
    total, energy, n = np.zeros(coder.d_out), np.zeros(coder.d_out), 0
    for x, y in site_batches(coder, dataset, max_tokens, "sharing"):
        z = coder.encode(x).astype(mx.float32)
        # The bias lies near the mean, which may be far from 0.
        y = y - coder.b_dec
        firings += np.array((z != 0).sum(axis=0))
        sums += np.array(z.sum(axis=0))
        squares += np.array(z.square().sum(axis=0))
        total += np.array(y.sum(axis=0))
        energy += np.array(y.square().sum(axis=0))
        n += len(y)
    varies = energy / n - np.square(total / n)
    parts = coder.writes.slices.values()
    return Usage(n, firings, sums, squares, np.array([varies[part].sum() for part in parts]))


@dataclass(frozen=True)
class SharedFeatures:
    """Features that matter at all sites, those that matter most first.

    `explained` `[n, n_sites]` is the variance of what a feature `feature_ids` `[n]` writes, as a
    share of the site's; `relative` `[n, n_sites]` are its relative norms, `firing_rates` `[n]` the
    shares of the `n_tokens` tokens on which it fires.
    """

    sites: tuple[str, ...]
    feature_ids: np.ndarray
    explained: np.ndarray
    relative: np.ndarray
    firing_rates: np.ndarray
    n_tokens: int

    @property
    def table(self) -> Table:
        """A row for each feature."""
        rows = (
            (str(i), f"{100 * rate:.2f}%", *(f"{100 * share:.2g}%" for share in shares))
            for i, rate, shares in zip(
                self.feature_ids, self.firing_rates, self.explained, strict=True
            )
        )
        title = f"variance explained at each site, over {self.n_tokens:,} tokens"
        return Table(title, ("feature", "on", *self.sites), (*rows,))

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        } | {"sites": [*self.sites]}

    def plot(self, ax: Any = None) -> Any:
        """A matplotlib figure: the variance explained, in percent, by feature and site."""
        names = [f"feature {i}" for i in self.feature_ids]
        label = "% of the site's variance"
        return plot_matrix(100 * self.explained, self.sites, names, label=label, ax=ax)


def shared_features(
    coder: SparseCoder,
    dataset: ActivationDataset,
    top: int = 20,
    *,
    max_tokens: int | None = None,
) -> SharedFeatures:
    """The features that explain most of all sites, in one pass over a dataset of these sites.

        explained_im = Var(z_i) |d_im|^2 / E |y_m - E y_m|^2

    is what a feature explains of site m where it is uncorrelated with the others. Ranked by the
    site of which they explain least.
    """
    if top < 1:
        raise ValueError(f"top must be >= 1, got {top}.")
    norms = norms_of(coder) / np.array(coder.site_scale, np.float64)
    usage = _usage(coder, dataset, max_tokens)
    varies = usage.squares / usage.n_tokens - np.square(usage.sums / usage.n_tokens)
    energies = np.maximum(varies, 0)[:, None] * np.square(norms)
    explained = ratio(energies, usage.variances)
    ids = np.argsort(-explained.min(axis=1), kind="stable")[:top]
    rates = usage.firings[ids] / usage.n_tokens
    relative = relative_norms(coder)[ids]
    return SharedFeatures(coder.writes.names, ids, explained[ids], relative, rates, usage.n_tokens)


@dataclass(frozen=True)
class ComponentInteractions:
    """How much of its features each site has in common with each other, `[n_sites, n_sites]`.

    `shared[i, j]` is the share of the decoder norm at site i that is matched at site j, NaN where
    no feature writes i;
    `n_features[i, j]` counts the features that both have, and `cosines[i, j]` is the mean cosine of
    their decoder rows, NaN where there are none or the widths differ.
    """

    sites: tuple[str, ...]
    shared: np.ndarray
    cosines: np.ndarray
    n_features: np.ndarray

    @property
    def tables(self) -> tuple[Table, Table]:
        """The shares, and the cosines."""
        return (
            self._table("share of a site's decoder norm (rows) at others (columns)", self.shared),
            self._table("mean cosine of the rows of features that both sites have", self.cosines),
        )

    def _table(self, title: str, matrix: np.ndarray) -> Table:
        rows = (
            (f"{i + 1} {site}", *map(_figure, row))
            for i, (site, row) in enumerate(zip(self.sites, matrix, strict=True))
        )
        return Table(title, ("", *(str(i + 1) for i in range(len(matrix)))), (*rows,))

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.tables))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)

    def to_dict(self) -> dict[str, Any]:
        """Sites and matrices, as plain values; `None` for NaN."""
        shared, cosines = (
            [[None if np.isnan(value) else value for value in row] for row in matrix.tolist()]
            for matrix in (self.shared, self.cosines)
        )
        return {
            "sites": [*self.sites], "shared": shared, "cosines": cosines,
            "n_features": self.n_features.tolist(),
        }  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """A matplotlib figure of the shares as a heat map."""
        label = "share of the row's norm"
        return plot_matrix(self.shared, self.sites, self.sites, label=label, ax=ax)


def _figure(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def component_interactions(
    coder: SparseCoder,
    dataset: ActivationDataset | None = None,
    *,
    shared: float = SHARED,
    max_tokens: int | None = None,
) -> ComponentInteractions:
    """Which sites share features, from relative norms r `[n_features, n_sites]` and cosines.

        shared_ij = sum_f w_f min(r_fi, r_fj) / sum_f w_f r_fi

    over living features. The weights w are 1 or, with a `dataset`, the root mean square of the
    feature's value on it. A site has a feature where its relative norm is at least `shared` times
    the equal share `1 / n_sites`.
    """
    relative = relative_norms(coder)
    weights = np.where(dead(coder, relative), 0.0, 1.0)
    if dataset is not None:
        usage = _usage(coder, dataset, max_tokens)
        weights *= np.sqrt(usage.squares / usage.n_tokens)
    relative = np.nan_to_num(relative)
    present = (relative >= shared / relative.shape[1]) & (weights > 0)[:, None]
    both = present.T.astype(float) @ present
    cosines = decoder_cosines(coder)
    n = relative.shape[1]
    common, angles = np.zeros((n, n)), np.full((n, n), np.nan)
    for i in range(n):
        for j in range(n):
            common[i, j] = weights @ np.minimum(relative[:, i], relative[:, j])
            chosen = present[:, i] & present[:, j]
            if chosen.any():
                angles[i, j] = np.average(cosines[chosen, i, j], weights=weights[chosen])
    common = ratio(common, (weights @ relative)[:, None])
    return ComponentInteractions(coder.writes.names, common, angles, both.astype(int))
