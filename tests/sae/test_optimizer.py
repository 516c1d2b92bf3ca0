import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.optimizer import (
    adam,
    gradient_norm,
    initial_moments,
    project,
    row_dots,
    unit_rows,
    with_norm,
)
from tests.sae.reference import Adam

N, D = 12, 6
SHAPES = {"W_enc": (N, D), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "log_gain": (N,)}


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}


def to_mlx(found: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(array.astype(np.float32)) for name, array in found.items()}


def initial_params(unit_norm: bool = True) -> dict[str, mx.array]:
    params = to_mlx(arrays(0))
    return params | ({"W_dec": unit_rows(params["W_dec"])} if unit_norm else {})


def step(params, moments, gradients, clip=0.0, unit_norm=True, rate=0.01):
    gradients, norm = with_norm(gradients, params, unit_norm)
    return adam(params, moments, gradients, norm, mx.array(rate), clip, unit_norm)


@pytest.mark.parametrize("unit_norm", [True, False], ids=["unit rows", "free rows"])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e5], ids=["unclipped", "clipped", "out of reach"])
def test_steps_equal_those_of_adam_in_float64(clip, unit_norm):
    params = initial_params(unit_norm)
    reference, moments = Adam(params, clip, unit_norm), initial_moments(params)
    for i in range(6):
        # From tiny to large, so that epsilon counts and the moments have to forget.
        gradients = arrays(1 + i, scale=10.0 ** (i - 3))
        gradients["b_dec"] *= 1e-7
        params, moments = step(params, moments, to_mlx(gradients), clip, unit_norm)
        reference.step(gradients, 0.01)
        assert moments["t"].item() == i + 1
        for name in SHAPES:
            for found, expected in (
                (moments["m"][name], reference.m[name]),
                (moments["v"][name], reference.v[name]),
            ):
                largest = np.abs(expected).max()
                np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-5 * largest)
            np.testing.assert_allclose(np.array(params[name]), reference.params[name], atol=3e-6)


def test_the_first_step_has_the_length_of_the_learning_rate():
    params = initial_params(unit_norm=False)
    gradients = {name: mx.sign(array) * 3 for name, array in to_mlx(arrays(1)).items()}
    after, _ = step(params, initial_moments(params), gradients, unit_norm=False, rate=0.125)
    for name, array in params.items():
        moved = np.array(after[name] - array)
        np.testing.assert_allclose(moved, -0.125 * np.sign(gradients[name]), rtol=1e-5)


def test_moments_and_rates_of_the_first_steps_are_corrected_for_their_start():
    params = {"W_dec": mx.zeros((1, 1)), "b_dec": mx.zeros((1,))}
    moments, same = initial_moments(params), {name: mx.ones_like(p) for name, p in params.items()}
    for i in range(1, 4):
        params, moments = step(params, moments, same, unit_norm=False, rate=0.1)
        assert params["b_dec"].item() == pytest.approx(-0.1 * i, rel=1e-4)
        assert moments["m"]["b_dec"].item() == pytest.approx(1 - 0.9**i, rel=1e-5)
        assert moments["v"]["b_dec"].item() == pytest.approx(1 - 0.999**i, rel=1e-4)


def test_decoder_rows_keep_unit_norm_and_nothing_else_does():
    params = initial_params()
    moments = initial_moments(params)
    for i in range(5):
        params, moments = step(params, moments, to_mlx(arrays(i)), rate=0.3)
    norms = np.linalg.norm(np.array(params["W_dec"], np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    assert np.ptp(np.linalg.norm(np.array(params["W_enc"]), axis=1)) > 0.5


def test_projection_removes_what_points_along_the_rows_and_nothing_else():
    params, gradients = initial_params(), to_mlx(arrays(1))
    projected = project(gradients, params)
    W, g = (np.array(a["W_dec"], np.float64) for a in (params, gradients))
    np.testing.assert_allclose((np.array(projected["W_dec"]) * W).sum(axis=1), 0, atol=1e-6)
    along = (g * W).sum(axis=1, keepdims=True)
    assert np.abs(along).min() > 1e-3
    np.testing.assert_allclose(np.array(projected["W_dec"]), g - along * W, atol=1e-6)
    assert all(projected[name] is gradients[name] for name in SHAPES if name != "W_dec")


def test_clipping_scales_all_gradients_by_one_factor():
    params, gradients = initial_params(unit_norm=False), to_mlx(arrays(1))
    norm = gradient_norm(gradients).item()
    expected = np.sqrt(sum((np.array(g, np.float64) ** 2).sum() for g in gradients.values()))
    assert norm == pytest.approx(expected, rel=1e-6)
    for clip in (norm / 4, 2 * norm, 0.0):
        _, moments = step(params, initial_moments(params), gradients, clip, unit_norm=False)
        factor = 0.25 if clip == norm / 4 else 1
        for name, g in gradients.items():
            np.testing.assert_allclose(
                np.array(moments["m"][name]), 0.1 * factor * np.array(g), rtol=1e-5
            )


def test_the_norm_of_a_large_gradient_keeps_its_digits():
    g = np.random.default_rng(0).normal(size=(4096, 512)).astype(np.float32)
    found = gradient_norm({"W_dec": mx.array(g), "b_dec": mx.ones((512,))}).item()
    assert found == pytest.approx(np.sqrt((g.astype(np.float64) ** 2).sum() + 512), rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e30])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_everything_to_the_last_bit(name, value, clip):
    params = initial_params()
    params, moments = step(params, initial_moments(params), to_mlx(arrays(1)), clip)
    gradients = arrays(2)
    gradients[name].reshape(-1)[3] = value
    after, after_moments = step(params, moments, to_mlx(gradients), clip)
    assert after_moments["t"].item() == moments["t"].item() == 1
    for key in SHAPES:
        assert mx.array_equal(after[key], params[key]), key
        for moment in ("m", "v"):
            assert mx.array_equal(after_moments[moment][key], moments[moment][key]), key


def test_row_dots_are_the_products_of_rows():
    a, b = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    found = np.array(row_dots(mx.array(a), mx.array(b)))
    np.testing.assert_allclose(found, (a * b).sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_unit_rows_point_the_same_way_and_a_row_of_zeros_stays():
    rows = unit_rows(mx.array([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-8]]))
    np.testing.assert_allclose(np.array(rows), [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)
