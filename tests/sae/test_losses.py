import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import kernels
from mlxterp.sae.losses import auxiliary, l1, squared_error

BATCH, D_IN, D_OUT, N = 30, 6, 5, 24


@pytest.fixture(params=[True, False], ids=["segments", "dense products"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(kernels, "_uses_segments", lambda: request.param)


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


def compute(a: dict[str, np.ndarray], dead: np.ndarray, k: int) -> mx.array:
    m = {name: mx.array(np.array(array, np.float32)) for name, array in a.items()}
    return of_mlx(m, mx.array(dead), k)


def of_mlx(m: dict[str, mx.array], dead: mx.array, k: int) -> mx.array:
    pre = mx.stop_gradient(m["x"] @ m["W_enc"].T + m["b_enc"])
    return auxiliary(m["residual"], m["x"], pre, dead, k, m["W_enc"], m["b_enc"], m["W_dec"])


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


def test_l1_is_the_mean_sum_of_the_values():
    assert l1(mx.array([[1.0, 2.0], [0.0, 5.0]])).item() == 4.0


@pytest.mark.parametrize(("n_dead", "k"), [(8, 3), (8, 8), (3, 8), (1, 1), (24, 5)])
def test_auxiliary_loss_is_the_share_that_dead_features_leave_over(n_dead, k):
    arrays, dead = problem(n_dead)
    assert compute(arrays, dead, k).item() == pytest.approx(by_hand(arrays, dead, k), rel=1e-5)


def test_dead_features_that_fit_the_residual_have_no_loss():
    arrays, dead = problem()
    arrays["residual"] = np.maximum(arrays["x"] @ arrays["W_enc"].T + arrays["b_enc"], 0)
    arrays["residual"] = (arrays["residual"] * dead) @ arrays["W_dec"]
    assert compute(arrays, dead, 8).item() < 1e-10


@pytest.mark.parametrize(("n_dead", "k"), [(8, 3), (2, 4)])
def test_auxiliary_gradient_reaches_dead_features_and_no_others(n_dead, k):
    arrays, dead = problem(n_dead)
    m = {name: mx.array(np.array(array, np.float32)) for name, array in arrays.items()}
    gradients = mx.grad(lambda m: of_mlx(m, mx.array(dead), k))(m)
    for name in ("W_enc", "b_enc", "W_dec"):
        gradient = np.array(gradients[name])
        assert not gradient[~dead].any(), name
        assert gradient[dead].any(axis=-1).all(), name
    assert not np.array(gradients["residual"]).any()


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec"])
def test_auxiliary_gradient_equals_finite_differences(name):
    arrays, dead = problem()
    m = {key: mx.array(np.array(array, np.float32)) for key, array in arrays.items()}
    gradient = np.array(mx.grad(lambda m: of_mlx(m, mx.array(dead), 3))(m)[name])
    step = 1e-6
    for position in np.argwhere(np.abs(gradient) > 1e-4)[:12]:
        at = tuple(position)
        up, down = ({**arrays, name: arrays[name].copy()} for _ in range(2))
        up[name][at] += step
        down[name][at] -= step
        slope = (by_hand(up, dead, 3) - by_hand(down, dead, 3)) / (2 * step)
        assert gradient[at] == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("n_tokens", [1, BATCH])
def test_a_residual_that_does_not_vary_has_no_auxiliary_loss(n_tokens):
    a, dead = problem()
    a |= {name: np.repeat(a[name][:1], n_tokens, axis=0) for name in ("residual", "x")}
    m = {name: mx.array(np.array(array, np.float32)) for name, array in a.items()}
    loss, gradients = mx.value_and_grad(lambda m: of_mlx(m, mx.array(dead), 3))(m)
    assert loss.item() == 0
    assert all(mx.array_equal(g, mx.zeros_like(g)) for g in gradients.values())
