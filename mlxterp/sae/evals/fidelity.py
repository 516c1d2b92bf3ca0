"""How well a coder describes activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.visualization import Table, plot_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCH_TOKENS = 4096
BATCH_ENTRIES = 1 << 28  # of a dense code


@dataclass(frozen=True)
class Fidelity:
    """How well a code describes activations, over `n_tokens` tokens.

    `fvu` is the fraction of variance unexplained, `sum |y - y'|^2 / sum |y - mean(y)|^2`, pooled
    over all tokens and columns in float64, NaN where nothing varies; of a coder that writes several
    sites it is the mean of theirs, `fvu_by_site`, which does not depend on how large the
    activations of each are. `l0` is the mean number of features that are not zero, `firing_rates`
    `[n_features]` the share of tokens on which each feature fires.
    """

    fvu: float
    l0: float
    n_tokens: int
    firing_rates: np.ndarray
    fvu_by_site: Mapping[str, float] = field(default_factory=dict)

    @property
    def dead(self) -> float:
        """The share of features that never fired on these tokens."""
        return float((self.firing_rates == 0).mean())

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the array; those of each site where there are several."""
        figures = {"fvu": self.fvu, "l0": self.l0, "dead": self.dead, "n_tokens": self.n_tokens}
        several = len(self.fvu_by_site) > 1
        return figures | ({"fvu_by_site": dict(self.fvu_by_site)} if several else {})

    @property
    def table(self) -> Table:
        """The figures, and the FVU of each site where there are several."""
        figures = {"FVU": f"{self.fvu:.4f}", "L0": f"{self.l0:.1f}", "silent": f"{self.dead:.1%}"}
        rows = [*figures.items()]
        if len(self.fvu_by_site) > 1:
            rows += [(f"FVU of {site}", f"{fvu:.4f}") for site, fvu in self.fvu_by_site.items()]
        return Table(f"Fidelity on {self.n_tokens:,} tokens", ("", ""), tuple(rows))

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of how many features fire on which share of the tokens."""
        return plot_density(self.firing_rates, ax)

    def __repr__(self) -> str:
        whole = (
            f"Fidelity(FVU {self.fvu:.4f}, L0 {self.l0:.1f}, "
            f"{100 * self.dead:.1f}% silent on {self.n_tokens:,} tokens)"
        )
        sites = [f"  {site}: FVU {fvu:.4f}" for site, fvu in self.fvu_by_site.items()]
        return "\n".join([whole, *(sites if len(sites) > 1 else [])])


def fidelity(
    coder: SparseCoder, dataset: ActivationDataset, max_tokens: int | None = None
) -> Fidelity:
    """FVU, L0 and firing rates of a coder over a dataset of its sites."""
    columns = dataset.columns
    total, squares, error = np.zeros((3, coder.d_out))
    firing = np.zeros(coder.n_features)
    n = 0
    for batch in dataset.batches(max(1, min(BATCH_TOKENS, BATCH_ENTRIES // coder.n_features))):
        if max_tokens is not None and n + len(batch) > max_tokens and n > 0:
            break
        x = columns.take(batch, coder.reads.names).astype(mx.float32)
        y = columns.take(batch, coder.writes.names).astype(mx.float32)
        z = coder.encode(x)
        residual = y - coder.decode(z, like=x)
        if coder.has_skip:
            residual -= x @ coder.W_skip.T
        error += np.array(residual.square().sum(axis=0), dtype=np.float64)
        values = np.array(y, dtype=np.float64)
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
        firing += np.array((z != 0).sum(axis=0))
        n += len(batch)
    variance = squares - np.square(total) / n
    sites = {
        name: _fraction(error[part], variance[part], squares[part])
        for name, part in coder.writes.slices.items()
    }
    known = [fvu for fvu in sites.values() if not math.isnan(fvu)]
    fvu = float(np.mean(known)) if known else math.nan
    return Fidelity(fvu, float(firing.sum() / n), n, firing / n, sites)


def _fraction(error: np.ndarray, variance: np.ndarray, squares: np.ndarray) -> float:
    # Below this the difference is rounding: one token, or tokens that are all the same.
    varies = variance.sum() > 1e-12 * squares.sum()
    return float(error.sum() / variance.sum()) if varies else math.nan
