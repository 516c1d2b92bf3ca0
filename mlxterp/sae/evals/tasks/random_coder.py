"""A coder that knows nothing: random directions in the place of what was learned."""

from __future__ import annotations

import copy
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder

TOKENS, ENTRIES = 2048, 1 << 26  # that are looked at
BLOCK_ENTRIES = 1 << 24

Coder = TypeVar("Coder", bound=SparseCoder)


def random_coder(coder: Coder, activations: mx.array, seed: int = 0) -> Coder:
    """A coder of the same shape whose features are random directions, as a control.

    Rows of both matrices keep their norms; where a feature reads and writes columns of the same
    number, its two directions are one. Every bias is such that on the `activations` `[n, d_in]`
    (of which up to 2048 are looked at) the feature's pre-activation exceeds what the trained one's
    does on the share of tokens on which that fires: a feature is as rare as the one in whose place
    it is, nearly where thresholds decide, and roughly where the largest are selected.
    """
    n = max(1, min(TOKENS, len(activations), ENTRIES // coder.n_features))
    x = activations[mx.array(np.linspace(0, len(activations) - 1, n).astype(np.int64))]
    made = copy.copy(coder)  # what it knows of models and data stays shared
    keys = mx.random.split(mx.random.key(seed), 2)
    made.W_enc = _with_norms_of(coder.W_enc, mx.random.normal(coder.W_enc.shape, key=keys[0]))
    tied = coder.W_enc.shape == coder.W_dec.shape
    rows = made.W_enc if tied else mx.random.normal(coder.W_dec.shape, key=keys[1])
    made.W_dec = _with_norms_of(coder.W_dec, rows)
    pre, fires = coder.pre_activations(x), coder.encode(x) != 0
    made.b_enc = coder.b_enc + _shifts(pre, made.pre_activations(x), fires)
    mx.eval(made.parameters())
    return made


def _with_norms_of(matrix: mx.array, rows: mx.array) -> mx.array:
    norms = mx.linalg.norm(matrix, axis=-1) / mx.linalg.norm(rows, axis=-1)
    return rows * norms[:, None]


def _shifts(pre: mx.array, random: mx.array, fires: mx.array) -> mx.array:
    """What is to be added to random pre-activations `[n, n_features]` so that as many are above
    the smallest that fires."""
    n, n_features = pre.shape
    size = max(1, BLOCK_ENTRIES // n)
    shifts = []
    for start in range(0, n_features, size):
        part = slice(start, start + size)
        ours, theirs = (np.array(a[:, part].astype(mx.float32)) for a in (pre, random))
        counts = np.array(fires[:, part]).sum(axis=0)
        # Between the last that is to fire and the first that is not.
        edges = [
            (np.take_along_axis(ordered, np.clip(n - counts, 0, n - 1)[None], axis=0)
             + np.take_along_axis(ordered, np.clip(n - counts - 1, 0, n - 1)[None], axis=0))[0] / 2
            for ordered in (np.sort(ours, axis=0), np.sort(theirs, axis=0))
        ]  # fmt: skip
        shifts.append(edges[0] - edges[1])
    return mx.array(np.concatenate(shifts))
