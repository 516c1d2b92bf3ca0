"""Which nodes and edges of a graph of linear effects matter to its ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Adjacency:
    """Linear effects between numbered nodes, of which there are `len(starts)`.

    `weights[i, j]` `[n_targets, n_sources]` is the part of the value of node `targets[i]` that node
    `sources[j]` has. `starts [n_nodes]` is what each node matters by itself: the probability of a
    logit, and 0 for all others.
    """

    weights: np.ndarray
    targets: np.ndarray
    sources: np.ndarray
    starts: np.ndarray

    def normalized(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """`|weights|` of some targets, divided by the sum of each row; a row of zeros stays."""
        return np.abs(self.weights[rows], dtype=np.float64) * self._scales[rows, None]

    @cached_property
    def _scales(self) -> np.ndarray:
        """What the rows of `|weights|` are multiplied by, `[n_targets]`."""
        parts = [
            np.abs(self.weights[start : start + ROWS_AT_ONCE]).sum(axis=1, dtype=np.float64)
            for start in range(0, len(self.targets), ROWS_AT_ONCE)
        ]
        sums = np.concatenate([np.zeros(0), *parts])
        return np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)

    def scales(self) -> np.ndarray:
        """What the sizes of the effects on each node are multiplied by, `[n_nodes]`."""
        found = np.zeros(len(self.starts))
        found[self.targets] = self._scales
        return found

    def influences(self) -> np.ndarray:
        """How much goes through each node to the ends, `[n_nodes]`.

            influence = starts (A + A^2 + A^3 + ...),   A = |weights|, its rows divided by their sum

        What goes through a node is shared out among those that its value is due to. So the nodes
        without such, together, have as much as all starts. Raises `ValueError` for a graph with a
        circle.
        """
        amounts = self._amounts()
        return np.bincount(
            self.sources, _shared(self.weights, amounts * self._scales), len(self.starts)
        )

    def _amounts(self) -> np.ndarray:
        """What matters of each target, and what goes through it, `[n_targets]`.

        Only what goes to a target goes on from there, so that the others need to be looked at but
        once.
        """
        column = np.full(len(self.starts), -1)
        column[self.sources] = np.arange(len(self.sources))
        columns = column[self.targets]
        between = columns >= 0
        inner = np.abs(self.weights[:, columns[between]], dtype=np.float64)
        inner *= self._scales[:, None]
        current = self.starts[self.targets].astype(np.float64)
        total = current.copy()
        for _ in range(len(self.targets) + 1):
            passed = np.zeros_like(current)
            passed[between] = current @ inner
            if not passed.any():
                return total
            total, current = total + passed, passed
        raise ValueError("weights must be those of a graph without circles.")

    def part(self, nodes: np.ndarray) -> Adjacency:
        """What is between some nodes, given by a mask `[n_nodes]`."""
        rows, columns = np.flatnonzero(nodes[self.targets]), np.flatnonzero(nodes[self.sources])
        weights = self.weights[np.ix_(rows, columns)]
        return Adjacency(weights, self.targets[rows], self.sources[columns], self.starts)

    def has_inputs(self) -> np.ndarray:
        """The nodes that are due to others, as a mask `[n_nodes]`."""
        found = np.zeros(len(self.starts), bool)
        found[self.targets] = self._scales > 0
        return found


def _shared(weights: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """`amounts |weights|` in float64, `[n_sources]`, of weights `[n_targets, n_sources]`."""
    found, rows = np.zeros(weights.shape[1]), np.flatnonzero(amounts)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        found += amounts[some] @ np.abs(weights[some], dtype=np.float64)
    return found


@dataclass(frozen=True, eq=False)
class Pruned:
    """What is kept of a graph: its `nodes`, as a mask, and its `edges [n, 2]`, the numbers of
    source and target of each, with their `weights [n]`."""

    nodes: np.ndarray
    edges: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Extent:
    """How much of a graph is to be kept: as few nodes as have `node_share` of all influence, or
    `n_nodes`; and as few edges as have `edge_share` of all scores, or at most `n_edges`."""

    node_share: float = 0.8
    edge_share: float = 0.98
    n_nodes: int | None = None
    n_edges: int | None = None

    def to_dict(self) -> dict[str, float]:
        """What was decided by."""
        nodes = ("node_share", "n_nodes")[self.n_nodes is not None]
        edges = ("edge_share", "n_edges")[self.n_edges is not None]
        return {name: getattr(self, name) for name in (nodes, edges)}


def prune(
    graph: Adjacency, influences: np.ndarray, extent: Extent, always: np.ndarray, ends: np.ndarray
) -> Pruned:
    """The nodes and edges that matter most.

    Kept are the nodes of the largest influence, and those that are to be there `always`; then, of
    the graph of these alone, the edges of the largest

        score = A[target, source] (influence + start)[target];

    and at last no node without an edge to another, or without one from another if it is none of the
    `ends`, where paths may begin. `always` and `ends` are masks `[n_nodes]`.
    """
    order = np.argsort(-influences, kind="stable")
    n = extent.n_nodes or _enough(influences[order], extent.node_share)
    nodes = always | _among(graph, order[:n][influences[order[:n]] > 0])
    part = graph.part(nodes)
    amounts = part.influences() + part.starts
    scores = part.normalized() * amounts[part.targets][:, None]
    rows, columns = np.nonzero(scores)
    order = np.argsort(-scores[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    edges = np.stack([part.sources[columns], part.targets[rows]], axis=1)
    everything = Pruned(nodes, edges, part.weights[rows, columns])

    def kept(n: int) -> Pruned:
        return _without_loose_ends(graph, everything, n, always, ends)

    if extent.n_edges is None:
        return kept(_enough(scores[rows, columns], extent.edge_share))
    low, high = 0, len(edges) + 1  # more edges of the whole never lead to fewer of what is kept
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(kept(middle).edges) <= extent.n_edges
        low, high = (middle, high) if fits else (low, middle)
    return kept(low)


def _without_loose_ends(
    graph: Adjacency, found: Pruned, n: int, always: np.ndarray, ends: np.ndarray
) -> Pruned:
    """The first `n` edges, without nodes that lack edges, and edges of such."""
    nodes, edges, weights = found.nodes, found.edges[:n], found.weights[:n]
    while True:
        used = _among(graph, edges[:, 0]) & (ends | _among(graph, edges[:, 1]))
        left = nodes & (always | used)
        kept = left[edges].all(axis=1)
        if kept.all() and (left == nodes).all():
            return Pruned(nodes, edges, weights)
        nodes, edges, weights = left, edges[kept], weights[kept]


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained, each in [0, 1].

    `replacement` is the share of the influence that comes from tokens, and not from what is not
    explained. `completeness` is the share of what nodes are due to that is explained, in the mean
    over all nodes by `influence + start`; a node without inputs counts as complete.
    """

    replacement: float
    completeness: float


def score(graph: Adjacency, tokens: np.ndarray, explained: np.ndarray) -> Scores:
    """The scores of a graph. Its `tokens`, and all nodes that are not errors and were looked at,
    are `explained`, both as masks `[n_nodes]`."""
    shares = np.zeros(len(graph.starts))
    for start in range(0, len(graph.targets), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        parts = graph.normalized(some)[:, explained[graph.sources]]
        shares[graph.targets[some]] = parts.sum(axis=1)
    return _scores(graph, graph.influences(), shares, tokens, explained)


def score_pruned(
    graph: Adjacency, kept: Pruned, tokens: np.ndarray, explained: np.ndarray
) -> Scores:
    """The scores of what is kept of a graph: all that came along other edges counts as not
    explained."""
    sources, targets = kept.edges.T
    n = len(graph.starts)
    parts = np.abs(kept.weights, dtype=np.float64) * graph.scales()[targets]
    shares = np.bincount(targets, parts * explained[sources], n)
    influences, current = np.zeros(n), graph.starts
    while current.any():
        current = np.bincount(sources, parts * current[targets], n)
        influences += current
    return _scores(graph, influences, shares, tokens, explained)


def _scores(
    graph: Adjacency,
    influences: np.ndarray,
    shares: np.ndarray,
    tokens: np.ndarray,
    explained: np.ndarray,
) -> Scores:
    amounts, has_inputs = influences + graph.starts, graph.has_inputs()
    of_biases = amounts[explained & ~tokens & ~has_inputs].sum()
    total = graph.starts.sum() - of_biases
    complete = amounts @ np.where(has_inputs, shares, 1.0)
    return Scores(
        float(influences[tokens].sum() / total) if total > 0 else math.nan,
        float(complete / amounts.sum()) if amounts.any() else math.nan,
    )


def cumulative(influences: np.ndarray) -> np.ndarray:
    """The share of all influence that a node has together with those that have more of it."""
    order = np.argsort(-influences, kind="stable")
    found = np.empty(len(influences))
    found[order] = np.cumsum(influences[order]) / (influences.sum() or 1.0)
    return found


def _enough(ranked: np.ndarray, share: float) -> int:
    """How many of some numbers, the largest first, make up that share of their sum."""
    if share >= 1 or not len(ranked):
        return len(ranked)
    sums = np.cumsum(ranked)
    return int(np.searchsorted(sums, share * sums[-1])) + 1


def _among(graph: Adjacency, numbers: np.ndarray) -> np.ndarray:
    """Which nodes are among those numbered, as a mask."""
    found = np.zeros(len(graph.starts), bool)
    found[numbers] = True
    return found
