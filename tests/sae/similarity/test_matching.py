import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.coder import Columns
from mlxterp.sae.similarity import matching
from mlxterp.sae.similarity.matching import match
from mlxterp.sae.transcoder import Transcoder
from tests.sae.kinds import KINDS
from tests.sae.similarity.coders import drawn, noised, random_units, sae_of, units

optimize = pytest.importorskip("scipy.optimize")

N, WIDTH = 60, 32


def permuted(rows: np.ndarray, seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """The rows in another order, and where each of them has gone."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows[order], np.argsort(order)


def by_candidates(monkeypatch, candidates: int) -> None:
    monkeypatch.setattr(matching, "EXACT_ENTRIES", 100)
    monkeypatch.setattr(matching, "CANDIDATES", candidates)


@pytest.mark.parametrize("method", ["exact", "candidates"])
def test_a_permutation_is_found_again(method, monkeypatch):
    if method == "candidates":
        by_candidates(monkeypatch, 4)
    rows = random_units(N, WIDTH)
    copy, where = permuted(noised(rows, 0.9, seed=1))
    found = match(sae_of(rows), sae_of(copy))
    np.testing.assert_array_equal(found.partners, where)
    np.testing.assert_allclose(found.cosines, 0.9, atol=1e-5)
    assert found.shared.all() and found.method == method
    assert found.scores.mcc == pytest.approx(0.9, abs=1e-5)
    assert found.scores.shared == 1 and found.chance.shared == 0


@pytest.mark.parametrize("by", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pairs_are_those_of_the_hungarian_algorithm(kind, by):
    coders = drawn(kind), drawn(kind, 1, 40)
    cosines = units(coders[0], by) @ units(coders[1], by).T
    other = "encoder" if by == "decoder" else "decoder"
    others = units(coders[0], other) @ units(coders[1], other).T
    for own, theirs, table in ((*coders, cosines), (*coders[::-1], cosines.T)):
        found = match(own, theirs, by=by)
        rows, columns = optimize.linear_sum_assignment(table, maximize=True)
        matched = np.flatnonzero(found.partners >= 0)
        # Pairs that share no column are all alike, so that the sum is compared.
        assert len(set(found.partners[matched])) == len(matched) == len(rows)
        assert table[matched, found.partners[matched]].sum() == pytest.approx(
            table[rows, columns].sum(), abs=1e-4
        )
        assert found.scores.mcc == pytest.approx(table[rows, columns].mean(), abs=1e-5)
        assert found.scores.mmcs == pytest.approx(table.max(axis=1).mean(), abs=1e-5)
        assert found.scores.mmcs_back == pytest.approx(table.max(axis=0).mean(), abs=1e-5)
        np.testing.assert_allclose(found.best, table.max(axis=1), atol=1e-5)
        np.testing.assert_allclose(found.best_back, table.max(axis=0), atol=1e-5)
        second = others if table is cosines else others.T
        expected = second[matched, found.partners[matched]]
        np.testing.assert_allclose(found.other_cosines[matched], expected, atol=1e-5)
        assert np.isnan(found.cosines[found.partners < 0]).all()


def scores_of_random_rows(seed: int) -> tuple[float, float]:
    """MMCS and MCC by the sizes of cosines, of 64 random rows with 64 others in 32 dimensions."""
    cosines = random_units(64, 32, seed) @ random_units(64, 32, seed + 1000).T
    sizes = np.abs(cosines)
    return sizes.max(axis=1).mean(), sizes[optimize.linear_sum_assignment(-sizes)].mean()


def test_chance_is_that_of_random_rows():
    coders = sae_of(random_units(64, 32)), sae_of(random_units(64, 32, 1))
    found = [match(*coders, absolute=True, seed=seed).chance for seed in range(0, 80, 4)]
    drawn_again = np.array([scores_of_random_rows(seed) for seed in range(100)])
    error = drawn_again.std(axis=0) * np.sqrt(1 / 20 + 1 / 100)
    mean = np.mean([(one.mmcs, one.mcc) for one in found], axis=0)
    assert (np.abs(mean - drawn_again.mean(axis=0)) < 3.5 * error).all()
    np.testing.assert_allclose(mean, [0.443, 0.418], atol=0.006)
    # The coders themselves are random, and so no better than that.
    scores = match(*coders, absolute=True).scores
    assert scores.mcc == pytest.approx(0.418, abs=0.03) and scores.shared == 0


def test_one_that_is_alike_cannot_be_the_partner_of_two():
    rows = random_units(N, WIDTH)
    twice = np.concatenate([rows, noised(rows[:1], 0.95, seed=2)])
    found = match(sae_of(twice), sae_of(rows))
    assert found.partner(0) == 0 and found.partner(N) is None
    assert np.isnan(found.cosines[N]) and not found.shared[N]
    assert found.best[N] == pytest.approx(0.95, abs=1e-5)
    assert N in found.only_here and len(found.pairs) == N


def test_opposites_match_where_sizes_count_and_not_otherwise():
    rows = random_units(N, WIDTH)
    signs = np.where(np.arange(N) % 3 == 0, -1, 1)[:, None]
    copy, where = permuted(rows * signs)
    signed, sizes = (match(sae_of(rows), sae_of(copy), absolute=a) for a in (False, True))
    np.testing.assert_array_equal(sizes.partners, where)
    np.testing.assert_allclose(sizes.cosines, signs[:, 0], atol=1e-5)
    assert sizes.scores.mcc == pytest.approx(1) and sizes.shared.all()
    np.testing.assert_array_equal(signed.shared, signs[:, 0] > 0)
    # A feature that is turned around in one matrix alone is not the same.
    turned = match(sae_of(rows), sae_of(rows * signs, rows), absolute=True)
    np.testing.assert_array_equal(turned.shared, signs[:, 0] > 0)


def test_sizes_count_by_default_where_codes_have_both_signs():
    rows = random_units(8, WIDTH)
    assert match(sae_of(rows), sae_of(rows, function="abs_topk")).absolute
    assert not match(sae_of(rows), sae_of(rows)).absolute


def test_shared_features_are_alike_in_both_matrices():
    rows = random_units(N, WIDTH)
    W_enc = np.where(np.arange(N)[:, None] < 20, rows, random_units(N, WIDTH, 5))
    found = match(sae_of(rows), sae_of(noised(rows, 0.8, 3), W_enc))
    np.testing.assert_array_equal(np.flatnonzero(found.shared), np.arange(20))
    np.testing.assert_array_equal(found.only_here, np.arange(20, N))
    assert found.scores.shared == pytest.approx(20 / N)
    assert not match(sae_of(rows), sae_of(noised(rows, 0.8, 3)), threshold=0.81).shared.any()


def test_the_other_matrix_is_left_out_where_it_cannot_be_compared():
    rows = random_units(20, 5)
    wide = match(drawn("transcoder"), sae_of(rows))  # it reads a width of 6
    assert wide.other_cosines is None
    assert "shared: the cosine >= 0.7" in repr(wide)
    # An SAE reads what it writes, and a transcoder something else of perhaps the same width.
    square = Transcoder(Columns(("in",), (5,)), Columns(("out",), (5,)), 20, "topk", 1)
    square.W_enc = square.W_dec = mx.array(rows.astype(np.float32))
    for pair in ((square, sae_of(rows)), (sae_of(rows), square)):
        found = match(*pair)
        assert found.other_cosines is None and found.shared.all()
    assert match(square, square).other_cosines is not None


def test_one_site_of_several_is_matched_alone():
    coders = drawn("crosscoder"), drawn("crosscoder", 1)
    table = units(coders[0], site="out.0") @ units(coders[1], site="out.0").T
    rows, columns = optimize.linear_sum_assignment(table, maximize=True)
    found = match(*coders, site="out.0")
    np.testing.assert_array_equal(found.partners[rows], columns)
    encoders = units(coders[0], "encoder", "out.0") @ units(coders[1], "encoder", "out.0").T
    np.testing.assert_allclose(found.other_cosines, encoders[rows, columns], atol=1e-5)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["sae", "crosscoder", "cross-layer transcoder"])
def test_among_candidates_it_is_nearly_as_good(kind, absolute, monkeypatch):
    coders = drawn(kind), drawn(kind, 1, 40)
    exact = match(*coders, absolute=absolute)
    by_candidates(monkeypatch, 6)
    found = match(*coders, absolute=absolute)
    partners = found.partners[found.partners >= 0]
    assert len(set(partners)) == len(partners) == 30, "each once, and no one is left alone"
    assert exact.scores.mcc - 0.05 < found.scores.mcc <= exact.scores.mcc + 1e-6
    assert found.scores.mmcs == pytest.approx(exact.scores.mmcs, abs=1e-6)
    assert found.scores.mmcs_back == pytest.approx(exact.scores.mmcs_back, abs=1e-6)


def test_those_whose_candidates_are_taken_are_matched_among_themselves(monkeypatch):
    own, theirs = random_units(N, WIDTH), random_units(N, WIDTH, 1)
    own[:20] = noised(np.repeat(theirs[:1], 20, axis=0), 0.9, seed=2)
    by_candidates(monkeypatch, 1)
    found = match(sae_of(own), sae_of(theirs))
    assert sorted(found.partners.tolist()) == list(range(N))
    np.testing.assert_allclose(found.cosines, (own * theirs[found.partners]).sum(1), atol=1e-5)
    assert found.scores.mcc > 3 * np.abs((own * theirs).sum(axis=1).mean())


def test_with_all_as_candidates_it_is_the_best(monkeypatch):
    coders = drawn("sae"), drawn("sae", 1, 40)
    exact = match(*coders)
    by_candidates(monkeypatch, 40)
    np.testing.assert_array_equal(match(*coders).partners, exact.partners)


def test_a_seed_decides_on_chance_alone():
    coders = drawn("sae"), drawn("sae", 1)
    first, again, other = (match(*coders, seed=seed) for seed in (0, 0, 1))
    assert first.chance == again.chance != other.chance
    assert first.scores == other.scores


def test_pairs_can_be_read_and_saved():
    rows = random_units(N, WIDTH)
    copy, where = permuted(noised(rows, 0.9, seed=1))
    copy[where[4]] = rows[4]
    found = match(sae_of(rows), sae_of(copy[:50]))
    assert found.pairs.shape == (50, 2)
    assert (np.diff(found.cosines[found.pairs[:, 0]]) <= 0).all()
    lines = repr(found).splitlines()
    assert lines[0] == "60 features, 50 of the other coder, 50 pairs, matched exactly"
    assert lines[1].split() == ["decoder", "cosine", "found", "chance"]
    assert lines[4].split()[-2:] == [f"{found.scores.mcc:.3f}", f"{found.chance.mcc:.3f}"]
    assert f">{found.scores.mcc:.3f}</td>" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["pairs"] == found.pairs.tolist() and plain["scores"]["mcc"] == found.scores.mcc
    assert plain["shared"] == np.flatnonzero(found.shared).tolist()


def test_cosines_are_drawn_beside_those_of_chance():
    pytest.importorskip("matplotlib")
    rows = random_units(N, WIDTH)
    found = match(sae_of(rows), sae_of(noised(rows, 0.9, seed=1)[:50]))
    (axes,) = found.plot().axes
    pairs, chance = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert sum(pairs) == sum(chance) == 50
    assert max(pairs) == 50 and max(chance) < 50


def test_settings_are_checked():
    rows = random_units(8, WIDTH)
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 0"):
        match(sae_of(rows), sae_of(rows), threshold=0)
    with pytest.raises(ValueError, match="same widths"):
        match(sae_of(rows), drawn("sae"))
    found = match(sae_of(rows), sae_of(rows))
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=f"feature_id must be below 8, got {wrong}"):
            found.partner(wrong)


def test_a_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"scipy is missing: pip install 'mlxterp\[analysis\]'"):
        match(drawn("sae"), drawn("sae", 1))


def test_the_method_of_a_coder_is_this_function():
    sae, other = drawn("sae"), drawn("sae", 1)
    found, expected = (
        sae.match(other, by="encoder", seed=3),
        match(sae, other, by="encoder", seed=3),
    )
    assert (found.scores, found.chance) == (expected.scores, expected.chance)
