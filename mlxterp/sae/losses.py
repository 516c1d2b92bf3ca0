"""The terms of the training objective, each a mean over tokens of a sum over columns."""

from __future__ import annotations

import mlx.core as mx

from mlxterp.sae.kernels import top_k
from mlxterp.sae.parallel import UNDIVIDED, Undivided

TANH_SCALE = 4.0


def squared_error(y_hat: mx.array, y: mx.array, importance: mx.array | None = None) -> mx.array:
    """`mean_b sum_d importance_d (y_hat - y)^2 / d` for `[batch, d]` arrays.

    With activations normalised to a mean squared norm of d this is the fraction of the energy that
    is not reconstructed, whatever the width. `importance` `[d]` is 1 where it is not given.
    """
    return _weighted((y_hat - y).square().sum(axis=0), importance).sum() / y_hat.size


def nested_error(
    parts: mx.array, bias: mx.array, y: mx.array, importance: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The mean over prefixes of the features of their `squared_error`, and the last residual.

        y_g = bias + sum of parts[:, :g + 1];  loss = mean_g squared_error(y_g, y)

    `parts` `[batch, n_groups, d]` is what each group of features adds, `bias` `[d]` or `[batch, d]`
    what is there without them. With one group this is the plain error. The residual is `y` minus
    the reconstruction of all features, `[batch, d]`.

    Reference: Bussmann et al. 2025, Matryoshka SAEs, arXiv 2503.17547.
    """
    y_hats = mx.cumsum(parts, axis=1) if parts.shape[1] > 1 else parts
    residuals = (y - bias)[:, None] - y_hats
    loss = _weighted(residuals.square().sum(axis=0), importance).sum() / residuals.size
    return loss, residuals[:, -1]


def _weighted(columns: mx.array, importance: mx.array | None) -> mx.array:
    return columns if importance is None else columns * importance


def l1(values: mx.array, norms: mx.array | float, n_tokens: int) -> mx.array:
    """`mean_b sum_i z_i * norm_i` for values `>= 0`, with `norms` those of the decoder rows.

    Reference: Conerly et al. 2024, "Update on how we train SAEs".
    """
    return _total(values * norms) / n_tokens


def tanh(values: mx.array, norms: mx.array | float, n_tokens: int) -> mx.array:
    """`mean_b sum_i tanh(4 * z_i * norm_i)` for values `>= 0`: L1 for small ones, nearly a count
    for large ones.

    Reference: Anthropic's "Circuits Updates" of February 2024, and of January 2025 for JumpReLU.
    """
    return _total(mx.tanh(TANH_SCALE * values * norms)) / n_tokens


def l0(counts: mx.array) -> mx.array:
    """`mean_b count_b` of the active features `[batch]`, which carry a straight-through gradient.

    Reference: Rajamanoharan et al. 2024, arXiv 2407.14435, equation 9.
    """
    return counts.mean()


def quadratic(counts: mx.array, target: float) -> mx.array:
    """`(mean_b count_b / target - 1)^2`: pulls the mean number of active features to a target.

    Reference: Rajamanoharan et al. 2024, arXiv 2407.14435, appendix F.
    """
    return (counts.mean() / target - 1).square()


def _total(array: mx.array) -> mx.array:
    # Summed by columns first: MLX's flat sum loses several percent on large arrays on the CPU.
    return array.sum(axis=0).sum()


def auxiliary(
    residual: mx.array,
    x: mx.array,
    living: mx.array,
    k: int,
    W_enc: mx.array,
    b_enc: mx.array,
    W_dec: mx.array,
    division: Undivided = UNDIVIDED,
) -> mx.array:
    """How badly dead features explain what the living ones leave over.

        e' = W_dec.T @ relu(the k largest pre-activations)
        loss = mean_b |e' - residual|^2 / mean_b |residual - mean(residual)|^2

    The arrays hold the rows of `n` features; those that are `living` `[n]` are left out. Zero where
    the residual is the same on every token. `residual` `[batch, d_out]` is a constant; the gradient
    reaches the encoder and the decoder of dead features only.

    Reference: Gao et al. 2024, arXiv 2406.04093, section A.2.
    """
    residual = mx.stop_gradient(residual)
    z = mx.where(living, 0, mx.maximum(mx.addmm(b_enc, x, W_enc.T), 0))
    n = z.shape[1]
    if k < n * (division.size if division.divides_features else 1):
        chosen = top_k(mx.stop_gradient(z), min(k, n))
        entries = division.largest(mx.take_along_axis(z, chosen, axis=-1), k)
        z = mx.put_along_axis(mx.zeros_like(z), chosen, entries, axis=-1)
    error = division.sum_over_features(z @ W_dec) - residual
    mean = division.mean_over_tokens
    variance = mean((residual - mean(residual.mean(axis=0))).square().sum(axis=0).sum())
    # Rounding leaves about this much variance to rows that are equal.
    varies = variance > 1e-6 * mean(residual.square().sum(axis=0).sum())
    left_over = error.square().sum(axis=0).sum() / mx.where(varies, variance, 1)
    return mx.where(varies, left_over, 0)
