from pathlib import Path

import numpy as np
import pytest

from mlxterp.sae.evals.tasks.logistic import Probe, area, fit_probe, quality

GOLDEN = np.load(Path(__file__).parents[3] / "golden" / "evals" / "logistic.npz")


@pytest.mark.parametrize("weight", [None, "balanced"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_decisions_are_those_of_scikit_learn(shape, weight):
    x, y = GOLDEN[f"{shape}_x"], GOLDEN[f"{shape}_y"]
    found = fit_probe(x, y, balanced=weight == "balanced").decide(x)
    np.testing.assert_allclose(found, GOLDEN[f"{shape}_{weight}"], atol=2e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_gradient_of_the_loss_vanishes(balanced):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 3)), rng.random(50) < 0.2
    probe = fit_probe(x, y, C=0.7, balanced=balanced)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    u, w = (x - mean) / deviation, probe.weights * deviation
    b = probe.bias + mean @ probe.weights
    s = 0.5 / np.where(y, y.mean(), 1 - y.mean()) if balanced else np.ones(50)
    slope = 0.7 * s * (1 / (1 + np.exp(-(u @ w + b))) - y)
    np.testing.assert_allclose(w + u.T @ slope, 0, atol=1e-6)
    assert abs(slope.sum()) < 1e-6


def test_units_and_offsets_of_columns_do_not_matter():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 4)), rng.random(60) < 0.5
    other = 1000 * x[:, ::-1] * [1, 1e-3, 5, 1] + 77
    np.testing.assert_allclose(
        fit_probe(x, y).decide(x), fit_probe(other, y).decide(other), atol=1e-6
    )


def test_a_column_that_never_varies_gets_no_weight():
    x = np.random.default_rng(3).normal(size=(30, 2))
    x[:, 1] = 0.1 + 0.2
    assert fit_probe(x, x[:, 0] > 0).weights[1] == 0
    assert fit_probe(np.zeros((30, 2)), x[:, 0] > 0).weights.tolist() == [0, 0]


def test_labels_that_can_be_separated_have_finite_weights():
    x = np.arange(-5, 5)[:, None] + 0.5
    probe = fit_probe(x, x[:, 0] > 0, C=1e6)
    assert np.isfinite(probe.weights).all()
    assert quality(probe.decide(x), x[:, 0] > 0).accuracy == 1


def test_the_area_counts_pairs_and_ties_half():
    rng = np.random.default_rng(4)
    values, y = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[y] for b in values[~y]]
    assert area(values, y) == pytest.approx(np.mean(pairs))
    assert np.isnan(area(values, np.ones(40, bool)))


def test_accuracy_and_f1_are_of_what_is_said():
    y = np.array([True, True, False, False, False])
    found = quality(np.array([1.0, -1, 1, -1, -1]), y)
    assert (found.accuracy, found.f1) == (pytest.approx(0.6), pytest.approx(0.5))
    assert quality(np.full(5, -1.0), y).f1 == 0
    assert Probe(np.array([2.0]), 1.0).decide(np.array([[3.0]])) == [7.0]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"both labels, got 0 true of 4"):
        fit_probe(np.zeros((4, 1)), np.zeros(4, bool))
    with pytest.raises(ValueError, match=r"got \[4\] and \[4\]"):
        fit_probe(np.zeros(4), np.zeros(4, bool))
