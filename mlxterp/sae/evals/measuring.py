"""One pass over activations, in which all that is known of codes and reconstructions is summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.corpus import CONTEXTS_PER_BLOCK, Corpus
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.noise import N_GROUPS, groups_of
from mlxterp.sae.evals.sparsity import CodeSums
from mlxterp.sae.evals.sums import Parts, SiteSums

BATCH_TOKENS = 4096
CODE_ENTRIES = 1 << 25  # of a dense code
SAMPLE_TOKENS = 4096
SAMPLE_ENTRIES = 1 << 26


@dataclass
class Measured:
    """The sums of one coder."""

    codes: CodeSums
    sites: dict[str, SiteSums]


@dataclass
class Pass:
    """What a pass over activations found: the sums of each coder, the mean activation `[width]`
    of all columns, and a `sample` of activations `[n, width]`."""

    measured: list[Measured]
    mean: mx.array
    sample: mx.array
    n_groups: int
    n_tokens: int
    corpus: Corpus | None
    clusters: str


def chosen(corpus: Corpus, max_tokens: int | None, seed: int) -> Corpus:
    """Random contexts of a corpus, in random order, with at most so many tokens that count."""
    order = np.random.default_rng(seed).permutation(len(corpus))
    if max_tokens is not None:
        counts = np.zeros(0, np.int64)
        while len(counts) < len(order) and counts.sum() <= max_tokens:
            some = corpus.documents(order[len(counts) : len(counts) + CONTEXTS_PER_BLOCK])
            counts = np.append(counts, (some >= 0).sum(axis=1))
        order = order[: max(1, int(np.searchsorted(counts.cumsum(), max_tokens, side="right")))]
    return replace(corpus, tokens=corpus.tokens[order], owners=corpus.owners[order])


def group_numbers(corpus: Corpus) -> np.ndarray:
    """The group of each position `[n_contexts, context]`, by its document; -1 where none counts."""
    documents = corpus.documents()
    known, numbers = np.unique(documents[documents >= 0], return_inverse=True)
    found = np.full(documents.shape, -1)
    found[documents >= 0] = groups_of(numbers, len(known))
    return found


def measure(
    coders: Sequence[SparseCoder], dataset: ActivationDataset, max_tokens: int | None, seed: int
) -> Pass:
    """All sums of some coders over the same tokens, at random contexts where there are texts.

    Raises `ValueError` for a dataset that lacks a site of a coder.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be None or >= 1, got {max_tokens}.")
    corpus, n_tokens = None, len(dataset)
    if dataset.corpus is not None and dataset.source is not None:
        corpus = chosen(dataset.corpus, max_tokens, seed)
        groups = group_numbers(corpus)
        n_groups, n_tokens = int(groups.max()) + 1, corpus.n_tokens
        batches = _of_texts(dataset, corpus, groups)
    else:
        n_tokens = min(max_tokens or n_tokens, n_tokens)
        n_groups = min(N_GROUPS, n_tokens)
        batches = _of_arrays(dataset, n_tokens, n_groups, seed)
    measured = [
        Measured(
            CodeSums(n_groups, coder.n_features),
            {
                name: SiteSums(n_groups, width)
                for name, width in zip(coder.writes.names, coder.writes.widths, strict=True)
            },
        )
        for coder in coders
    ]
    wanted = max(1, min(_sample_size(coders), SAMPLE_ENTRIES // dataset.columns.width))
    total, sample, n = np.zeros(dataset.columns.width), [], 0
    with tqdm(total=n_tokens, desc="evaluating", unit="tok", disable=not dataset.verbose) as bar:
        for batch, of_group, of_context in batches:
            batch = batch.astype(mx.float32)
            for coder, sums in zip(coders, measured, strict=True):
                _add(coder, dataset, sums, batch, of_group, of_context)
            total += np.array(batch.sum(axis=0), np.float64)
            if n < wanted:
                sample.append(batch[: wanted - n])
                mx.eval(sample[-1])
            n += len(batch)
            bar.update(len(batch))
    if n == 0:
        raise ValueError("None of the activations is finite.")
    return Pass(
        measured=measured,
        mean=mx.array((total / n).astype(np.float32)),
        sample=mx.concatenate(sample),
        n_groups=n_groups,
        n_tokens=n,
        corpus=corpus,
        clusters="tokens" if corpus is None else "documents",
    )


def _sample_size(coders: Sequence[SparseCoder]) -> int:
    """Enough tokens to fit an affine map of what is read on one half of them."""
    return max(SAMPLE_TOKENS, *(8 * (coder.d_in + 1) for coder in coders))


Batches = Iterator[tuple[mx.array, np.ndarray, np.ndarray | None]]


def _of_texts(dataset: ActivationDataset, corpus: Corpus, groups: np.ndarray) -> Batches:
    flat = groups.reshape(-1)
    for found in dataset.harvest(corpus):
        if len(found.positions):
            context = found.positions // corpus.context
            yield found.activations, flat[found.positions], context


def _of_arrays(dataset: ActivationDataset, n_tokens: int, n_groups: int, seed: int) -> Batches:
    """Without texts it is not known which tokens belong together: each is its own."""
    done = 0
    for batch in dataset.batches(BATCH_TOKENS, seed=seed):
        batch = batch[: n_tokens - done]
        yield batch, (done + np.arange(len(batch))) % n_groups, None
        done += len(batch)
        if done == n_tokens:
            return


def _add(
    coder: SparseCoder,
    dataset: ActivationDataset,
    sums: Measured,
    batch: mx.array,
    groups: np.ndarray,
    contexts: np.ndarray | None,
) -> None:
    x = dataset.columns.take(batch, coder.reads.names)
    y = dataset.columns.take(batch, coder.writes.names)
    written, size = [], max(1, CODE_ENTRIES // coder.n_features)
    for start, end in spans(contexts, len(batch), size):
        z = coder.encode(x[start:end]).astype(mx.float32)
        within = None if contexts is None else Parts.of(contexts[start:end])
        sums.codes.add(z, Parts.of(groups[start:end]), within)
        written.append(coder.decode(z, like=x[start:end]).astype(mx.float32))
        mx.eval(written[-1])
    y_hat = mx.concatenate(written)
    if coder.has_skip:
        y_hat += x @ coder.W_skip.T
    of_group = Parts.of(groups)
    of_context = None if contexts is None else Parts.of(contexts)
    for name, part in coder.writes.slices.items():
        sums.sites[name].add(y[:, part], y_hat[:, part], of_group, of_context)


def spans(contexts: np.ndarray | None, n: int, size: int) -> Iterator[tuple[int, int]]:
    """`n` tokens cut into pieces of about `size`, none of which ends within a context `[n]`."""
    if contexts is None:
        ends = [*range(size, n, size), n]
    else:
        bounds = np.append(np.flatnonzero(np.diff(contexts)) + 1, n)
        last = np.append(np.diff(bounds // size) > 0, True)
        ends = bounds[last].tolist()
    yield from zip([0, *ends[:-1]], ends, strict=True)
