"""Which features of coders trained from several seeds are found again in the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.similarity.directions import Side
from mlxterp.sae.similarity.matching import THRESHOLD, Matching, match
from mlxterp.sae.visualization import Table, plot_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Stability:
    """How much of several coders, such as those of several seeds, is the same.

    `found` has for each coder an array `[n_features]`: in how many of the others each feature is
    found, as the same feature by `match`. `shared`, `mcc` and `mmcs` `[n, n]` are the scores of all
    pairs of coders, 1 on the diagonal; `mmcs[i, j]` is from coder i to j. `chance_*` are those of
    as many random directions. `matchings` holds `(i, j): Matching` for i < j.
    """

    found: tuple[np.ndarray, ...]
    shared: np.ndarray
    mcc: np.ndarray
    mmcs: np.ndarray
    chance_shared: np.ndarray
    chance_mcc: np.ndarray
    chance_mmcs: np.ndarray
    matchings: dict[tuple[int, int], Matching]

    def stable(self, coder: int = 0, at_least: int | None = None) -> np.ndarray:
        """The features of a coder that are found in so many of the others, by default in all."""
        least = len(self.found) - 1 if at_least is None else at_least
        return np.flatnonzero(self.found[coder] >= least)

    @property
    def table(self) -> Table:
        """Scores of each coder with the others, and how many of its features are found again."""
        n = len(self.found)
        rows = []
        for i, found in enumerate(self.found):
            scores = (f"{_others(of, i):.3f}" for of in (self.mmcs, self.mcc))
            shares = (f"{share:.1%}" for share in ((found == n - 1).mean(), (found == 0).mean()))
            rows.append((f"coder {i}", f"{len(found):,}", *scores, *shares))
        chance = (f"{_others(of):.3f}" for of in (self.chance_mmcs, self.chance_mcc))
        rows.append(("chance", "", *chance, f"{self._chance_in_all:.1%}", ""))
        header = ("", "features", "MMCS", "MCC", "in all", "in none")
        return Table(f"{n} coders, each with the others", header, (*rows,))

    @property
    def _chance_in_all(self) -> float:
        off = ~np.eye(len(self.found), dtype=bool)
        return float(self.chance_shared[off].mean() ** (len(self.found) - 1))

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The scores of all pairs and the counts of all features, as plain values."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else [f.tolist() for f in value]
            for name, value in vars(self).items()
            if name != "matchings"
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the shares of features that two coders have in common."""
        names = [f"coder {i}" for i in range(len(self.found))]
        return plot_matrix(self.shared, names, names, label="share of shared features", ax=ax)


def stability(
    coders: Sequence[SparseCoder],
    *,
    by: Side = "decoder",
    site: str | None = None,
    absolute: bool | None = None,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> Stability:
    """In how many of the other coders each feature is found again; all pairs go through `match`.

    Raises `ValueError` for fewer than two coders.

    Reference: Paulo and Belrose 2025, arXiv 2501.16615.
    """
    if len(coders) < 2:
        raise ValueError(f"stability needs two coders or more, got {len(coders)}.")
    n = len(coders)
    found = tuple(np.zeros(coder.n_features, np.int64) for coder in coders)
    matrices = {name: np.eye(n) for name in ("shared", "mcc", "mmcs")}
    matrices |= {f"chance_{name}": np.eye(n) for name in ("shared", "mcc", "mmcs")}
    matchings = {}
    for i, j in combinations(range(n), 2):
        one = match(
            coders[i], coders[j], by=by, site=site, absolute=absolute, threshold=threshold,
            seed=seed,
        )  # fmt: skip
        matchings[i, j] = one
        found[i][one.shared] += 1
        found[j][one.partners[one.shared]] += 1
        for prefix, scores in (("", one.scores), ("chance_", one.chance)):
            for name in ("shared", "mcc"):
                matrices[prefix + name][[i, j], [j, i]] = getattr(scores, name)
            matrices[prefix + "mmcs"][[i, j], [j, i]] = scores.mmcs, scores.mmcs_back
    return Stability(found, **matrices, matchings=matchings)


def _others(matrix: np.ndarray, i: int | None = None) -> float:
    """The mean of a row, or of all, without the diagonal."""
    off = ~np.eye(len(matrix), dtype=bool)
    return float(matrix[off].mean() if i is None else matrix[i][off[i]].mean())
