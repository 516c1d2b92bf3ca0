import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.interactions import component_interactions, shared_features
from mlxterp.sae.sharing import decoder_cosines, relative_norms

SITES = ("a", "b", "c")


def random_coder(n: int = 12, widths=(6, 6, 6), seed: int = 0) -> SparseCoder:
    columns = Columns(SITES[: len(widths)], widths)
    coder = SparseCoder(columns, columns, n, activation_function="relu")
    rng = np.random.default_rng(seed)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        coder[name] = mx.array(rng.normal(size=coder[name].shape).astype(np.float32))
    coder.W_dec = coder.W_dec * mx.array(rng.uniform(0, 1, (n, 1)).astype(np.float32))
    coder.site_scale = mx.array([0.8, 1.2, 1.5][: len(widths)])
    return coder


def data(n_tokens: int, widths=(6, 6, 6), mean: float = 0.0):
    rng = np.random.default_rng(1)
    arrays = {
        s: (rng.normal(size=(n_tokens, d)) * (i + 1) + mean).astype(np.float32)
        for i, (s, d) in enumerate(zip(SITES, widths, strict=False))
    }
    return arrays, ActivationDataset.from_activations(arrays)


def code(coder: SparseCoder, arrays: dict) -> np.ndarray:
    """The code of a ReLU coder in float64."""
    x = np.concatenate(list(arrays.values()), axis=1).astype(np.float64)
    return np.maximum(x @ np.array(coder.W_enc, np.float64).T + np.array(coder.b_enc), 0)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_features_are_measured_by_their_share_of_each_sites_variance(mean):
    coder = random_coder()
    coder.b_dec = mx.full(coder.b_dec.shape, mean)
    coder.b_enc = coder.b_enc - mean * coder.W_enc.sum(axis=1)
    arrays, dataset = data(9000, mean=mean)
    found = shared_features(coder, dataset, top=12)
    z = code(coder, arrays)
    rows = np.array(coder.W_dec, np.float64).reshape(12, 3, 6)
    variance = np.array([x.astype(np.float64).var(axis=0).sum() for x in arrays.values()])
    expected = z.var(axis=0)[:, None] * np.square(rows).sum(axis=-1) / variance
    np.testing.assert_allclose(found.explained, expected[found.feature_ids], rtol=2e-3)
    np.testing.assert_allclose(
        found.firing_rates, (z > 0).mean(axis=0)[found.feature_ids], atol=1e-3
    )
    np.testing.assert_allclose(found.relative, relative_norms(coder)[found.feature_ids])
    assert found.n_tokens == 9000 and sorted(found.feature_ids) == list(range(12))


def test_independent_features_explain_what_they_make():
    columns = Columns(("a", "b"), (4, 4))
    coder = SparseCoder(columns, columns, 4, activation_function="relu")
    strength = mx.array([1.0, 0.5, 2.0, 0.0])
    coder.W_dec = mx.concatenate([mx.eye(4), mx.eye(4) * strength[:, None]], axis=1)
    coder.W_enc = mx.concatenate([mx.eye(4), mx.zeros((4, 4))], axis=1)
    z = np.random.default_rng(3).exponential(size=(20_000, 4)).astype(np.float32)
    dataset = ActivationDataset.from_activations({"a": z, "b": z * np.array(strength)})
    found = shared_features(coder, dataset, top=4)
    np.testing.assert_allclose(found.explained.sum(axis=0), 1, atol=0.01)
    # Least at a site: 1 of 4 or 5.25 parts, 0.25 of 5.25, 1 of 4, nothing.
    assert found.feature_ids[2:].tolist() == [1, 3] and set(found.feature_ids[:2]) == {0, 2}
    assert found.explained[3, 1] == 0 and found.explained[3, 0] == pytest.approx(0.25, abs=0.02)


def test_the_number_of_features_is_bounded():
    coder, (_, dataset) = random_coder(), data(500)
    assert len(shared_features(coder, dataset, top=5).feature_ids) == 5
    assert len(shared_features(coder, dataset, top=99).feature_ids) == 12
    assert shared_features(coder, dataset, max_tokens=100).n_tokens == 100
    with pytest.raises(ValueError, match="top must be >= 1, got 0"):
        shared_features(coder, dataset, top=0)


def test_each_question_takes_one_pass(monkeypatch):
    coder, (_, dataset) = random_coder(), data(500)
    passes = []
    original = ActivationDataset.batches
    monkeypatch.setattr(
        ActivationDataset, "batches", lambda *a, **o: (passes.append(1), original(*a, **o))[1]
    )
    shared_features(coder, dataset)
    component_interactions(coder, dataset)
    assert len(passes) == 2
    component_interactions(coder)
    assert len(passes) == 2


def by_hand(coder: SparseCoder, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r, cosines = relative_norms(coder), decoder_cosines(coder)
    n = r.shape[1]
    shared, angles, counts = np.zeros((n, n)), np.full((n, n), np.nan), np.zeros((n, n), int)
    for i in range(n):
        for j in range(n):
            shared[i, j] = sum(w * min(f[i], f[j]) for w, f in zip(weights, r, strict=True))
            shared[i, j] /= sum(w * f[i] for w, f in zip(weights, r, strict=True))
            both = [f for f in range(len(r)) if min(r[f, i], r[f, j]) >= 0.6 / n and weights[f] > 0]
            counts[i, j] = len(both)
            if both:
                w = weights[both] / weights[both].sum()
                angles[i, j] = (w * cosines[both, i, j]).sum()
    return shared, angles, counts


@pytest.mark.parametrize("weighted", [False, True])
def test_interactions_follow_their_formula(weighted):
    coder, (arrays, dataset) = random_coder(), data(3000)
    weights = np.sqrt(np.square(code(coder, arrays)).mean(axis=0)) if weighted else np.ones(12)
    shared, cosines, counts = by_hand(coder, weights)
    found = component_interactions(coder, dataset if weighted else None)
    np.testing.assert_allclose(found.shared, shared, rtol=1e-4)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-5)
    np.testing.assert_array_equal(found.n_features, counts)
    np.testing.assert_allclose(np.diag(found.shared), 1)
    assert 0 < counts[0, 1] < 12


def test_sites_without_a_feature_in_common_share_nothing():
    columns = Columns(("a", "b"), (2, 2))
    coder = SparseCoder(columns, columns, 3, activation_function="relu")
    coder.W_dec = mx.array([[1.0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    found = component_interactions(coder)
    assert found.shared.tolist() == [[1, 0], [0, 1]]
    assert found.n_features.tolist() == [[1, 0], [0, 1]]
    np.testing.assert_array_equal(found.cosines, [[1, np.nan], [np.nan, 1]])
    assert found.to_dict()["cosines"] == [[1, None], [None, 1]]


def test_a_site_that_no_feature_writes_has_no_share():
    columns = Columns(("a", "b"), (2, 2))
    coder = SparseCoder(columns, columns, 1, activation_function="relu")
    coder.W_dec = mx.array([[1.0, 0, 0, 0]])
    found = component_interactions(coder)
    np.testing.assert_array_equal(found.shared, [[1, 0], [np.nan, np.nan]])
    assert json.dumps(found.to_dict(), allow_nan=False) and found.plot()._repr_png_()


def test_both_can_be_read():
    coder, (_, dataset) = random_coder(), data(500)
    features, found = shared_features(coder, dataset, top=3), component_interactions(coder)
    assert len(repr(features).splitlines()) == 5 and "500 tokens" in repr(features)
    assert features._repr_html_().count("<tr") == 4
    assert json.loads(json.dumps(features.to_dict()))["sites"] == list(SITES)
    lines = repr(found).splitlines()
    assert len(lines) == 10 and lines[1].split() == ["1", "2", "3"]
    assert lines[2].split() == ["1", "a", "1.00", *(f"{v:.2f}" for v in found.shared[0, 1:])]
    assert found._repr_html_().count("<table") == 2
    for figure, values in (
        (features.plot(), 100 * features.explained),
        (found.plot(), found.shared),
    ):
        ax = figure.axes[0]
        np.testing.assert_allclose(ax.get_images()[0].get_array(), values)
        written = [f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in values.reshape(-1)]
        assert [t.get_text() for t in ax.texts] == written
