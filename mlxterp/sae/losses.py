"""The terms of the training objective, each a mean over tokens of a sum over columns."""

from __future__ import annotations

import mlx.core as mx

from mlxterp.sae.kernels import decode_pairs, pre_activations_at, top_k

_BELOW_ALL = -1e30


def squared_error(y_hat: mx.array, y: mx.array) -> mx.array:
    """`mean_b sum_d (y_hat - y)^2 / d` for `[batch, d]` arrays.

    With activations normalised to a mean squared norm of d this is the fraction of the energy that
    is not reconstructed, whatever the width.
    """
    return (y_hat - y).square().sum(axis=0).sum() / y_hat.size


def l1(z: mx.array) -> mx.array:
    """`mean_b sum_i |z_i|` over the active values `[batch, k]` (decoder rows have unit norm)."""
    return mx.abs(z).sum() / z.shape[0]


def auxiliary(
    residual: mx.array,
    x: mx.array,
    pre: mx.array,
    dead: mx.array,
    k: int,
    W_enc: mx.array,
    b_enc: mx.array,
    W_dec: mx.array,
) -> mx.array:
    """How badly the dead features explain what the living ones leave over.

        e' = W_dec.T @ relu(the k largest pre-activations of dead features)
        loss = mean_b |e' - residual|^2 / mean_b |residual - mean(residual)|^2

    Zero where the residual is the same on every token. `residual` `[batch, d_out]` is a constant;
    `dead` `[n_features]` is boolean. The gradient reaches the encoder and the decoder of dead
    features only.

    Reference: Gao et al. 2024, arXiv 2406.04093, section A.2.
    """
    residual = mx.stop_gradient(residual)
    indices = top_k(mx.where(dead, pre, _BELOW_ALL), k)
    values = mx.maximum(pre_activations_at(pre, indices, x, W_enc, b_enc), 0)
    values = mx.where(dead[indices], values, 0)
    error = decode_pairs(values, indices, W_dec) - residual
    variance = (residual - residual.mean(axis=0)).square().sum(axis=0).sum()
    # Rounding leaves about this much variance to rows that are equal.
    varies = variance > 1e-6 * residual.square().sum(axis=0).sum()
    left_over = error.square().sum(axis=0).sum() / mx.where(varies, variance, 1)
    return mx.where(varies, left_over, 0)
