"""The costly operations of a sparse coder: top-k selection, sparse decoding, sparse gradients.

The gradients are written by hand because automatic ones are dense: of the six matrix products of a
plain TopK step only the encoder's is left, and everything else touches the active (token, feature)
pairs alone. They are gradients with respect to the parameters; the input is data and receives none
(for that, use the dense `SparseCoder.encode` and `decode`).

How the pairs are summed into rows differs by back-end. On the CPU they are sorted by feature and
summed as segments. On a GPU that is slow with plain MLX operations: there kernels of our own do it
(`gpu_kernels`) or, where those were never run, a dense product of the scattered code. All give the
same numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlxterp.sae import gpu_kernels

# The stubs of MLX say that what it decorates returns `object`.
_custom_function: Any = mx.custom_function

GATHERED_BYTES = 64 << 20


def _uses_segments() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _uses_kernels() -> bool:
    return not _uses_segments() and gpu_kernels.available()


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


@dataclass(frozen=True)
class Pairs:
    """The (token, feature) pairs of a batch that may be active, sorted by token.

    `tokens` and `features` are `[n_pairs]`; `per_token` is their number on each token where that is
    the same everywhere.
    """

    tokens: mx.array
    features: mx.array
    n_tokens: int
    n_features: int
    per_token: int | None

    @cached_property
    def by_feature(self) -> tuple[mx.array, mx.array]:
        """The order that sorts the pairs by feature, and where each feature starts in it,
        `[n_features + 1]`."""
        if _uses_kernels():
            return gpu_kernels.sort_pairs(self.features, self.n_features)
        return mx.argsort(self.features), _starts(self.features, self.n_features)

    def dense(self, values: mx.array) -> mx.array:
        """The code `[n_tokens, n_features]` with `values` at the pairs."""
        if self.per_token is not None:
            shape = (self.n_tokens, self.per_token)
            return scatter_code(
                values.reshape(shape), self.features.reshape(shape), self.n_features
            )
        flat = scatter_code(values[None], self._flat[None], self.n_tokens * self.n_features)
        return flat.reshape(self.n_tokens, self.n_features)

    def at(self, dense: mx.array) -> mx.array:
        """The entries `[n_pairs]` of a `[n_tokens, n_features]` array."""
        if self.per_token is not None:
            features = self.features.reshape(self.n_tokens, self.per_token)
            return mx.take_along_axis(dense, features, axis=-1).reshape(-1)
        return mx.take(dense.reshape(-1), self._flat)

    @property
    def _flat(self) -> mx.array:
        return self.tokens * self.n_features + self.features

    def ordered(self) -> Pairs:
        """The same pairs, on each token sorted by feature."""
        if self.per_token is None:
            return self
        features = mx.sort(self.features.reshape(self.n_tokens, self.per_token), axis=-1)
        return replace(self, features=features.reshape(-1))


def select_per_token(pre: mx.array, k: int) -> Pairs:
    """The `k` largest entries of each row of `[batch, n_features]`."""
    batch, n_features = pre.shape
    select = gpu_kernels.top_k if _uses_kernels() else top_k
    features = select(pre, k).reshape(-1)
    tokens = mx.arange(batch * k, dtype=mx.uint32) // k
    return Pairs(tokens, features, batch, n_features, k)


def select_from_batch(pre: mx.array, n: int) -> Pairs:
    """The `n` largest entries of `[batch, n_features]`, wherever they are."""
    batch, n_features = pre.shape
    flat = mx.sort(top_k(pre.reshape(1, -1), n)[0])
    return Pairs(flat // n_features, flat % n_features, batch, n_features, None)


def _starts(ids: mx.array, n: int) -> mx.array:
    """Where each of `n` ids starts among the sorted ids, and where the last one ends, `[n + 1]`."""
    counts = mx.zeros((n + 1,), mx.int32).at[ids + 1].add(mx.array(1, mx.int32))
    return mx.cumsum(counts).astype(mx.uint32)


def _segments(starts: mx.array) -> mx.array:
    """Each `[start, end)`, `[n, 2]`."""
    return mx.stack([starts[:-1], starts[1:]], axis=-1)


def _column_blocks(n_rows: int, width: int) -> int:
    """Into how many equal blocks of columns gathered rows are cut, to bound the memory."""
    wanted = n_rows * width * 4 / GATHERED_BYTES
    return next((n for n in range(1, width + 1) if n >= wanted and width % n == 0), width)


def _by_blocks(
    matrix: mx.array,
    indices: mx.array,
    use: Callable[[mx.array, int], mx.array],
    gathered: mx.array | None = None,
) -> list[mx.array]:
    """`use(rows, block)` for every block of columns of the rows of `matrix` at `indices`, which are
    `gathered` where somebody has done so."""
    n_rows, width = matrix.shape
    blocks = _column_blocks(len(indices), width)
    if blocks == 1:
        return [use(matrix[indices] if gathered is None else gathered, 0)]
    cut = matrix.reshape(n_rows * blocks, width // blocks)
    return [use(cut[indices * blocks + block], block) for block in range(blocks)]


def row_sums(
    values: mx.array, pairs: Pairs, matrix: mx.array, rows: mx.array | None = None
) -> mx.array:
    """`out[f] = sum of values[p] * matrix[rows[p]] over all pairs p with features[p] == f`.

    `values` and `rows` are `[n_pairs]`, `matrix` `[n_rows, d]`; the result is `[n_features, d]`.
    Without `rows` they are the pairs' tokens.
    """
    if not (_uses_segments() or _uses_kernels()):
        assert rows is None
        return pairs.dense(values.astype(matrix.dtype)).T @ matrix
    rows = pairs.tokens if rows is None else rows
    order, starts = pairs.by_feature
    if _uses_kernels():
        return gpu_kernels.row_sums(order, starts, values, rows, matrix)
    weights, segments = values[order][None], _segments(starts)
    parts = _by_blocks(
        matrix,
        rows[order],
        lambda gathered, _: mx.segmented_mm(weights, gathered, segments)[:, 0],
    )
    return joined(parts, axis=-1)


def with_gradients(
    raw: mx.array, pairs: Pairs, x: mx.array, W_enc: mx.array, b_enc: mx.array
) -> mx.array:
    """The pre-activations `raw` `[n_pairs]` at the pairs, with gradients for `W_enc` and `b_enc`.

    `raw` must be entries of `x @ W_enc.T + b_enc`, and is treated as a constant.
    """

    @_custom_function
    def look_up(W_enc: mx.array, b_enc: mx.array) -> mx.array:
        return raw

    @look_up.vjp
    def _vjp(primals, cotangent, _):
        W_enc, b_enc = primals
        if _uses_kernels():
            bias = row_sums(cotangent, pairs, mx.ones((len(x), 1)))[:, 0]
        else:
            # In float32: sums of many bfloat16 numbers stop growing.
            bias = mx.zeros(b_enc.shape).at[pairs.features].add(cotangent)
        rows = row_sums(cotangent, pairs, x)
        return rows.astype(W_enc.dtype), bias.astype(b_enc.dtype)

    return look_up(W_enc, b_enc)


def decode_pairs(
    values: mx.array, pairs: Pairs, W_dec: mx.array, bounds: tuple[int, ...] = ()
) -> mx.array:
    """What each group of features adds to the reconstruction, `[batch, n_groups, d_out]`.

    `values` `[n_pairs]` are the code at the pairs; `bounds` are the first features of all groups
    but the first, and with them the pairs must be ordered. Summed over the groups it is
    `z @ W_dec`.
    """
    form = _decode_rows if _uses_segments() or _uses_kernels() else _decode_dense
    return form(values, pairs, W_dec, bounds)


def _decode_dense(
    values: mx.array, pairs: Pairs, W_dec: mx.array, bounds: tuple[int, ...]
) -> mx.array:
    z = pairs.dense(mx.stop_gradient(values).astype(W_dec.dtype))
    groups = _groups(bounds, pairs.n_features)

    @_custom_function
    def decode(values: mx.array, W_dec: mx.array) -> mx.array:
        return mx.stack([z[:, part] @ W_dec[part] for part in groups], axis=1)

    @decode.vjp
    def _vjp(primals, cotangent, _):
        values, W_dec = primals
        by_group = [(part, cotangent[:, i]) for i, part in enumerate(groups)]
        at_code = joined([g @ W_dec[part].T for part, g in by_group], axis=-1)
        rows = joined([z[:, part].T @ g for part, g in by_group], axis=0)
        return pairs.at(at_code).astype(values.dtype), rows

    return decode(values, W_dec)


def decode_groups(z: mx.array, W_dec: mx.array, bounds: tuple[int, ...] = ()) -> mx.array:
    """What each group of features of a dense code adds, as `decode_pairs`; every gradient dense."""
    groups = _groups(bounds, len(W_dec))
    return mx.stack([z[:, part] @ W_dec[part] for part in groups], axis=1)


def _groups(bounds: tuple[int, ...], n_features: int) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise((0, *bounds, n_features))]


def joined(parts: list[mx.array], axis: int = 0) -> mx.array:
    """The parts side by side; one alone as it is."""
    return mx.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]


def _decode_rows(
    values: mx.array, pairs: Pairs, W_dec: mx.array, bounds: tuple[int, ...]
) -> mx.array:
    n_groups = len(bounds) + 1
    n_rows = pairs.n_tokens * n_groups
    # Group g of token t is row t * n_groups + g of what follows.
    rows = pairs.tokens
    for i, bound in enumerate(bounds):
        rows = (rows * n_groups if i == 0 else rows) + (pairs.features >= bound)
    k = None if bounds else pairs.per_token
    # Small enough, the gathered rows are kept for the gradient.
    keep = k is not None and _uses_segments() and _column_blocks(len(rows), W_dec.shape[1]) == 1
    gathered = mx.stop_gradient(W_dec)[pairs.features] if keep else None

    def starts() -> mx.array:
        return _starts(rows, n_rows) if k is None else mx.arange(n_rows + 1, dtype=mx.uint32) * k

    @_custom_function
    def decode(values: mx.array, W_dec: mx.array) -> mx.array:
        if _uses_kernels():
            decoded = gpu_kernels.decode(values, pairs.features, starts(), W_dec)
            return decoded.reshape(pairs.n_tokens, n_groups, -1)
        if k is not None:
            weights = values.reshape(n_rows, 1, k)
            use = lambda gathered, _: weights @ gathered.reshape(n_rows, k, -1)  # noqa: E731
        else:
            segments = _segments(starts())
            use = lambda gathered, _: mx.segmented_mm(values[None], gathered, segments)  # noqa: E731
        parts = _by_blocks(W_dec, pairs.features, use, gathered)
        return joined(parts, axis=-1).reshape(pairs.n_tokens, n_groups, -1)

    @decode.vjp
    def _vjp(primals, cotangent, _):
        values, W_dec = primals
        cotangent = cotangent.reshape(n_rows, -1)
        if _uses_kernels():
            dots = gpu_kernels.dots(rows, pairs.features, cotangent, W_dec)
        else:
            dots = _dots(cotangent, rows, W_dec, pairs.features, k, gathered)
        sums = row_sums(values, pairs, cotangent, rows)
        return dots.astype(values.dtype), sums.astype(W_dec.dtype)

    return decode(values, W_dec)


def _dots(
    left: mx.array,
    rows: mx.array,
    right: mx.array,
    features: mx.array,
    k: int | None,
    gathered: mx.array | None,
) -> mx.array:
    """`left[rows[p]] . right[features[p]]` for every pair, `[n_pairs]`; `k` pairs in each row."""
    if k is None:
        return mx.gather_mm(
            left[:, None, :], right[:, :, None], lhs_indices=rows, rhs_indices=features
        ).reshape(-1)
    n_rows = len(left)

    def use(gathered: mx.array, block: int) -> mx.array:
        n = gathered.shape[-1]
        part = left[:, block * n : (block + 1) * n, None]
        return (gathered.reshape(n_rows, k, n) @ part).reshape(-1)

    first, *others = _by_blocks(right, features, use, gathered)
    return sum(others, start=first)
