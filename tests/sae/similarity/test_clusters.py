import json
import sys

import numpy as np
import pytest

from mlxterp.sae.similarity import clusters as module
from mlxterp.sae.similarity.clusters import find_clusters
from mlxterp.sae.similarity.directions import directions_of
from tests.sae.kinds import KINDS
from tests.sae.similarity.coders import drawn, families, random_units, sae_of, units
from tests.sae.similarity.firing import codes_of, data_of

networkx = pytest.importorskip("networkx")
pytest.importorskip("scipy")


def planted(seed: int = 0):
    """Twenty families of six with a cosine of .64 between members, and forty others, shuffled."""
    rows = np.concatenate([families(20, 6, 128, 0.8, seed), random_units(40, 128, seed + 9)])
    truth = np.append(np.repeat(np.arange(20), 6), np.full(40, -1))
    order = np.random.default_rng(seed).permutation(len(rows))
    return sae_of(rows[order]), truth[order]


def same_sets(labels: np.ndarray, truth: np.ndarray) -> bool:
    sets = [{frozenset(np.flatnonzero(one == i)) for i in set(one.tolist()) - {-1}}
            for one in (labels, truth)]  # fmt: skip
    return sets[0] == sets[1]


def test_planted_families_are_found_and_nothing_else():
    sae, truth = planted()
    found = find_clusters(sae)
    assert same_sets(found.labels, truth)
    assert found.sizes.tolist() == [6] * 20
    assert 0.3 < found.min_cosine < 0.5


def test_random_directions_are_in_no_cluster_to_speak_of():
    found = find_clusters(sae_of(random_units(400, 64)))
    assert (found.labels >= 0).mean() < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_dense_rows(kind):
    coder = drawn(kind)
    found = find_clusters(coder, min_cosine=0.4, n_neighbours=3)
    cosines = units(coder) @ units(coder).T
    background = cosines[~np.eye(30, dtype=bool)].mean()
    assert found.background == pytest.approx(background, abs=1e-6)
    assert len(found) and found.sizes.tolist() == sorted(found.sizes.tolist(), reverse=True)
    for i in range(len(found)):
        ids = np.flatnonzero(found.labels == i)
        within = cosines[np.ix_(ids, ids)]
        central = (within.sum(axis=1) - 1) / (len(ids) - 1)
        assert found.sizes[i] == len(ids) > 1
        np.testing.assert_allclose(found.centrality[ids], central, atol=1e-5)
        assert found.cohesion[i] == pytest.approx(central.mean(), abs=1e-5)
        assert central[ids == found.medoids[i]] == pytest.approx(central.max(), abs=1e-5)
        assert found.members(i)[0] == found.medoids[i]
        assert sorted(found.members(i)) == ids.tolist()
    assert np.isnan(found.centrality[found.labels < 0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_edges_join_each_feature_to_its_nearest(kind):
    coder = drawn(kind)
    cosines = units(coder) @ units(coder).T
    np.fill_diagonal(cosines, -2)
    expected = {}
    for i, row in enumerate(cosines):
        for j in np.argsort(-row)[:3].tolist():
            if row[j] >= 0.5:
                expected[min(i, j), max(i, j)] = row[j]
    rows, columns, weights = module._edges(directions_of(coder), None, 3, 0.5)
    found = dict(zip(zip(rows.tolist(), columns.tolist(), strict=True), weights, strict=True))
    assert found == pytest.approx(expected, abs=1e-6)


def test_communities_are_those_of_networkx():
    coder = drawn("sae")
    edges = module._edges(directions_of(coder), None, 3, 0.3)
    graph = networkx.Graph()
    graph.add_weighted_edges_from(zip(*(part.tolist() for part in edges), strict=True))
    sets = networkx.community.louvain_communities(graph, resolution=1.5, seed=4)
    found = find_clusters(coder, n_neighbours=3, min_cosine=0.3, resolution=1.5, seed=4)
    expected = {frozenset(one) for one in sets if len(one) > 1}
    assert {frozenset(found.members(i).tolist()) for i in range(len(found))} == expected


def test_the_same_seed_gives_the_same_clusters():
    sae = sae_of(random_units(150, 12))
    first, again = (find_clusters(sae, min_cosine=0.3, seed=2) for _ in range(2))
    np.testing.assert_array_equal(first.labels, again.labels)


def test_a_higher_resolution_makes_smaller_clusters():
    sae = sae_of(random_units(150, 12))
    sizes = [find_clusters(sae, min_cosine=0.3, resolution=r).sizes.max() for r in (0.5, 4)]
    assert sizes[0] > sizes[1]


def firing_families(n_features: int) -> np.ndarray:
    """Each four features in order fire together, up to a few tokens."""
    rng = np.random.default_rng(3)
    fires = np.repeat(rng.random((1500, n_features // 4)) < 0.05, 4, axis=1)
    return fires ^ (rng.random(fires.shape) < 0.002)


def test_features_that_fire_together_are_joined_where_there_is_data():
    sae = sae_of(random_units(40, 128))
    fires = firing_families(40)
    assert not len(find_clusters(sae, min_cosine=0.6))
    found = find_clusters(sae, data_of(sae, fires), min_cosine=0.6)
    assert same_sets(found.labels, np.repeat(np.arange(10), 4))


def test_weights_are_the_mean_of_cosine_and_correlation():
    coder, fires = drawn("sae", n_features=24), firing_families(24)
    fires[:, 23] = False
    with np.errstate(invalid="ignore"):
        phi = np.nan_to_num(np.corrcoef(fires.T.astype(float)))
    cosines = units(coder) @ units(coder).T
    expected = {}
    for i in range(24):
        for j in range(i + 1, 24):
            weight = cosines[i, j] * (cosines[i, j] >= 0.5) + phi[i, j] * (phi[i, j] >= 0.1)
            if weight > 0:
                expected[i, j] = weight / 2
    edges = module._edges(directions_of(coder), data_of(coder, fires), 23, 0.5)
    found = {(i, j): w for i, j, w in zip(*(part.tolist() for part in edges), strict=True)}
    assert found == pytest.approx(expected, abs=1e-5)


def test_correlations_are_those_of_numpy_in_blocks_too(monkeypatch):
    monkeypatch.setattr(module, "CODE_COLUMNS", 7)
    fires = firing_families(24)
    fires[:, 5], fires[:, 6] = False, True  # no correlation is known of either
    found = np.concatenate([phi for _, phi in module._phi(codes_of(fires))])
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(fires.T.astype(float)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [np.zeros((5, 8)), random_units(1, 8), random_units(2, 8)])
def test_few_features_and_zero_ones_are_in_no_cluster(rows):
    found = find_clusters(sae_of(rows))
    assert len(found) == 0 and found.labels.tolist() == [-1] * len(rows)
    assert "0 clusters" in repr(found)


def test_clusters_can_be_read_and_saved():
    sae, _ = planted()
    found = find_clusters(sae)
    feature = int(found.members(3)[2])
    assert found.of(feature) == 3
    assert found.of(int(np.flatnonzero(found.labels < 0)[0])) is None
    lines = repr(found).splitlines()
    assert lines[0].startswith("20 clusters of 160 features, 40 in none; joined from")
    assert len(lines) == 3 + module.LISTED
    listed = ", ".join(map(str, found.members(3).tolist()))
    assert lines[6].split(maxsplit=3) == ["3", "6", f"{found.cohesion[3]:.2f}", listed]
    assert listed in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["labels"] == found.labels.tolist() and plain["medoids"][3] == found.medoids[3]


def test_settings_are_checked():
    sae = sae_of(random_units(8, 6))
    for name, wrong, allowed in (
        ("n_neighbours", 0, ">= 1"),
        ("resolution", 0, "above 0"),
        ("min_cosine", 1.5, r"in \[0, 1\]"),
        ("by", "both", "'decoder' or 'encoder'"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {wrong!r}"):
            find_clusters(sae, **{name: wrong})
    with pytest.raises(ValueError, match="data is of 24 features, the coder has 8"):
        find_clusters(sae, data_of(sae, firing_families(24)))
    found = find_clusters(planted()[0])
    with pytest.raises(ValueError, match=r"cluster must be in \[0, 19\], got 20"):
        found.members(20)
    with pytest.raises(ValueError, match="feature_id must be below 160, got -1"):
        found.of(-1)


def test_a_missing_networkx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="networkx is missing: .*analysis"):
        find_clusters(sae_of(random_units(8, 6)))


def test_the_method_of_a_coder_is_this_function():
    sae, fires = sae_of(random_units(40, 128)), firing_families(40)
    data = data_of(sae, fires)
    found = sae.clusters(data, min_cosine=0.6)
    assert len(found) == 10
    np.testing.assert_array_equal(found.labels, find_clusters(sae, data, min_cosine=0.6).labels)
