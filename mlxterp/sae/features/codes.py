"""The codes of many tokens, of which only what is not zero is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Measure = Literal["jaccard", "phi", "npmi", "conditional", "count"]


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The features that are active on each of some tokens, with their values.

    The tokens are those that count in the contexts numbered `contexts` `[n_contexts]`; they are at
    the flattened `positions` `[n_tokens]` of the corpus, in ascending order. Token `i` has the
    entries `starts[i]` to `starts[i + 1]` of `features` and `values`, the latter float16 in units
    of `scale`.
    """

    contexts: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    features: np.ndarray
    values: np.ndarray
    scale: float
    n_features: int

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.positions)

    @cached_property
    def firing_counts(self) -> np.ndarray:
        """On how many of these tokens each feature fires, `[n_features]`."""
        return np.diff(self._by_feature[0])

    @cached_property
    def _by_feature(self) -> tuple[np.ndarray, np.ndarray]:
        """The entries in order of features and tokens, and where each feature's begin."""
        counts = np.bincount(self.features, minlength=self.n_features)
        return np.append(0, np.cumsum(counts)), np.argsort(self.features, kind="stable")

    @cached_property
    def _rows(self) -> np.ndarray:
        """The token of each entry."""
        return np.repeat(np.arange(self.n_tokens, dtype=np.int32), np.diff(self.starts))

    def of(self, feature_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens on which a feature fires, ascending, and its values there, float32."""
        ends, order = self._by_feature
        entries = order[ends[feature_id] : ends[feature_id + 1]]
        return self._rows[entries], np.float32(self.scale) * self.values[entries]

    def in_context(self, feature_id: int, context: int, length: int) -> np.ndarray | None:
        """A feature's values `[length]` on a context of that length, 0 where a token does not
        count; None where the context is not among these."""
        at = np.searchsorted(self.contexts, context)
        if at == len(self.contexts) or self.contexts[at] != context:
            return None
        rows, values = self.of(feature_id)
        first, last = np.searchsorted(
            self.positions[rows], [context * length, (context + 1) * length]
        )
        found = np.zeros(length, np.float32)
        found[self.positions[rows[first:last]] - context * length] = values[first:last]
        return found

    def together(self, feature_id: int) -> np.ndarray:
        """On how many tokens each feature fires together with one of them, `[n_features]`; of that
        feature itself, on how many it fires at all."""
        rows, _ = self.of(feature_id)
        starts, sizes = self.starts[rows], np.diff(self.starts)[rows]
        # The entries of all these tokens, one run of successive numbers after another.
        skipped = np.repeat(starts - np.append(0, np.cumsum(sizes)[:-1]), sizes)
        entries = np.arange(sizes.sum()) + skipped
        return np.bincount(self.features[entries], minlength=self.n_features)

    def counts_together(self, features: Sequence[int]) -> np.ndarray:
        """On how many tokens each two of some features fire together, `[n, n]`."""
        return np.stack([self.together(i)[list(features)] for i in features])


def association(
    together: np.ndarray, counts: np.ndarray, feature_id: int, n_tokens: int, by: Measure
) -> np.ndarray:
    """How strongly a feature goes with each of the others, `[n_features]`; see
    `FeatureData.co_active`."""
    n = max(1, n_tokens)
    both, one, other = together / n, counts[feature_id] / n, counts / n
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = {
            "count": together.astype(float),
            "conditional": both / one,
            "jaccard": both / (one + other - both),
            "phi": (both - one * other) / np.sqrt(one * (1 - one) * other * (1 - other)),
            "npmi": np.where(both < 1, np.log(both / (one * other)) / -np.log(both), 1.0),
        }
    if by not in scores:
        raise ValueError(f"by must be one of {sorted(scores)}, got {by!r}.")
    return np.nan_to_num(scores[by], nan=0.0, neginf=-1.0, posinf=0.0)
