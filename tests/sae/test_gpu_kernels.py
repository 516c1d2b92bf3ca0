"""The custom kernels against float64; they need a GPU."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import gpu_kernels

needs_gpu = pytest.mark.skipif(not gpu_kernels.available(), reason="needs CUDA")
DTYPES = [mx.float32, mx.bfloat16]


def _largest(rows, k):
    return np.sort(np.argsort(-rows, axis=-1, kind="stable")[:, :k], axis=-1)


def _as_float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _pairs(rng, n_rows, n_features, k):
    features = np.stack([np.sort(rng.permutation(n_features)[:k]) for _ in range(n_rows)])
    rows = np.repeat(np.arange(n_rows), k)
    return rows.astype(np.uint32), features.reshape(-1).astype(np.uint32)


def _close(result, expected, scale=1e-5):
    result, expected = np.array(result), np.array(expected)
    assert result.shape == expected.shape
    assert np.isfinite(result).all()
    assert np.abs(result - expected).max() <= scale * max(np.abs(expected).max(), 1e-30)


def _sums_of(rng, rows, features, n_features, d, dtype=mx.float32):
    """`row_sums` of random numbers, and the same in float64."""
    matrix = mx.array(rng.normal(size=(int(rows.max()) + 1, d)).astype(np.float32)).astype(dtype)
    values = rng.normal(size=len(rows)).astype(np.float32)
    expected = np.zeros((n_features, d))
    np.add.at(expected, features, values[:, None] * _as_float64(matrix)[rows])
    order, starts = gpu_kernels.sort_pairs(mx.array(features), n_features)
    sums = gpu_kernels.row_sums(order, starts, mx.array(values), mx.array(rows), matrix)
    return sums, expected


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (7, 7), (100, 3), (1000, 1), (1001, 900), (4096, 100), (40000, 256), (131072, 64)],
)
def test_top_k_is_exact(n, k, dtype):
    rows = mx.random.normal((5, n), key=mx.random.key(n)).astype(dtype)
    assert np.array_equal(gpu_kernels.top_k(rows, k), _largest(_as_float64(rows), k))


@needs_gpu
@pytest.mark.parametrize("k", [1, 10, 300, 1003])
@pytest.mark.parametrize(
    "kind", ["few values", "all equal", "zeros of both signs", "negative", "infinite", "one group"]
)
def test_top_k_prefers_low_indices_among_equal_entries(kind, k):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(3, 1003)).astype(np.float32)
    column = np.arange(1003)
    rows = {
        "few values": np.round(normal),
        "all equal": np.full_like(normal, -2.5),
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0).astype(np.float32),
        "negative": -np.abs(normal),
        "infinite": np.where(column % 3 == 0, -np.inf, normal).astype(np.float32),
        "one group": np.where(column % 512 == 5, 9.0, normal).astype(np.float32),
    }[kind]
    assert np.array_equal(gpu_kernels.top_k(mx.array(rows), k), _largest(rows, k))


@needs_gpu
@pytest.mark.parametrize("k", [5, 600])
@pytest.mark.parametrize("share", [0.01, 0.9, 1.0])
def test_rows_with_nan_give_distinct_valid_indices(share, k):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(4, 2000)).astype(np.float32)
    rows[rng.random(rows.shape) < share] = np.nan
    indices = np.array(gpu_kernels.top_k(mx.array(rows), k))
    assert indices.max() < 2000
    assert (np.diff(indices.astype(np.int64), axis=-1) > 0).all()


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 36, 130, 2048])
def test_decode_and_dots_match_a_dense_product(d, dtype):
    rng = np.random.default_rng(d)
    rows, features = _pairs(rng, 33, 300, 11)
    W_dec = mx.array(rng.normal(size=(300, d)).astype(np.float32)).astype(dtype)
    values = rng.normal(size=len(rows)).astype(np.float32)
    starts = mx.arange(34, dtype=mx.uint32) * 11
    code = np.zeros((33, 300))
    code[rows, features] = values
    cotangent = rng.normal(size=(33, d)).astype(np.float32)
    decoded = gpu_kernels.decode(mx.array(values), mx.array(features), starts, W_dec)
    _close(decoded, code @ _as_float64(W_dec))
    dots = gpu_kernels.dots(mx.array(rows), mx.array(features), mx.array(cotangent), W_dec)
    _close(dots, (cotangent.astype(np.float64) @ _as_float64(W_dec).T)[rows, features])


@needs_gpu
def test_rows_without_pairs_decode_to_zero():
    starts = mx.array([0, 0, 2, 2, 3, 3], mx.uint32)
    features = mx.array([1, 0, 1], mx.uint32)
    W_dec = mx.array([[1.0, 2.0], [3.0, 4.0]])
    decoded = gpu_kernels.decode(mx.array([1.0, 10.0, 100.0]), features, starts, W_dec)
    assert decoded.tolist() == [[0, 0], [13, 24], [0, 0], [300, 400], [0, 0]]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 36, 130, 2048])
def test_row_sums_match_a_dense_product(d, dtype):
    rng = np.random.default_rng(d)
    rows, features = _pairs(rng, 70, 500, 20)
    _close(*_sums_of(rng, rows, features, 500, d, dtype))


@needs_gpu
@pytest.mark.parametrize("n_rows", [127, 128, 129, 1000])
def test_a_feature_on_every_token_is_summed_in_pieces(n_rows):
    rng = np.random.default_rng(n_rows)
    rows, features = _pairs(rng, n_rows, 40, 6)
    features[::6] = 3  # may repeat a feature in a row, which sums allow
    _close(*_sums_of(rng, rows, features, 40, 12))


@needs_gpu
def test_features_without_pairs_have_zero_sums():
    rng = np.random.default_rng(0)
    rows, features = np.zeros(300, np.uint32), np.full(300, 5, np.uint32)
    sums, expected = _sums_of(rng, rows, features, 9, 4)
    _close(sums, expected)
    assert not np.delete(np.array(sums), 5, axis=0).any()


@needs_gpu
def test_row_sums_do_not_change_between_runs():
    rng = np.random.default_rng(2)
    rows, features = _pairs(rng, 600, 50, 10)
    runs = [_sums_of(np.random.default_rng(3), rows, features, 50, 64)[0] for _ in range(5)]
    assert all(mx.array_equal(runs[0], run) for run in runs)


@needs_gpu
@pytest.mark.parametrize("d", [3, 64, 2050])
def test_row_squares_leave_out_the_part_along_the_unit_rows(d):
    rng = np.random.default_rng(d)
    g = rng.normal(size=(37, d)).astype(np.float32)
    unit = rng.normal(size=(37, d)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    rest = g.astype(np.float64) - (g.astype(np.float64) * unit).sum(-1, keepdims=True) * unit
    _close(gpu_kernels.row_squares(mx.array(g)), (g.astype(np.float64) ** 2).sum(-1))
    _close(gpu_kernels.row_squares(mx.array(g), mx.array(unit)), (rest**2).sum(-1))


def _adam(p, m, v, g, rate, root, factor):
    g = factor * g
    m = m + 0.1 * (g - m)
    v = v + 0.001 * (g**2 - v)
    return p - rate * m / (np.sqrt(v) * root + 1e-8), m, v


def _adam_inputs(rng, shape):
    p, m, g = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    return p, m, rng.random(shape).astype(np.float32), g


@needs_gpu
@pytest.mark.parametrize("shape", [(1,), (13,), (64,), (5, 36), (3, 4, 5), (300, 128)])
def test_adam_follows_its_formula(shape):
    inputs = _adam_inputs(np.random.default_rng(0), shape)
    expected = _adam(*(array.astype(np.float64) for array in inputs), 0.01, 1.5, 0.3)
    new = gpu_kernels.adam(*map(mx.array, inputs), mx.array(0.01), mx.array(1.5), mx.array(0.3))
    for result, reference in zip(new, expected, strict=True):
        _close(result, reference, 1e-6)


@needs_gpu
@pytest.mark.parametrize("d", [1, 5, 36, 2048, 9000])
def test_adam_keeps_unit_rows(d):
    p, m, v, g = _adam_inputs(np.random.default_rng(d), (21, d))
    p /= np.linalg.norm(p, axis=-1, keepdims=True)
    wide = [array.astype(np.float64) for array in (p, m, v, g)]
    wide[3] = wide[3] - (wide[3] * wide[0]).sum(-1, keepdims=True) * wide[0]
    expected = list(_adam(*wide, 0.01, 1.5, 0.3))
    expected[0] /= np.linalg.norm(expected[0], axis=-1, keepdims=True)
    new = gpu_kernels.adam_unit_rows(*map(mx.array, (p, m, v, g)), 0.01, 1.5, 0.3)
    for result, reference in zip(new, expected, strict=True):
        _close(result, reference, 1e-5)


@needs_gpu
@pytest.mark.parametrize("update", [gpu_kernels.adam, gpu_kernels.adam_unit_rows])
def test_a_bad_step_changes_nothing(update):
    inputs = [mx.array(array) for array in _adam_inputs(np.random.default_rng(0), (8, 20))]
    inputs[3] = mx.full((8, 20), mx.nan)
    new = update(*inputs, mx.array(0.1), mx.array(1.0), mx.array(mx.nan), mx.array(False))
    assert all(mx.array_equal(a, b) for a, b in zip(new, inputs[:3], strict=True))


@needs_gpu
def test_kernels_work_compiled_and_as_gradients():
    rng = np.random.default_rng(0)
    rows, features = (mx.array(part) for part in _pairs(rng, 12, 64, 5))
    starts = mx.arange(13, dtype=mx.uint32) * 5
    order, by_feature = gpu_kernels.sort_pairs(features, 64)

    @mx.custom_function
    def decode(values, W_dec):
        return gpu_kernels.decode(values, features, starts, W_dec)

    @decode.vjp
    def _(primals, cotangent, output):
        values, W_dec = primals
        dots = gpu_kernels.dots(rows, features, cotangent, W_dec)
        return dots, gpu_kernels.row_sums(order, by_feature, values, rows, cotangent)

    def dense(values, W_dec):
        return mx.zeros((12, 64)).at[rows, features].add(values) @ W_dec

    values, W_dec = mx.random.normal((60,)), mx.random.normal((64, 24))
    losses = [lambda *args, f=f: (f(*args) ** 2).sum() for f in (decode, dense)]
    sparse, reference = (mx.compile(mx.value_and_grad(loss, (0, 1))) for loss in losses)
    (loss, gradients), (loss_2, gradients_2) = sparse(values, W_dec), reference(values, W_dec)
    _close(loss, loss_2, 1e-4)
    for result, expected in zip(gradients, gradients_2, strict=True):
        _close(result, expected, 1e-4)


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_refuses_a_k_outside_of_the_row(k):
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\]"):
        gpu_kernels.top_k(mx.zeros((2, 3)), k)


def test_arrays_beyond_one_launch_are_refused():
    with pytest.raises(ValueError, match="top_k takes fewer than 2147483648 threads"):
        gpu_kernels.top_k(mx.zeros((2**22, 2)), 1)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="pairs must be flat lists of one length"):
        gpu_kernels.dots(mx.array([0, 1]), mx.array([0]), mx.zeros((2, 4)), mx.zeros((3, 4)))
