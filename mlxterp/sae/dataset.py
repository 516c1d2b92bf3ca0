"""Activation datasets: how they are made from models and texts, arrays and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae import documents
from mlxterp.sae.caching import Cache
from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.curation import CurationReport, DiversityMetric, curate
from mlxterp.sae.dataset_info import DatasetInfo, mixing
from mlxterp.sae.harvest import OUTLIER_NORM
from mlxterp.sae.serving import DEFAULT_BUFFER_BYTES, Activations
from mlxterp.sae.source import ActivationSource, find_site
from mlxterp.sae.store import Layout, Precision, Store, is_store

DEFAULT_CONTEXT = 256


class ActivationDataset(Activations):
    """Activations of one or more sites over many tokens, served as shuffled batches.

    Made by `from_texts` and its kin from a language model, by `from_activations` from arrays, by
    `open` from a disk. While they fit into `buffer_bytes` the activations are kept in memory and
    shuffled as a whole. Otherwise they are read from the disk, if they have been harvested to one,
    or else computed again for each pass, and mixed in a buffer of that size.
    """

    report: CurationReport | None = None
    """What `curate` left out, and why."""

    @classmethod
    def from_texts(
        cls,
        model: ActivationSource,
        texts: Any,
        layer: Any,
        component: str | None = None,
        *,
        context_length: int | None = None,
        max_samples: int | None = None,
        separate_documents: bool = False,
        shuffle: bool = True,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        outlier_norm: float = OUTLIER_NORM,
        drop_outliers: bool = False,
        cache_dir: str | Path | None = None,
        precision: Precision = "bfloat16",
        verbose: bool = False,
    ) -> ActivationDataset:
        """Activations of a model over texts, chats (lists of messages) or lists of token ids, or
        over what a path or a dataset's name on the Hub holds; see `documents.read`. A `Corpus` is
        taken as it has been packed.

        `layer` and `component` (`mlp` where none is given) name the site; `layer` may also be the
        site's whole name, or a list that joins several. Documents are packed back to back into
        contexts of `context_length` tokens (default: 256, or what the model takes), or with
        `separate_documents` into contexts of their own; long ones go over several. Special
        tokens are left out, and what is not finite; `max_samples` bounds the number of all other
        tokens. Those whose norm is more than `outlier_norm` times the median are counted, and
        with `drop_outliers` left out.

        With a `cache_dir` the activations are harvested now, to a directory of their own in it,
        unless they are there already, and kept with the given `precision`: `bfloat16`, `float16`,
        `float32`, or `int8` with a scale for each token. Raises `ValueError` for an empty dataset
        and for a site that does not exist, `OSError` where the disk is too small.
        """
        context = _context_length(model, context_length)
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be >= 1, got {max_samples}.")
        columns = _columns(model, layer, component)
        if not outlier_norm > 1:
            raise ValueError(f"outlier_norm must be > 1, got {outlier_norm}.")
        layout = Layout(columns, precision)
        options: Any = {"shuffle": shuffle, "buffer_bytes": buffer_bytes, "verbose": verbose}
        seed = 0 if shuffle and cache_dir is not None else None
        if not isinstance(texts, Corpus):
            found = documents.read(texts)
            corpus = Corpus.from_documents(
                model, found, context, max_samples, separate_documents, seed
            )
        elif (context_length, max_samples, separate_documents) == (None, None, False):
            corpus = texts if seed is None else texts.shuffled(seed)
        else:
            raise ValueError(
                "context_length, max_samples and separate_documents must be left out for a corpus, "
                "which is packed already."
            )
        if cache_dir is None:
            outliers = outlier_norm, drop_outliers
            return cls(columns, source=model, corpus=corpus, outliers=outliers, **options)
        place = Path(cache_dir)
        cache = Cache(model, corpus, layout, place, outlier_norm, drop_outliers, verbose)
        del corpus  # for the one on the disk
        return cls(columns, source=model, store=cache.open(), cache=cache, **options)

    @classmethod
    def from_huggingface(
        cls,
        model: ActivationSource,
        dataset_name: str,
        layer: Any,
        component: str | None = None,
        *,
        subset: str | None = None,
        split: str = "train",
        column: str | None = None,
        revision: str | None = None,
        streaming: bool = True,
        **options: Any,
    ) -> ActivationDataset:
        """Activations of a model over a dataset of the Hugging Face Hub.

        `column` holds texts, chats or token ids; by default the first of `text`, `content`,
        `messages`, `input_ids` and the like that there is. Needs the extra `data`. `options` are
        those of `from_texts`. Raises `ValueError` for a name, subset, split or column that does
        not exist, and `ConnectionError` without a network.
        """
        found = documents.read_huggingface(
            dataset_name, subset=subset, split=split, column=column, revision=revision,
            streaming=streaming,
        )  # fmt: skip
        return cls.from_texts(model, found, layer, component, **options)

    @classmethod
    def from_files(
        cls,
        model: ActivationSource,
        paths: str | Path | Iterable[str | Path],
        layer: Any,
        component: str | None = None,
        *,
        column: str | None = None,
        **options: Any,
    ) -> ActivationDataset:
        """Activations of a model over files of text, JSON lines or Parquet; see `from_texts`.

        A path may be a directory or a pattern. Raises `FileNotFoundError`, and `ValueError` naming
        file and line for what cannot be read.
        """
        found = documents.read_files(paths, column)
        return cls.from_texts(model, found, layer, component, **options)

    @classmethod
    def from_tokens(
        cls,
        model: ActivationSource,
        tokens: Iterable[Any],
        layer: Any,
        component: str | None = None,
        **options: Any,
    ) -> ActivationDataset:
        """Activations of a model over token ids: an array `[n, length]`, or a list of lists.

        Each row is a document; the rows of an array are contexts by themselves, unless
        `context_length` or `separate_documents` says otherwise. `options` are those of
        `from_texts`.
        """
        if isinstance(tokens, (np.ndarray, mx.array)):
            if tokens.ndim != 2:
                raise ValueError(f"tokens must have shape [n, length], got {list(tokens.shape)}.")
            options = {
                "context_length": tokens.shape[1], "separate_documents": True, **options,
            }  # fmt: skip
            tokens = np.array(tokens)
        return cls.from_texts(model, tokens, layer, component, **options)

    @classmethod
    def curate(
        cls,
        model: ActivationSource,
        source: Any,
        layer: Any,
        component: str | None = None,
        *,
        diversity_metric: DiversityMetric = "loss",
        max_samples: int | None = None,
        min_activation_norm: float = 0.0,
        deduplicate: bool = True,
        context_length: int | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> ActivationDataset:
        """Activations over the most diverse part of some documents; see `curation.curate`.

        `source` is what `documents.read` takes: a list of texts, paths, or the name of a dataset
        of the Hub. Duplicates, boilerplate and text of which most activations are shorter than
        `min_activation_norm` times the median are left out, and of the rest so much is chosen by
        `diversity_metric` as `max_samples` tokens allow: `loss`, `kmeans` or
        `activation_variance`. The dataset's `report` says what was dropped and why. `options` are
        those of `from_texts` that come after `separate_documents`.
        """
        columns = _columns(model, layer, component)
        chosen, report = curate(
            model, documents.read(source), columns, context=_context_length(model, context_length),
            max_tokens=max_samples, diversity_metric=diversity_metric,
            min_activation_norm=min_activation_norm, deduplicate=deduplicate, verbose=verbose,
        )  # fmt: skip
        dataset = cls.from_texts(model, chosen, layer, component, verbose=verbose, **options)
        dataset.report = report
        return dataset

    @classmethod
    def from_activations(
        cls, activations: Any, *, site: str = "activations", shuffle: bool = True
    ) -> ActivationDataset:
        """A dataset from an array `[n_tokens, d]`, or from `{site: array}` with equal `n_tokens`.

        A path is that of a directory of such arrays, as `.npy` or `.safetensors` files, which are
        read from there as they are needed, or of one for `open`. Rows of arrays that are not finite
        are left out and counted in `n_skipped`; those in files are counted when they are first
        read, with a warning, and training skips the batches that they are in. Raises `ValueError`
        for other shapes and where nothing is left.
        """
        if isinstance(activations, (str, Path)):
            store = Store.of_directory(Path(activations), site)
            return cls(store.columns, store=store, shuffle=shuffle)
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

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: ActivationSource | None = None,
        *,
        shuffle: bool = True,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    ) -> ActivationDataset:
        """Activations that were harvested to a disk before, from a cache's directory.

        With the `model` that they are from, analysis can show the text. Raises `ValueError` where
        there are none, where they are not complete, and for another model.
        """
        store = Store.open(path)
        if model is not None and store.index is not None:
            theirs = store.index["identity"]["model"]
            if theirs["fingerprint"] != model.fingerprint:
                raise ValueError(
                    f"{path} holds activations of {theirs['name']}, not of the model given."
                )
        options: dict[str, Any] = {"shuffle": shuffle, "buffer_bytes": buffer_bytes}
        return cls(store.columns, source=model, store=store, **options)

    @classmethod
    def of(
        cls, model: ActivationSource, data: Any, layer: Any, component: str | None = None,
        verbose: bool = False,
    ) -> ActivationDataset:  # fmt: skip
        """What is given as a dataset for training: one of these, or the path of one on a disk;
        texts, paths of texts, or the name of a dataset of the Hub."""
        if isinstance(data, ActivationDataset):
            return data
        if isinstance(data, (str, Path)) and is_store(Path(data)):
            return cls.open(data, model)
        return cls.from_texts(model, data, layer, component, verbose=verbose)

    def info(self, batch_size: int = 256) -> DatasetInfo:
        """Size, sites and mixing, as an object to read."""
        corpus = self.corpus
        found = None if corpus is None else self.documents_per_batch(batch_size)
        return DatasetInfo(
            sites=self.columns.names,
            width=self.columns.width,
            n_tokens=self.n_tokens,
            n_documents=None if corpus is None else corpus.n_documents,
            context=None if corpus is None else corpus.context,
            n_bytes=self.n_bytes,
            where="kept in memory" if self.in_memory else
            "read from the disk" if self._store is not None else "computed again for each pass",
            n_skipped=self.n_skipped,
            n_outliers=self.n_outliers,
            batch_size=batch_size,
            documents_per_batch=found,
            mixing=None if corpus is None or not found else
            mixing(found, corpus.document_sizes, batch_size),
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"ActivationDataset({self.n_tokens:,} tokens of {', '.join(self.columns.names)}, "
            f"width {self.columns.width})"
        )


def _columns(model: ActivationSource, layer: Any, component: str | None) -> Columns:
    sites = layer if isinstance(layer, (list, tuple)) else [layer]
    sites = [find_site(model, site, component) for site in sites]
    return Columns(tuple(map(str, sites)), tuple(model.width(site) for site in sites))


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
