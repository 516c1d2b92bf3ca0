"""From token ids to activations: contexts through a language model, stopped at the last site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.source import ActivationSource

OUTLIER_NORM = 10.0


@dataclass(frozen=True)
class NormLimits:
    """Norms beyond which an activation counts as an outlier, one of each site.

    Models park attention on a few tokens, whose activations are tens to thousands of times as long
    as others: "attention sinks" (arXiv 2309.17453) and "massive activations" (arXiv 2402.17762).
    With `drop` they are left out.
    """

    limits: tuple[float, ...]
    drop: bool = False

    @classmethod
    def measure(
        cls, source: ActivationSource, corpus: Corpus, columns: Columns, multiple: float, drop: bool
    ) -> NormLimits:
        """A multiple of the median norm, over contexts from all of the corpus."""
        contexts = np.linspace(0, len(corpus) - 1, min(len(corpus), corpus.rows_per_forward))
        (forward,) = _forwards(source, corpus, columns, contexts.astype(int))
        norms = np.array(norms_of(forward.activations, columns), np.float64)
        norms = norms[np.isfinite(norms).all(axis=1)]
        medians = np.median(norms, axis=0) if len(norms) else np.full(norms.shape[1], np.inf)
        return cls(tuple((multiple * medians).tolist()), drop)


def norms_of(activations: mx.array, columns: Columns) -> mx.array:
    """The norm of each site's part of each activation, `[n, n_sites]`."""
    parts = [activations[:, part].astype(mx.float32) for part in columns.slices.values()]
    return mx.stack([mx.linalg.norm(part, axis=-1) for part in parts], axis=-1)


class Harvest(NamedTuple):
    """Activations `[n, width]`, and where they are from: `positions` `[n]` in the flattened tokens
    of the corpus; how many were not finite and left out; how many were outliers."""

    activations: mx.array
    positions: np.ndarray
    n_not_finite: int = 0
    n_outliers: int = 0


def harvest(
    source: ActivationSource,
    corpus: Corpus,
    columns: Columns,
    contexts: Sequence[int] | np.ndarray,
    limits: NormLimits | None = None,
) -> Iterator[Harvest]:
    """Activations of the positions that count, of some contexts, one after another.

    Those that are not finite are left out. Raises `ValueError` for a site that is not one vector
    per token.
    """
    # One forward ahead, so that the device computes while the one before it is looked at.
    waiting = None
    for following in _forwards(source, corpus, columns, contexts):
        if waiting is not None:
            yield _sound(waiting, columns, limits)
        waiting = following
    if waiting is not None:
        yield _sound(waiting, columns, limits)


def _forwards(
    source: ActivationSource,
    corpus: Corpus,
    columns: Columns,
    contexts: Sequence[int] | np.ndarray,
) -> Iterator[Harvest]:
    """All positions that count, being computed."""
    contexts = np.asarray(contexts)

    def forward(tokens: mx.array) -> mx.array:
        captured = source.run(tokens, capture=columns.names, stop=True)
        return columns.join({name: captured[name] for name in columns.names})

    if mx.default_device() != mx.Device(mx.cpu):  # where MLX compiles for long and gains nothing
        forward = mx.compile(forward)
    for start in range(0, len(contexts), corpus.rows_per_forward):
        picked = contexts[start : start + corpus.rows_per_forward]
        tokens = corpus.tokens[picked]
        joined = forward(mx.array(tokens))
        if joined.shape[:-1] != tokens.shape:
            raise ValueError(
                f"{', '.join(columns.names)} must be one vector per token, [batch, tokens, width]; "
                f"it is {list(joined.shape)}."
            )
        found = np.flatnonzero(corpus.documents(picked).reshape(-1) >= 0)
        activations = joined.reshape(-1, columns.width)[mx.array(found)]
        mx.async_eval(activations)
        row, column = np.divmod(found, corpus.context)
        yield Harvest(activations, picked[row] * corpus.context + column)


def _sound(found: Harvest, columns: Columns, limits: NormLimits | None) -> Harvest:
    """Without what is not finite or, where they are to be dropped, outliers."""
    activations = found.activations
    finite = np.array(mx.isfinite(activations).all(axis=-1))
    kept, n_outliers = finite, 0
    if limits is not None:
        beyond = norms_of(activations, columns) > mx.array(limits.limits)
        outlying = finite & np.array(beyond.any(axis=-1))
        n_outliers = int(outlying.sum())
        kept = finite & ~outlying if limits.drop else finite
    positions = found.positions
    if not kept.all():
        activations, positions = activations[mx.array(np.flatnonzero(kept))], positions[kept]
    return Harvest(activations, positions, int((~finite).sum()), n_outliers)
