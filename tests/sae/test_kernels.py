import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import kernels
from mlxterp.sae.kernels import (
    Pairs,
    decode_groups,
    decode_pairs,
    row_sums,
    scatter_code,
    select_from_batch,
    select_per_token,
    top_k,
    with_gradients,
)

SHAPES = [
    (1, 1, 1), (3, 7, 1), (3, 7, 7), (5, 100, 3), (4, 1000, 16), (2, 4097, 64), (8, 3000, 100),
    (3, 256, 256), (2, 130, 129), (6, 5000, 1), (1, 2, 1), (70, 333, 20),
]  # fmt: skip


@pytest.fixture(params=[True, False], ids=["segments", "dense products"])
def form(request, monkeypatch):
    monkeypatch.setattr(kernels, "_uses_segments", lambda: request.param)
    return request.param


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


def listed(pairs: Pairs) -> list[tuple[int, int]]:
    """The (token, feature) pairs, after a check that they are sorted by token."""
    tokens, features = pairs.tokens.tolist(), pairs.features.tolist()
    assert tokens == sorted(tokens)
    return list(zip(tokens, features, strict=True))


@pytest.mark.parametrize(("batch", "n", "k"), [(9, 40, 5), (4, 300, 7), (1, 6, 6)])
def test_selection_per_token_takes_the_largest_of_every_row(batch, n, k):
    pre = np.random.default_rng(n).normal(size=(batch, n)).astype(np.float32)
    pairs = select_per_token(mx.array(pre), k)
    expected = {(t, int(f)) for t in range(batch) for f in np.argsort(-pre[t])[:k]}
    assert set(listed(pairs)) == expected and len(listed(pairs)) == batch * k
    assert (pairs.n_tokens, pairs.n_features, pairs.per_token) == (batch, n, k)


@pytest.mark.parametrize(
    ("batch", "n", "count"), [(9, 40, 45), (4, 300, 28), (5, 6, 30), (3, 8, 1)]
)
def test_selection_from_the_batch_takes_the_largest_wherever_they_are(batch, n, count):
    pre = np.random.default_rng(n).normal(size=(batch, n)).astype(np.float32)
    pre[0] += 2  # so that tokens differ in number
    pairs = select_from_batch(mx.array(pre), count)
    largest = np.argsort(-pre.reshape(-1))[:count]
    # Sorted by token and, on each, by feature: nested groups rely on it.
    assert listed(pairs) == sorted((int(i) // n, int(i) % n) for i in largest)
    assert pairs.per_token is None


def test_ordered_pairs_are_the_same_pairs_sorted_by_feature_on_each_token():
    pairs = select_per_token(mx.random.normal((6, 50), key=mx.random.key(0)), 7)
    assert listed(pairs.ordered()) == sorted(listed(pairs))


N_FEATURES, D_IN, D_OUT, BATCH = 40, 6, 4, 9


def per_token(rng) -> Pairs:
    """5 pairs a token: feature 3 is on every token, features 0 to 2 and 39 on none."""
    others = [rng.permutation(np.arange(4, N_FEATURES - 1))[:4] for _ in range(BATCH)]
    features = np.concatenate([np.full((BATCH, 1), 3), others], axis=1).reshape(-1)
    tokens = np.repeat(np.arange(BATCH), 5)
    return Pairs(*_ids(tokens, features), BATCH, N_FEATURES, 5)


def from_batch(rng) -> Pairs:
    """From no pair on a token (3 and the last) to 20 of them."""
    counts = [1, 20, 4, 0, 7, 2, 9, 3, 0]
    tokens = np.repeat(np.arange(BATCH), counts)
    features = [np.sort(rng.permutation(N_FEATURES - 1)[:count]) for count in counts]
    return Pairs(*_ids(tokens, np.concatenate(features)), BATCH, N_FEATURES, None)


def _ids(tokens, features):
    return mx.array(tokens.astype(np.uint32)), mx.array(features.astype(np.uint32))


@pytest.fixture(params=[per_token, from_batch], ids=["per token", "from the batch"])
def problem(request):
    """Pairs, and float64 arrays of every shape that the kernels take."""
    rng = np.random.default_rng(0)
    pairs = request.param(rng)
    arrays = {
        "x": rng.normal(size=(BATCH, D_IN)),
        "W_enc": rng.normal(size=(N_FEATURES, D_IN)),
        "b_enc": rng.normal(size=N_FEATURES),
        "W_dec": rng.normal(size=(N_FEATURES, D_OUT)),
        # Some are negative, as with AbsTopK.
        "values": rng.normal(size=len(pairs.features)),
        "weights": rng.normal(size=len(pairs.features)),
        "out": rng.normal(size=(BATCH, 3, D_OUT)),
    }
    return pairs, arrays


def to_mlx(arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(array.astype(np.float32)) for name, array in arrays.items()}


def ids(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    return np.array(pairs.tokens).astype(int), np.array(pairs.features).astype(int)


def dense_code(pairs: Pairs, values: np.ndarray) -> np.ndarray:
    code = np.zeros((pairs.n_tokens, pairs.n_features))
    code[ids(pairs)] = values
    return code


def close(found: mx.array, expected, rtol=2e-5, atol=4e-6) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=rtol, atol=atol)


def test_pairs_place_values_into_a_dense_code_and_take_them_out(problem):
    pairs, arrays = problem
    dense = pairs.dense(to_mlx(arrays)["values"])
    close(dense, dense_code(pairs, arrays["values"]))
    close(pairs.at(dense), arrays["values"])


def test_scattered_code_holds_each_value_at_its_feature():
    values, indices = mx.array([[1.0, 2.0], [3.0, 4.0]]), mx.array([[2, 0], [1, 2]])
    assert scatter_code(values, indices, 4).tolist() == [[2, 0, 1, 0], [0, 3, 4, 0]]


def test_row_sums_add_up_the_rows_of_each_feature(problem, form):
    pairs, arrays = problem
    a = to_mlx(arrays)
    expected = np.zeros((N_FEATURES, D_IN))
    for p, (token, feature) in enumerate(zip(*ids(pairs), strict=True)):
        expected[feature] += arrays["values"][p] * arrays["x"][token]
    found = row_sums(a["values"], pairs, a["x"])
    close(found, expected)
    unused = ~np.isin(np.arange(N_FEATURES), ids(pairs)[1])
    assert unused[39] and not np.array(found)[unused].any()


def test_pre_activations_at_have_the_values_and_gradients_of_the_dense_product(problem, form):
    pairs, arrays = problem
    a = to_mlx(arrays)

    def sparse(W_enc, b_enc):
        pre = a["x"] @ W_enc.T + b_enc
        return (a["weights"] * pre_activations_at(pre, pairs, a["x"], W_enc, b_enc)).sum()

    value, (W, b) = mx.value_and_grad(sparse, (0, 1))(a["W_enc"], a["b_enc"])
    code = dense_code(pairs, arrays["weights"])
    pre = arrays["x"] @ arrays["W_enc"].T + arrays["b_enc"]
    close(value, (code * pre).sum(), rtol=1e-4)
    close(W, code.T @ arrays["x"])
    close(b, code.sum(axis=0))


def test_the_bias_gradient_of_many_tokens_keeps_its_digits_in_bfloat16(form):
    n = 4096
    zeros = mx.zeros((n,), mx.uint32)
    pairs = Pairs(mx.arange(n, dtype=mx.uint32), zeros, n, 2, 1)
    x, W_enc = mx.zeros((n, 1), mx.bfloat16), mx.zeros((2, 1), mx.bfloat16)

    def total(b_enc):
        pre = mx.broadcast_to(b_enc, (n, 2))
        return pre_activations_at(pre, pairs, x, W_enc, b_enc).astype(mx.float32).sum()

    gradient = mx.grad(total)(mx.zeros((2,), mx.bfloat16))
    assert gradient.astype(mx.float32).tolist() == [n, 0]


BOUNDS = {"one group": (), "two groups": (12,), "three groups": (1, 25)}


def slices(bounds: tuple[int, ...]) -> list[slice]:
    ends = (0, *bounds, N_FEATURES)
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


@pytest.fixture(params=BOUNDS.values(), ids=BOUNDS)
def bounds(request):
    return request.param


def check_decoding(problem, bounds) -> None:
    """`decode_pairs` and its gradients against products of the dense code's slices."""
    pairs, arrays = problem
    groups = slices(bounds)
    out = arrays["out"][:, : len(groups)]
    order = np.lexsort(ids(pairs)[::-1])
    arrays = {**arrays, "values": arrays["values"][order]}
    pairs = pairs.ordered()
    code, a = dense_code(pairs, arrays["values"]), to_mlx(arrays)

    def sparse(values, W_dec):
        parts = decode_pairs(values, pairs, W_dec, bounds)
        return (mx.array(out.astype(np.float32)) * parts).sum(), parts

    (_, parts), (v, W) = mx.value_and_grad(sparse, (0, 1))(a["values"], a["W_dec"])
    W_dec = arrays["W_dec"]
    expected = np.stack([code[:, part] @ W_dec[part] for part in groups], axis=1)
    by_code = np.concatenate([out[:, i] @ W_dec[part].T for i, part in enumerate(groups)], axis=1)
    rows = np.concatenate([code[:, part].T @ out[:, i] for i, part in enumerate(groups)])
    assert parts.shape == expected.shape
    close(parts, expected)
    close(v, by_code[ids(pairs)])
    close(W, rows)


def test_decoding_pairs_has_the_values_and_gradients_of_dense_slices(problem, bounds, form):
    check_decoding(problem, bounds)


@pytest.mark.parametrize("blocks", [2, 4])
def test_cutting_gathered_rows_into_blocks_changes_nothing(problem, bounds, blocks, monkeypatch):
    monkeypatch.setattr(kernels, "_uses_segments", lambda: True)
    n_pairs = len(problem[0].features)
    monkeypatch.setattr(kernels, "GATHERED_BYTES", n_pairs * D_OUT * 4 // blocks)
    assert kernels._column_blocks(n_pairs, D_OUT) == blocks
    check_decoding(problem, bounds)


@pytest.mark.parametrize(
    ("n_rows", "width", "expected"), [(8, 4, 1), (9, 4, 2), (32, 4, 4), (99, 6, 6)]
)
def test_blocks_are_the_fewest_equal_ones_within_the_memory(n_rows, width, expected, monkeypatch):
    monkeypatch.setattr(kernels, "GATHERED_BYTES", 128)
    # More than one block a column cannot be had.
    assert kernels._column_blocks(n_rows, width) == expected


def test_row_sums_in_blocks_are_the_same(problem, monkeypatch):
    pairs, arrays = problem
    a = to_mlx(arrays)
    monkeypatch.setattr(kernels, "_uses_segments", lambda: True)
    whole = row_sums(a["values"], pairs, a["x"])
    monkeypatch.setattr(kernels, "GATHERED_BYTES", 1)
    close(row_sums(a["values"], pairs, a["x"]), whole, rtol=1e-6, atol=1e-6)


def test_decoding_a_dense_code_by_groups_is_the_product_of_its_slices(bounds):
    rng = np.random.default_rng(1)
    z, W = rng.normal(size=(BATCH, N_FEATURES)), rng.normal(size=(N_FEATURES, D_OUT))
    found = decode_groups(*to_mlx({"z": z, "W": W}).values(), bounds)
    close(found, np.stack([z[:, part] @ W[part] for part in slices(bounds)], axis=1))


def test_gradients_of_one_token_and_one_feature_are_right(form):
    W_enc, b_enc, x = mx.array([[2.0, 1.0]]), mx.array([0.5]), mx.array([[3.0, -1.0]])
    pairs = Pairs(mx.array([0]), mx.array([0]), 1, 1, 1)

    def value(W_enc, b_enc):
        pre = x @ W_enc.T + b_enc
        return decode_pairs(pre_activations_at(pre, pairs, x, W_enc, b_enc), pairs, W_enc).sum()

    result, (W, b) = mx.value_and_grad(value, (0, 1))(W_enc, b_enc)
    # pre = 6 - 1 + 0.5 = 5.5; sum of 5.5 * (2, 1) = 16.5; d/dW = (2 + 1) * x + 5.5.
    assert result.item() == 16.5
    assert W.tolist() == [[14.5, 2.5]] and b.tolist() == [3.0]


def pre_activations_at(pre, pairs, x, W_enc, b_enc):
    return with_gradients(pairs.at(mx.stop_gradient(pre)), pairs, x, W_enc, b_enc)
