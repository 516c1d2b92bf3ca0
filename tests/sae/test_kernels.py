import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import kernels
from mlxterp.sae.kernels import decode_pairs, pre_activations_at, row_sums, scatter_code, top_k

SHAPES = [
    (1, 1, 1), (3, 7, 1), (3, 7, 7), (5, 100, 3), (4, 1000, 16), (2, 4097, 64), (8, 3000, 100),
    (3, 256, 256), (2, 130, 129), (6, 5000, 1), (1, 2, 1), (70, 333, 20),
]  # fmt: skip


@pytest.fixture(params=[True, False], ids=["segments", "dense products"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(kernels, "_uses_segments", lambda: request.param)


def check_selection(values: np.ndarray, k: int) -> None:
    indices = np.array(top_k(mx.array(values), k))
    assert indices.shape == (len(values), k)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert indices.min() >= 0 and indices.max() < values.shape[1]
    selected = np.take_along_axis(values, indices.astype(np.int64), axis=1)
    np.testing.assert_array_equal(np.sort(selected, axis=1), np.sort(values, axis=1)[:, -k:])


@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_selects_exactly_the_k_largest(shape):
    batch, n, k = shape
    rng = np.random.default_rng(n + k)
    check_selection(rng.normal(size=(batch, n)).astype(np.float32), k)


@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_is_exact_where_all_entries_are_negative(shape):
    batch, n, k = shape
    rng = np.random.default_rng(n)
    check_selection(-np.abs(rng.normal(size=(batch, n))).astype(np.float32) - 1e-3, k)


@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_is_exact_with_many_ties(shape):
    batch, n, k = shape
    rng = np.random.default_rng(k)
    check_selection(rng.integers(-2, 3, size=(batch, n)).astype(np.float32), k)
    check_selection(np.zeros((batch, n), np.float32), k)
    check_selection(np.full((batch, n), -1e30, np.float32), k)


def test_top_k_finds_neighbours_and_multiples_of_every_stride():
    # The largest entries all in one group of strided columns, then all side by side.
    for stride in (1, 2, 31, 32, 64, 128):
        values = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32)
        values[0, np.arange(20) * stride] += 100
        check_selection(values, 20)


def pairs(batch=9, n=40, k=5, d_in=6, d_out=4, seed=0):
    rng = np.random.default_rng(seed)
    # Feature 3 is in every row, features 0 and 39 in none, and some values are negative.
    others = np.array([rng.permutation(np.arange(4, n - 1))[: k - 1] for _ in range(batch)])
    indices = np.concatenate([np.full((batch, 1), 3), others], axis=1)
    return {
        "x": rng.normal(size=(batch, d_in)),
        "W_enc": rng.normal(size=(n, d_in)),
        "b_enc": rng.normal(size=n),
        "W_dec": rng.normal(size=(n, d_out)),
        "values": rng.normal(size=(batch, k)),
        "in_pairs": rng.normal(size=(batch, k)),
        "out": rng.normal(size=(batch, d_out)),
    }, indices


def to_mlx(arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(array.astype(np.float32)) for name, array in arrays.items()}


def close(found: mx.array, expected, rtol=2e-5, atol=2e-6) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=rtol, atol=atol)


def test_row_sums_add_up_the_rows_of_each_feature():
    arrays, indices = pairs()
    a = to_mlx(arrays)
    expected = np.zeros((40, 6))
    for token, row in enumerate(indices):
        for j, feature in enumerate(row):
            expected[feature] += arrays["values"][token, j] * arrays["x"][token]
    found = row_sums(a["values"], mx.array(indices), a["x"], 40)
    close(found, expected)
    assert not np.array(found)[[0, 1, 2, 39]].any()


def test_scattered_code_holds_each_value_at_its_feature():
    arrays, indices = pairs()
    expected = np.zeros((9, 40))
    np.put_along_axis(expected, indices, arrays["values"], axis=1)
    close(scatter_code(to_mlx(arrays)["values"], mx.array(indices), 40), expected)


def test_pre_activations_at_have_the_values_and_gradients_of_the_dense_product():
    arrays, indices = pairs()
    a, at = to_mlx(arrays), mx.array(indices)

    def sparse(W_enc, b_enc):
        pre = a["x"] @ W_enc.T + b_enc
        return (a["in_pairs"] * pre_activations_at(pre, at, a["x"], W_enc, b_enc)).sum()

    def dense(W_enc, b_enc):
        pre = a["x"] @ W_enc.T + b_enc
        return (a["in_pairs"] * mx.take_along_axis(pre, at, axis=-1)).sum()

    parameters = a["W_enc"], a["b_enc"]
    value, (W, b) = mx.value_and_grad(sparse, (0, 1))(*parameters)
    dense_value, (dense_W, dense_b) = mx.value_and_grad(dense, (0, 1))(*parameters)
    close(value, dense_value)
    close(W, dense_W)
    close(b, dense_b)
    code = np.zeros((9, 40))
    np.put_along_axis(code, indices, arrays["in_pairs"], axis=1)
    close(W, code.T @ arrays["x"])
    close(b, code.sum(axis=0))
    pre = arrays["x"] @ arrays["W_enc"].T + arrays["b_enc"]
    close(value, (code * pre).sum(), rtol=1e-4)


def test_decoding_pairs_has_the_values_and_gradients_of_the_dense_product():
    arrays, indices = pairs()
    a, at = to_mlx(arrays), mx.array(indices)

    def sparse(values, W_dec):
        return (a["out"] * decode_pairs(values, at, W_dec)).sum()

    def dense(values, W_dec):
        return (a["out"] * (scatter_code(values, at, 40) @ W_dec)).sum()

    parameters = a["values"], a["W_dec"]
    value, (v, W) = mx.value_and_grad(sparse, (0, 1))(*parameters)
    dense_value, (dense_v, dense_W) = mx.value_and_grad(dense, (0, 1))(*parameters)
    close(value, dense_value)
    close(v, dense_v)
    close(W, dense_W)
    code = np.zeros((9, 40))
    np.put_along_axis(code, indices, arrays["values"], axis=1)
    close(decode_pairs(*parameters[:1], at, a["W_dec"]), code @ arrays["W_dec"])
    close(W, code.T @ arrays["out"])
    by_feature = arrays["out"] @ arrays["W_dec"].T
    close(v, np.take_along_axis(by_feature, indices, axis=1))


def test_gradients_of_one_token_and_one_feature_are_right():
    W_enc, b_enc = mx.array([[2.0, 1.0]]), mx.array([0.5])
    x, at = mx.array([[3.0, -1.0]]), mx.array([[0]])

    def value(W_enc, b_enc):
        pre = x @ W_enc.T + b_enc
        return decode_pairs(pre_activations_at(pre, at, x, W_enc, b_enc), at, W_enc).sum()

    result, (W, b) = mx.value_and_grad(value, (0, 1))(W_enc, b_enc)
    # pre = 6 - 1 + 0.5 = 5.5; sum of 5.5 * (2, 1) = 16.5; d/dW = (2 + 1) * x + 5.5.
    assert result.item() == 16.5
    assert W.tolist() == [[14.5, 2.5]] and b.tolist() == [3.0]
