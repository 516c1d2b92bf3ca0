import json

import numpy as np
import pytest

from mlxterp.sae.similarity import directions
from mlxterp.sae.similarity.directions import directions_of
from mlxterp.sae.similarity.nearest import Neighbour, nearest, nearest_all, neighbourhood, scan
from tests.sae.kinds import KINDS
from tests.sae.similarity.coders import drawn, noised, random_units, sae_of, units
from tests.sae.similarity.firing import data_of


def ranked(scores: np.ndarray, k: int) -> list[int]:
    return np.argsort(-scores, kind="stable")[:k].tolist()


@pytest.mark.parametrize("by", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_have_the_largest_cosines(kind, by):
    coder, other = drawn(kind), drawn(kind, 1, 40)
    within, between = (units(coder, by) @ units(one, by).T for one in (coder, other))
    for feature in (0, 14, 29):
        found = nearest(coder, feature, other, by=by, top_k=7)
        assert [i for i, _ in found] == ranked(between[feature], 7)
        cosines = between[feature, ranked(between[feature], 7)]
        assert [c for _, c in found] == pytest.approx(cosines.tolist(), abs=1e-6)
        alone = within[feature].copy()
        alone[feature] = -2
        assert [i for i, _ in nearest(coder, feature, by=by, top_k=7)] == ranked(alone, 7)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("entries", [100, 1 << 24])
@pytest.mark.parametrize("kind", KINDS)
def test_all_at_once_are_those_of_each(kind, entries, absolute, monkeypatch):
    monkeypatch.setattr(directions, "BLOCK_ENTRIES", entries)
    coder, other = drawn(kind), drawn(kind, 1, 40)
    for second in (None, other):
        ids, cosines = nearest_all(coder, second, top_k=4, absolute=absolute)
        assert ids.shape == cosines.shape == (30, 4)
        for feature in range(30):
            alone = nearest(coder, feature, second, top_k=4, absolute=absolute)
            assert [c for _, c in alone] == pytest.approx(cosines[feature].tolist(), abs=1e-6)
            # Features of a cross-layer coder may share no column: among cosines of 0 any is right.
            told_apart = np.abs(cosines[feature]) > 1e-6
            own = np.array([i for i, _ in alone])
            np.testing.assert_array_equal(ids[feature][told_apart], own[told_apart])


def test_a_scan_finds_the_nearest_of_the_other_side_too(monkeypatch):
    monkeypatch.setattr(directions, "BLOCK_ENTRIES", 100)
    coder, other = drawn("sae"), drawn("sae", 1, 40)
    cosines = units(coder) @ units(other).T
    for absolute, scores in ((False, cosines), (True, np.abs(cosines))):
        _, back = scan(directions_of(coder), directions_of(other), 3, absolute)
        np.testing.assert_array_equal(back.ids[:, 0], scores.argmax(axis=0))
        expected = cosines[scores.argmax(axis=0), np.arange(40)]
        np.testing.assert_allclose(back.cosines[:, 0], expected, atol=1e-6)


def test_an_opposite_feature_comes_last_unless_sizes_count():
    rows = random_units(20, 8)
    rows[7] = -rows[3]
    sae = sae_of(rows)
    signed = nearest(sae, 3, top_k=19)
    assert signed[-1].feature_id == 7 and signed[-1].cosine == pytest.approx(-1)
    sizes = nearest(sae, 3, top_k=19, absolute=True)
    assert sizes[0].feature_id == 7 and sizes[0].cosine == pytest.approx(-1)
    assert sizes.chance > signed.chance


def test_chance_is_that_of_random_directions():
    found = [nearest(sae_of(random_units(500, 32, seed)), 0, top_k=1) for seed in range(30)]
    cosines = [one[0].cosine for one in found]
    assert np.mean(cosines) == pytest.approx(found[0].chance, abs=0.03)


def test_there_are_no_more_neighbours_than_features():
    sae = sae_of(random_units(4, 8))
    assert len(nearest(sae, 0, top_k=10)) == 3
    assert len(nearest(sae, 0, sae, top_k=10)) == 4
    assert nearest_all(sae, top_k=10).ids.shape == (4, 3)
    lonely = sae_of(random_units(1, 8))
    assert len(nearest(lonely, 0)) == 0
    assert nearest_all(lonely).ids.shape == (1, 0)


def test_neighbours_are_a_sequence_that_can_be_read_and_saved():
    sae = sae_of(random_units(30, 8))
    found = nearest(sae, 5, top_k=3)
    assert isinstance(found[0], Neighbour) and found[1:] == found.found[1:]
    lines = repr(found).splitlines()
    assert lines[0].startswith("features nearest to 5 by decoder cosine; ")
    assert [line.split() for line in lines[2:]] == [[str(i), f"{c:+.3f}"] for i, c in found]
    assert f">{found[0].cosine:+.3f}</td>" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["found"] == [{"feature_id": i, "cosine": c} for i, c in found]


def test_what_does_not_exist_is_an_error():
    sae = sae_of(random_units(4, 8))
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 3\], got 4"):
        nearest(sae, 4)
    for call in (lambda: nearest(sae, 0, top_k=0), lambda: nearest_all(sae, top_k=0)):
        with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
            call()


def firing(seed: int = 0) -> np.ndarray:
    """Of feature 0 feature 1 takes the place on half of the tokens; 2 fires whenever 0 does; the
    rest fire by themselves."""
    rng = np.random.default_rng(seed)
    fires = rng.random((2000, 20)) < 0.1
    both = rng.random(2000) < 0.3
    first = rng.random(2000) < 0.5
    fires[:, 0], fires[:, 1] = both & first, both & ~first
    fires[:, 2] = fires[:, 0]
    fires[:, 19] = False
    return fires


def neighbours_of_0(top_k: int = 3):
    rows = random_units(20, 64)
    rows[1] = noised(rows[:1], 0.6, seed=1)[0]
    fires = firing()
    return rows, fires, neighbourhood(data_of(sae_of(rows), fires), 0, top_k=top_k)


def test_a_neighbourhood_has_the_nearest_and_those_that_fire_together():
    rows, fires, found = neighbours_of_0()
    cosines = rows @ rows[0]
    together = (fires & fires[:, :1]).sum(axis=0)
    jaccard = together / np.maximum(1, (fires | fires[:, :1]).sum(axis=0))
    expected = fires[:, 0].sum() * fires.sum(axis=0) / len(fires)
    cosines[0] = jaccard[0] = -1
    wanted = {*ranked(cosines, 3), *ranked(jaccard, 3)}
    assert [r.feature_id for r in found.relations] == sorted(wanted, key=lambda i: -cosines[i])
    for r in found.relations:
        i = r.feature_id
        assert (r.together, r.cosine) == (together[i], pytest.approx(cosines[i], abs=1e-6))
        assert (r.expected, r.jaccard) == pytest.approx((expected[i], jaccard[i]))


def test_alike_features_that_fire_apart_are_pointed_out():
    rows, _, found = neighbours_of_0(top_k=19)
    apart = [r.feature_id for r in found.relations if r.apart]
    assert apart == [1], "2 fires with it, the others now and then, and 19 never"
    line = next(line for line in repr(found).splitlines() if line.split()[0] == "1")
    assert line.endswith("apart")
    assert 2 in {r.feature_id for r in neighbours_of_0(1)[2].relations}


def test_a_neighbourhood_of_a_feature_that_never_fires_is_of_cosines_alone():
    rows = random_units(20, 64)
    found = neighbourhood(data_of(sae_of(rows), firing()), 19, top_k=3)
    assert [r.feature_id for r in found.relations] == ranked(np.delete(rows @ rows[19], 19), 3)
    assert not any(r.together or r.expected or r.jaccard or r.apart for r in found.relations)


def test_a_neighbourhood_can_be_read_and_saved():
    _, _, found = neighbours_of_0()
    assert repr(found).startswith("around feature 0, on 2,000 tokens\n")
    assert ">apart</td>" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["relations"][0]["feature_id"] == 1 and plain["n_tokens"] == 2000
    with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
        neighbours_of_0(top_k=0)


def test_the_methods_of_a_coder_are_these_functions():
    sae, other = drawn("sae"), drawn("sae", 1)
    assert sae.similar_features(3, top_k=4).found == nearest(sae, 3, top_k=4).found
    found = sae.similar_features(3, other, by="encoder", site="in.0")
    assert found.found == nearest(sae, 3, other, by="encoder", site="in.0").found
