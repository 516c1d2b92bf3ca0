import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.evals.tasks.random_coder import random_coder
from tests.sae.kinds import KINDS, make


def coder_and_tokens(kind="sae", function="topk", n=1500):
    coder = make(kind, function, n_features=30, k=4)
    for i, name in enumerate(("W_enc", "b_enc", "W_dec")):
        coder[name] = mx.random.normal(coder[name].shape, key=mx.random.key(i))
    if "threshold" in coder.activation_function.arrays:
        shape = coder.activation_function.threshold.shape
        coder.activation_function.threshold = mx.full(shape, 0.7)
    return coder, mx.random.normal((n, coder.d_in), key=mx.random.key(9)) + 2


@pytest.mark.parametrize("kind", KINDS)
def test_norms_stay_and_directions_go(kind):
    coder, x = coder_and_tokens(kind)
    made = random_coder(coder, x, seed=1)
    for name in ("W_enc", "W_dec"):
        a, b = np.array(coder[name]), np.array(made[name])
        lengths = np.linalg.norm(a, axis=1)
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), lengths, rtol=1e-5)
        cosines = (a * b).sum(axis=1) / np.square(lengths)
        assert abs(cosines.mean()) < 0.3 and np.abs(cosines).max() < 1
    assert np.array(random_coder(coder, x, seed=1).b_enc).tolist() == made.b_enc.tolist()
    assert not mx.array_equal(random_coder(coder, x, seed=2).W_enc, made.W_enc)
    assert made.encode(x).shape == (len(x), coder.n_features)


@pytest.mark.parametrize("function", ["relu", "jumprelu", "batch_topk", "gated"])
def test_features_are_as_rare_where_thresholds_decide(function):
    coder, x = coder_and_tokens(function=function)
    made = random_coder(coder, x)
    rates = [np.array((one.encode(x) != 0).mean(axis=0)) for one in (coder, made)]
    np.testing.assert_allclose(rates[0], rates[1], atol=5e-3)
    assert 0.1 < rates[0].mean() < 0.9


def test_as_many_are_selected_and_about_as_often():
    coder, x = coder_and_tokens(function="topk")
    made = random_coder(coder, x)
    rates = [np.array((one.encode(x) != 0).mean(axis=0)) for one in (coder, made)]
    assert rates[0].sum() == pytest.approx(rates[1].sum(), rel=0.02)
    assert np.corrcoef(rates)[0, 1] > 0.8


def test_the_coder_itself_stays_as_it_is():
    coder, x = coder_and_tokens()
    before = {name: np.array(coder[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    random_coder(coder, x)
    for name, array in before.items():
        np.testing.assert_array_equal(np.array(coder[name]), array)
