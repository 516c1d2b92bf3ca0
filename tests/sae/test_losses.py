import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.losses import auxiliary, l0, l1, nested_error, quadratic, squared_error, tanh
from tests.sae.reference import central_differences

BATCH, D_IN, D_OUT, N = 30, 6, 5, 24


def to_mlx(arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(np.array(array, np.float32)) for name, array in arrays.items()}


def check_gradients(of_mlx, of_numpy, arrays: dict[str, np.ndarray]) -> None:
    """Value and every gradient of `of_mlx(arrays)` against `of_numpy` in float64."""
    value, gradients = mx.value_and_grad(of_mlx)(to_mlx(arrays))
    assert value.item() == pytest.approx(of_numpy(arrays), rel=1e-5)
    for name in arrays:
        expected = central_differences(of_numpy, arrays, name)
        assert np.abs(expected).max() > 1e-3, f"{name} has no gradient to test"
        found = np.array(gradients[name])
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=name)


def test_squared_error_is_the_mean_over_tokens_and_columns():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50, 7))
    found = squared_error(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)))
    assert found.item() == pytest.approx(np.mean((a - b) ** 2), rel=1e-5)


def test_squared_error_of_large_arrays_keeps_its_digits():
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(4096, 512)) * 3).astype(np.float32)
    found = squared_error(mx.array(a), mx.zeros(a.shape))
    assert found.item() == pytest.approx(np.mean(a.astype(np.float64) ** 2), rel=1e-4)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_nested_error_is_the_mean_over_prefixes(n_groups):
    rng = np.random.default_rng(1)
    arrays = {
        "parts": rng.normal(size=(BATCH, n_groups, D_OUT)),
        "bias": rng.normal(size=D_OUT),
        "y": rng.normal(size=(BATCH, D_OUT)),
    }

    def of_numpy(a):
        prefixes = [a["bias"] + a["parts"][:, : g + 1].sum(axis=1) for g in range(n_groups)]
        return np.mean([np.mean((y_hat - a["y"]) ** 2) for y_hat in prefixes])

    check_gradients(lambda m: nested_error(m["parts"], m["bias"], m["y"])[0], of_numpy, arrays)
    _, residual = nested_error(*to_mlx(arrays).values())
    expected = arrays["y"] - arrays["bias"] - arrays["parts"].sum(axis=1)
    np.testing.assert_allclose(np.array(residual), expected, atol=1e-5)


def test_the_error_of_one_group_is_the_plain_error():
    y_hat, y = (mx.random.normal((40, 1, 7), key=mx.random.key(i)) for i in (0, 1))
    bias = mx.random.normal((7,), key=mx.random.key(2))
    plain = squared_error(y_hat[:, 0] + bias, y[:, 0]).item()
    assert nested_error(y_hat, bias, y[:, 0])[0].item() == pytest.approx(plain, rel=1e-6)


PENALTIES = {"l1": (l1, lambda a: a), "tanh": (tanh, lambda a: np.tanh(4 * a))}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_a_dense_code_are_weighted_by_decoder_norms(name):
    penalty, shape = PENALTIES[name]
    rng = np.random.default_rng(2)
    arrays = {"z": rng.uniform(0, 0.5, (BATCH, N)), "W_dec": rng.normal(size=(N, D_OUT))}
    # Where a value is zero the slope counts as well: JumpReLU's thresholds are moved by it.
    arrays["z"][::3] = 0

    def of_numpy(a):
        norms = np.sqrt((a["W_dec"] ** 2).sum(axis=1))
        return shape(a["z"] * norms).sum() / BATCH

    def of_mlx(m):
        return penalty(m["z"], mx.linalg.norm(m["W_dec"], axis=-1), BATCH)

    check_gradients(of_mlx, of_numpy, arrays)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_pairs_are_those_of_the_dense_code(name):
    penalty, shape = PENALTIES[name]
    values = np.random.default_rng(3).uniform(0, 0.6, 57)
    found = penalty(mx.array(values.astype(np.float32)), 1.0, 12).item()
    assert found == pytest.approx(shape(values).sum() / 12, rel=1e-5)


def test_l1_is_the_mean_sum_of_the_values():
    assert l1(mx.array([[1.0, 2.0], [0.0, 5.0]]), 1.0, 2).item() == 4.0


def test_tanh_nearly_counts_what_is_large():
    assert tanh(mx.array([[5.0, 7.0, 0.0], [9.0, 0.0, 0.0]]), 1.0, 2).item() == pytest.approx(1.5)


def test_l0_is_the_mean_count():
    check_gradients(
        lambda m: l0(m["counts"]), lambda a: a["counts"].mean(), {"counts": np.arange(5.0)}
    )
    assert l0(mx.array([3.0, 0.0, 6.0])).item() == 3


def test_quadratic_is_the_squared_relative_distance_of_the_mean_count():
    counts = {"counts": np.array([1.0, 2.0, 6.0])}
    for target in (2.0, 8.0):
        check_gradients(
            lambda m, target=target: quadratic(m["counts"], target),
            lambda a, target=target: (a["counts"].mean() / target - 1) ** 2,
            counts,
        )
    assert quadratic(mx.array([1.0, 2.0, 6.0]), 2.0).item() == 0.25
    # Of the mean over the batch, not the mean over tokens: these are on target.
    assert quadratic(mx.array([0.0, 8.0]), 4.0).item() == 0


def problem(n_dead=8, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "residual": rng.normal(size=(BATCH, D_OUT)) + 1,
        "x": rng.normal(size=(BATCH, D_IN)),
        "W_enc": rng.normal(size=(N, D_IN)),
        "b_enc": rng.normal(size=N),
        "W_dec": rng.normal(size=(N, D_OUT)),
    }
    dead = np.zeros(N, bool)
    dead[rng.permutation(N)[:n_dead]] = True
    return arrays, dead


def by_hand(a: dict[str, np.ndarray], dead: np.ndarray, k: int) -> float:
    pre = a["x"] @ a["W_enc"].T + a["b_enc"]
    z = np.zeros_like(pre)
    for token, row in enumerate(pre):
        for feature in sorted(np.flatnonzero(dead), key=lambda i: -row[i])[:k]:
            z[token, feature] = max(row[feature], 0)
    error = z @ a["W_dec"] - a["residual"]
    centred = a["residual"] - a["residual"].mean(axis=0)
    return float((error**2).sum() / (centred**2).sum())


def of_mlx(m: dict[str, mx.array], dead: np.ndarray, k: int) -> mx.array:
    living = mx.array(~dead)
    return auxiliary(m["residual"], m["x"], living, k, m["W_enc"], m["b_enc"], m["W_dec"])


@pytest.mark.parametrize(("n_dead", "k"), [(8, 3), (8, 8), (3, 8), (1, 1), (24, 5), (24, 30)])
def test_auxiliary_loss_is_the_share_that_dead_features_leave_over(n_dead, k):
    arrays, dead = problem(n_dead)
    found = of_mlx(to_mlx(arrays), dead, k).item()
    assert found == pytest.approx(by_hand(arrays, dead, k), rel=1e-5)


def test_dead_features_that_fit_the_residual_have_no_loss():
    arrays, dead = problem()
    arrays["residual"] = np.maximum(arrays["x"] @ arrays["W_enc"].T + arrays["b_enc"], 0)
    arrays["residual"] = (arrays["residual"] * dead) @ arrays["W_dec"]
    assert of_mlx(to_mlx(arrays), dead, 8).item() < 1e-10


@pytest.mark.parametrize(("n_dead", "k"), [(8, 3), (2, 4)])
def test_auxiliary_gradient_reaches_dead_features_and_no_others(n_dead, k):
    arrays, dead = problem(n_dead)
    gradients = mx.grad(lambda m: of_mlx(m, dead, k))(to_mlx(arrays))
    for name in ("W_enc", "b_enc", "W_dec"):
        gradient = np.array(gradients[name])
        assert not gradient[~dead].any(), name
        assert gradient[dead].any(axis=-1).all(), name
    assert not np.array(gradients["residual"]).any()


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec"])
def test_auxiliary_gradient_equals_finite_differences(name):
    arrays, dead = problem()
    gradient = np.array(mx.grad(lambda m: of_mlx(m, dead, 3))(to_mlx(arrays))[name])
    expected = central_differences(lambda a: by_hand(a, dead, 3), arrays, name)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("n_tokens", [1, BATCH])
def test_a_residual_that_does_not_vary_has_no_auxiliary_loss(n_tokens):
    a, dead = problem()
    a |= {name: np.repeat(a[name][:1], n_tokens, axis=0) for name in ("residual", "x")}
    loss, gradients = mx.value_and_grad(lambda m: of_mlx(m, dead, 3))(to_mlx(a))
    assert loss.item() == 0
    assert all(mx.array_equal(g, mx.zeros_like(g)) for g in gradients.values())
