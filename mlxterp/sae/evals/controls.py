"""What is reconstructed by something that has learned no features."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxterp.sae.evals.noise import finite
from mlxterp.sae.kernels import scatter_code, top_k

CODE_ENTRIES = 1 << 24
TOKENS_PER_COLUMN = 4  # at least, for a fit
RIDGE = 1e-6


def random_directions(y: mx.array, n_features: int, k: int, seed: int = 0) -> mx.array:
    """What random directions make of activations `[n, width]`, as many and as sparse as features.

        z = the k largest of relu((y - mean(y)) @ R.T)        R [n_features, width], rows of norm 1
        y' = mean(y) + scale * z @ R                          with the scale that fits best

    This is an SAE that was not trained.
    """
    rows = mx.random.normal((n_features, y.shape[1]), key=mx.random.key(seed))
    rows /= mx.linalg.norm(rows, axis=-1, keepdims=True)
    mean, k = y.mean(axis=0), min(max(1, k), n_features)
    centred, parts, size = y - mean, [], max(1, CODE_ENTRIES // n_features)
    for start in range(0, len(y), size):
        along = centred[start : start + size] @ rows.T
        chosen = top_k(along, k)
        values = mx.maximum(mx.take_along_axis(along, chosen, axis=-1), 0)
        parts.append(scatter_code(values, chosen, n_features) @ rows)
        mx.eval(parts[-1])
    written = mx.concatenate(parts)
    scale = (written * centred).sum() / mx.maximum(written.square().sum(), 1e-30)
    return mean + scale * written


def affine_map(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array] | None:
    """The second half of `y` `[n, width]`, and what the affine map from `x` `[n, d_in]` makes of
    it that fits the first half best; `None` of fewer than 8 tokens for each column of `x`.

    This is a transcoder that has a skip connection and no feature.
    """
    half = len(x) // 2
    if half < TOKENS_PER_COLUMN * (x.shape[1] + 1):
        return None
    inputs, outputs = (np.array(a.astype(mx.float32), np.float64) for a in (x, y))
    centre, mean = inputs[:half].mean(axis=0), outputs[:half].mean(axis=0)
    inputs -= centre
    gram = inputs[:half].T @ inputs[:half]
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram, inputs[:half].T @ (outputs[:half] - mean))
    return y[half:], mx.array((inputs[half:] @ weight + mean).astype(np.float32))


def explained(y: mx.array, y_hat: mx.array) -> tuple[float | None, float | None]:
    """Explained variance, about the global mean, and the mean cosine."""
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (y, y_hat))
    variance = np.square(a - a.mean(axis=0)).sum()
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1 - np.square(a - b).sum() / variance
        cosine = ((a * b).sum(axis=1) / lengths).mean()
    return finite(share), finite(cosine)
