"""Which of some features fire on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.features.codes import Measure, SparseCodes, association
from mlxterp.sae.visualization import Table, plot_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LISTED = 10  # pairs of a table
LABELS: dict[Measure, str] = {
    "jaccard": "Jaccard index of the tokens",
    "conditional": "share of the row's tokens on which the column fires",
    "phi": "correlation of firing",
    "npmi": "normalised pointwise mutual information",
    "count": "tokens on which both fire",
}


@dataclass(frozen=True)
class CoActive:
    """A feature that fires on the same tokens as another, and on how many of them."""

    feature_id: int
    count: int
    score: float

    def __repr__(self) -> str:
        return f"feature {self.feature_id}: {self.score:.3f}, together on {self.count:,} tokens"


@dataclass(frozen=True, eq=False)
class CoOccurrence:
    """How strongly each two of some `features` go together, `scores` `[n, n]` by a measure.

    `counts` `[n, n]` is on how many of `n_tokens` tokens both fire, on the diagonal on how many
    each does. On the diagonal of `scores` is NaN, since a feature says nothing of itself; with
    `"conditional"` a row says how often the others fire where its feature does.
    """

    features: tuple[int, ...]
    scores: np.ndarray
    counts: np.ndarray
    by: Measure
    n_tokens: int

    @property
    def pairs(self) -> tuple[tuple[int, int, float], ...]:
        """Each two features with the larger of their scores, those that go together most first."""
        both = np.fmax(self.scores, self.scores.T)
        rows, columns = np.triu_indices(len(self.features), 1)
        order = np.argsort(-both[rows, columns], kind="stable")
        return tuple(
            (self.features[i], self.features[j], float(both[i, j]))
            for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
        )

    @property
    def table(self) -> Table:
        """The pairs that go together most."""
        at = {feature: i for i, feature in enumerate(self.features)}
        rows = tuple(
            (f"{a} and {b}", f"{self.counts[at[a], at[b]]:,}", f"{score:.3f}")
            for a, b, score in self.pairs[:LISTED]
        )
        title = f"{len(self.features)} features on {self.n_tokens:,} tokens"
        return Table(title, ("features", "together", self.by), rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; `None` on the diagonal of the scores."""
        scores = [[None if np.isnan(x) else x for x in row] for row in self.scores.tolist()]
        return {
            "features": [*self.features],
            "scores": scores,
            "counts": self.counts.tolist(),
            "by": self.by,
            "n_tokens": self.n_tokens,
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the scores as a heat map."""
        names = [str(feature) for feature in self.features]
        axes = {"row_label": "feature", "column_label": "feature"}
        return plot_matrix(self.scores, names, names, label=LABELS[self.by], ax=ax, **axes)


def co_occurrence(
    codes: SparseCodes, features: Sequence[int], by: Measure = "jaccard"
) -> CoOccurrence:
    """How strongly each two features go together, among the tokens whose codes are kept; the
    measures are those of `FeatureData.co_active`."""
    counts, firing = codes.counts_together(features), codes.firing_counts[[*features]]
    scores = np.stack(
        [association(row, firing, i, codes.n_tokens, by) for i, row in enumerate(counts)]
    )
    np.fill_diagonal(scores, np.nan)
    return CoOccurrence(tuple(features), scores, counts, by, codes.n_tokens)


def most_frequent(codes: SparseCodes, n: int) -> list[int]:
    """The `n` features that fire most often, those that go together side by side: each is followed
    by that of the others which goes with it most, by Jaccard index."""
    most = np.argsort(-codes.firing_counts, kind="stable")[:n]
    left = [int(i) for i in most if codes.firing_counts[i] > 0]
    if not left:
        return []
    scores, at = co_occurrence(codes, left).scores, {i: row for row, i in enumerate(left)}
    found = [left.pop(0)]
    while left:
        nearest = max(left, key=lambda i: scores[at[found[-1]], at[i]])
        left.remove(nearest)
        found.append(nearest)
    return found
