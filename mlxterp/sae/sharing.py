"""Which sites a coder's features belong to: all of them, some, or one alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.visualization import Table, plot_matrix, plot_shares

SPECIFIC = 0.1
SHARED = 0.6
# Codes of a batch are dense while they are looked at.
BATCH_ENTRIES, BATCH_TOKENS = 1 << 25, 4096


def norms_of(coder: SparseCoder) -> np.ndarray:
    """`coder.decoder_norms()` `[n_features, n_sites]` in float64; raises `ValueError` for a coder
    that writes one site only."""
    if len(coder.writes.names) < 2:
        raise ValueError(f"The coder must write several sites, got {coder.writes}.")
    return np.array(coder.decoder_norms().astype(mx.float32), np.float64)


def relative_norms(coder: SparseCoder) -> np.ndarray:
    """How much of a feature's decoder is at each write site, `[n_features, n_sites]`.

        r_im = |d_im| / sum over m' of |d_im'|

    The norms are those of `coder.decoder_norms`, in units of each site's activations. Rows sum to
    1; those of features that write nothing are NaN.

    Reference: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
    """
    return ratio((norms := norms_of(coder)), norms.sum(axis=1, keepdims=True))


def delta_norms(coder: SparseCoder) -> np.ndarray:
    """For two write sites, where a feature is between the first (0) and the second (1).

        (1 + (|d_b| - |d_a|) / max(|d_a|, |d_b|)) / 2        [n_features]

    NaN for features that write nothing. Raises `ValueError` for another number of sites.

    Reference: Minder et al. 2025, arXiv 2504.02922.
    """
    norms = norms_of(coder)
    if norms.shape[1] != 2:
        raise ValueError(f"Delta norms need two write sites, got {coder.writes}.")
    return (1 + ratio(norms[:, 1] - norms[:, 0], norms.max(axis=1))) / 2


def decoder_cosines(coder: SparseCoder) -> np.ndarray:
    """The cosine between decoder rows of a feature, `[n_features, n_sites, n_sites]`.

    NaN where the sites' widths differ and where a row is zero. It says something only for sites
    that share a basis, such as layers of one residual stream.
    """
    names, widths = coder.writes.names, coder.writes.widths
    found = np.full((coder.n_features, len(names), len(names)), np.nan)
    for block, rows in zip(coder.blocks, coder.decoder_blocks(), strict=True):
        sites = range(len(names))[block.sites]
        parts = Columns(names[block.sites], widths[block.sites]).slices.values()
        units = [_unit_rows(rows[:, part]) for part in parts]
        for i, a in zip(sites, units, strict=True):
            for j, b in zip(sites, units, strict=True):
                if a.shape == b.shape:
                    found[block.features, i, j] = np.array((a * b).sum(axis=-1))
    return found


def _unit_rows(rows: mx.array) -> mx.array:
    rows = rows.astype(mx.float32)
    norms = mx.linalg.norm(rows, axis=-1, keepdims=True)
    return mx.where(norms > 0, rows / norms, mx.nan)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`, NaN where `below` is not above 0; for arrays that broadcast."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


@dataclass(frozen=True)
class Sharing:
    """The class of every feature, by where its decoder's norm is.

    `classes` `[n_features]` are `"shared"`, `"partial"`, `"dead"` or, for features of one site,
    `"only <site>"`; `relative` `[n_features, n_sites]` are the relative norms.
    """

    sites: tuple[str, ...]
    classes: np.ndarray
    relative: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """All classes that there are for these sites."""
        return ("shared", "partial", *(f"only {site}" for site in self.sites), "dead")

    @property
    def counts(self) -> dict[str, int]:
        """How many features are in each class."""
        return {name: int((self.classes == name).sum()) for name in self.names}

    def features(self, name: str) -> np.ndarray:
        """The ids of the features of a class; a site's name stands for those of it alone.

        Raises `ValueError` for a name that is neither.
        """
        return ids_of(self.classes, name, self.names)

    @property
    def table(self) -> Table:
        """The counts and shares of the classes."""
        n = len(self.classes)
        rows = ((k, f"{count:,}", f"{100 * count / n:.1f}%") for k, count in self.counts.items())
        return Table(f"{n:,} features of {len(self.sites)} sites", ("", "features", ""), (*rows,))

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Sites, counts and the class of each feature, as plain values."""
        return {"sites": [*self.sites], "counts": self.counts, "classes": self.classes.tolist()}

    def plot(self, ax: Any = None) -> Any:
        """A matplotlib figure: for two sites the histogram of the second one's relative norms, for
        more the relative norms of all living features, those of like profile side by side."""
        if len(self.sites) == 2:
            label = f"relative decoder norm at {self.sites[1]}\n(the rest is at {self.sites[0]})"
            return plot_shares(self.relative[:, 1], self.classes, self.names[:-1], label, ax)
        living = self.relative[self.classes != "dead"]
        order = np.lexsort((-living.max(axis=1), living.argmax(axis=1)))
        label, rows = "relative decoder norm", f"{len(living):,} features"
        return plot_matrix(living[order], self.sites, label=label, row_label=rows, ax=ax)


def ids_of(kinds: np.ndarray, name: str, names: tuple[str, ...]) -> np.ndarray:
    """The indices at which `kinds` is `name`, or `"only <name>"`."""
    chosen = name if name in names else f"only {name}"
    if chosen not in names:
        raise ValueError(f"The class must be one of {list(names)} or a site, got {name!r}.")
    return np.flatnonzero(kinds == chosen)


def sharing(coder: SparseCoder, *, specific: float = SPECIFIC, shared: float = SHARED) -> Sharing:
    """Sort features by the sites that they write, from the coder's arrays alone.

    A feature is specific to one site where the relative norms of all others together are below
    `specific`; shared where each is at least `shared` times the equal share `1 / n_sites`; partial
    otherwise. With two sites those bands are the usual ones, below .1 and from .3 to .7. It is dead
    where it writes nothing, or fired on no token at the end of training. Features of a cross-layer
    transcoder are measured by the sites that they can write.

    Norms alone can mislead: an L1 penalty removes small ones. `diffing.diff` looks at data.
    """
    relative, sites = relative_norms(coder), coder.writes.names
    if not 0 < specific < shared / 2 < 0.5:
        raise ValueError(
            "specific and shared must satisfy 0 < specific < shared / 2 < 0.5, "
            f"got {specific} and {shared}."
        )
    reach = np.zeros(relative.shape, bool)
    for block in coder.blocks:
        reach[block.features, block.sites] = True
    least = np.where(reach, relative, np.inf).min(axis=1)
    classes = np.where(least >= shared / reach.sum(axis=1), "shared", "partial").astype(object)
    for i, site in enumerate(sites):
        classes[1 - relative[:, i] < specific] = f"only {site}"
    classes[dead(coder, relative)] = "dead"
    return Sharing(sites, classes.astype(str), relative)


def dead(coder: SparseCoder, relative: np.ndarray) -> np.ndarray:
    """Boolean `[n_features]`: without relative norms, or never active at the end of training."""
    rates = getattr(getattr(coder, "statistics", None), "firing_rates", ())
    silent = rates == 0 if len(rates) == coder.n_features else False
    return np.isnan(relative[:, 0]) | silent


def site_batches(
    coder: SparseCoder, dataset: ActivationDataset, max_tokens: int | None, label: str
) -> Iterator[tuple[mx.array, mx.array]]:
    """What the coder reads and what it shall write, in float32, batch by batch of a dataset.

    Raises `ValueError` for a dataset that lacks one of the sites.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be None or >= 1, got {max_tokens}.")
    columns = dataset.columns
    size = min(BATCH_TOKENS, max(256, BATCH_ENTRIES // max(coder.n_features, coder.d_out)))
    left = dataset.n_tokens if max_tokens is None else min(max_tokens, dataset.n_tokens)
    with tqdm(total=left, desc=label, disable=not dataset.verbose) as bar:
        for batch in dataset.batches(size):
            batch = batch[:left].astype(mx.float32)
            x = columns.take(batch, coder.reads.names)
            yield x, columns.take(batch, coder.writes.names)
            left -= len(batch)
            bar.update(len(batch))
            if left <= 0:
                return
