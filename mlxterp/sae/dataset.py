"""From activations to shuffled batches."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import Columns
from mlxterp.sae.harvest import ActivationSource, Corpus, find_site, harvest, rows_per_forward

DEFAULT_CONTEXT = 256
DEFAULT_BUFFER_BYTES = 2 << 30


def shuffle_buffer(
    chunks: Iterator[mx.array], capacity: int, batch_size: int, rng: np.random.Generator | None
) -> Iterator[mx.array]:
    """Batches of rows drawn at random from a buffer of `capacity` rows; in order without `rng`.

    The buffer is filled, shuffled, emptied by half, and filled again; what is left when the chunks
    end is emitted to the last row, so the final batch may be smaller.
    """
    held: list[mx.array] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size < max(capacity, batch_size):
            continue
        buffer = _joined(held, rng)
        n_emitted = max(1, size // 2 // batch_size) * batch_size
        for start in range(0, n_emitted, batch_size):
            yield buffer[start : start + batch_size]
        held = [mx.contiguous(buffer[n_emitted:])]
        size -= n_emitted
    if size:
        buffer = _joined(held, rng)
        for start in range(0, size, batch_size):
            yield buffer[start : start + batch_size]


def _joined(chunks: list[mx.array], rng: np.random.Generator | None) -> mx.array:
    rows = mx.concatenate(chunks)
    return rows if rng is None else rows[mx.array(rng.permutation(len(rows)))]


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset holds, and how well its batches are mixed."""

    sites: tuple[str, ...]
    width: int
    n_tokens: int
    n_documents: int | None
    context: int | None
    n_bytes: int
    in_memory: bool
    batch_size: int
    documents_per_batch: float | None

    def __repr__(self) -> str:
        where = "kept in memory" if self.in_memory else "computed again for each pass"
        text = (
            f"{self.n_tokens:,} tokens of {', '.join(self.sites)}, width {self.width}, "
            f"{self.n_bytes / 1e6:,.0f} MB {where}"
        )
        if self.n_documents is None:
            return text
        return (
            f"{text};\n{self.n_documents:,} documents in contexts of {self.context} tokens, of "
            f"which a batch of {self.batch_size:,} mixes {self.documents_per_batch:.0f}"
        )


class ActivationDataset:
    """Activations of one or more sites over many tokens, served as shuffled batches.

    Made by `from_texts` (from a language model) or `from_activations` (from arrays). While they fit
    into `buffer_bytes` the activations are computed once, kept in memory and shuffled as a whole;
    otherwise they are computed again for each pass and mixed in a buffer of that size.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        source: ActivationSource | None = None,
        corpus: Corpus | None = None,
        activations: mx.array | None = None,
        shuffle: bool = True,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        verbose: bool = False,
    ):
        self.columns = columns
        self.source = source
        self.corpus = corpus
        self.shuffle = shuffle
        self.buffer_bytes = buffer_bytes
        self.verbose = verbose
        self.n_skipped = 0
        self._activations = activations

    @classmethod
    def from_texts(
        cls,
        model: ActivationSource,
        texts: Iterable[str],
        layer: Any,
        component: str | None = None,
        *,
        context_length: int | None = None,
        max_samples: int | None = None,
        shuffle: bool = True,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        verbose: bool = False,
    ) -> ActivationDataset:
        """Activations of a model over texts.

        `layer` and `component` (`mlp` where none is given) name the site; `layer` may also be the
        site's whole name, or a list that joins several. Texts are packed back to back into contexts
        of `context_length` tokens (default: 256, or what the model takes). `max_samples` bounds the
        number of tokens. Special tokens are left out. Raises `ValueError` for an empty dataset and
        for a site that does not exist.
        """
        sites = layer if isinstance(layer, (list, tuple)) else [layer]
        sites = [find_site(model, site, component) for site in sites]
        columns = Columns(tuple(map(str, sites)), tuple(model.width(site) for site in sites))
        context = _context_length(model, context_length)
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be >= 1, got {max_samples}.")
        corpus = Corpus.from_texts(model, texts, context, max_samples)
        return cls(
            columns,
            source=model,
            corpus=corpus,
            shuffle=shuffle,
            buffer_bytes=buffer_bytes,
            verbose=verbose,
        )

    @classmethod
    def from_activations(
        cls, activations: Any, *, site: str = "activations", shuffle: bool = True
    ) -> ActivationDataset:
        """A dataset from an array `[n_tokens, d]`, or from `{site: array}` with equal `n_tokens`.

        Rows that are not finite are left out and counted in `n_skipped`. Raises `ValueError` for
        other shapes and where nothing is left.
        """
        named = activations if isinstance(activations, Mapping) else {site: activations}
        arrays = {name: _as_matrix(name, array) for name, array in named.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"All sites need the same number of tokens, got {lengths}.")
        columns = Columns(tuple(arrays), tuple(array.shape[1] for array in arrays.values()))
        joined = mx.concatenate(list(arrays.values()), axis=-1)
        finite = np.array(mx.isfinite(joined).all(axis=-1))
        dataset = cls(columns, shuffle=shuffle)
        dataset._set_skipped(len(finite) - int(finite.sum()), len(finite))
        dataset._activations = joined if finite.all() else joined[mx.array(np.flatnonzero(finite))]
        return dataset

    def __len__(self) -> int:
        """The number of tokens."""
        return self.n_tokens

    @property
    def n_tokens(self) -> int:
        """The number of tokens; special ones are not counted."""
        if self._activations is not None:
            return len(self._activations)
        assert self.corpus is not None
        return self.corpus.n_tokens

    @property
    def n_bytes(self) -> int:
        """The size of all activations in memory."""
        dtype = mx.float32 if self._activations is None else self._activations.dtype
        return self.n_tokens * self.columns.width * dtype.size

    @property
    def bytes_to_come(self) -> int:
        """What the activations will still take in memory when they are used."""
        if self._activations is not None:
            return 0
        return self.n_bytes if self.in_memory else self.buffer_bytes

    def split(
        self, validation: float = 0.05, seed: int = 0
    ) -> tuple[ActivationDataset, ActivationDataset]:
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
        if self.corpus is not None:
            training, held_out = (self._like(corpus=c) for c in self.corpus.split(validation, seed))
            held_out.verbose = False  # its bar would cut through the one of the training
            return training, held_out
        n_held_out = min(max(1, round(n * validation)), n - 1)
        order = mx.array(np.random.default_rng(seed).permutation(n))
        array = self._array()
        training = self._like(activations=array[order[n_held_out:]])
        training.n_skipped = self.n_skipped
        return training, self._like(activations=array[order[:n_held_out]])

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
        rng = np.random.default_rng((seed, epoch))
        for i, batch in enumerate(self._pass(batch_size, rng, start)):
            if i >= start and not (drop_last and len(batch) < batch_size):
                yield batch

    def _pass(self, batch_size: int, rng: np.random.Generator, start: int) -> Iterator[mx.array]:
        if not self.in_memory:
            mixing = rng if self.shuffle else None
            yield from shuffle_buffer(self._harvest(rng), self._capacity, batch_size, mixing)
            return
        array = self._array()
        order = rng.permutation(len(array)) if self.shuffle else np.arange(len(array))
        for i in range(0, len(array), batch_size):
            skipped = i < start * batch_size
            yield array[:0] if skipped else array[mx.array(order[i : i + batch_size])]

    @property
    def in_memory(self) -> bool:
        """Whether all activations are kept in memory."""
        return self._activations is not None or self.n_bytes <= self.buffer_bytes

    @property
    def _capacity(self) -> int:
        return max(1, self.buffer_bytes // (4 * self.columns.width)) if self.shuffle else 1

    def _harvest(self, rng: np.random.Generator | None) -> Iterator[mx.array]:
        """One pass through the language model; what had to be left out is counted at its end."""
        assert self.source is not None and self.corpus is not None
        n_rows, n_found = len(self.corpus.rows[0]), 0
        order = rng.permutation(n_rows) if rng is not None and self.shuffle else np.arange(n_rows)
        for chunk, _ in harvest(self.source, self.corpus, self.columns, order):
            n_found += len(chunk)
            yield chunk
        self._set_skipped(self.corpus.n_tokens - n_found, self.corpus.n_tokens)

    def _array(self) -> mx.array:
        """All activations, computed at the first call."""
        if self._activations is None:
            total, chunks = self.n_tokens, []
            with tqdm(total=total, desc="activations", unit="tok", disable=not self.verbose) as bar:
                for chunk in self._harvest(None):
                    mx.eval(chunk)
                    chunks.append(chunk)
                    bar.update(len(chunk))
            self._activations = mx.concatenate(chunks)
            mx.eval(self._activations)
        return self._activations

    def _set_skipped(self, n_skipped: int, n: int) -> None:
        if n_skipped == n:
            raise ValueError(f"None of the {n} activations is finite.")
        if n_skipped and n_skipped != self.n_skipped:
            warnings.warn(
                f"{n_skipped} of {n} activations are not finite and were left out.", stacklevel=3
            )
        self.n_skipped = n_skipped

    def _like(self, **changes: Any) -> ActivationDataset:
        return ActivationDataset(
            self.columns,
            source=self.source,
            shuffle=self.shuffle,
            buffer_bytes=self.buffer_bytes,
            verbose=self.verbose,
            **changes,
        )

    def documents_per_batch(self, batch_size: int = 256, n_batches: int = 8) -> float | None:
        """The mean number of distinct documents in a batch; `None` where documents are unknown.

        Found by shuffling document numbers in place of activations.
        """
        if self.corpus is None:
            return None
        rng = np.random.default_rng(0)
        step = rows_per_forward(self.corpus.context)
        _, owners = self.corpus.rows
        order = rng.permutation(len(owners)) if self.shuffle else np.arange(len(owners))
        parts = (owners[order[i : i + step]].reshape(-1) for i in range(0, len(order), step))
        chunks = (mx.array(part[part >= 0]) for part in parts)
        capacity = self.n_tokens if self.in_memory and self.shuffle else self._capacity
        mixing = rng if self.shuffle else None
        batches = shuffle_buffer(chunks, capacity, batch_size, mixing)
        counts = [len(np.unique(batch)) for batch in itertools.islice(batches, n_batches)]
        return float(np.mean(counts))

    def info(self, batch_size: int = 256) -> DatasetInfo:
        """Size, sites and mixing, as an object to read."""
        corpus = self.corpus
        return DatasetInfo(
            sites=self.columns.names,
            width=self.columns.width,
            n_tokens=self.n_tokens,
            n_documents=None if corpus is None else len(corpus.documents),
            context=None if corpus is None else corpus.context,
            n_bytes=self.n_bytes,
            in_memory=self.in_memory,
            batch_size=batch_size,
            documents_per_batch=self.documents_per_batch(batch_size),
        )

    def __repr__(self) -> str:
        return (
            f"ActivationDataset({self.n_tokens:,} tokens of {', '.join(self.columns.names)}, "
            f"width {self.columns.width})"
        )


def _context_length(model: ActivationSource, wanted: int | None) -> int:
    limit = model.context_length
    if wanted is None:
        return min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if wanted < 2 or (limit is not None and wanted > limit):
        bound = "" if limit is None else f" and at most the model's {limit}"
        raise ValueError(f"context_length must be >= 2{bound}, got {wanted}.")
    return wanted


def _as_matrix(name: str, array: Any) -> mx.array:
    array = mx.array(array)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"Activations of {name!r} must have shape [n_tokens, width], both above 0; "
            f"got {tuple(array.shape)}."
        )
    if not mx.issubdtype(array.dtype, mx.floating):
        raise ValueError(f"Activations of {name!r} must be floating point, got {array.dtype}.")
    return array
