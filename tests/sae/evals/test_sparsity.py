"""Counts of codes against NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.evals.sparsity import CodeSums, sparsity_of
from mlxterp.sae.evals.sums import Parts

N, FEATURES = 3000, 60


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    """Codes whose features fire on shares of the tokens from nothing to nearly all."""
    rng = np.random.default_rng(0)
    rates = np.concatenate([[0.0, 0.0, 0.9], np.logspace(-3.5, -0.5, FEATURES - 3)])
    z = rng.exponential(size=(N, FEATURES)) * (rng.random((N, FEATURES)) < rates)
    z[:, 5] *= -1
    return z.astype(np.float32)


CONTEXTS = np.repeat(np.arange(30), 100)


@pytest.fixture(scope="module")
def report(codes):
    sums = CodeSums(30, FEATURES)
    for start in range(0, N, 500):
        part = slice(start, start + 500)
        of = Parts.of(CONTEXTS[part])
        sums.add(mx.array(codes[part]), of, of)
    return sparsity_of(sums)[0]


def test_numbers_of_features_per_token(codes, report):
    l0 = (codes != 0).sum(axis=1)
    assert report.l0.value == pytest.approx(l0.mean(), rel=1e-6)
    assert report.l1.value == pytest.approx(np.abs(codes).sum(axis=1).mean(), rel=1e-5)
    assert report.l0_median == np.quantile(l0, 0.5, method="inverted_cdf")
    assert report.l0_95 == np.quantile(l0, 0.95, method="inverted_cdf")
    spread = l0.reshape(30, 100).mean(axis=1).std(ddof=1) / np.sqrt(30)
    assert report.l0.spread == pytest.approx(spread, rel=0.1)
    assert report.n_tokens == N


def test_numbers_of_tokens_per_feature(codes, report):
    fires = codes != 0
    np.testing.assert_allclose(report.density, fires.mean(axis=0), rtol=1e-12)
    first = np.where(fires.any(axis=0), fires.argmax(axis=0) + 1, 0)
    np.testing.assert_array_equal(report.first, first)
    contexts = fires.reshape(30, 100, FEATURES).any(axis=1).sum(axis=0)
    with np.errstate(invalid="ignore"):
        expected = fires.sum(axis=0) / np.where(contexts, contexts, np.nan)
    np.testing.assert_allclose(report.per_context, expected)


def test_dead_and_dense_features_depend_on_the_window(codes, report):
    fires = codes != 0
    assert report.dead == (~fires.any(axis=0)).mean() > 0
    silent = report.silent_within
    assert list(silent) == [1000, N]
    for n, share in silent.items():
        assert share == (~fires[:n].any(axis=0)).mean()
    assert silent[1000] > silent[N] == report.dead
    for share, found in report.denser_than.items():
        assert found == (fires.mean(axis=0) > share).mean()
    assert list(report.rarer_than) == [1e-3]
    assert report.rarer_than[1e-3] == (fires.mean(axis=0) < 1e-3).mean() > report.dead


def test_the_report_can_be_read(report):
    text, figures = repr(report), report.to_dict()
    assert "L0, median and 95 %" in text and "silent in 1,000 tokens" in text
    assert figures["l0"]["value"] == report.l0.value and figures["dead"] == report.dead
    assert figures["silent_within"]["1000"] == report.silent_within[1000]
    assert "<table" in report._repr_html_()
    assert report.plot().axes[0].get_xlabel().startswith("share of the tokens")
