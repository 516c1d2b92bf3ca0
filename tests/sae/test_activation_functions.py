import math

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.activation_functions import (
    ACTIVATION_FUNCTIONS,
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    TopK,
    make_activation_function,
)
from mlxterp.sae.parallel import UNDIVIDED
from tests.sae.reference import central_differences, threshold_gradient, trained_threshold

ONE = mx.array(1.0)
SHAPES = [(30,), (4, 30), (2, 3, 30), (4, 700), (1, 1)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_mlx(arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(np.array(array, np.float32)) for name, array in arrays.items()}


def near(found, expected, tolerance=1e-5) -> None:
    """Equal up to a share of the largest entry, which is not zero."""
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=tolerance * largest)


def numpy_top_k(pre: np.ndarray, k: int) -> np.ndarray:
    z = np.zeros_like(pre)
    largest = np.argsort(-pre, axis=-1)[..., :k]
    np.put_along_axis(z, largest, np.take_along_axis(pre, largest, axis=-1), axis=-1)
    return np.maximum(z, 0)


def in_training(function: TopK, pre: np.ndarray, k: int) -> np.ndarray:
    """The dense code of a function that selects, as it is in training."""
    pairs = function.select(mx.array(pre), k)
    return np.array(pairs.dense(function.values(pairs.at(mx.array(pre)))))


@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_keeps_the_largest_values_in_place(shape):
    pre = normal(*shape) + 1
    k = min(5, shape[-1])
    np.testing.assert_array_equal(np.array(TopK(k)(mx.array(pre))), numpy_top_k(pre, k))


def test_values_below_zero_are_never_active():
    pre = mx.array([[-1.0, 2.0, -3.0, 0.0], [-1.0, -2.0, -3.0, -4.0]])
    assert TopK(3)(pre).tolist() == [[0, 2, 0, 0], [0, 0, 0, 0]]


def test_gradient_passes_to_the_active_entries_only():
    pre = mx.array([[3.0, -1.0, 2.0, 1.0]])
    weights = mx.array([[1.0, 10.0, 100.0, 1000.0]])
    gradient = mx.grad(lambda pre: (weights * TopK(2)(pre)).sum())(pre)
    assert gradient.tolist() == [[1, 0, 100, 0]]


@pytest.mark.parametrize("kind", [TopK, AbsTopK])
def test_functions_of_one_token_do_the_same_in_training(kind):
    pre = normal(6, 50)
    np.testing.assert_array_equal(in_training(kind(4), pre, 4), np.array(kind(4)(mx.array(pre))))


def test_in_training_the_number_to_keep_may_be_another():
    pre = np.abs(normal(6, 50))
    assert (in_training(TopK(4), pre, 9) > 0).sum(axis=1).tolist() == [9] * 6
    assert (in_training(BatchTopK(4), pre, 9) > 0).sum() == 54


@pytest.mark.parametrize("shape", SHAPES)
def test_abs_top_k_keeps_the_largest_magnitudes_with_their_sign(shape):
    pre = normal(*shape)
    k = min(5, shape[-1])
    kept = np.abs(pre) >= np.sort(np.abs(pre), axis=-1)[..., -k, None]
    expected = np.where(kept, pre, 0)
    assert shape == (1, 1) or (expected < 0).any()
    np.testing.assert_array_equal(np.array(AbsTopK(k)(mx.array(pre))), expected)


def test_abs_top_k_passes_the_gradient_whatever_the_sign():
    pre = mx.array([[3.0, -4.0, 2.0, -1.0]])
    weights = mx.array([[1.0, 10.0, 100.0, 1000.0]])
    gradient = mx.grad(lambda pre: (weights * AbsTopK(2)(pre)).sum())(pre)
    assert gradient.tolist() == [[1, 10, 0, 0]]


def test_batch_top_k_selects_the_largest_of_the_whole_batch():
    pre = normal(12, 40) + np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    z = in_training(BatchTopK(3), pre, 3)
    largest = pre >= np.sort(pre.reshape(-1))[-36]
    np.testing.assert_array_equal(z, np.where(largest, np.maximum(pre, 0), 0))
    assert len(set((z > 0).sum(axis=1))) > 2, "all tokens have about the same number"


def test_batch_top_k_selects_nothing_below_zero():
    pre = -np.abs(normal(4, 10))
    pre[2, 3] = 1.5
    z = in_training(BatchTopK(3), pre, 3)
    assert z[2, 3] == 1.5 and np.count_nonzero(z) == 1


def test_the_threshold_is_a_plain_mean_at_first_and_then_a_moving_one():
    function = BatchTopK(2)
    averaged, smallest = function.averaged(), np.random.default_rng(0).uniform(0.1, 1, 150)
    threshold = 0.0
    for step, value in enumerate(smallest, start=1):
        averaged = function.average(averaged, mx.array(value))
        threshold += (value - threshold) * max(1 / step, 0.01)
        if step == 100:
            assert threshold == pytest.approx(smallest[:100].mean())
        assert averaged["threshold"].item() == pytest.approx(threshold, rel=1e-5)


def test_a_step_without_any_active_feature_leaves_the_threshold():
    function = BatchTopK(2)
    averaged = function.average(function.averaged(), mx.array(0.25))
    after = function.average(averaged, mx.array(math.inf))
    assert {name: array.item() for name, array in after.items()} == {
        "threshold": 0.25,
        "threshold_steps": 1,
    }
    assert function.average(after, mx.array(0.75))["threshold"].item() == 0.5


def trained_batch_top_k(k: int) -> BatchTopK:
    """With the threshold of 200 batches of 64 tokens and 100 features."""
    function = BatchTopK(k)
    averaged = function.averaged()
    for seed in range(200):
        pre = mx.array(normal(64, 100, seed=seed))
        values = function.values(function.select(pre, k).at(pre))
        averaged = function.average(averaged, UNDIVIDED.smallest(values))
    function.set_arrays({}, averaged, mx.ones((100,)), ONE)
    return function


@pytest.mark.parametrize("k", [3, 10])
def test_batch_top_k_at_inference_has_about_k_active_features(k):
    z = trained_batch_top_k(k)(mx.array(normal(2000, 100, seed=999)))
    assert (z > 0).sum(axis=1).astype(mx.float32).mean().item() == pytest.approx(k, rel=0.05)


def test_batch_top_k_at_inference_does_not_look_at_other_tokens():
    function = trained_batch_top_k(3)
    pre = mx.array(normal(20, 100))
    together = function(pre)
    for token in range(20):
        assert mx.array_equal(function(pre[token]), together[token])
    assert mx.array_equal(together, mx.where(pre > function.threshold, pre, 0))


def test_relu_keeps_what_is_positive():
    pre = mx.array([[-1.0, 0.0, 2.0]])
    assert ReLU()(pre).tolist() == [[0, 0, 2]]
    code, penalised = ReLU().code(pre, {}, 1.0)
    assert code.tolist() == penalised.tolist() == [[0, 0, 2]]


THRESHOLD, BANDWIDTH = np.array([0.3, 0.6, 0.9, 1.2]), 0.5


def jump_problem():
    """Pre-activations on both sides of every threshold, inside and outside the kernel."""
    offsets = np.array([-0.4, -0.2, -0.1, 0.1, 0.2, 0.4])[:, None]
    pre = (THRESHOLD + offsets * np.array([1, 1.05, 0.95, 1.1])).astype(np.float32)
    weights = normal(*pre.shape, seed=3)
    return pre, weights, to_mlx(trained_threshold(THRESHOLD))


def near_threshold(pre: np.ndarray) -> np.ndarray:
    near = np.abs((pre - THRESHOLD) / BANDWIDTH) < 0.5
    above = pre > THRESHOLD
    assert (near & above).any(axis=0).all() and (near & ~above).any(axis=0).all()
    assert (~near & above).any() and (~near & ~above).any()
    return near


def test_jump_relu_keeps_what_exceeds_the_threshold_unchanged():
    pre, _, trained = jump_problem()
    expected = np.where(pre > THRESHOLD, pre, 0)
    function = JumpReLU(4)
    code, penalised = function.code(mx.array(pre), trained, BANDWIDTH)
    near(code, expected)
    near(penalised, expected)
    counts = function.count(mx.array(pre), trained, BANDWIDTH)
    assert counts.tolist() == (pre > THRESHOLD).sum(axis=1).tolist()
    function.set_arrays(trained, {}, mx.ones((4,)), ONE)
    near(function.threshold, THRESHOLD)
    near(function(mx.array(pre)), expected)


def test_jump_relu_starts_at_the_wanted_threshold():
    function = JumpReLU(4)
    gain = mx.array([1.0, 1.0, 2.0, 4.0])
    function.set_arrays(function.trained(mx.array(0.125)), {}, gain, ONE)
    near(function.threshold, np.array([0.125, 0.125, 0.25, 0.5]))


def test_jump_relu_never_lets_negative_values_through():
    assert JumpReLU(3)(mx.array([-1.0, 0.0, 1.0])).tolist() == [0, 0, 1]


def test_the_gradients_of_the_jump_are_those_of_the_paper():
    pre, weights, trained = jump_problem()

    def value(pre, trained):
        return (mx.array(weights) * JumpReLU(4).code(pre, trained, BANDWIDTH)[0]).sum()

    at_pre, at_trained = mx.grad(value, (0, 1))(mx.array(pre), trained)
    near(at_pre, np.where(pre > THRESHOLD, weights, 0))
    kernel = near_threshold(pre) / BANDWIDTH
    expected = (weights * -THRESHOLD * kernel).sum(axis=0)
    near(threshold_gradient(at_trained, THRESHOLD), expected)


def test_the_gradients_of_the_count_are_those_of_the_paper():
    pre, weights, trained = jump_problem()
    weights = weights[:, 0]

    def value(pre, trained):
        return (mx.array(weights) * JumpReLU(4).count(pre, trained, BANDWIDTH)).sum()

    at_pre, at_trained = mx.grad(value, (0, 1))(mx.array(pre), trained)
    assert not np.array(at_pre).any()
    kernel = near_threshold(pre) / BANDWIDTH
    expected = -(weights[:, None] * kernel).sum(axis=0)
    near(threshold_gradient(at_trained, THRESHOLD), expected)


@pytest.mark.parametrize("side", [-1, 1], ids=["below", "above"])
@pytest.mark.parametrize("what", ["code", "count"])
def test_either_side_of_a_threshold_moves_it(side, what):
    def slope(offset: float) -> float:
        pre = mx.array([[0.5 + side * offset]])
        function = JumpReLU(1)

        def value(trained):
            if what == "count":
                return function.count(pre, trained, 0.2).sum()
            return function.code(pre, trained, 0.2)[0].sum()

        gradient = mx.grad(value)(to_mlx(trained_threshold(np.array([0.5]))))
        return threshold_gradient(gradient, 0.5).item()

    assert slope(0.09) == pytest.approx(-0.5 / 0.2 if what == "code" else -1 / 0.2, rel=1e-5)
    assert slope(0.11) == 0


def gated_arrays() -> dict[str, np.ndarray]:
    """The paper's two maps that share directions, and inputs."""
    rng = np.random.default_rng(4)
    return {
        "x": rng.normal(size=(40, 5)),
        "W_gate": rng.normal(size=(8, 5)),
        "b_gate": rng.normal(size=8),
        "r_mag": 0.5 * rng.normal(size=8),
        "b_mag": rng.normal(size=8),
    }


def of_the_paper(a: dict[str, np.ndarray]) -> np.ndarray:
    gate = a["x"] @ a["W_gate"].T + a["b_gate"] > 0
    W_mag = np.exp(a["r_mag"])[:, None] * a["W_gate"]
    z = gate * np.maximum(a["x"] @ W_mag.T + a["b_mag"], 0)
    # Open gates without a magnitude and magnitudes behind a closed gate both occur.
    assert (gate & (z == 0)).any() and (~gate & (a["x"] @ W_mag.T + a["b_mag"] > 0)).any()
    return z


def ours(a: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    pre = a["x"] @ a["W_gate"].T + a["b_gate"]
    offset = a["b_mag"] - np.exp(a["r_mag"]) * a["b_gate"]
    return pre, {"log_gain": a["r_mag"], "offset": offset}


def test_gated_is_the_paper_s_two_maps_written_in_one():
    arrays = gated_arrays()
    pre, trained = ours(arrays)
    function = Gated(8)
    code, penalised = function.code(mx.array(pre.astype(np.float32)), to_mlx(trained), 1.0)
    near(code, of_the_paper(arrays))
    near(penalised, np.maximum(pre, 0))
    function.set_arrays(to_mlx(trained), {}, mx.ones((8,)), ONE)
    near(function(mx.array(pre.astype(np.float32))), of_the_paper(arrays))


def test_gated_starts_as_a_relu():
    function, pre = Gated(30), mx.array(normal(9, 30))
    code, _ = function.code(pre, function.trained(mx.array(0.1)), 1.0)
    assert mx.array_equal(code, mx.maximum(pre, 0))
    assert mx.array_equal(function(pre), mx.maximum(pre, 0))


@pytest.mark.parametrize("name", ["pre", "log_gain", "offset"])
def test_the_gradients_of_gated_equal_finite_differences(name):
    pre, trained = ours(gated_arrays())
    arrays, weights = {"pre": pre, **trained}, normal(*pre.shape, seed=5)

    def by_hand(a):
        z = (a["pre"] > 0) * np.maximum(np.exp(a["log_gain"]) * a["pre"] + a["offset"], 0)
        return (weights * z).sum()

    def value(a):
        return (mx.array(weights) * Gated(8).code(a["pre"], a, 1.0)[0]).sum()

    expected = central_differences(by_hand, arrays, name)
    near(mx.grad(value)(to_mlx(arrays))[name], expected)


N = 12
NAMES = sorted(ACTIVATION_FUNCTIONS)


def filled(name: str):
    """A function whose arrays are not at their initial values."""
    function = make_activation_function(name, N, 3)
    for i, (key, array) in enumerate(sorted(function.arrays.items())):
        # `+ 0.5` so that thresholds are positive.
        function[key] = mx.random.uniform(shape=array.shape, key=mx.random.key(i)) + 0.5
    return function


@pytest.mark.parametrize("name", NAMES)
def test_options_and_arrays_rebuild_a_function(name):
    function, pre = filled(name), mx.array(normal(50, N))
    again = make_activation_function(name, N, function.options.get("k"))
    assert {n: a.shape for n, a in again.arrays.items()} == {
        n: a.shape for n, a in function.arrays.items()
    }
    again.update(function.arrays)
    assert again.options == function.options
    assert mx.array_equal(again(pre), function(pre))
    if function.arrays:
        assert not mx.array_equal(make_activation_function(name, N, 3)(pre), function(pre))


def test_functions_have_these_arrays_and_options():
    found = {n: (sorted(filled(n).arrays), filled(n).options) for n in NAMES}
    assert found == {
        "abs_topk": ([], {"k": 3}),
        "batch_topk": (["threshold"], {"k": 3}),
        "gated": (["log_gain", "offset"], {}),
        "jumprelu": (["threshold"], {}),
        "relu": ([], {}),
        "topk": ([], {"k": 3}),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_function_works_on_each_token_alone(name):
    function = filled(name)
    pre = mx.array(2 * normal(2, 7, N))
    together = function(pre)
    assert together.shape == pre.shape
    assert mx.any(together != 0).item() and mx.any(together == 0).item()
    assert mx.array_equal(function(pre[1, 3]), together[1, 3])
    assert mx.array_equal(function(pre[:, 2:3]), together[:, 2:3])


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_features_are_selected_among_each_by_itself(name):
    pre, blocks = mx.array(normal(40, N)), [slice(0, N // 2), slice(N // 2, N)]
    function = make_activation_function(name, N, 3, n_blocks=2)
    for i, (key, array) in enumerate(function.arrays.items()):
        function[key] = mx.random.uniform(shape=array.shape, key=mx.random.key(i)) + 0.5
    z = function(pre)
    for i, part in enumerate(blocks):
        alone = make_activation_function(name, N // 2, 3)
        for key, array in function.arrays.items():
            alone[key] = array[i] if name == "batch_topk" else array[part]
        assert mx.array_equal(z[:, part], alone(pre[:, part]))
        assert mx.array_equal(function.of_block(i, part)(pre[:, part]), z[:, part])


def test_blocks_that_would_not_be_equally_large_are_refused():
    with pytest.raises(ValueError, match="n_features must be a multiple of 3, got 20"):
        make_activation_function("topk", 20, 3, n_blocks=3)


@pytest.mark.parametrize("name", NAMES)
def test_codes_grow_with_their_pre_activations_once_folded(name):
    """With `gain` times larger pre-activations the folded function gives a `gain` times larger
    code."""
    function, folded = make_activation_function(name, N, 3), make_activation_function(name, N, 3)
    gain = mx.random.uniform(0.5, 2, (N,), key=mx.random.key(0))
    if function.selects:
        gain = mx.full((N,), 1.7)
    trained = to_mlx(trained_threshold(np.linspace(0.2, 0.9, N)))
    trained |= {"log_gain": mx.linspace(-1, 1, N), "offset": mx.linspace(0.5, -0.5, N)}
    averaged = {"threshold": mx.array(0.4), "threshold_steps": mx.array(9.0)}
    function.set_arrays(trained, averaged, mx.ones((N,)), ONE)
    folded.set_arrays(trained, averaged, gain, mx.array(1.7))
    pre = mx.array(normal(30, N))
    near(folded(pre * gain), np.array(function(pre) * gain))


@pytest.mark.parametrize("name", ["abs_topk", "batch_topk", "topk"])
@pytest.mark.parametrize("k", [0, -1, N + 1, 2.5, None])
def test_a_k_out_of_range_is_refused(name, k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, n_features = {N}\], got {k}"):
        make_activation_function(name, N, k)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="one of .*'topk'.* got 'softmax'"):
        make_activation_function("softmax", N, 3)
