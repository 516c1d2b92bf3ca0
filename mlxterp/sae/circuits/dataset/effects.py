"""The effects on many features of a later coder, each looked at on some tokens where it fires."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.circuits.dataset.pathway import COTANGENTS_PER_PASS, Attribution, Pathway
from mlxterp.sae.features.data import FeatureData

ENTRIES_PER_PASS = 1 << 20  # of the derivatives that are held at once
LEAST = 3  # tokens on which a target must fire
SAMPLE = 256  # tokens that an estimate looks at
KEPT = 64  # effects on a target at one token, where thousands of targets are looked at


@dataclass(frozen=True, eq=False)
class Effects:
    """Means over the tokens on which each of the `targets` was looked at, `counts` of them.

    The i-th entry is the effect of feature `sources[i]` on target number `rows[i]`: its `means`, on
    which `shares` of the tokens it is not zero, and on which share of these it has the sign of the
    mean. `errors` are the effects of errors on each target, `rises` what the target's value is
    above that without any of the earlier features.
    """

    targets: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    sources: np.ndarray
    means: np.ndarray
    shares: np.ndarray
    consistencies: np.ndarray
    errors: np.ndarray
    rises: np.ndarray

    def strongest(self, n: int) -> np.ndarray:
        """The `n` entries of the largest mean, of either sign."""
        return np.argsort(-np.abs(self.means), kind="stable")[:n]

    def explained(self) -> np.ndarray:
        """The sum of all effects of features on each target."""
        return np.bincount(self.rows, self.means, len(self.targets))


class Look:
    """Looks at features of the later coder of a pathway on tokens where they fire.

    `data` is what was collected of that coder; the same seed draws the same tokens.
    """

    def __init__(self, pathway: Pathway, data: FeatureData, seed: int = 0, verbose: bool = False):
        self.pathway, self.data = pathway, data
        self._seed, self._verbose = seed, verbose

    def firing(self) -> np.ndarray:
        """The features that fire on enough tokens to be looked at."""
        return np.flatnonzero(self.data.codes.firing_counts >= LEAST)

    def tokens(self, feature_id: int, n: int) -> np.ndarray:
        """Up to `n` random positions of the flattened corpus on which a feature fires."""
        rows, _ = self.data.codes.of(feature_id)
        rng = np.random.default_rng([self._seed, feature_id])
        return self.data.codes.positions[rng.permutation(rows)[:n]]

    def effects(
        self,
        targets: Sequence[int] | np.ndarray,
        n: int,
        n_steps: int,
        title: str,
        kept: int | None = None,
    ) -> Effects:
        """The effects on each target on up to `n` tokens; of those on one token the `kept`
        largest, or all."""
        targets = np.asarray(targets, int)
        drawn = [self.tokens(feature_id, n) for feature_id in targets.tolist()]
        counts = np.array([len(tokens) for tokens in drawn], int)
        rows = np.repeat(np.arange(len(targets)), counts)
        positions = np.concatenate(drawn) if drawn else np.zeros(0, int)
        n_features = self.pathway.earlier.n_features
        keys, values = [np.zeros(0, int)], [np.zeros(0, np.float32)]
        errors, rises = np.zeros((2, len(targets)))
        with tqdm(total=len(rows), desc=title, unit="token", disable=not self._verbose) as bar:
            for some, found in self._attributed(targets[rows], positions, n_steps):
                for row, one in zip(rows[some].tolist(), found, strict=True):
                    largest = np.argsort(-np.abs(one.effects))[:kept]
                    keys.append(row * n_features + one.features[largest])
                    values.append(one.effects[largest])
                    errors[row] += one.errors
                    rises[row] += one.rise
                bar.update(len(some))
        return _means(
            targets, counts, np.concatenate(keys), np.concatenate(values), n_features, errors, rises
        )

    def work(self, targets: np.ndarray, n: int) -> int:
        """How many derivatives of a context by one target the effects take, at each step."""
        positions = np.concatenate([np.zeros(0, int), *(self.tokens(i, n) for i in targets)])
        groups = self._groups(positions // self.data.corpus.context)
        return sum(len(own) * int(np.bincount(ranks).max()) for own, _, ranks in groups)

    def seconds(self, targets: np.ndarray, n: int) -> float:
        """How long one of these derivatives takes, from some of them."""
        some = targets[:: max(1, n * len(targets) // SAMPLE)]
        if not (work := self.work(some, n)):
            return 0.0
        times = []
        for _ in range(2):  # the first time more is to be done
            started = time.perf_counter()
            self.effects(some, n, 0, "estimate", KEPT)
            times.append(time.perf_counter() - started)
        return min(times) / work

    def losses(
        self, pairs: Sequence[tuple[int, int]], n: int, factor: float, title: str
    ) -> np.ndarray:
        """What the value of a target loses, in the mean over the tokens on which it was looked at,
        where an earlier feature is multiplied by a factor; for pairs of earlier and later feature.
        """
        drawn = [self.tokens(target, n) for _, target in pairs]
        rows = np.repeat(np.arange(len(pairs)), [len(tokens) for tokens in drawn])
        positions = np.concatenate(drawn)
        found = np.zeros(len(rows))
        earlier, later = np.array(pairs).T[:, rows]
        contexts, columns = np.divmod(positions, self.data.corpus.context)
        size = self._contexts_per_pass(1)
        with tqdm(total=len(rows), desc=title, unit="token", disable=not self._verbose) as bar:
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                clean = self.pathway.clean(self.data.corpus.tokens[contexts[part]])
                found[part] = self.pathway.losses(
                    clean, columns[part], later[part], earlier[part], factor
                )
                mx.clear_cache()
                bar.update(len(found[part]))
        return np.bincount(rows, found, len(pairs)) / np.bincount(rows, minlength=len(pairs))

    def _attributed(
        self, features: np.ndarray, positions: np.ndarray, n_steps: int
    ) -> Iterator[tuple[np.ndarray, list[Attribution]]]:
        """The numbers of some targets at a time, and what they are due to."""
        contexts, columns = np.divmod(positions, self.data.corpus.context)
        for own, some, ranks in self._groups(contexts):
            clean = self.pathway.clean(self.data.corpus.tokens[own])
            at = ranks, columns[some], features[some]
            yield some, self.pathway.attribute(clean, *at, n_steps)
            mx.clear_cache()  # sizes differ from context to context, so that buffers would pile up

    def _groups(self, contexts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Some contexts at a time, the numbers of the targets that are in them, and in which of
        them each is."""
        numbers, places, counts = np.unique(contexts, return_inverse=True, return_counts=True)
        # Contexts with equally many targets together: then few derivatives are taken in vain.
        order = np.argsort(-counts, kind="stable")
        ranks = np.argsort(order)[places]
        size = self._contexts_per_pass(COTANGENTS_PER_PASS)
        for start in range(0, len(numbers), size):
            some = np.flatnonzero((ranks >= start) & (ranks < start + size))
            yield numbers[order[start : start + size]], some, ranks[some] - start

    def _contexts_per_pass(self, n: int) -> int:
        width = max(self.pathway.earlier.d_out, self.pathway.later.d_in)
        return max(1, ENTRIES_PER_PASS // (n * width * self.data.corpus.context))


def _means(
    targets: np.ndarray, counts: np.ndarray, keys: np.ndarray, values: np.ndarray,
    n_features: int, errors: np.ndarray, rises: np.ndarray,
) -> Effects:  # fmt: skip
    values = values.astype(np.float64)
    # A feature that is nowhere before the target has no effect on it, but a zero.
    keys, values = keys[values != 0], values[values != 0]
    pairs, entries = np.unique(keys, return_inverse=True)
    rows, sources = np.divmod(pairs, n_features)
    means = np.bincount(entries, values, len(pairs)) / counts[rows]
    seen = np.bincount(entries, minlength=len(pairs))
    same = np.bincount(entries, np.sign(values) == np.sign(means[entries]), len(pairs))
    n = np.maximum(1, counts)
    return Effects(
        targets=targets, counts=counts, rows=rows, sources=sources, means=means,
        shares=seen / n[rows], consistencies=same / np.maximum(1, seen),
        errors=errors / n, rises=rises / n,
    )  # fmt: skip
