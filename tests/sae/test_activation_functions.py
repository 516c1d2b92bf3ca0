import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.activation_functions import TopK


def numpy_top_k(pre: np.ndarray, k: int) -> np.ndarray:
    z = np.zeros_like(pre)
    largest = np.argsort(-pre, axis=-1)[..., :k]
    np.put_along_axis(z, largest, np.take_along_axis(pre, largest, axis=-1), axis=-1)
    return np.maximum(z, 0)


@pytest.mark.parametrize("shape", [(30,), (4, 30), (2, 3, 30), (4, 700), (1, 1)])
def test_top_k_keeps_the_largest_values_in_place(shape):
    pre = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 1
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
