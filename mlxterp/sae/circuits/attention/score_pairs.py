"""One attention score as a sum over pairs of what the query and what the key are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from mlxterp.sae.circuits import storage
from mlxterp.sae.circuits.nodes import FeatureLabels, Names, Node, cut, labelled
from mlxterp.sae.circuits.validation import Validation
from mlxterp.sae.visualization import Table, plot_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Against = int | Literal["mean"] | None

SHOWN = 10
SAVED = 100  # pairs in `to_dict`
AT_ONCE = 2**22  # pairs whose scores are computed together
WIDEST, NARROW = 44, 28  # narrow characters of a source in a table, and in a figure
BIASES = "biases"


@dataclass(frozen=True)
class ScorePair:
    """What a source at the query and one at the key add to a score together; None stands for
    biases. `share` is that of the whole contrast."""

    query: Node | None
    key: Node | None
    score: float
    share: float


class ScoreOrigin(Protocol):
    """What a score was found in: it can intervene there."""

    @property
    def validate(self) -> Callable[..., Validation]: ...


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """Why a head looks from a query at a key, as the exact sum over pairs of sources.

        score    = scale q . k
        contrast = score - baseline = constant + sum over i and j of Q[:, i] . K[:, j]

    `Q [d_head, n + 1]` is what each of the n `queries`, sources of the query, adds to it, times the
    scale; `K [d_head, m + 1]` is what each of the m `keys` adds to the key above what it adds to
    the keys that it is set `against`. The last columns are those of biases. Sources are features,
    errors and embeddings with their positions; their `effect` is the sum over all their pairs.

    A softmax is blind to what the scores of all keys have in common, so that they are set against
    the "mean" of the keys that the query sees: `baseline` is the mean of their scores. Set against
    another key (its position) it is that key's score, and with None it is 0.

    `scores [S]` and `pattern [S]` are those of the query at all keys, nan at hidden ones, and
    `all_keys [d_head, S]` are the keys. `constant` is what the mask adds, such as a score of the
    distance alone.
    """

    layer: int
    head: int
    query: int
    key: int
    against: Against
    queries: tuple[Node, ...]
    keys: tuple[Node, ...]
    Q: np.ndarray
    K: np.ndarray
    all_keys: np.ndarray
    scores: np.ndarray
    pattern: np.ndarray
    levels: tuple[str, ...]
    tokens: tuple[str, ...]
    constant: float = 0.0
    origin: ScoreOrigin | None = None

    @property
    def score(self) -> float:
        """The score before the softmax, with what the mask adds."""
        return float(self.scores[self.key])

    @property
    def attention(self) -> float:
        """The attention from the query to the key, in [0, 1]."""
        return float(self.pattern[self.key])

    @property
    def baseline(self) -> float:
        """What the score is set against."""
        if self.against is None:
            return 0.0
        return float(
            np.nanmean(self.scores) if self.against == "mean" else self.scores[self.against]
        )

    @property
    def contrast(self) -> float:
        """The score above the baseline, which the pairs add up to."""
        return self.score - self.baseline

    @property
    def gap(self) -> float:
        """By how much the pairs and the constant miss the contrast, as they do by rounding."""
        whole = self.Q.sum(axis=1, dtype=np.float64) @ self.K.sum(axis=1, dtype=np.float64)
        return float(whole) + self.constant - self.contrast

    @property
    def query_effects(self) -> np.ndarray:
        """What each source of the query adds to the contrast, with all of the key, `[n + 1]`."""
        return self.Q.T @ self.K.sum(axis=1)

    @property
    def key_effects(self) -> np.ndarray:
        """What each source of the key adds to the contrast, with all of the query, `[m + 1]`."""
        return self.K.T @ self.Q.sum(axis=1)

    @property
    def over_keys(self) -> np.ndarray:
        """What each source of the query adds to its score at each key, `[n + 1, S]`."""
        return self.Q.T @ self.all_keys

    @property
    def parts(self) -> dict[tuple[str, str], float]:
        """The contrast by the kinds of the two sources, `{(query, key): score}`."""
        of_q, of_k = (_by_kind(*side) for side in ((self.Q, self.queries), (self.K, self.keys)))
        return {(a, b): float(q @ k) for a, q in of_q.items() for b, k in of_k.items()}

    @property
    def explained(self) -> float:
        """The share of the contrast that pairs of features add; above 1 where others take away."""
        return _share(self.parts.get(("feature", "feature"), 0.0), self.contrast)

    def pair_scores(self, queries: Sequence[int], keys: Sequence[int]) -> np.ndarray:
        """The scores of pairs of sources by their numbers, `[len(queries), len(keys)]`; -1 is that
        of the biases."""
        return self.Q[:, [*queries]].T @ self.K[:, [*keys]]

    def strongest(self, n: int = SHOWN, features: bool = False) -> list[tuple[int, int]]:
        """The numbers of the `n` pairs of the largest scores of either sign; -1 is that of the
        biases. With `features` only pairs of features count."""
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}.")
        rows, columns = (
            np.array([i for i, x in enumerate(nodes) if not features or x.kind == "feature"]
                     + ([] if features else [-1]), int)
            for nodes in (self.queries, self.keys)
        )  # fmt: skip
        found = _largest(self.Q[:, rows], self.K[:, columns], n)
        return [(int(rows[i]), int(columns[j])) for i, j in found]

    def pairs(self, n: int = SHOWN, features: bool = False) -> tuple[ScorePair, ...]:
        """The `n` pairs of the largest scores of either sign, of features alone if wanted."""
        found = []
        for i, j in self.strongest(n, features):
            score = float(self.Q[:, i] @ self.K[:, j])
            ends = self.queries[i] if i >= 0 else None, self.keys[j] if j >= 0 else None
            found.append(ScorePair(*ends, score, _share(score, self.contrast)))
        return tuple(found)

    def with_labels(self, feature_labels: FeatureLabels) -> QKAttribution:
        """The same with texts at its features: `{layer or site: {feature: text}}`. Raises
        `ValueError` for a layer and a site that it has not."""
        queries, keys = (
            labelled(nodes, self.levels, feature_labels) for nodes in (self.queries, self.keys)
        )
        return replace(self, queries=queries, keys=keys)

    def validate(self, **options: Any) -> Validation:
        """Change the strongest sources in the model and compare what happens to the contrast with
        what the pairs say; see `ScoreChanges.validate` for the options. Raises `ValueError` where
        the model is not known any more."""
        if self.origin is None:
            raise ValueError("validate() needs the model that the score was found in.")
        return self.origin.validate(self, **options)

    def name(self, node: Node | None) -> str:
        """What a source is called: `L8/42 French words at 5 “Paris”`."""
        return BIASES if node is None else self._names().full(node)

    def table(self, n: int = SHOWN, features: bool = False) -> Table:
        """The `n` strongest pairs and the share of the contrast that each adds."""
        names = self._names()
        rows = [
            (_text(names, x.query), _text(names, x.key), f"{x.score:+.4g}", f"{x.share:.1%}")
            for x in self.pairs(n, features)
        ]
        return Table(self._title(), ("query", "key", "score", "share"), tuple(rows))

    def part_table(self) -> Table:
        """The contrast by the kinds of sources: those of the query over those of the key."""
        parts = self.parts
        of_q, of_k = (tuple(dict.fromkeys(side)) for side in zip(*parts, strict=True))
        rows = ((a, *(f"{parts[a, b]:+.4g}" for b in of_k)) for a in of_q)
        return Table(self._title(), ("query", *of_k), tuple(rows))

    def source_table(self, side: Literal["query", "key"] = "key", n: int = SHOWN) -> Table:
        """The `n` sources of the query or of the key that add most, of either sign."""
        if side not in ("query", "key"):
            raise ValueError(f"side must be 'query' or 'key', got {side!r}.")
        nodes, effects = (
            (self.queries, self.query_effects) if side == "query" else (self.keys, self.key_effects)
        )
        names, largest = self._names(), np.argsort(-np.abs(effects), kind="stable")[:n]
        rows = [
            (
                _text(names, nodes[i] if i < len(nodes) else None),
                f"{nodes[i].value:.4g}" if i < len(nodes) and nodes[i].kind == "feature" else "",
                f"{effects[i]:+.4g}",
                f"{_share(float(effects[i]), self.contrast):.1%}",
            )
            for i in largest.tolist()
            if effects[i]
        ]
        return Table(self._title(), (side, "value", "score", "share"), tuple(rows))

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table(2 * SHOWN)._repr_html_()

    def plot(self, n: int = SHOWN, features: bool = False, ax: Axes | None = None) -> Figure:
        """A matplotlib heat map of the sources that the `n` strongest pairs have. Raises
        `ImportError` where matplotlib is missing, and `ValueError` where there are no pairs."""
        pairs, names = self.strongest(n, features), self._names()
        if not pairs:
            raise ValueError("There is no pair to draw: all scores are zero.")
        rows, columns = ([*dict.fromkeys(side)] for side in zip(*pairs, strict=True))
        return plot_matrix(
            self.pair_scores(rows, columns),
            [cut(_name(names, self.keys, j), NARROW) for j in columns],
            [cut(_name(names, self.queries, i), NARROW) for i in rows],
            label=f"score, of {self.contrast:.3g} in all",
            row_label=f"query {self.query} {names.token(self.query)}",
            column_label=f"key {self.key} {names.token(self.key)}",
            ax=ax,
        )

    def to_dict(self, n: int = SAVED) -> dict[str, Any]:
        """All figures, all sources with their effects, and the `n` strongest pairs, by the numbers
        of their sources, as plain values."""
        figures = ("layer", "head", "query", "key", "against", "score", "baseline", "contrast",
                   "attention", "explained", "constant", "gap", "levels", "tokens", "scores",
                   "pattern")  # fmt: skip
        return storage.plain(
            {
                **{name: _known(getattr(self, name)) for name in figures},
                "parts": [{"query": a, "key": b, "score": x} for (a, b), x in self.parts.items()],
                "queries": [asdict(node) for node in self.queries],
                "keys": [asdict(node) for node in self.keys],
                "pairs": [
                    {"query": i, "key": j, "score": float(self.Q[:, i] @ self.K[:, j])}
                    for i, j in self.strongest(n)
                ],
            }
        )

    def _names(self) -> Names:
        return Names(self.levels, self.tokens)

    def _title(self) -> str:
        at = [f"{i} “{cut(self._names().token(i), NARROW)}”" for i in (self.query, self.key)]
        first = (
            f"Head {self.layer}.{self.head} from {at[0]} to {at[1]}: attention "
            f"{self.attention:.1%}, score {self.score:.4g}"
        )
        n = int(np.isfinite(self.scores).sum())
        other = f"the mean of {n} keys" if self.against == "mean" else f"key {self.against}"
        of = "the score"
        if self.against is not None:
            first += f", {self.contrast:.4g} above that of {other}"
            of = "this"
        return f"{first};\n  of {of} features × features add {self.explained:.1%}"


def _by_kind(columns: np.ndarray, nodes: Sequence[Node]) -> dict[str, np.ndarray]:
    """The sums of the columns of each kind of source."""
    kinds = np.array([*(node.kind for node in nodes), BIASES])
    return {str(k): columns[:, kinds == k].sum(axis=1) for k in dict.fromkeys(kinds.tolist())}


def _largest(q: np.ndarray, k: np.ndarray, n: int) -> list[tuple[int, int]]:
    """The `n` pairs of columns whose products are the largest, of either sign.

    No product is larger than that of the lengths, so that most pairs are never looked at.
    """
    of_q, of_k = (np.linalg.norm(x, axis=0) for x in (q, k))
    rows, columns = (np.argsort(-lengths, kind="stable") for lengths in (of_q, of_k))
    best, scores, start, least = np.zeros((0, 2), int), np.zeros(0), 0, 0.0
    while start < len(rows):
        longest = of_q[rows[start]]
        seen = columns[: int((longest * of_k[columns] > least).sum())]
        if not len(seen):
            break
        block = rows[start : start + max(1, AT_ONCE // len(seen))]
        start += len(block)
        found = q[:, block].T @ k[:, seen]
        sizes = np.abs(found).ravel()
        top = np.argpartition(-sizes, min(n, sizes.size) - 1)[:n]
        at = np.stack([block[top // len(seen)], seen[top % len(seen)]], axis=1)
        best, scores = np.concatenate([best, at]), np.concatenate([scores, sizes[top]])
        order = np.lexsort((best[:, 1], best[:, 0], -scores))[:n]
        best, scores = best[order], scores[order]
        least = float(scores[-1]) if len(scores) == n else 0.0
    return [(int(i), int(j)) for (i, j), size in zip(best, scores, strict=True) if size > 0]


def _known(value: Any) -> Any:
    """A value, or None in the place of each that is not a number."""
    if isinstance(value, np.ndarray):
        return [_known(x) for x in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _name(names: Names, nodes: Sequence[Node], i: int) -> str:
    return names.full(nodes[i]) if i >= 0 else BIASES


def _text(names: Names, node: Node | None) -> str:
    return BIASES if node is None else cut(names.full(node), WIDEST)
