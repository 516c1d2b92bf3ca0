import json
import sys
import types

import numpy as np
import pytest

from mlxterp.sae.similarity import directions
from mlxterp.sae.similarity.directions import directions_of
from mlxterp.sae.similarity.map import CAPTION, feature_map, principal
from tests.sae.kinds import KINDS
from tests.sae.similarity.coders import drawn, families, random_units, sae_of, units


def stretched(n: int = 200) -> np.ndarray:
    """Directions that vary along some axes more than along others."""
    return random_units(n, 20) * np.linspace(4, 0.2, 20) + 0.5


def by_numpy(rows: np.ndarray, n: int = 2) -> tuple[np.ndarray, np.ndarray]:
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return (left * sizes)[:, :n], (sizes**2 / (sizes**2).sum())[:n]


@pytest.mark.parametrize("by", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_points_are_the_principal_components(kind, by, monkeypatch):
    monkeypatch.setattr(directions, "BLOCK_ROWS", 7)
    coder = drawn(kind)
    found = feature_map(coder, by=by)
    points, explained = by_numpy(units(coder, by))
    # The iteration is stopped where axes are nearly as long as the next ones.
    np.testing.assert_allclose(np.abs(found.points), np.abs(points), atol=1e-3)
    assert found.explained == pytest.approx(explained.tolist(), abs=1e-4)


def test_the_main_axes_are_found_among_many():
    rows = stretched()
    found = principal(directions_of(sae_of(rows)), 5)
    points, explained = by_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True), 5)
    np.testing.assert_allclose(np.abs(found[0]), np.abs(points), atol=1e-4)
    np.testing.assert_allclose(found[1], explained, atol=1e-6)


def test_the_farthest_feature_of_each_axis_is_above_zero():
    found = feature_map(sae_of(stretched())).points
    assert (found[np.abs(found).argmax(axis=0), [0, 1]] > 0).all()
    for seed in (1, 2):
        again = feature_map(sae_of(stretched()), seed=seed).points
        np.testing.assert_allclose(again, found, atol=1e-4)


def test_families_are_near_each_other():
    rows = families(4, 30, 32, 0.9)
    points = feature_map(sae_of(rows)).points.reshape(4, 30, 2)
    centres = points.mean(axis=1)
    within = np.linalg.norm(points - centres[:, None], axis=-1).mean()
    between = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    assert between[~np.eye(4, dtype=bool)].mean() > 4 * within


@pytest.mark.parametrize("rows", [random_units(2, 8), random_units(9, 1), np.zeros((4, 3))])
def test_few_features_and_columns_have_points_too(rows):
    found = feature_map(sae_of(rows))
    assert found.points.shape == (len(rows), 2) and np.isfinite(found.points).all()


class FakeUMAP:
    def __init__(self, **options):
        self.options = options

    def fit_transform(self, points):
        FakeUMAP.given = self.options, points
        return points[:, :2] * 2


def test_umap_gets_the_main_axes_and_the_seed(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=FakeUMAP))
    sae = sae_of(random_units(120, 60))
    found = feature_map(sae, "umap", seed=5)
    options, points = FakeUMAP.given
    assert (options["random_state"], options["n_components"], options["n_jobs"]) == (5, 2, 1)
    np.testing.assert_array_equal(points, principal(directions_of(sae), 50, 5)[0])
    np.testing.assert_array_equal(found.points, points[:, :2] * 2)
    assert (found.method, found.explained) == ("umap", None)


def test_umap_keeps_families_together():
    pytest.importorskip("umap")
    points = feature_map(sae_of(families(4, 30, 32, 0.9)), "umap").points.reshape(4, 30, 2)
    centres = points.mean(axis=1)
    within = np.linalg.norm(points - centres[:, None], axis=-1).mean()
    between = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    assert between[~np.eye(4, dtype=bool)].min() > 2 * within


def test_a_missing_umap_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"umap-learn is missing: pip install 'mlxterp\[umap\]'"):
        feature_map(drawn("sae"), "umap")


def test_another_method_is_an_error():
    with pytest.raises(ValueError, match="method must be 'pca' or 'umap', got 'tsne'"):
        feature_map(drawn("sae"), "tsne")


def test_a_map_can_be_read_and_saved():
    found = feature_map(drawn("sae"))
    share = f"{sum(found.explained):.1%}"
    assert repr(found) == f"FeatureMap(30 features, pca, {share} of the variance; display only)"
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["points"] == found.points.tolist() and plain["method"] == "pca"


def shown(figure) -> list:
    return [np.asarray(one.get_offsets()) for one in figure.axes[0].collections]


def test_a_figure_says_that_it_is_for_display():
    pytest.importorskip("matplotlib")
    found = feature_map(drawn("sae"))
    figure = found.plot()
    assert figure.axes[0].get_title() == CAPTION
    assert figure.axes[0].get_xlabel() == f"pca 1 ({found.explained[0]:.1%})"
    np.testing.assert_allclose(shown(figure)[0], found.points)


def test_the_largest_kinds_have_colours_and_the_rest_are_grey():
    pytest.importorskip("matplotlib")
    found = feature_map(drawn("sae"))
    labels = np.repeat([-1, 4, 7, 0, 1, 2, 3, 5], [2, 7, 5, 4, 4, 3, 3, 2])
    figure = found.plot(labels, "cluster")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["others", *(f"cluster {i}" for i in (4, 7, 0, 1, 2, 3))]
    assert [len(points) for points in shown(figure)] == [4, 7, 5, 4, 4, 3, 3]
    np.testing.assert_allclose(shown(figure)[1], found.points[labels == 4])
    names = np.where(labels == 4, "names", "calls")
    texts = found.plot(names).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["calls", "names"]


def test_numbers_are_a_scale():
    pytest.importorskip("matplotlib")
    found = feature_map(drawn("sae"))
    rates = np.linspace(0, 0.2, 30)
    figure = found.plot(rates, "firing rate")
    (points,) = figure.axes[0].collections
    np.testing.assert_allclose(points.get_array(), rates)
    assert figure.axes[1].get_ylabel() == "firing rate"


def test_values_of_another_length_are_an_error():
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"values must be 30, got shape \(29,\)"):
        feature_map(drawn("sae")).plot(np.zeros(29))


def test_the_method_of_a_coder_is_this_function():
    sae = drawn("sae")
    expected = feature_map(sae, by="encoder").points
    np.testing.assert_array_equal(sae.feature_map("pca", by="encoder").points, expected)
    with pytest.raises(ValueError, match="got 'tsne'"):
        sae.feature_map(method="tsne")
