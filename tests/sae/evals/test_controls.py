import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.evals.controls import affine_map, explained, random_directions


def by_hand(y: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    y, rows = y.astype(np.float64), rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centred = y - y.mean(axis=0)
    along = centred @ rows.T
    z = np.where(along >= np.sort(along, axis=1)[:, -k, None], np.maximum(along, 0), 0)
    written = z @ rows
    return y.mean(axis=0) + (written * centred).sum() / (written**2).sum() * written


@pytest.mark.parametrize("entries", [1 << 24, 300])
def test_random_directions_are_as_many_and_as_sparse(entries, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.evals.controls.CODE_ENTRIES", entries)
    y = (np.random.default_rng(0).normal(size=(200, 12)) + 3).astype(np.float32)
    rows = np.array(mx.random.normal((30, 12), key=mx.random.key(7)))
    found = random_directions(mx.array(y), 30, 4, seed=7)
    np.testing.assert_allclose(np.array(found), by_hand(y, rows, 4), rtol=1e-4, atol=1e-4)


def test_more_random_directions_explain_more_and_none_explains_nothing():
    y = mx.array(np.random.default_rng(1).normal(size=(2000, 16)).astype(np.float32))
    shares = [explained(y, random_directions(y, 100, k))[0] for k in (1, 4, 16)]
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    assert explained(y, mx.broadcast_to(y.mean(axis=0), y.shape))[0] == pytest.approx(0, abs=1e-6)


def test_an_affine_map_is_judged_on_what_it_was_not_fitted_to():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1000, 10)).astype(np.float32)
    noise = rng.normal(size=(1000, 5))
    y = (x @ rng.normal(size=(10, 5)) + 4 + 2 * noise).astype(np.float32)
    wanted, made = affine_map(mx.array(x), mx.array(y))
    inputs = np.c_[x[:500], np.ones(500)].astype(np.float64)
    fit = np.linalg.lstsq(inputs, y[:500].astype(np.float64), rcond=None)[0]
    expected = np.c_[x[500:], np.ones(500)] @ fit
    np.testing.assert_allclose(np.array(made), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(np.array(wanted), y[500:])
    # Of pure noise the map explains less than nothing where it was not fitted.
    assert explained(*affine_map(mx.array(x), mx.array(noise.astype(np.float32))))[0] < 0


def test_an_affine_map_of_too_few_tokens_is_not_fitted():
    x = mx.ones((40, 10))
    assert affine_map(x, x) is None


def test_what_is_explained_is_said_in_float64():
    y = mx.array(np.random.default_rng(3).normal(size=(50, 4)).astype(np.float32))
    share, cosine = explained(y, 0.5 * y)
    centred = np.array(y, np.float64) - np.array(y, np.float64).mean(axis=0)
    missing = np.sum(np.square(0.5 * np.array(y))) / np.sum(np.square(centred))
    assert share == pytest.approx(1 - missing, rel=1e-6) and cosine == pytest.approx(1)
    assert explained(mx.ones((5, 2)), mx.zeros((5, 2))) == (None, None)
