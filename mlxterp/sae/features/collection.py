"""One pass over a corpus that learns about all features of a coder at once."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm.auto import tqdm

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.features.codes import SparseCodes
from mlxterp.sae.features.data import MARKER, N_BINS, OCTAVES_ABOVE, FeatureData, Settings
from mlxterp.sae.files import read_json
from mlxterp.sae.harvest import harvest
from mlxterp.sae.source import ActivationSource

BATCH_ENTRIES = 1 << 24  # of a dense code
WAITING = 1 << 20  # candidates for top examples that wait to be compared
LARGEST = float(np.finfo(np.float16).max)
SECONDS_BETWEEN_SAVES = 60.0


def collect(
    coder: SparseCoder,
    dataset: ActivationDataset,
    *,
    n_examples: int = 20,
    max_tokens: int | None = None,
    max_kept: int = 1 << 25,
    path: str | Path | None = None,
    seed: int = 0,
    known: FeatureData | None = None,
    verbose: bool = False,
) -> FeatureData:
    """What all features of a coder respond to in a dataset, from one pass of its texts.

    Firing counts, sums, maxima and histograms are of all tokens, and so are the `n_examples`
    strongest examples of each feature, at most one of each context. Codes are kept, for examples of
    weaker activations and for co-activations: those of all contexts, or if that would be more than
    `max_kept` values, of a random part of the contexts, one at least. `max_tokens` bounds the pass
    to contexts evenly spread over the dataset.

    With a `path` the result is saved there and the pass can be interrupted: called again with the
    same coder, model, dataset and settings it goes on where it was, or returns what is there;
    without one it returns `known`, if that is of the same. `verbose` shows a progress bar. Raises
    `ValueError` for a dataset without texts.
    """
    if dataset.corpus is None or dataset.source is None:
        raise ValueError(
            "Collecting needs texts and a language model: this dataset holds activations alone."
        )
    for name, value in (("n_examples", n_examples), ("max_kept", max_kept)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")
    corpus = _part(dataset.corpus, max_tokens)
    source, part = dataset.source, None
    identity = {
        "coder": fingerprint(coder), "corpus": corpus.fingerprint, "model": source.fingerprint,
    }  # fmt: skip
    settings = Settings(n_examples, max_kept, seed, identity)
    if known is not None and known.settings == settings and path is None:
        return known
    if path is not None:
        path = Path(path)
        part = path.with_name(path.name + ".part")
        for place in (path, part):
            found = _saved(place, coder, source, settings)
            if found is not None and found.is_complete:
                return found
            if found is not None:
                return _finish(_Pass.resumed(found, source), part, path, verbose)
    return _finish(_Pass(coder, source, corpus, settings), part, path, verbose)


def _part(corpus: Corpus, max_tokens: int | None) -> Corpus:
    if max_tokens is None:
        return corpus
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be >= 1, got {max_tokens}.")
    wanted = -(-max_tokens // corpus.context)
    if wanted >= len(corpus):
        return corpus
    contexts = np.linspace(0, len(corpus) - 1, wanted).astype(int)
    return replace(corpus, tokens=corpus.tokens[contexts], owners=corpus.owners[contexts])


def fingerprint(coder: SparseCoder) -> str:
    """16 hexadecimal digits that tell a coder by its arrays."""
    digest = hashlib.sha256(b"" if coder.token_norm == "none" else coder.token_norm.encode())
    arrays: Any = tree_flatten(coder.parameters())
    for name, array in sorted(arrays):
        bits = np.array(array.view(mx.uint8) if array.ndim else array.astype(mx.float32))
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(bits.tobytes())
    return digest.hexdigest()[:16]


def _saved(
    path: Path, coder: SparseCoder, source: ActivationSource, settings: Settings
) -> FeatureData | None:
    """What a pass with these settings has saved, whole or in part."""
    file = path / MARKER
    if not file.is_file() or read_json(file, ("settings",))["settings"] != asdict(settings):
        return None
    return FeatureData.load(path, coder, source)


def _finish(running: _Pass, part: Path | None, path: Path | None, verbose: bool) -> FeatureData:
    """Run a pass to its end, saving what it has now and then, and save the result."""
    saved = time.monotonic()
    with tqdm(
        total=len(running.corpus), initial=running.done, desc="collecting", unit="context",
        disable=not verbose,
    ) as bar:  # fmt: skip
        for n_contexts in running:
            bar.update(n_contexts)
            if part is not None and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                running.result().save(part)
                saved = time.monotonic()
    result = running.result()
    if path is not None:
        result.save(path)
    if part is not None:
        shutil.rmtree(part, ignore_errors=True)
    return result


class _Pass:
    """The state of a pass; iterating over it goes on with it, a forward pass at a time."""

    def __init__(
        self, coder: SparseCoder, source: ActivationSource, corpus: Corpus, settings: Settings
    ):
        self.coder, self.source, self.corpus, self.settings = coder, source, corpus, settings
        n, shape = coder.n_features, (coder.n_features, settings.n_examples)
        self.done = 0
        self.n_tokens = 0
        self.scale = 0.0
        self.counts = np.zeros(n, np.int64)
        self.sums = np.zeros(n)
        self.maxima = np.zeros(n, np.float32)
        self.histogram = np.zeros((n, N_BINS), np.uint32)
        self.top_values = np.zeros(shape, np.float32)
        self.top_positions = np.full(shape, -1, np.int64)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._ranks = np.random.default_rng(settings.seed).permutation(len(corpus))
        self._limit = len(corpus)
        self._kept: list[tuple[np.ndarray, ...]] = []

    @classmethod
    def resumed(cls, found: FeatureData, source: ActivationSource) -> _Pass:
        """A pass that goes on where another one was when it saved its result."""
        running = cls(found.coder, source, found.corpus, found.settings)
        running.done, running.n_tokens = found.n_contexts, found.n_tokens
        running.scale, running._limit = found.codes.scale, found.rank_limit
        running.counts, running.sums = found.firing_counts, found.sums
        running.maxima, running.histogram = found.maxima, found.histogram
        running.top_values, running.top_positions = found.top_values, found.top_positions
        codes = found.codes
        kept = codes.positions, np.diff(codes.starts), codes.features, codes.values
        running._kept = [kept]
        return running

    def __iter__(self) -> Iterator[int]:
        """The number of contexts of each forward pass, once they have been looked at."""
        contexts = np.arange(self.done, len(self.corpus))
        step = self.corpus.rows_per_forward
        for found in harvest(self.source, self.corpus, self.coder.reads, contexts):
            positions = np.full(len(found.computed), -1)
            positions[found.rows] = found.positions
            for z, at in self._codes(found.computed, positions):
                self._add(z, at)
            self.n_tokens += len(found.rows)
            n = min(step, len(self.corpus) - self.done)
            self.done += n
            yield n
        self._rank()

    def _codes(
        self, activations: mx.array, positions: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Dense codes `[n, n_features]` of some rows at a time, and the positions of these rows."""
        size = max(1, BATCH_ENTRIES // self.coder.n_features)
        # One batch ahead, so that the device computes while the one before it is looked at.
        waiting: Any = None
        for start in range(0, len(positions), size):
            part = slice(start, start + size)
            z = self.coder.encode(activations[part]).astype(mx.float32)
            mx.async_eval(z)
            if waiting is not None:
                yield np.asarray(memoryview(waiting[0])), waiting[1]
            waiting = z, positions[part]
        if waiting is not None:
            yield np.asarray(memoryview(waiting[0])), waiting[1]

    def _add(self, z: np.ndarray, positions: np.ndarray) -> None:
        flat = z.reshape(-1)
        entries = np.flatnonzero(flat != 0)
        rows, features = np.divmod(entries, z.shape[1])
        counted = positions[rows] >= 0
        rows, features = rows[counted], features[counted]
        values = flat[entries[counted]]
        sizes = np.abs(values)
        if not self.scale and len(values):
            self.scale = float(2.0 ** np.ceil(np.log2(sizes.max())))
        n = z.shape[1]
        self.counts += np.bincount(features, minlength=n)
        self.sums += np.bincount(features, weights=values, minlength=n)
        np.maximum.at(self.maxima, features, sizes)
        np.add.at(self.histogram.reshape(-1), features * N_BINS + self._bins(sizes), 1)
        self._offer(features, values, positions[rows])
        self._keep(rows, features, values, positions)

    def _bins(self, sizes: np.ndarray) -> np.ndarray:
        octaves = np.log2(sizes / np.float32(self.scale)) - OCTAVES_ABOVE
        return np.clip(np.floor(2 * octaves).astype(np.int64) + N_BINS, 0, N_BINS - 1)

    def _offer(self, features: np.ndarray, values: np.ndarray, positions: np.ndarray) -> None:
        """Let values that are larger than the smallest top example of a feature compete."""
        beyond = np.abs(values) > np.abs(self.top_values[features, -1])
        self._waiting.append((features[beyond], values[beyond], positions[beyond]))
        if sum(len(values) for _, values, _ in self._waiting) >= WAITING:
            self._rank()

    def _rank(self) -> None:
        """The strongest of the top examples and of those that wait, one of each context."""
        if not self._waiting:
            return
        new = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
        self._waiting, n = [], self.settings.n_examples
        touched = np.unique(new[0])
        held = np.repeat(touched, n), self.top_values[touched], self.top_positions[touched]
        features, values, positions = map(np.append, held, new)
        real = positions >= 0
        features, values, positions = features[real], values[real], positions[real]
        contexts = positions // self.corpus.context
        order = np.lexsort((positions, -np.abs(values), contexts, features))
        first = np.ones(len(order), bool)
        first[1:] = np.diff(features[order]) | np.diff(contexts[order])
        order = order[first]
        order = order[np.lexsort((positions[order], -np.abs(values[order]), features[order]))]
        features, values, positions = features[order], values[order], positions[order]
        places = np.arange(len(features)) - np.searchsorted(features, features)
        best = places < n
        self.top_values[touched], self.top_positions[touched] = 0, -1
        at = features[best], places[best]
        self.top_values[at], self.top_positions[at] = values[best], positions[best]

    def _keep(
        self, rows: np.ndarray, features: np.ndarray, values: np.ndarray, positions: np.ndarray
    ) -> None:
        counted = positions >= 0
        sizes = np.bincount(rows, minlength=len(positions))[counted]
        small = features.astype(_smallest_type(self.coder.n_features))
        halves = np.clip(values / np.float32(self.scale or 1), -LARGEST, LARGEST).astype(np.float16)
        part = positions[counted], sizes, small, halves
        self._kept.append(self._within_limit(part))
        most = self.settings.max_kept
        while self._limit > 1 and sum(len(kept[2]) for kept in self._kept) > most:
            self._limit //= 2
            self._kept = [self._within_limit(kept) for kept in self._kept]

    def _within_limit(self, part: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        positions, sizes, features, values = part
        kept = self._ranks[positions // self.corpus.context] < self._limit
        if kept.all():
            return part
        entries = np.repeat(kept, sizes)
        return positions[kept], sizes[kept], features[entries], values[entries]

    def result(self) -> FeatureData:
        """What is known so far."""
        self._rank()
        joined = [np.concatenate(parts) for parts in zip(*self._kept, strict=True)]
        self._kept = [tuple(joined)]
        positions, sizes, features, values = joined
        seen = np.flatnonzero(self._ranks[: self.done] < self._limit)
        starts = np.append(0, np.cumsum(sizes))
        codes = SparseCodes(
            seen, positions, starts, features, values, self.scale or 1.0, self.coder.n_features
        )
        return FeatureData(
            coder=self.coder, source=self.source, corpus=self.corpus, settings=self.settings,
            n_contexts=self.done, n_tokens=self.n_tokens, rank_limit=self._limit,
            firing_counts=self.counts, sums=self.sums, maxima=self.maxima,
            histogram=self.histogram, top_values=self.top_values,
            top_positions=self.top_positions, codes=codes,
        )  # fmt: skip


def _smallest_type(n_features: int) -> type:
    return np.uint16 if n_features <= 1 << 16 else np.uint32
