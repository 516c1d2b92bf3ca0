"""Tables of tokens that predict where features fire, fitted and scored for many of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.labels.contexts import Split
from mlxterp.sae.labels.scores import Score

ENTRIES_AT_ONCE = 1 << 21
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_PAIRS = 3  # times that a pair must be seen for its share to be believed
ANY, START = -2, -1  # in the place of a token's id


class Block(NamedTuple):
    """The tokens `rows` on which each of some features fires; `owners` says which of them does."""

    features: np.ndarray
    owners: np.ndarray
    rows: np.ndarray


def blocks(data: FeatureData, features: np.ndarray) -> Iterator[Block]:
    """Some features at a time, in random order."""
    features = np.random.default_rng(0).permutation(features)
    ends = np.cumsum(data.codes.firing_counts[features])
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(ENTRIES_AT_ONCE, total, ENTRIES_AT_ONCE))
    for some in np.split(features, np.unique(cuts)):
        if len(some):
            rows = [data.codes.of(i)[0] for i in some.tolist()]
            owners = np.repeat(np.arange(len(some)), [len(found) for found in rows])
            yield Block(some, owners, np.concatenate(rows))


@dataclass(frozen=True, eq=False)
class Rules:
    """For each feature of a block, the classes of tokens on which it is said to fire.

    Of each pair of a feature and a class, `keys = feature * n_classes + class` ascending, `fired`
    is on how many of the class's `n` tokens the feature fired. `chosen` are the pairs above the
    feature's threshold, and `f1` `[n_features]` what these reach on the tokens that were counted.
    """

    keys: np.ndarray
    fired: np.ndarray
    n: np.ndarray
    chosen: np.ndarray
    f1: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Tokens in classes: where a feature fires is predicted from the share of firing in a class.

    `classes` `[n_tokens]` is the class of each kept token; `wider` the class to whose counts it
    belongs as well, or -1. `names` `[n_classes, 2]` are the previous token and the token of a
    class, or ANY, or START. `scored` are the tokens of the documents for scores; the others are
    counted.
    """

    classes: np.ndarray
    wider: np.ndarray
    names: np.ndarray
    scored: np.ndarray

    @classmethod
    def of(cls, data: FeatureData, split: Split, kind: str) -> TokenTable:
        """The table of one kind; see `token_labels`."""
        positions = data.codes.positions
        scored = split.scored[data.documents(positions)]
        now = data.corpus.tokens.reshape(-1)[positions].astype(np.int64)
        anything = np.full(len(now), ANY)
        before = anything if kind == "token" else _before(data, positions)
        token = anything if kind == "previous" else now
        width = int(data.corpus.tokens.max()) + 3  # names are from -2 on
        known, classes = np.unique((before + 2) * width + token + 2, return_inverse=True)
        names = np.stack(np.divmod(known, width), axis=1) - 2
        wider = np.full(len(now), -1)
        if kind == "pair":
            is_rare = np.bincount(classes[~scored], minlength=len(names))[classes] < LEAST_PAIRS
            ids, alone = np.unique(now, return_inverse=True)
            alone = alone + len(names)
            names = np.append(names, np.stack([np.full(len(ids), ANY), ids], axis=1), axis=0)
            wider = np.where(is_rare, -1, alone)
            classes = np.where(is_rare, alone, classes)
        return cls(classes, wider, names, scored)

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    def rules(self, block: Block) -> Rules:
        """The rules of each feature of a block, with the thresholds of the best F1."""
        counted = ~self.scored[block.rows]
        rows, owners = block.rows[counted], block.owners[counted]
        keys, fired, fired_own = self._fired(rows, owners * self.n_classes)
        features, classes = np.divmod(keys, self.n_classes)
        n_all, n_own = self._sizes
        n, silent_own = n_all[classes], n_own[classes] - fired_own
        # A token is left out of the counts that predict it, and one silent token more is counted.
        share_if_fired, share_if_silent = (fired - 1) / n, fired / n
        n_features = len(block.features)
        total = np.bincount(owners, minlength=n_features)
        best, threshold = np.full((2, n_features), -1.0)
        for level in THRESHOLDS:
            hits = _summed(features, np.where(share_if_fired > level, fired_own, 0), n_features)
            alarms = _summed(features, np.where(share_if_silent > level, silent_own, 0), n_features)
            f1 = 2 * hits / np.maximum(1, hits + alarms + total)
            threshold[f1 > best], best = level, np.maximum(best, f1)
        return Rules(keys, fired, n, fired / (n + 1) > threshold[features], best)

    def scores(self, rules: Rules, block: Block, predicting: np.ndarray) -> list[Score | None]:
        """How well the rules of the features `predicting` predict each feature of a block; None for
        one that does not fire on the tokens for scores."""
        n_features = len(block.features)
        scored = self.scored[block.rows]
        rows, owners = block.rows[scored], block.owners[scored]
        keys = rules.keys[rules.chosen]
        features, classes = np.divmod(keys, self.n_classes)
        said = _summed(features, self._scored_sizes[classes], n_features)[predicting].astype(int)
        hit = _among(predicting[owners] * self.n_classes + self.classes[rows], keys)
        hits = np.bincount(owners[hit], minlength=n_features)
        firing = np.bincount(owners, minlength=n_features)
        alarms = said - hits
        rejections = int(self._scored_sizes.sum()) - firing - alarms
        counts = np.stack([hits, firing - hits, alarms, rejections], axis=1).tolist()
        return [Score(*row) if n else None for row, n in zip(counts, firing, strict=True)]

    def _fired(
        self, rows: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of feature and class in which something fired, ascending, how often, and how
        often on tokens that the class predicts."""
        keys, own = np.unique(offsets + self.classes[rows], return_counts=True)
        wide = self.wider[rows] >= 0
        if not wide.any():
            return keys, own, own
        more, wider = np.unique(offsets[wide] + self.wider[rows[wide]], return_counts=True)
        joined = np.union1d(keys, more)
        fired_own, fired_more = np.zeros((2, len(joined)), np.int64)
        fired_own[np.searchsorted(joined, keys)] = own
        fired_more[np.searchsorted(joined, more)] = wider
        return joined, fired_own + fired_more, fired_own

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens are counted in each class, and how many of these it predicts."""
        own = np.bincount(self.classes[~self.scored], minlength=self.n_classes)
        wider = self.wider[~self.scored]
        return own + np.bincount(wider[wider >= 0], minlength=self.n_classes), own

    @cached_property
    def _scored_sizes(self) -> np.ndarray:
        return np.bincount(self.classes[self.scored], minlength=self.n_classes)


def _before(data: FeatureData, positions: np.ndarray) -> np.ndarray:
    """The token before each position, START where its document or context begins there."""
    tokens, owners = data.corpus.tokens.reshape(-1), data.corpus.owners.reshape(-1)
    earlier = np.maximum(0, positions - 1)
    inside = (positions % data.corpus.context > 0) & (owners[earlier] == owners[positions])
    return np.where(inside, tokens[earlier], START).astype(np.int64)


def _summed(features: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(features, weights=weights, minlength=n)


def _among(asked: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which of some keys are among others."""
    if not len(ascending):
        return np.zeros(len(asked), bool)
    at = np.minimum(np.searchsorted(ascending, asked), len(ascending) - 1)
    return ascending[at] == asked
