"""Which documents labels are made from and which they are scored on, and the contexts of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlxterp.sae.corpus import Corpus
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.examples import Example
from mlxterp.sae.labels.prompts import AFTER, BEFORE, marked, unmarked


@dataclass(frozen=True, eq=False)
class Split:
    """Which documents labels are scored on, `[n_documents]`; labels are made from the others.

    Documents go by a hash of their tokens, so that copies of a document stay together, until the
    one part has about half of the tokens. `digest` tells a split from others.
    """

    scored: np.ndarray
    digest: str

    @classmethod
    def of(cls, corpus: Corpus) -> Split:
        """The split of a corpus; raises `ValueError` for fewer than two different documents."""
        owners = corpus.owners.reshape(-1)
        numbers = np.unique(owners[owners >= 0])
        hashes = np.array(
            [hashlib.sha256(body.astype("<i4").tobytes()).hexdigest() for body in corpus.bodies()]
        )
        different, groups = np.unique(hashes, return_inverse=True)
        if len(different) < 2:
            raise ValueError(
                "Labels need texts in at least 2 different documents, to be made from some and "
                f"scored on others; there is {len(different)}."
            )
        sizes = np.bincount(groups, weights=corpus.document_sizes[numbers])
        ends = np.cumsum(sizes)[:-1]
        cut = 1 + int(np.argmin(np.abs(ends - sizes.sum() / 2)))
        scored = np.zeros(numbers[-1] + 1, bool)
        scored[numbers] = groups < cut
        digest = hashlib.sha256("\n".join([*different[:cut], "", *different[cut:]]).encode())
        return cls(scored, digest.hexdigest()[:16])


@dataclass(frozen=True)
class Item:
    """A context as a judge sees it, and the right answer."""

    text: str
    is_right: bool


@dataclass(frozen=True, eq=False)
class Contexts:
    """Chooses contexts of a feature, among the documents for labels and those for scores."""

    data: FeatureData
    split: Split

    def for_label(self, feature_id: int, n: int) -> tuple[Example, ...]:
        """Contexts to make a label from: the strongest, and as many that are spread over evenly
        spaced intervals between the feature's maximum and 0."""
        positions, values = self._firing(feature_id, scored=False)
        top = min(len(positions), -(-n // 2))
        rest, n_rest = np.arange(top, len(positions)), n - top
        rng = np.random.default_rng([0, feature_id])
        intervals = np.ceil(n_rest * values[rest] / values[0]) if len(rest) else rest
        drawn = rng.permutation(rest)
        # The first of every interval, then whatever is left.
        _, first = np.unique(intervals[drawn - top], return_index=True)
        order = np.append(drawn[first], np.delete(drawn, first))
        return self._read(feature_id, positions[np.append(np.arange(top), order[:n_rest])])

    def for_detection(self, feature_id: int, n: int) -> tuple[Item, ...]:
        """Contexts without marks, in random order: half of them where the feature fires, from
        strong to weak, and as many where it does not. Of these every second one, where there are
        so many, has a token in the middle on which the feature fires elsewhere."""
        firing, _ = self._firing(feature_id, scored=True)
        firing = firing[_spread(len(firing), n // 2)]
        silent = self._silent(feature_id, len(firing), self._tokens[firing])
        firing = firing[_spread(len(firing), len(silent))]
        items = [
            Item(unmarked(example), is_right)
            for positions, is_right in ((firing, True), (silent, False))
            for example in self._read(feature_id, positions)
        ]
        return self._mixed(feature_id, items)

    def for_fuzzing(self, feature_id: int, n: int) -> tuple[Item, ...]:
        """Contexts where the feature fires, in random order: in every second one the tokens on
        which it does are marked, in the others as many on which it does not."""
        firing, _ = self._firing(feature_id, scored=True)
        rng = np.random.default_rng([1, feature_id])
        right, wrong = [], []
        for example in self._read(feature_id, firing[_spread(len(firing), n)]):
            active = [i for i, value in enumerate(example.values) if value]
            silent = [
                i for i, v in enumerate(example.values) if not v and example.tokens[i].strip()
            ]
            if silent and len(wrong) < len(right):
                chosen = rng.choice(silent, min(len(active), len(silent)), replace=False)
                wrong.append(Item(marked(example, chosen.tolist()), False))
            elif len(right) <= len(wrong):
                right.append(Item(marked(example, active), True))
        return self._mixed(feature_id, [*right[: len(wrong)], *wrong])

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self.data.corpus.tokens.reshape(-1)

    @cached_property
    def _scored_positions(self) -> np.ndarray:
        positions = self.data.codes.positions
        return positions[self.split.scored[self.data.documents(positions)]]

    def _firing(self, feature_id: int, scored: bool) -> tuple[np.ndarray, np.ndarray]:
        """Where a feature fires, strongest first and one of each context, and the values' sizes."""
        data = self.data
        rows, values = data.codes.of(feature_id)
        top = data.top_positions[feature_id] >= 0
        positions = np.append(data.codes.positions[rows], data.top_positions[feature_id][top])
        values = np.abs(np.append(values, data.top_values[feature_id][top]))
        wanted = self.split.scored[data.documents(positions)] == scored
        positions, values = positions[wanted], values[wanted]
        order = np.argsort(-values, kind="stable")
        _, first = np.unique(positions[order] // data.corpus.context, return_index=True)
        order = order[np.sort(first)]
        return positions[order], values[order]

    def _silent(self, feature_id: int, n: int, tokens: np.ndarray) -> np.ndarray:
        """Positions without a value around them, one of each context; half of them at `tokens`."""
        candidates = self._scored_positions
        firing = self.data.codes.positions[self.data.codes.of(feature_id)[0]]
        ends = np.searchsorted(firing, [candidates - BEFORE, candidates + AFTER + 1])
        candidates = candidates[ends[0] == ends[1]]
        candidates = np.random.default_rng([2, feature_id]).permutation(candidates)
        hard = np.isin(self._tokens[candidates], tokens)
        chosen: dict[int, int] = {}
        for some, limit in ((candidates[hard], n // 2), (candidates[~hard], n), (candidates, n)):
            contexts, first = np.unique(some // self.data.corpus.context, return_index=True)
            for i in np.argsort(first):
                if len(chosen) >= limit:
                    break
                chosen.setdefault(int(contexts[i]), int(some[first[i]]))
        return np.array(list(chosen.values()), np.int64)

    def _read(self, feature_id: int, positions: np.ndarray) -> tuple[Example, ...]:
        return tuple(
            self.data.example(feature_id, position, BEFORE, AFTER)
            for position in positions.tolist()
        )

    def _mixed(self, feature_id: int, items: list[Item]) -> tuple[Item, ...]:
        order = np.random.default_rng([3, feature_id]).permutation(len(items))
        return tuple(items[i] for i in order)


def _spread(length: int, n: int) -> np.ndarray:
    """Up to `n` indices, evenly spread."""
    return np.unique(np.linspace(0, length - 1, min(n, length)).round().astype(int))
