"""Activations as batches: from memory, from a disk, or from the language model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.caching import Cache
from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.harvest import Harvest, NormLimits, harvest
from mlxterp.sae.shards import DamagedShard, Rows
from mlxterp.sae.shuffle import Order, Span, ahead, shuffle_buffer, spans_of
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.store import Store

DEFAULT_BUFFER_BYTES = 2 << 30


class Activations:
    """Activations of one or more sites over many tokens, wherever they are from.

    Those made by `ActivationDataset`, which says how they are served.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        source: ActivationSource | None = None,
        corpus: Corpus | None = None,
        activations: mx.array | None = None,
        store: Store | None = None,
        rows: range | None = None,
        cache: Cache | None = None,
        outliers: tuple[float, bool] | None = None,
        shuffle: bool = True,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        verbose: bool = False,
    ):
        self.columns = columns
        self.source = source
        self.shuffle = shuffle
        self.buffer_bytes = buffer_bytes
        self.verbose = verbose
        self.n_skipped = 0 if store is None else store.n_skipped
        self.n_outliers = 0 if store is None else store.n_outliers
        self._corpus, self._activations, self._outliers = corpus, activations, outliers
        self._store, self._cache = store, cache
        self._rows = rows if rows is not None or store is None else range(store.n_tokens)

    def __len__(self) -> int:
        """The number of tokens."""
        return self.n_tokens

    @property
    def n_tokens(self) -> int:
        """The number of tokens; special ones are not counted."""
        if self._activations is not None:
            return len(self._activations)
        if self._rows is not None:
            return len(self._rows)
        assert self.corpus is not None
        return self.corpus.n_tokens

    @cached_property
    def corpus(self) -> Corpus | None:
        """The tokens that the activations belong to; `None` where they are not known."""
        store, rows = self._store, self._rows
        if store is None or rows is None or store.corpus is None:
            return self._corpus
        if len(rows) == store.n_tokens:
            return store.corpus
        return store.corpus.between(store.position(rows.start), store.position(rows.stop))

    @property
    def n_bytes(self) -> int:
        """The size of all activations in memory."""
        itemsize = 4 if self._activations is None else self._activations.dtype.size
        if self._store is not None and self._store.layout.precision in ("bfloat16", "float16"):
            itemsize = 2
        return self.n_tokens * self.columns.width * itemsize

    @property
    def in_memory(self) -> bool:
        """Whether all activations are kept in memory."""
        return self._activations is not None or self.n_bytes <= self.buffer_bytes

    @property
    def bytes_to_come(self) -> int:
        """What the activations will still take in memory when they are used."""
        if self._activations is not None:
            return 0
        return self.n_bytes if self.in_memory else self.buffer_bytes

    def split(self, validation: float = 0.05, seed: int = 0) -> tuple[Self, Self]:
        """A training and a validation part, divided by document where there are documents.

        Raises `ValueError` where a part would be empty.
        """
        if not 0 < validation < 1:
            raise ValueError(f"validation must be in (0, 1), got {validation}.")
        n = self.n_tokens
        if n < 2:
            raise ValueError(
                f"The dataset has {n} token and no part to hold out for validation: give more "
                "text, or validation_split=0."
            )
        n_held_out = min(max(1, round(n * validation)), n - 1)
        if self._store is not None and self._rows is not None:
            return self._split_rows(n_held_out)
        if self._corpus is not None:
            parts = (self._like(corpus=c) for c in self._corpus.split(validation, seed))
            training, held_out = parts
            held_out.verbose = False  # its bar would cut through the one of the training
            return training, held_out
        order = mx.array(np.random.default_rng(seed).permutation(n))
        array = self._array()
        training = self._like(activations=array[order[n_held_out:]])
        training.n_skipped = self.n_skipped
        return training, self._like(activations=array[order[:n_held_out]])

    def _split_rows(self, n_held_out: int) -> tuple[Self, Self]:
        """The end is held out: documents on a disk are in random order, unless not shuffled."""
        store, rows = self._store, self._rows
        assert store is not None and rows is not None
        cut = rows.stop - n_held_out
        start = store.document_start(cut)
        cut = start if rows.start < start < rows.stop else cut
        return self._like(rows=range(rows.start, cut)), self._like(rows=range(cut, rows.stop))

    def _like(self, **changes: Any) -> Self:
        given = {
            "store": self._store, "cache": self._cache, "outliers": self._outliers,
            "source": self.source, "shuffle": self.shuffle, "buffer_bytes": self.buffer_bytes,
            "verbose": self.verbose,
        }  # fmt: skip
        return type(self)(self.columns, **{**given, **changes})

    # How it is served

    def batches(
        self,
        batch_size: int = 256,
        *,
        epoch: int = 0,
        seed: int = 0,
        start: int = 0,
        drop_last: bool = False,
    ) -> Iterator[mx.array]:
        """Batches `[batch_size, width]` of one pass; a pass is given by `seed` and `epoch` alone.

        `start` batches are left out at the beginning. The last batch may be smaller, unless
        `drop_last`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}.")
        for batch in self._pass(batch_size, (seed, epoch), start):
            if not (drop_last and len(batch) < batch_size):
                yield batch

    def _pass(self, batch_size: int, seed: tuple[int, int], start: int) -> Iterator[mx.array]:
        rng = np.random.default_rng(seed)
        if self.in_memory:
            array = self._array()
            order = rng.permutation(len(array)) if self.shuffle else np.arange(len(array))
            for i in range(start * batch_size, len(array), batch_size):
                yield array[mx.array(order[i : i + batch_size])]
        elif self._store is not None:
            yield from self._from_disk(batch_size, seed, start)
        else:
            mixing = rng if self.shuffle else None
            batches = shuffle_buffer(self._harvest(rng), self._capacity, batch_size, mixing)
            yield from itertools.islice(batches, start, None)

    @property
    def _capacity(self) -> int:
        """Rows in the buffer that mixes what is computed again."""
        return max(1, self.buffer_bytes // (4 * self.columns.width)) if self.shuffle else 1

    def harvest(self, corpus: Corpus) -> Iterator[Harvest]:
        """Activations of contexts of the dataset's corpus, made by its model one after another,
        with the positions of their tokens; without those that the dataset leaves out."""
        if self.source is None:
            raise ValueError("Texts can be run only by a dataset that knows its language model.")
        outliers, limits = self._outliers, None
        if self._cache is not None:
            outliers = self._cache.outlier_norm, self._cache.drop_outliers
        if outliers is not None and outliers[1] and self.corpus is not None:
            limits = NormLimits.measure(self.source, self.corpus, self.columns, *outliers)
        return harvest(self.source, corpus, self.columns, np.arange(len(corpus)), limits)

    @cached_property
    def _limits(self) -> NormLimits | None:
        """Norms beyond which a token counts as an outlier."""
        if self._outliers is None or self.source is None or self.corpus is None:
            return None
        return NormLimits.measure(self.source, self.corpus, self.columns, *self._outliers)

    def _harvest(self, rng: np.random.Generator | None) -> Iterator[mx.array]:
        """One pass through the language model; what is noticed in it is counted at its end."""
        corpus = self.corpus
        assert self.source is not None and corpus is not None
        n, n_not_finite, n_outliers = len(corpus), 0, 0
        order = rng.permutation(n) if rng is not None and self.shuffle else np.arange(n)
        for found in harvest(self.source, corpus, self.columns, order, self._limits):
            n_not_finite += found.n_not_finite
            n_outliers += found.n_outliers
            if len(found.positions):
                yield found.activations
        self._set_skipped(n_not_finite, corpus.n_tokens)
        self.n_outliers = n_outliers

    def _from_disk(self, batch_size: int, seed: tuple[int, int], start: int) -> Iterator[mx.array]:
        """Batches of a store; a shard that is damaged is made again where there is a model."""
        while (store := self._store) is not None:
            try:
                rows = self._order(seed).batches(store.read_spans, batch_size, start)
                for batch in ahead(rows):
                    self._note_not_finite(store)
                    yield store.layout.decode(batch)
                    start += 1
                return
            except DamagedShard as error:
                self._remake(error)

    def _order(self, seed: tuple[int, int]) -> Order:
        store = self._store
        assert store is not None and self._rows is not None
        # Two groups are held: one that is given out, one that is being read.
        capacity = max(1, self.buffer_bytes // 2 // store.layout.row_bytes)
        spans = spans_of(store.ends, self._rows)
        return Order(spans, capacity, seed if self.shuffle else None)

    def _remake(self, error: DamagedShard) -> None:
        if self._cache is None:
            raise ValueError(
                f"{error} Make it again: ActivationDataset.from_texts with the same arguments and "
                "cache_dir as at first."
            ) from error
        self._store = self._cache.remake(error.path)

    def _array(self) -> mx.array:
        """All activations, computed or read at the first call."""
        if self._activations is None:
            chunks = []
            with tqdm(
                total=self.n_tokens, desc="activations", unit="tok", disable=not self.verbose
            ) as bar:
                for chunk in self._in_order():
                    mx.eval(chunk)
                    chunks.append(chunk)
                    bar.update(len(chunk))
            self._activations = mx.concatenate(chunks)
            mx.eval(self._activations)
        return self._activations

    def _in_order(self) -> Iterator[mx.array]:
        if self._store is None:
            yield from self._harvest(None)
            return
        assert self._rows is not None
        for span in spans_of(self._store.ends, self._rows):
            rows = self._sound([span])
            self._note_not_finite(self._store)
            yield self._store.layout.decode(rows)

    def _sound(self, spans: list[Span]) -> Rows:
        assert self._store is not None
        try:
            return self._store.read_spans(spans)
        except DamagedShard as error:
            self._remake(error)
            return self._store.read_spans(spans)

    def _set_skipped(self, n_skipped: int, n: int) -> None:
        if n_skipped == n:
            raise ValueError(f"None of the {n} activations is finite.")
        if n_skipped and n_skipped != self.n_skipped:
            warnings.warn(
                f"{n_skipped} of {n} activations are not finite and were left out.", stacklevel=3
            )
        self.n_skipped = n_skipped

    def _note_not_finite(self, store: Store) -> None:
        """Rows of others that are not finite stay in: their number is known once all are read."""
        if store.n_skipped and not self.n_skipped:
            warnings.warn(
                f"{store.path} holds activations that are not finite; training skips the batches "
                "that they are in.",
                stacklevel=3,
            )
        self.n_skipped = store.n_skipped

    def documents_per_batch(self, batch_size: int = 256, n_batches: int = 8) -> float | None:
        """The mean number of distinct documents in a batch; `None` where documents are unknown.

        Found by shuffling document numbers in place of activations.
        """
        corpus = self.corpus
        if corpus is None:
            return None
        if self._store is not None and not self.in_memory:
            batches = self._documents_from_disk(batch_size)
        else:
            rng = np.random.default_rng(0)
            order = rng.permutation(len(corpus)) if self.shuffle else np.arange(len(corpus))
            parts = (
                corpus.documents(order[i : i + corpus.rows_per_forward]).reshape(-1)
                for i in range(0, len(order), corpus.rows_per_forward)
            )
            chunks = (mx.array(part[part >= 0]) for part in parts)
            capacity = self.n_tokens if self.in_memory and self.shuffle else self._capacity
            batches = shuffle_buffer(chunks, capacity, batch_size, rng if self.shuffle else None)
        counts = [len(np.unique(batch)) for batch in itertools.islice(batches, n_batches)]
        return float(np.mean(counts))

    def _documents_from_disk(self, batch_size: int) -> Iterator[np.ndarray]:
        store = self._store
        assert store is not None

        def read(spans: list[Span]) -> Rows:
            found = [store.documents(span.chunk)[span.start : span.end] for span in spans]
            return {"documents": np.concatenate(found)}

        for rows in self._order((0, 0)).batches(read, batch_size):
            yield rows["documents"]
