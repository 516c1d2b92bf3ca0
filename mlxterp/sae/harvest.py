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
        norms = np.array(norms_of(forward.computed, columns), np.float64)[forward.rows]
        norms = norms[np.isfinite(norms).all(axis=1)]
        medians = np.median(norms, axis=0) if len(norms) else np.full(norms.shape[1], np.inf)
        return cls(tuple((multiple * medians).tolist()), drop)


def norms_of(activations: mx.array, columns: Columns) -> mx.array:
    """The norm of each site's part of each activation, `[n, n_sites]`."""
    parts = [activations[:, part].astype(mx.float32) for part in columns.slices.values()]
    return mx.stack([mx.linalg.norm(part, axis=-1) for part in parts], axis=-1)


class Harvest(NamedTuple):
    """What a forward pass computed `[n_computed, width]`; which `rows` of it are taken, `[n]`, and
    where these are from: `positions` `[n]` in the flattened tokens of the corpus; how many were not
    finite and left out; how many were outliers.

    `n_computed` is the same for all passes over a corpus: MLX keeps the memory of arrays that are
    gone for others of their size alone, so that with `n` of them for each pass it would pile up.
    """

    computed: mx.array
    rows: np.ndarray
    positions: np.ndarray
    n_not_finite: int = 0
    n_outliers: int = 0

    @property
    def activations(self) -> mx.array:
        """Those that are taken, `[n, width]`."""
        if len(self.rows) == len(self.computed):
            return self.computed
        taken = self.computed[mx.array(self.rows)]
        mx.async_eval(taken)  # until then it would keep all that was computed
        return taken


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
    """All positions that count, being computed; the last contexts are filled up with others."""
    contexts = np.asarray(contexts)
    n_rows = min(corpus.rows_per_forward, len(corpus))

    def forward(tokens: mx.array) -> mx.array:
        captured = source.run(tokens, capture=columns.names, stop=True)
        return columns.join({name: captured[name] for name in columns.names})

    if mx.default_device() != mx.Device(mx.cpu):  # where MLX compiles for long and gains nothing
        forward = mx.compile(forward)
    for start in range(0, len(contexts), n_rows):
        picked = contexts[start : start + n_rows]
        tokens = corpus.tokens[np.resize(picked, n_rows)]
        joined = forward(mx.array(tokens))
        if joined.shape[:-1] != tokens.shape:
            raise ValueError(
                f"{', '.join(columns.names)} must be one vector per token, [batch, tokens, width]; "
                f"it is {list(joined.shape)}."
            )
        computed = joined.reshape(-1, columns.width)
        mx.async_eval(computed)
        rows = np.flatnonzero(corpus.documents(picked).reshape(-1) >= 0)
        row, column = np.divmod(rows, corpus.context)
        yield Harvest(computed, rows, picked[row] * corpus.context + column)


def _sound(found: Harvest, columns: Columns, limits: NormLimits | None) -> Harvest:
    """Without what is not finite or, where they are to be dropped, outliers."""
    computed, rows = found.computed, found.rows
    finite = np.array(mx.isfinite(computed).all(axis=-1))[rows]
    kept, n_outliers = finite, 0
    if limits is not None:
        beyond = norms_of(computed, columns) > mx.array(limits.limits)
        outlying = finite & np.array(beyond.any(axis=-1))[rows]
        n_outliers = int(outlying.sum())
        kept = finite & ~outlying if limits.drop else finite
    n_not_finite = int((~finite).sum())
    return Harvest(computed, rows[kept], found.positions[kept], n_not_finite, n_outliers)
