"""The costly operations of a sparse coder: top-k selection, sparse decoding, sparse gradients.

The gradients are written by hand because automatic ones are dense: of the six matrix products of a
plain TopK step only the encoder's is left, and everything else touches the active (token, feature)
pairs alone. They are gradients with respect to the parameters; the input is data and receives none
(for that, use the dense `SparseCoder.encode` and `decode`).

How the pairs are summed into rows differs by back-end. On the CPU they are sorted by feature and
summed as segments. On a GPU that is slow with plain MLX operations, and a dense product of the
scattered code is the better form. Both give the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

# The stubs of MLX say that what it decorates returns `object`.
_custom_function: Any = mx.custom_function


def _uses_segments() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _group_count(n_features: int, k: int) -> int:
    """A power of two near `sqrt(k * n_features)`, which makes both selections equally small."""
    return 1 << max(0, round(math.log2(math.sqrt(k * n_features))))


def top_k(values: mx.array, k: int) -> mx.array:
    """Unordered indices `[batch, k]` of the `k` largest entries of each row of `[batch, n]`.

    Exact, in two levels: the k largest entries lie in the k groups with the largest maxima, so one
    pass finds the maxima and two selections run over about `2 * sqrt(k * n)` entries instead of n.
    Full selections over n are sorts on Metal and CUDA. Entries must be finite.
    """
    batch, n = values.shape
    groups = _group_count(n, k)
    if groups <= k or groups >= n:
        return mx.argpartition(values, n - k, axis=-1)[:, n - k :]
    depth = -(-n // groups)
    padding = depth * groups - n
    if padding:
        values = mx.pad(values, [(0, 0), (0, padding)], constant_values=-math.inf)
    # Groups are strided columns: their maxima are a reduction over contiguous rows.
    maxima = values.reshape(batch, depth, groups).max(axis=1)
    best = mx.argpartition(maxima, groups - k, axis=-1)[:, groups - k :]
    offsets = mx.arange(depth, dtype=best.dtype) * groups
    candidates = (offsets[None, :, None] + best[:, None, :]).reshape(batch, depth * k)
    entries = mx.take_along_axis(values, candidates, axis=-1)
    chosen = mx.argpartition(entries, entries.shape[1] - k, axis=-1)[:, entries.shape[1] - k :]
    # Only entries that are not finite can lose to the padding; an index beyond n must not escape.
    return mx.minimum(mx.take_along_axis(candidates, chosen, axis=-1), n - 1)


def scatter_code(values: mx.array, indices: mx.array, n_features: int) -> mx.array:
    """The dense code `[batch, n_features]` of the pairs `values`, `indices` `[batch, k]`."""
    zeros = mx.zeros((values.shape[0], n_features), values.dtype)
    return mx.put_along_axis(zeros, indices, values, axis=-1)


def _segments(indices: mx.array, n_features: int) -> tuple[mx.array, mx.array]:
    """The order that sorts the pairs by feature, and each feature's `[start, end)` in it."""
    flat = indices.reshape(-1)
    order = mx.argsort(flat)
    counts = mx.zeros((n_features,), mx.int32).at[flat].add(mx.array(1, mx.int32))
    ends = mx.cumsum(counts)
    return order, mx.stack([ends - counts, ends], axis=-1).astype(mx.uint32)


def row_sums(values: mx.array, indices: mx.array, rows: mx.array, n_features: int) -> mx.array:
    """`out[f] = sum of values[b, j] * rows[b] over all pairs with indices[b, j] == f`.

    `values` and `indices` are `[batch, k]`, `rows` `[batch, d]`; the result is `[n_features, d]`.
    """
    if not _uses_segments():
        return scatter_code(values, indices, n_features).T @ rows
    order, segments = _segments(indices, n_features)
    tokens = order // indices.shape[1]
    sums = mx.segmented_mm(values.reshape(1, -1)[:, order], rows[tokens], segments)
    return sums.reshape(n_features, rows.shape[1])


@_custom_function
def pre_activations_at(
    pre: mx.array, indices: mx.array, x: mx.array, W_enc: mx.array, b_enc: mx.array
) -> mx.array:
    """The pre-activations `[batch, k]` at `indices`, with gradients for `W_enc` and `b_enc`.

    `pre` `[batch, n_features]` must be `x @ W_enc.T + b_enc` and is treated as a constant.
    """
    return mx.take_along_axis(pre, indices, axis=-1)


@pre_activations_at.vjp
def _pre_activations_at_vjp(primals, cotangent, _):
    pre, indices, x, W_enc, b_enc = primals
    n_features = W_enc.shape[0]
    bias = mx.zeros_like(b_enc).at[indices.reshape(-1)].add(cotangent.reshape(-1))
    return (
        mx.zeros_like(pre),
        mx.zeros_like(indices),
        mx.zeros_like(x),
        row_sums(cotangent, indices, x, n_features),
        bias,
    )


@_custom_function
def decode_pairs(values: mx.array, indices: mx.array, W_dec: mx.array) -> mx.array:
    """`z @ W_dec` `[batch, d_out]` for the code given by the pairs `[batch, k]`."""
    if _uses_segments():
        return (values[:, None, :] @ W_dec[indices])[:, 0]
    return scatter_code(values, indices, W_dec.shape[0]) @ W_dec


@decode_pairs.vjp
def _decode_pairs_vjp(primals, cotangent, _):
    values, indices, W_dec = primals
    if _uses_segments():
        gradient = (W_dec[indices] @ cotangent[:, :, None])[..., 0]
    else:
        gradient = mx.take_along_axis(cotangent @ W_dec.T, indices, axis=-1)
    rows = row_sums(values, indices, cotangent, W_dec.shape[0])
    return gradient, mx.zeros_like(indices), rows
