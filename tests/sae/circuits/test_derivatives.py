import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp.sae.circuits.derivatives import for_each

X = mx.random.normal((3, 64), key=mx.random.key(0))
COTANGENTS = mx.random.normal((5, 3, 64), key=mx.random.key(1))


@pytest.mark.parametrize("quantised", [False, True])
def test_derivatives_of_all_cotangents_are_those_of_each(quantised):
    linear = nn.Linear(64, 64, bias=False)
    model = nn.QuantizedLinear.from_linear(linear) if quantised else linear

    def slopes(cotangent):
        return mx.vjp(lambda x, y: mx.tanh(model(x)) * y, [X, 2 * X], [cotangent])[1]

    by_x, by_y = for_each(slopes, COTANGENTS)
    for i, cotangent in enumerate(COTANGENTS):
        one = slopes(cotangent)
        np.testing.assert_allclose(by_x[i], one[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(by_y[i], one[1], rtol=1e-5, atol=1e-6)
    assert by_x.shape == (5, 3, 64) and mx.abs(by_x).max() > 0


def test_one_array_stays_one_array():
    found = for_each(lambda c: mx.vjp(lambda x: x * x, [X], [c])[1][0], COTANGENTS)
    assert mx.allclose(found, 2 * X * COTANGENTS)


def test_other_errors_are_not_hidden():
    with pytest.raises(ValueError, match="matmul"):
        for_each(lambda c: X @ c, COTANGENTS)
