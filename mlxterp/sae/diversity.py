"""What pieces of text are like, and which of them are the most diverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.harvest import OUTLIER_NORM, NormLimits, harvest, norms_of
from mlxterp.sae.source import ActivationSource

SAMPLE_FORWARDS = 4
MOST_AXES = 256
MOST_CLUSTERS = 256
KMEANS_ROUNDS = 10
LOSS_EXTREMES = 0.05
LOSS_GROUPS = 20
CANDIDATES = 64
CANDIDATES_PER_RATIO = 7  # ln(1 / 0.001)


class Pieces(NamedTuple):
    """Documents, cut: token ids, the document of each `[n]`, and its number of tokens `[n]`."""

    ids: list[np.ndarray]
    owners: np.ndarray
    sizes: np.ndarray


class Objective(NamedTuple):
    """`F = sum_j g(E_j)`, `E` the sum of the rows `features` `[n_pieces, n_groups]` chosen, by its
    derivative `g'(E) = (prior + E) ** -power`: 1 makes `g` a logarithm, 1/2 a square root."""

    features: np.ndarray
    prior: float
    power: float

    def take(self, index: np.ndarray) -> Objective:
        return self._replace(features=self.features[index])


def by_loss(
    source: ActivationSource, corpus: Corpus, sizes: np.ndarray, verbose: bool
) -> tuple[Objective, np.ndarray]:
    """The objective of `"loss"` and which pieces are extreme `[n]`."""
    losses = _mean_losses(source, corpus, len(sizes), verbose)
    shares = np.linspace(LOSS_EXTREMES, 1 - LOSS_EXTREMES, LOSS_GROUPS + 1)
    low, *edges, high = np.nanquantile(losses, shares)
    groups = np.searchsorted(edges, losses)
    features = np.eye(LOSS_GROUPS)[groups] * sizes[:, None]
    return Objective(features, corpus.context, 0.5), ~((losses >= low) & (losses <= high))


def by_activations(
    source: ActivationSource,
    corpus: Corpus,
    columns: Columns,
    make_phi: Callable[[np.ndarray], Callable[[mx.array], mx.array]],
    min_activation_norm: float,
    n_pieces: int,
    verbose: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The sums of phi over the tokens of each piece that count `[n, m]`, and how many do `[n]`.

    `make_phi` is given a sample of activations, with a mean squared norm of 1 at every site.
    """
    limits = NormLimits.measure(source, corpus, columns, OUTLIER_NORM, drop=True)
    least = mx.array(limits.limits) * (min_activation_norm / OUTLIER_NORM)
    some = np.linspace(0, len(corpus) - 1, SAMPLE_FORWARDS * corpus.rows_per_forward)
    chunks = harvest(source, corpus, columns, np.unique(some.astype(int)), limits)
    sample = np.concatenate([np.array(c.activations.astype(mx.float32)) for c in chunks])
    if not len(sample):
        raise ValueError(f"No activation of {', '.join(columns.names)} is finite.")
    scale = _scale(sample, columns)
    phi, scaled = make_phi(sample * scale), mx.array(scale)
    total, pieces = np.zeros((n_pieces, 0), np.float32), corpus.owners.reshape(-1)
    with tqdm(total=corpus.n_tokens, desc="curating", unit="tok", disable=not verbose) as bar:
        for found in harvest(source, corpus, columns, np.arange(len(corpus)), limits):
            x = found.activations.astype(mx.float32)
            counts = (norms_of(x, columns) >= least).any(axis=-1, keepdims=True)
            values = mx.concatenate([phi(x * scaled), mx.ones_like(counts)], axis=-1) * counts
            owners = pieces[found.positions]
            starts = np.flatnonzero(np.diff(owners, prepend=-1))
            if not total.size:
                total = np.zeros((n_pieces, values.shape[1]), np.float32)
            total[owners[starts]] += np.add.reduceat(np.array(values), starts)
            bar.update(len(owners))
    return total[:, :-1], total[:, -1]


def _mean_losses(
    source: ActivationSource, corpus: Corpus, n_pieces: int, verbose: bool
) -> np.ndarray:
    """The model's mean loss on the tokens of each piece, NaN where none is predicted, `[n]`."""
    totals, counts = np.zeros(n_pieces), np.zeros(n_pieces)
    with tqdm(total=len(corpus), desc="losses", unit="context", disable=not verbose) as bar:
        for start, tokens, counting in corpus.blocks():
            logits = source.run(tokens).output[:, :-1].astype(mx.float32)
            right = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
            losses = np.array(mx.logsumexp(logits, axis=-1) - right)
            scored = np.array(counting)[:, 1:]
            owners = corpus.owners[start : start + len(tokens), 1:][scored]
            totals += np.bincount(owners, losses[scored], n_pieces)
            counts += np.bincount(owners, minlength=n_pieces)
            bar.update(len(tokens))
    return np.divide(totals, counts, out=np.full(n_pieces, np.nan), where=counts > 0)


def _scale(sample: np.ndarray, columns: Columns) -> np.ndarray:
    """Factors `[width]` that give every site a mean squared norm of 1."""
    scale = np.ones(columns.width, np.float32)
    for part in columns.slices.values():
        scale[part] /= np.sqrt(np.square(sample[:, part]).sum(axis=1).mean()) or 1
    return scale


def axes(sample: np.ndarray) -> Callable[[mx.array], mx.array]:
    """Squares along the principal axes of a sample, largest first; all beyond 256 together."""
    centred = sample - sample.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    first = mx.array(np.ascontiguousarray(axes[:, ::-1][:, :MOST_AXES]))
    mean = mx.array(sample.mean(axis=0))

    def squares(x: mx.array) -> mx.array:
        along = ((x - mean) @ first).square()
        if len(mean) <= MOST_AXES:
            return along
        rest = (x - mean).square().sum(-1, keepdims=True) - along.sum(-1, keepdims=True)
        return mx.concatenate([along, mx.maximum(rest, 0)], axis=-1)

    return squares


def variance(features: np.ndarray, counts: np.ndarray) -> float:
    """The mean variance along an axis; 1 where nothing varies."""
    return float(features.sum(dtype=np.float64) / max(1, counts.sum()) / features.shape[1]) or 1.0


def clusters(rng: np.random.Generator) -> Callable[[np.ndarray], Callable[[mx.array], mx.array]]:
    """Which of about `sqrt(n)` clusters an activation is in, as a row with a single 1.

    Lloyd's k-means, from centres drawn with the squared distance to those before as weight
    (k-means++, Arthur and Vassilvitskii, 2007).
    """

    def fit(sample: np.ndarray) -> Callable[[mx.array], mx.array]:
        x = mx.array(sample)
        centres = x[mx.array(_seeds(sample, rng))]
        for _ in range(KMEANS_ROUNDS):
            members = _nearest(x, centres)
            counts = members.sum(axis=0)[:, None]
            centres = mx.where(counts > 0, members.T @ x / mx.maximum(counts, 1), centres)
            mx.eval(centres)
        return lambda x: _nearest(x, centres)

    return fit


def _seeds(sample: np.ndarray, rng: np.random.Generator) -> list[int]:
    drawn, distance = [int(rng.integers(len(sample)))], np.full(len(sample), np.inf)
    while len(drawn) < min(MOST_CLUSTERS, max(2, round(math.sqrt(len(sample))))):
        distance = np.minimum(distance, np.square(sample - sample[drawn[-1]]).sum(axis=1))
        if not distance.sum() > 0:
            break
        drawn.append(int(rng.choice(len(sample), p=distance / distance.sum())))
    return drawn


def _nearest(x: mx.array, centres: mx.array) -> mx.array:
    closeness = x @ centres.T - centres.square().sum(axis=-1) / 2
    return (closeness.argmax(axis=-1)[:, None] == mx.arange(len(centres))).astype(mx.float32)


def choose(
    objective: Objective, sizes: np.ndarray, budget: int, rng: np.random.Generator
) -> np.ndarray:
    """Indices of pieces until they have `budget` tokens, greedily, see `curate`."""
    if sizes.sum() <= budget:
        return np.arange(len(sizes))
    features, prior, power = objective
    n_candidates = max(CANDIDATES, math.ceil(CANDIDATES_PER_RATIO * sizes.sum() / budget))
    left, n_left, chosen, n_tokens = rng.permutation(len(sizes)), len(sizes), [], 0
    total = np.zeros(features.shape[1])
    while n_tokens < budget:
        few = n_left <= n_candidates
        places = np.arange(n_left) if few else rng.integers(n_left, size=n_candidates)
        candidates = left[places]
        gains = features[candidates] @ (prior + total) ** -power / sizes[candidates]
        place = places[gains.argmax()]
        chosen.append(left[place])
        total += features[left[place]]
        n_tokens += sizes[left[place]]
        n_left -= 1
        left[place] = left[n_left]
    return np.array(chosen)
