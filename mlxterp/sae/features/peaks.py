"""Where in a text, or in several, the score of a feature is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxterp.sae.features.display import visible


@dataclass(frozen=True)
class FeatureActivation:
    """A feature, and the token where its score in a text, or in several, is largest in size.

    `value` is the feature's value there. `score` is what features are ranked by: the value itself,
    or what it contributes to a logit. `scores` has the feature's score at every token of the text.
    Of several texts `text` is the number of the one meant, and `n_texts` of those with a score.
    """

    feature_id: int
    value: float
    position: int
    token: str
    score: float
    text: int = 0
    n_texts: int = 1
    label: str | None = None
    scores: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {**vars(self), "scores": list(self.scores)}

    def __repr__(self) -> str:
        score = "" if self.score == self.value else f"{self.score:+.3f}, value "
        label = "" if self.label is None else f"  {visible(self.label)}"
        where = f"{self.position} {self.token!r}"
        return f"feature {self.feature_id}: {score}{self.value:.3f} at {where}{label}"


@dataclass(frozen=True)
class Peaks:
    """Where the score of each feature that has one is largest, by size, largest first."""

    ids: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    positions: np.ndarray
    texts: np.ndarray
    n_texts: np.ndarray
    tokens: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls, scores: np.ndarray, values: np.ndarray, tokens: tuple[str, ...], text: int
    ) -> Peaks:
        """The peaks of one text, the `text`-th of several, from `[n_tokens, n_features]`."""
        at, every = np.abs(scores).argmax(axis=0), np.arange(scores.shape[1])
        peaks = scores[at, every]
        ids = np.flatnonzero(peaks)
        ids = ids[np.argsort(-np.abs(peaks[ids]), kind="stable")]
        same, once = np.full(len(ids), text), np.ones(len(ids), int)
        return cls(ids, peaks[ids], values[at[ids], ids], at[ids], same, once, (tokens,))

    @classmethod
    def joined(cls, parts: Sequence[Peaks]) -> Peaks:
        """The peaks of several texts, over all of them."""
        names = ("ids", "scores", "values", "positions", "texts")
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
        order = np.argsort(-np.abs(columns[1]), kind="stable")
        _, first, counts = np.unique(columns[0][order], return_index=True, return_counts=True)
        by_size = np.argsort(first)
        chosen = order[first[by_size]]
        ids, scores, values, positions, texts = (column[chosen] for column in columns)
        tokens = tuple(part.tokens[0] for part in parts)
        return cls(ids, scores, values, positions, texts, counts[by_size], tokens)

    def largest(
        self, n: int, labels: Mapping[int, str], scores: np.ndarray | None = None
    ) -> tuple[FeatureActivation, ...]:
        """The entries of the features with the largest scores."""
        return tuple(self._entry(i, labels, scores) for i in range(min(n, len(self.ids))))

    def most_common(self, n: int, labels: Mapping[int, str]) -> tuple[FeatureActivation, ...]:
        """The entries of the features with a score in most texts."""
        order = np.argsort(-self.n_texts, kind="stable")[:n]
        return tuple(self._entry(i, labels, None) for i in order.tolist())

    def _entry(
        self, i: int, labels: Mapping[int, str], scores: np.ndarray | None
    ) -> FeatureActivation:
        feature_id, position, text = (int(x[i]) for x in (self.ids, self.positions, self.texts))
        tokens = self.tokens[text if len(self.tokens) > 1 else 0]
        # Of several tokens that make up a character the first has it.
        token = next((t for t in tokens[position::-1] if t), "")
        return FeatureActivation(
            feature_id=feature_id,
            value=float(self.values[i]),
            position=position,
            token=token,
            score=float(self.scores[i]),
            text=text,
            n_texts=int(self.n_texts[i]),
            label=labels.get(feature_id),
            scores=() if scores is None else tuple(scores[:, feature_id].tolist()),
        )


def strongest(row: np.ndarray, n: int) -> tuple[tuple[int, float], ...]:
    """The `n` values of a row that are largest in size, none of them 0, with their columns."""
    ids = np.flatnonzero(row)
    ids = ids[np.argsort(-np.abs(row[ids]), kind="stable")[:n]]
    return tuple((int(i), float(row[i])) for i in ids)
