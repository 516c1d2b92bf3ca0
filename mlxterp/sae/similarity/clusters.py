"""Families of features: those that write alike, or that fire together as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.features.codes import SparseCodes
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.similarity.directions import Directions, Side, directions_of, needed
from mlxterp.sae.similarity.nearest import scan
from mlxterp.sae.visualization import Table

LISTED = 10  # clusters of a table, and members of each
NEAREST_SHARE = 0.99  # of random directions have no neighbour as near as the least cosine
SAMPLED = 512
LEAST_PHI = 0.1
FEATURES_PER_RESOLUTION = 256
CODE_COLUMNS = 512


@dataclass(frozen=True, eq=False)
class Clusters:
    """Families of features.

    `labels` `[n_features]` is the number of each feature's cluster, largest first, -1 for features
    that are in none. `sizes`, `medoids` and `cohesion` `[n_clusters]` are the numbers of members,
    the member nearest to all others, and the mean cosine of two members; that of any two features
    is `background`. `centrality` `[n_features]` is the mean cosine with the other members, NaN for
    features in no cluster. Features were joined from a cosine of `min_cosine` on.
    """

    labels: np.ndarray
    sizes: np.ndarray
    medoids: np.ndarray
    cohesion: np.ndarray
    centrality: np.ndarray
    background: float
    min_cosine: float

    def __len__(self) -> int:
        return len(self.sizes)

    def members(self, cluster: int) -> np.ndarray:
        """The features of a cluster, the most central first."""
        if not 0 <= cluster < len(self):
            raise ValueError(f"cluster must be in [0, {len(self) - 1}], got {cluster}.")
        ids = np.flatnonzero(self.labels == cluster)
        return ids[np.argsort(-self.centrality[ids], kind="stable")]

    def of(self, feature_id: int) -> int | None:
        """The number of a feature's cluster, or None."""
        if not 0 <= feature_id < len(self.labels):
            raise ValueError(f"feature_id must be below {len(self.labels)}, got {feature_id}.")
        label = int(self.labels[feature_id])
        return None if label < 0 else label

    @property
    def table(self) -> Table:
        """The largest clusters."""
        alone = int((self.labels < 0).sum())
        title = (
            f"{len(self):,} clusters of {len(self.labels):,} features, {alone:,} in none; joined "
            f"from a cosine of {self.min_cosine:.2f}\n(two features have one of "
            f"{round(self.background, 2) + 0.0:.2f} on average)"
        )
        rows = []
        for i in range(min(LISTED, len(self))):
            central = self.members(i)[:LISTED].tolist()
            more = ", ..." if self.sizes[i] > LISTED else ""
            listed = ", ".join(map(str, central)) + more
            rows.append((str(i), f"{self.sizes[i]:,}", f"{self.cohesion[i]:.2f}", listed))
        return Table(title, ("cluster", "features", "cosine", "most central"), (*rows,))

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the centralities, as plain values."""
        return {
            "labels": self.labels.tolist(),
            "sizes": self.sizes.tolist(),
            "medoids": self.medoids.tolist(),
            "cohesion": self.cohesion.tolist(),
            "background": self.background,
            "min_cosine": self.min_cosine,
        }


def find_clusters(
    coder: SparseCoder,
    data: FeatureData | None = None,
    *,
    n_neighbours: int = 10,
    min_cosine: float | None = None,
    resolution: float | None = None,
    by: Side = "decoder",
    site: str | None = None,
    seed: int = 0,
) -> Clusters:
    """Families of features, as communities of the graph that joins each to its nearest ones.

    Two features are joined where one is among the `n_neighbours` nearest of the other, with their
    cosine as weight, if that is at least `min_cosine`: by default so much that only 1 in 100 random
    directions has a neighbour as near. With `data`, features that fire together are joined too: the
    weight is the mean of the cosine and of the correlation of their firing (phi), each where it is
    large enough (phi from .1). Communities are those of the Louvain algorithm. A higher
    `resolution` makes them smaller; by default it grows with the number of features, so that
    families of a few to some hundred features are told apart.

    The same `seed` gives the same result. Raises `ImportError` where scipy or networkx is missing.

    Reference: Blondel et al. 2008, arXiv 0803.0476; for the resolution Reichardt and Bornholdt
    2006, arXiv cond-mat/0603718.
    """
    own = directions_of(coder, by, site)
    if n_neighbours < 1:
        raise ValueError(f"n_neighbours must be >= 1, got {n_neighbours}.")
    if resolution is None:
        resolution = max(1.0, own.n_features / FEATURES_PER_RESOLUTION)
    elif resolution <= 0:
        raise ValueError(f"resolution must be above 0, got {resolution}.")
    if min_cosine is not None and not 0 <= min_cosine <= 1:
        raise ValueError(f"min_cosine must be in [0, 1], got {min_cosine}.")
    if data is not None and data.n_features != own.n_features:
        raise ValueError(f"data is of {data.n_features} features, the coder has {own.n_features}.")
    least = _chance_level(own, seed) if min_cosine is None else min_cosine
    edges = _edges(own, data, n_neighbours, least)
    labels = _communities(own.n_features, edges, resolution, seed)
    return _described(own, labels, least)


def _chance_level(own: Directions, seed: int) -> float:
    """A cosine that few random directions have with the nearest of as many others."""
    if own.n_features < 3:
        return 1.0
    drawn, rng = own.random(seed), np.random.default_rng(seed)
    some = np.sort(rng.permutation(own.n_features)[:SAMPLED])
    # The very nearest of each is itself.
    nearest = scan(drawn.take(some), drawn, 2)[0].cosines[:, 1]
    return float(np.quantile(nearest, NEAREST_SHARE))


Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


def _edges(own: Directions, data: FeatureData | None, n_neighbours: int, least: float) -> Edges:
    """The two features `[n]` of each edge, the smaller first, and its weight, above 0."""
    ids, cosines = scan(own, own, n_neighbours, within=True)[0]
    rows, columns = np.repeat(np.arange(len(ids)), ids.shape[1]), ids.reshape(-1)
    weights = np.where(cosines >= least, np.maximum(cosines, 0), 0).reshape(-1)
    if data is not None:
        known, others, phis = _correlated(data.codes, ids, n_neighbours)
        more = np.repeat(np.arange(len(others)), others.shape[1])
        alike = own.cosines_of_pairs(more, own, others.reshape(-1))
        alike = np.where(alike >= least, np.maximum(alike, 0), 0)
        phis = np.concatenate([known.reshape(-1), phis.reshape(-1)])
        weights = (np.concatenate([weights, alike]) + phis * (phis >= LEAST_PHI)) / 2
        rows, columns = np.append(rows, more), np.append(columns, others)
    keys = np.minimum(rows, columns) * own.n_features + np.maximum(rows, columns)
    keys, weights = keys[weights > 0], weights[weights > 0]
    order = np.argsort(keys, kind="stable")
    keys, first = np.unique(keys[order], return_index=True)
    weights = np.maximum.reduceat(weights[order], first) if len(keys) else weights
    return keys // own.n_features, keys % own.n_features, weights


def _correlated(
    codes: SparseCodes, ids: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The correlation of the firing of features with those of `ids` `[n_features, k]`, and the `n`
    features with which it is largest, with their correlations."""
    known = np.zeros(ids.shape, np.float32)
    others = np.zeros((len(ids), min(n, len(ids) - 1)), np.int64)
    phis = np.zeros(others.shape, np.float32)
    for block, phi in _phi(codes):
        known[block] = np.take_along_axis(phi, ids[block], axis=1)
        phi[np.arange(len(phi)), np.arange(len(ids))[block]] = -1
        others[block] = np.argpartition(-phi, others.shape[1] - 1, axis=1)[:, : others.shape[1]]
        phis[block] = np.take_along_axis(phi, others[block], axis=1)
    return known, others, phis


def _phi(codes: SparseCodes) -> Iterator[tuple[slice, np.ndarray]]:
    """The correlations of firing with all features, `[n, n_features]`, block by block."""
    sparse = needed("scipy.sparse")
    n, counts = codes.n_tokens, codes.firing_counts.astype(np.float32)
    ones = np.ones(len(codes.features), np.float32)
    shape = n, codes.n_features
    fires = sparse.csr_matrix((ones, codes.features.astype(np.int32), codes.starts), shape)
    by_feature = fires.T.tocsr()
    spread = np.sqrt(counts * np.maximum(n - counts, 0))
    for start in range(0, codes.n_features, CODE_COLUMNS):
        block = slice(start, min(start + CODE_COLUMNS, codes.n_features))
        together = (by_feature[block] @ fires).toarray()
        below = np.outer(spread[block], spread)
        above = n * together - np.outer(counts[block], counts)
        yield block, np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _communities(n_features: int, edges: Edges, resolution: float, seed: int) -> np.ndarray:
    """The number of each feature's community, largest first, -1 where it is alone."""
    networkx = needed("networkx")
    graph = networkx.Graph()
    graph.add_weighted_edges_from(zip(*(part.tolist() for part in edges), strict=True))
    labels = np.full(n_features, -1)
    if not len(graph):
        return labels
    found = networkx.community.louvain_communities(graph, resolution=resolution, seed=seed)
    several = (sorted(one) for one in found if len(one) > 1)
    for i, members in enumerate(sorted(several, key=lambda one: (-len(one), one[0]))):
        labels[members] = i
    return labels


def _described(own: Directions, labels: np.ndarray, least: float) -> Clusters:
    sizes = np.bincount(labels[labels >= 0]) if labels.max(initial=-1) >= 0 else np.zeros(0, int)
    total, alive = np.zeros(own.sites.width), 0
    sums = np.zeros((len(sizes) + 1, own.sites.width), np.float32)  # the last of those in none
    for ids, columns, rows in own.blocks():
        units = np.array(rows)
        total[columns] += units.sum(axis=0, dtype=np.float64)
        alive += int((np.square(units).sum(axis=1) > 0.5).sum())
        order = np.argsort(labels[ids], kind="stable")
        present, first = np.unique(labels[ids][order], return_index=True)
        sums[present, columns] += np.add.reduceat(units[order], first, axis=0)
    centrality = np.full(len(labels), np.nan)
    for ids, columns, rows in own.blocks():
        of, units = labels[ids], np.array(rows)
        with_all = np.einsum("nd,nd->n", units, sums[of, columns])
        others = np.append(sizes, 2)[of] - 1
        norms = np.square(units).sum(axis=1)
        centrality[ids] = np.where(of >= 0, (with_all - norms) / others, np.nan)
    medoids, cohesion = np.zeros(len(sizes), np.int64), np.zeros(len(sizes))
    for i in range(len(sizes)):
        members = np.flatnonzero(labels == i)
        medoids[i] = members[centrality[members].argmax()]
        cohesion[i] = centrality[members].mean()
    background = (float(total @ total) - alive) / max(1, alive * (alive - 1))
    return Clusters(labels, sizes, medoids, cohesion, centrality, background, least)
