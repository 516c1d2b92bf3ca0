"""Custom GPU kernels for the sparse training step: selection, sums over pairs, Adam.

A sparse code is a flat list of pairs (token, feature) sorted by token. All results are
deterministic: sums run in a fixed order and no float is added atomically. Arrays must start on a
16-byte boundary, as all but odd slices of flat arrays do.

Each kernel is written once and compiled as CUDA or as Metal. Nobody has run the Metal form, so it
has to be asked for with the environment variable `MLXTERP_METAL_KERNELS=1`.
"""

from __future__ import annotations

import os
import zlib
from functools import cache
from typing import Any

import mlx.core as mx

from mlxterp.sae import gpu_sources as sources

LIMIT = 2**31  # of the threads along one axis of a grid
PIECE = 128  # pairs summed by one block; longer segments are cut at multiples of it
UNROLL = 4  # pairs whose rows are loaded at once
WARPS = 8  # per block, where warps work alone
COLUMNS = 256  # of a slab, narrow enough for a slab of the matrix to stay in the cache

_PAIRS_IN = ["matrix", "rows", "values", "starts", "order"]
_ADAM_ARRAYS = (
    ["p", "m", "v", "g", "rate", "root", "factor", "good"],
    ["p_new", "m_new", "v_new"],
)
_KERNELS = {  # name: body, inputs, outputs
    "top_k": (sources.TOP_K, ["pre"], ["indices"]),
    "sums": (sources.SUMS, [*_PAIRS_IN, "partial"], ["out"]),
    "partial_sums": (sources.PARTIAL_SUMS, _PAIRS_IN, ["out"]),
    "dots": (sources.DOTS, ["rows", "features", "cotangent", "matrix"], ["out"]),
    "squares": (sources.SQUARES, ["g", "unit"], ["out"]),
    "adam": (sources.ADAM, *_ADAM_ARRAYS),
    "adam_unit_rows": (sources.ADAM_UNIT_ROWS, *_ADAM_ARRAYS),
}


def available() -> bool:
    """Whether the kernels run here: on CUDA, and on Metal where it was asked for."""
    if mx.default_device() != mx.Device(mx.gpu):
        return False
    return mx.cuda.is_available() or os.environ.get("MLXTERP_METAL_KERNELS") == "1"


@cache
def _kernel(name: str) -> Any:
    dialect = "cuda" if mx.cuda.is_available() else "metal"
    body, inputs, outputs = _KERNELS[name]
    header = sources.HEADERS[dialect] + sources.SHARED_HEADER
    source = sources.PRELUDES[dialect] + body
    make: Any = mx.fast.cuda_kernel if dialect == "cuda" else mx.fast.metal_kernel
    # Compiled kernels are kept on disk by name alone.
    digest = f"{zlib.crc32((header + source).encode()):08x}"
    return make(
        name=f"mlxterp_{name}_{digest}",
        input_names=inputs,
        output_names=outputs,
        source=source,
        header=header,
    )


def _run(
    name: str,
    inputs: list[mx.array],
    shapes: list[tuple[int, ...]],
    blocks: int,
    threads: int,
    slabs: int = 1,
    dtype: mx.Dtype = mx.float32,
    **template: Any,
) -> list[mx.array]:
    if blocks * threads >= LIMIT or slabs >= 2**16:
        raise ValueError(
            f"{name} takes fewer than {LIMIT} threads x {2**16} slabs, "
            f"got {blocks * threads} x {slabs}"
        )
    return _kernel(name)(
        inputs=inputs,
        template=[*template.items(), ("THREADS", threads)],
        grid=(blocks * threads, slabs, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=[dtype] * len(shapes),
    )


def _width(d: int, *arrays: mx.array) -> int:
    """Entries per load: 16 bytes of the smallest type, where the rows of `d` entries allow it."""
    width = 16 // min(array.itemsize for array in arrays)
    while d % width:
        width //= 2
    return width


def _threads(items: int, limit: int) -> int:
    return min(limit, 32 * -(-items // 32))


def top_k(pre: mx.array, k: int) -> mx.array:
    """Indices `[batch, k]`, ascending, of the `k` largest entries of each row of `[batch, n]`.

    Exact; of equal entries those with the lowest indices are chosen. Rows with NaN give some valid
    indices. Raises `ValueError` for a `k` outside of `[1, n]`.
    """
    batch, n = pre.shape
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], got {k}")
    width = _width(n, pre)
    return _run(
        "top_k", [pre], [(batch, k)], batch, 512, dtype=mx.uint32, T=pre.dtype, F=n, K=k, VEC=width
    )[0]


def decode(values: mx.array, features: mx.array, starts: mx.array, W_dec: mx.array) -> mx.array:
    """`out[r]` = sum of `values[p] * W_dec[features[p]]` over the pairs of row r, `[n_rows, d]`.

    `values` and `features` are `[n_pairs]`; row r owns the pairs `starts[r]` to `starts[r + 1]`.
    """
    return _sums(W_dec, features, values, starts, None, None)


def dots(rows: mx.array, features: mx.array, cotangent: mx.array, W_dec: mx.array) -> mx.array:
    """`out[p] = cotangent[rows[p]] . W_dec[features[p]]`, `[n_pairs]`; fast for sorted `rows`."""
    d = W_dec.shape[1]
    n_pairs = _pair_count(rows, features)
    width = _width(d, W_dec)
    chunks = COLUMNS // (32 * width)
    slabs = -(-d // COLUMNS)
    inputs = [_index(rows), _index(features), cotangent.astype(mx.float32), W_dec]
    template = {"T": W_dec.dtype, "D": d, "VEC": width, "CHUNKS": chunks, "UNROLL": UNROLL}
    launch = {"blocks": -(-n_pairs // (WARPS * 32)), "threads": 32 * WARPS, "slabs": slabs}
    parts = _run("dots", inputs, [(slabs, n_pairs)], **launch, **template)[0]
    return parts.reshape(n_pairs) if slabs == 1 else parts.sum(axis=0)


def sort_pairs(features: mx.array, n_features: int) -> tuple[mx.array, mx.array]:
    """`order` `[n_pairs]`, the pairs sorted by feature, and each feature's `starts` in it."""
    order = mx.argsort(features)
    bounds = mx.arange(n_features + 1, dtype=features.dtype)
    return order, mx.searchsorted(features[order], bounds).astype(mx.uint32)


def row_sums(
    order: mx.array, starts: mx.array, values: mx.array, rows: mx.array, matrix: mx.array
) -> mx.array:
    """`out[f]` = sum of `values[p] * matrix[rows[p]]` over the pairs of feature f.

    The result is `[n_features, d]`; `order` and `starts` are those of `sort_pairs`. Features that
    fire on many tokens are summed in pieces, by blocks that run side by side.
    """
    pieces = -(-_pair_count(values, rows, order) // PIECE)
    return _sums(matrix, rows, values, starts, order, pieces)


def _sums(matrix, rows, values, starts, order, pieces: int | None) -> mx.array:
    d = matrix.shape[1]
    _pair_count(values, rows)
    width = _width(d, matrix)
    threads = _threads(-(-d // width), 64)
    template = {
        **{"T": matrix.dtype, "D": d, "VEC": width, "PIECE": PIECE, "UNROLL": UNROLL},
        "ORDERED": pieces is not None,
    }
    launch = {"threads": threads, "slabs": -(-d // (threads * width)), **template}
    values, starts = values.astype(mx.float32), _index(starts)
    inputs = [matrix, _index(rows), values, starts, _index(rows if order is None else order)]
    partial = values
    if pieces is not None:
        partial = _run("partial_sums", inputs, [(pieces, d)], pieces, **launch)[0]
    n_segments = starts.shape[0] - 1
    return _run("sums", [*inputs, partial], [(n_segments, d)], n_segments, **launch)[0]


def row_squares(g: mx.array, unit: mx.array | None = None) -> mx.array:
    """`|g|^2` of each row `[n_rows]`; with `unit` rows, of its part at right angles to them."""
    n_rows, d = g.shape
    # Compiled kernels are told apart by their constants, not by the types of their inputs.
    inputs = [array.astype(mx.float32) for array in (g, g if unit is None else unit)]
    template = {"D": d, "VEC": _width(d, *inputs), "PROJECTED": unit is not None}
    return _run("squares", inputs, [(n_rows,)], -(-n_rows // WARPS), 32 * WARPS, **template)[0]


# Compiled, because to assemble a kernel's source at each call takes longer than to run it.
@mx.compile
def adam(p, m, v, g, rate, root, factor, good: Any = True) -> tuple[mx.array, mx.array, mx.array]:
    """Adam's new `(p, m, v)` for the gradient `factor * g`; the old ones where not `good`.

    `m += 0.1 * (g - m)`, `v += 0.001 * (g^2 - v)`, `p -= rate * m / (sqrt(v) * root + 1e-8)`.
    """
    shape = p.shape
    arrays = [array.astype(mx.float32).reshape(-1, shape[-1]) for array in (p, m, v, g)]
    width, threads = _width(shape[-1], *arrays), 256
    inputs = [*arrays, *_scalars(rate, root, factor, good)]
    blocks = -(-p.size // (threads * width))
    new = _run("adam", inputs, [arrays[0].shape] * 3, blocks, threads, VEC=width)
    p_new, m_new, v_new = (array.reshape(shape) for array in new)
    return p_new, m_new, v_new


@mx.compile
def adam_unit_rows(
    p, m, v, g, rate, root, factor, good: Any = True
) -> tuple[mx.array, mx.array, mx.array]:
    """`adam` for a matrix of unit rows: not along them, and with their norms set to 1 again."""
    n_rows, d = p.shape
    arrays = [array.astype(mx.float32) for array in (p, m, v, g)]
    width = _width(d, *arrays)
    threads = _threads(-(-d // (2 * width)), 256)
    template = {"D": d, "VEC": width, "ITEMS": -(-d // (threads * width))}
    inputs = [*arrays, *_scalars(rate, root, factor, good)]
    p_new, m_new, v_new = _run("adam_unit_rows", inputs, [p.shape] * 3, n_rows, threads, **template)
    return p_new, m_new, v_new


def _scalars(*values: Any) -> list[mx.array]:
    return [mx.array(value).astype(mx.float32).reshape(1) for value in values]


def _index(array: mx.array) -> mx.array:
    return array.astype(mx.uint32)


def _pair_count(*arrays: mx.array) -> int:
    n = arrays[0].size
    if any(array.shape != (n,) for array in arrays) or not 1 <= n < LIMIT:
        shapes = [array.shape for array in arrays]
        raise ValueError(f"pairs must be flat lists of one length in [1, {LIMIT}), got {shapes}")
    return n
