"""Which features of one coder are found in another, one to one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.similarity.directions import Directions, Side, needed, pair_of_directions
from mlxterp.sae.similarity.nearest import scan
from mlxterp.sae.visualization import COLOURS, Table, dress, new_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Method = Literal["exact", "candidates"]

THRESHOLD = 0.7
EXACT_ENTRIES = 1 << 24
CANDIDATES = 32
BINS = 50


@dataclass(frozen=True)
class Scores:
    """How much of two coders is alike.

    `mmcs` is the mean over the first coder's features of the largest cosine with any feature of the
    second, `mmcs_back` the same the other way round, `mcc` the mean cosine of the pairs, and
    `shared` the share of the pairs that are the same feature.
    """

    mmcs: float
    mmcs_back: float
    mcc: float
    shared: float


@dataclass(frozen=True, eq=False)
class Matching:
    """The features of a coder, and one feature of another for each of them.

    `partners` `[n_features]` has the other coder's feature, -1 where none is left for it, and
    `cosines` that of the pair by the matrix `by`, NaN where there is none; `other_cosines` are the
    pairs' by the other matrix, `None` where its widths differ between the coders. `best` and
    `best_back` hold for every feature of either coder the largest cosine with any of the other.
    `shared` says which are the same feature in both, see `match`.

    `scores` are the results and `chance` those of as many random directions, whose pairs have
    `chance_cosines`. `method` is `"exact"`, or `"candidates"` where pairs were sought among the
    nearest features only. With `absolute` all scores are of the sizes of cosines.
    """

    partners: np.ndarray
    cosines: np.ndarray
    other_cosines: np.ndarray | None
    best: np.ndarray
    best_back: np.ndarray
    shared: np.ndarray
    scores: Scores
    chance: Scores
    chance_cosines: np.ndarray
    by: Side
    absolute: bool
    threshold: float
    method: Method

    @property
    def pairs(self) -> np.ndarray:
        """The features of each pair `[n_pairs, 2]`, those with the largest cosine first."""
        own = np.flatnonzero(self.partners >= 0)
        order = np.argsort(-self._sizes(self.cosines[own]), kind="stable")
        return np.stack([own, self.partners[own]], axis=1)[order]

    @property
    def only_here(self) -> np.ndarray:
        """The features that are not shared."""
        return np.flatnonzero(~self.shared)

    def partner(self, feature_id: int) -> int | None:
        """The other coder's feature for one, or None."""
        if not 0 <= feature_id < len(self.partners):
            raise ValueError(f"feature_id must be below {len(self.partners)}, got {feature_id}.")
        found = int(self.partners[feature_id])
        return None if found < 0 else found

    def _sizes(self, cosines: np.ndarray) -> np.ndarray:
        return np.abs(cosines) if self.absolute else cosines

    @property
    def table(self) -> Table:
        """The scores beside those of chance."""
        cosine = f"|{self.by} cosine|" if self.absolute else f"{self.by} cosine"
        both = "the cosine" if self.other_cosines is None else "both cosines"
        names = (
            "mean largest, there (MMCS)", "mean largest, back", "mean of the pairs (MCC)",
            f"shared: {both} >= {self.threshold:g}",
        )  # fmt: skip
        rows = tuple(
            (name, form.format(found), form.format(chance))
            for name, form, found, chance in zip(
                names, ["{:.3f}"] * 3 + ["{:.1%}"], vars(self.scores).values(),
                vars(self.chance).values(), strict=True,
            )
        )  # fmt: skip
        how = "exactly" if self.method == "exact" else "among the nearest candidates"
        title = (
            f"{len(self.best):,} features, {len(self.best_back):,} of the other coder, "
            f"{(self.partners >= 0).sum():,} pairs, matched {how}"
        )
        return Table(title, (cosine, "found", "chance"), rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The scores, and the pairs with their cosines, as plain values."""
        pairs = self.pairs
        return {
            "scores": asdict(self.scores),
            "chance": asdict(self.chance),
            "pairs": pairs.tolist(),
            "cosines": self.cosines[pairs[:, 0]].tolist(),
            "shared": np.flatnonzero(self.shared).tolist(),
            "by": self.by,
            "absolute": self.absolute,
            "threshold": self.threshold,
            "method": self.method,
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib histogram of the cosines of the pairs, beside those of random directions."""
        ax = new_axis() if ax is None else ax
        edges = np.linspace(0 if self.absolute else -1, 1, BINS + 1).tolist()
        for cosines, label, colour in (
            (self.cosines, "pairs", COLOURS[0]),
            (self.chance_cosines, "random directions", COLOURS[-1]),
        ):
            found = self._sizes(cosines[np.isfinite(cosines)])
            ax.hist(found, bins=edges, color=colour, alpha=0.7, label=label)
        ax.axvline(self.threshold, color="0.3", linewidth=0.8, linestyle="--")
        ax.legend()
        return dress(ax, f"{'size of the ' * self.absolute}{self.by} cosine of a pair", "features")


def match(
    coder: SparseCoder,
    other: SparseCoder,
    *,
    by: Side = "decoder",
    site: str | None = None,
    other_site: str | None = None,
    absolute: bool | None = None,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> Matching:
    """A partner in another coder for every feature, one to one, so that cosines sum to the most.

    It is found exactly by the Hungarian algorithm for up to 4096 features and, for more, among the
    32 nearest features of each; those for which none is left are matched among themselves. Sites
    are chosen as in `similarity.nearest`. Two features are shared where the cosine of their pair is
    at least `threshold` in the decoder and in the encoder.

    The sign of a cosine counts, as features whose codes are not negative differ from their
    opposites; `absolute=True`, the default for coders whose codes have both signs, compares the
    sizes of cosines, as the mean correlation coefficient (MCC) of arXiv 2505.20254 does; then
    shared features also have the same sign in both matrices. `seed` makes the random directions,
    as many and as wide, of which `chance` says how alike they are.

    Raises `ValueError` as `nearest` does, and `ImportError` where scipy is missing.

    Reference: Sharkey et al. 2022 for the mean largest cosine (MMCS); Paulo and Belrose 2025, arXiv
    2501.16615, for shared features.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}.")
    if absolute is None:
        absolute = any(one.activation_name == "abs_topk" for one in (coder, other))
    pair = pair_of_directions(coder, other, by, site, other_site)
    second = _other_side(coder, other, by, site, other_site)
    found = _match(pair, second, absolute, threshold)
    chance = _match(
        (pair[0].random(seed), pair[1].random(seed + 1)),
        second and (second[0].random(seed + 2), second[1].random(seed + 3)),
        absolute,
        threshold,
    )
    return Matching(
        **found._asdict(), chance=chance.scores, chance_cosines=chance.cosines, by=by,
        absolute=absolute, threshold=threshold,
    )  # fmt: skip


Pair = tuple[Directions, Directions]


class _Found(NamedTuple):
    partners: np.ndarray
    cosines: np.ndarray
    other_cosines: np.ndarray | None
    best: np.ndarray
    best_back: np.ndarray
    shared: np.ndarray
    scores: Scores
    method: Method


def _other_side(
    coder: SparseCoder, other: SparseCoder, by: Side, site: str | None, other_site: str | None
) -> Pair | None:
    """The directions of the other matrix, at the same sites where coders write what they read, and
    else at all sites; `None` where they cannot be compared."""
    side: Side = "encoder" if by == "decoder" else "decoder"
    same = [one.reads == one.writes for one in (coder, other)]
    if same[0] != same[1]:
        return None
    try:
        return pair_of_directions(
            coder, other, side, *((site, other_site) if same[0] else (None, None))
        )
    except ValueError:
        return None


def _match(pair: Pair, second: Pair | None, absolute: bool, threshold: float) -> _Found:
    partners, best, best_back, method = _assign(*pair, absolute)
    own = np.flatnonzero(partners >= 0)
    cosines = _of_pairs(pair, own, partners)
    others = None if second is None else _of_pairs(second, own, partners)
    sign = np.sign(cosines) if absolute else 1.0
    shared = sign * cosines >= threshold
    if others is not None:
        shared &= sign * others >= threshold
    sizes = np.abs(cosines[own]) if absolute else cosines[own]
    scores = (array.mean(dtype=np.float64) for array in (best, best_back, sizes, shared[own]))
    return _Found(
        partners, cosines, others, best, best_back, shared, Scores(*map(float, scores)), method
    )


def _of_pairs(pair: Pair, own: np.ndarray, partners: np.ndarray) -> np.ndarray:
    found = np.full(len(partners), np.nan, np.float32)
    found[own] = pair[0].cosines_of_pairs(own, pair[1], partners[own])
    return found


def _assign(
    own: Directions, theirs: Directions, absolute: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Method]:
    """The partner of each feature, and the largest scores of either side."""
    if own.n_features * theirs.n_features > EXACT_ENTRIES:
        return _assign_candidates(own, theirs, absolute)
    scores = np.concatenate([np.array(block) for _, block in own.cosines(theirs)])
    scores = np.abs(scores) if absolute else scores
    rows, columns = needed("scipy.optimize").linear_sum_assignment(scores, maximize=True)
    partners = np.full(own.n_features, -1)
    partners[rows] = columns
    return partners, scores.max(axis=1), scores.max(axis=0), "exact"


def _assign_candidates(
    own: Directions, theirs: Directions, absolute: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Method]:
    there, back = scan(own, theirs, CANDIDATES, absolute)
    n, k = there.ids.shape
    rows = np.concatenate([np.repeat(np.arange(n), k), back.ids[:, 0]])
    columns = np.concatenate([there.ids.reshape(-1), np.arange(theirs.n_features)])
    cosines = np.concatenate([there.cosines.reshape(-1), back.cosines[:, 0]])
    scores = np.abs(cosines) if absolute else cosines
    partners = _sparse_assignment(rows, columns, scores, n, theirs.n_features)
    left = np.flatnonzero(partners < 0), np.setdiff1d(np.arange(theirs.n_features), partners)
    if len(left[0]) and len(left[1]):
        rest = _assign(own.take(left[0]), theirs.take(left[1]), absolute)[0]
        partners[left[0]] = np.where(rest < 0, -1, left[1][rest])
    best, best_back = there.cosines[:, 0], back.cosines[:, 0]
    if absolute:
        best, best_back = np.abs(best), np.abs(best_back)
    return partners, best, best_back, "candidates"


def _sparse_assignment(
    rows: np.ndarray, columns: np.ndarray, scores: np.ndarray, n_rows: int, n_columns: int
) -> np.ndarray:
    """The best partner of each row among the pairs given, -1 where it gets none."""
    sparse, graph = needed("scipy.sparse"), needed("scipy.sparse.csgraph")
    _, first = np.unique(rows * n_columns + columns, return_index=True)
    # Every row may also stay alone, which costs more than any pair does: all costs are positive.
    alone = np.arange(n_rows)
    costs = np.concatenate([2.0 - scores[first], np.full(n_rows, 3.5)])
    at = (
        np.concatenate([rows[first], alone]),
        np.concatenate([columns[first], n_columns + alone]),
    )
    matrix = sparse.csr_matrix((costs, at), shape=(n_rows, n_columns + n_rows))
    matched, partners = graph.min_weight_full_bipartite_matching(matrix)
    found = np.full(n_rows, -1)
    found[matched] = np.where(partners < n_columns, partners, -1)
    return found
