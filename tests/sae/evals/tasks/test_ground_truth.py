from itertools import permutations

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.evals.tasks.ground_truth import RANDOM, recovery
from mlxterp.sae.evals.tasks.synthetic import SyntheticFeatures
from tests.sae.evals.tasks.planted import coder_of
from tests.sae.kinds import make

KINDS = ("sparse", "zipfian", "correlated", "hierarchical")


@pytest.mark.parametrize("kind", KINDS)
def test_features_fire_as_often_as_they_should(kind):
    made = SyntheticFeatures.make(kind, 64, 32, 2.0)
    codes, x = made.draw(40_000)
    np.testing.assert_allclose((codes > 0).mean(axis=0), made.rates, atol=0.01)
    assert (codes > 0).sum(axis=1).mean() == pytest.approx(2.0, abs=0.1)
    on = codes[codes > 0]
    assert on.min() >= 0.5 and on.max() <= 1.5 and on.mean() == pytest.approx(1.0, abs=0.01)
    np.testing.assert_allclose(x, codes @ made.directions, atol=0.08)
    np.testing.assert_allclose(np.linalg.norm(made.directions, axis=1), 1)


def phi(codes, i, j):
    return np.corrcoef(codes[:, i] > 0, codes[:, j] > 0)[0, 1]


def test_families_are_what_their_kind_says():
    codes = {kind: SyntheticFeatures.make(kind, 64, 32, 2.0).draw(40_000)[0] for kind in KINDS}
    assert abs(phi(codes["sparse"], 0, 1)) < 0.02
    assert phi(codes["correlated"], 0, 1) > 0.2 > abs(phi(codes["correlated"], 3, 4)) + 0.18
    tree = codes["hierarchical"] > 0
    assert not (tree[:, 1:4].any(axis=1) & ~tree[:, 0]).any()
    assert tree[tree[:, 0], 1].mean() == pytest.approx(0.25, abs=0.03)
    rates = (codes["zipfian"] > 0).mean(axis=0)
    assert rates[0] / rates[20] == pytest.approx(5, rel=0.25)


def test_directions_are_orthogonal_where_there_is_room():
    made = SyntheticFeatures.make("sparse", 8, 16, 1.0)
    np.testing.assert_allclose(made.directions @ made.directions.T, np.eye(8), atol=1e-12)
    assert np.abs(np.triu(SyntheticFeatures.make().directions @ SyntheticFeatures.make()
                          .directions.T, 1)).max() > 0.3  # fmt: skip


def exact(gain=1.0, n=8, width=16, rows=None):
    made = SyntheticFeatures.make("sparse", n, width, 1.5, noise=0.0)
    rows = made.directions if rows is None else rows
    return made, coder_of(rows, gain * rows, np.full(len(rows), -1e-4))


def test_the_truth_itself_is_recovered_wholly():
    made, coder = exact()
    found = recovery(coder, made, n_tokens=2000, seeds=2)
    for name in ("MCC", "MMCS", "MMCS back", "uniqueness", "precision", "recall", "F1",
                 "size of values", "L0 over the true L0", "explained variance"):  # fmt: skip
        assert found[name].score.value == pytest.approx(1, abs=1e-3), name
    assert found["dead features"].score.value == 0
    assert found["MCC"].control(RANDOM).value < 0.6
    assert found["F1"].control(RANDOM).value < 0.7


def test_shrinkage_is_seen_in_the_size_of_values_and_not_in_directions():
    made, coder = exact(gain=0.5)
    found = recovery(coder, made, n_tokens=1000, seeds=1)
    assert found["size of values"].score.value == pytest.approx(0.5, abs=1e-3)
    assert found["MCC"].score.value == pytest.approx(1) == found["F1"].score.value
    assert found["explained variance"].score.value < 0.8


def test_duplicates_are_punished_by_mcc_and_uniqueness_but_not_by_the_largest_cosines_back():
    made, _ = exact()
    rows = np.concatenate([made.directions[:4], made.directions[:4]])
    _, coder = exact(rows=rows)
    found = recovery(coder, made, n_tokens=1000, seeds=1)
    assert found["uniqueness"].score.value == 0.5
    assert found["MMCS back"].score.value == pytest.approx(1)
    assert found["MCC"].score.value == pytest.approx(0.5, abs=0.01)
    assert found["recall"].score.value < 0.65
    assert found["L0 over the true L0"].score.value == pytest.approx(1, abs=0.1)


def test_scores_are_those_of_an_independent_computation():
    made = SyntheticFeatures.make("sparse", 4, 3, 1.0, noise=0.0)
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(5, 3))
    coder = coder_of(rows, rows, np.full(5, -0.3))
    found = recovery(coder, made, n_tokens=500, seeds=1)
    codes, x = made.draw(500, 0)
    z = np.maximum(x @ rows.T - 0.3, 0)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = made.directions @ units.T
    best = max(permutations(range(5), 4), key=lambda m: sum(cosines[j, m[j]] for j in range(4)))
    expected = {"MCC": np.mean([cosines[j, best[j]] for j in range(4)])}
    expected["MMCS"] = np.mean([max(row) for row in cosines])
    recall, precision, f1, sizes = [], [], [], []
    for j, i in enumerate(best):
        on, fires = codes[:, j] > 0, z[:, i] > 0
        both = (on & fires).sum()
        recall.append(both / on.sum())
        precision.append(both / max(1, fires.sum()))
        f1.append(2 * both / (on.sum() + fires.sum()))
        if both:
            gain = rows[i] @ made.directions[j]
            sizes.append((z[on & fires, i] * gain).sum() / codes[on & fires, j].sum())
    expected |= {"recall": np.mean(recall), "precision": np.mean(precision), "F1": np.mean(f1),
                 "size of values": np.mean(sizes)}  # fmt: skip
    expected["L0 over the true L0"] = (z > 0).sum() / (codes > 0).sum()
    expected["explained variance"] = (
        1 - np.square(x - z @ rows).sum() / np.square(x - x.mean(axis=0)).sum()
    )
    for name, value in expected.items():
        assert found[name].values[0] == pytest.approx(value, rel=1e-4), name


def test_chance_is_what_random_directions_have():
    """64 random rows and 64 truths in 32 dimensions, with signs: by a simulation of its own."""
    made = SyntheticFeatures.make()
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(64, 32))
    found = recovery(coder_of(rows, rows), made, n_tokens=300, seeds=4)
    largest = [
        (made.directions @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T).max(axis=1).mean()
        for w in rng.normal(size=(20, 64, 32))
    ]
    assert found["MMCS"].control(RANDOM).value == pytest.approx(np.mean(largest), abs=0.02)
    assert found["MMCS"].score.value == pytest.approx(np.mean(largest), abs=0.04)


def test_several_coders_give_the_spread_of_training():
    made, coder = exact()
    other = exact(gain=0.5)[1]
    found = recovery([coder, other], made, n_tokens=500)
    assert found["size of values"].values == pytest.approx((1, 0.5), abs=1e-3)
    assert found["size of values"].score.spread == pytest.approx(0.354, abs=1e-2)


def test_bad_arguments_are_refused():
    made = SyntheticFeatures.make("sparse", 8, 16, 1.0)
    with pytest.raises(ValueError, match="the features' width 16, got 6"):
        recovery(coder_of(np.eye(6), np.eye(6)), made)
    with pytest.raises(ValueError, match="needs a coder that writes what it reads"):
        recovery(make("transcoder"), made)
    with pytest.raises(ValueError, match="kind must be one of"):
        SyntheticFeatures.make("dense")
    with pytest.raises(ValueError, match="n_features must be a multiple of 4"):
        SyntheticFeatures.make("sparse", 10)
    with pytest.raises(ValueError, match=r"active must be in \(0, 32\] here, got 40"):
        SyntheticFeatures.make(active=40)
    with pytest.raises(ValueError, match="bias and noise must be >= 0"):
        SyntheticFeatures.make(noise=-1)


def test_a_bias_is_common_to_all_tokens():
    made = SyntheticFeatures.make(bias=7.0, noise=0.0)
    codes, x = made.draw(50)
    np.testing.assert_allclose(x - codes @ made.directions, np.tile(made.bias, (50, 1)), atol=1e-5)
    assert np.linalg.norm(made.bias) == pytest.approx(7)
    assert mx.array(x).shape == (50, 32)
