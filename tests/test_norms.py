"""Gain and bias of norms of any class, and why some have none."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp.hooks import Hooks
from mlxterp.norms import gain_and_bias, why_not_units


class FromOne(nn.Module):
    """A norm whose weight is what the gain has above 1, as Gemma's."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def __call__(self, x):
        return mx.fast.rms_norm(x, 1.0 + self.weight, 1e-6)


def why_not_unit(norm):
    return why_not_units([norm])[0]


def weights(n=1):
    return mx.random.normal((n, 32), key=mx.random.key(5)) + 2


def rms():
    norm = nn.RMSNorm(32)
    norm.weight = weights()[0]
    return norm


def test_rms_norms():
    for norm, expected in ((rms(), weights()[0]), (FromOne(weights()[0]), weights()[0] + 1)):
        gain, bias = gain_and_bias(norm)
        np.testing.assert_allclose(gain, expected, rtol=1e-6)
        assert mx.all(mx.abs(bias) < 1e-6)
        assert why_not_unit(norm) == ""


def test_layer_norms():
    norm = nn.LayerNorm(32)
    norm.weight, norm.bias = weights(2)
    gain, bias = gain_and_bias(norm)
    np.testing.assert_allclose(gain, norm.weight, rtol=1e-5)
    np.testing.assert_allclose(bias, norm.bias, rtol=1e-5)
    assert why_not_unit(norm) == ""


def test_a_gain_of_zero_leaves_nothing_to_divide():
    norm = rms()
    norm.weight[3] = 0
    assert why_not_unit(norm) == "some gains of its norm are zero"


def test_what_is_no_norm_is_said_to_be_none():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weights()[0]

        def __call__(self, x):
            return x * self.weight

    assert why_not_unit(Scale()) == "its norm is no RMS norm or layer norm"
    odd = nn.LayerNorm(31)  # of which the probe is not centred
    assert why_not_unit(odd) == "its norm is no RMS norm or layer norm"
    assert why_not_unit(nn.RMSNorm(31)) == ""


def test_what_cannot_be_called_by_itself_says_so():
    class Needy(FromOne):
        def __call__(self, x, gate):
            return super().__call__(x) * gate

    found = why_not_units([rms(), Needy(weights()[0]), rms()])
    assert found[::2] == ["", ""]
    assert found[1].startswith("its norm cannot be called by itself (")


def test_whoever_watches_the_norm_does_not_see_the_probe():
    norm, seen = rms(), []
    hooks = Hooks()
    hooks.add_after(norm, lambda output: seen.append(output) or output)
    hooks.add_around("rms_norm", lambda function, *args: seen.append(args) or function(*args))
    with hooks:
        gain_and_bias(norm)
        assert not seen
        norm(mx.ones((1, 32)))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision(dtype):
    norm = rms()
    norm.weight = norm.weight.astype(dtype)
    gain, _ = gain_and_bias(norm)
    assert gain.dtype == mx.float32
    np.testing.assert_allclose(gain, norm.weight.astype(mx.float32), rtol=1e-6)
