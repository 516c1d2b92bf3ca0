import math

import numpy as np
import pytest

from mlxterp.sae.evals.noise import Difference, Score, groups_of, redraw, spread_of


def mean(totals):
    return totals[:, 1] / totals[:, 0]


@pytest.mark.parametrize("n_groups", [8, 200])
def test_the_spread_of_a_mean_over_documents_is_its_standard_error(n_groups):
    """Of documents of equal length it is known: the deviation of their means by sqrt(n)."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=n_groups)
    sums = np.stack([np.full(n_groups, 50.0), 50 * means], axis=1)
    found = spread_of(redraw(sums, mean, n_draws=20_000), n_groups)
    assert found == pytest.approx(means.std(ddof=1) / math.sqrt(n_groups), rel=0.03)


def test_the_spread_is_how_much_scores_of_other_documents_differ():
    """Documents of unequal length, whose tokens depend on each other."""
    rng = np.random.default_rng(1)

    def draw():
        lengths = rng.integers(5, 100, size=60)
        level = rng.normal(size=60)
        totals = [(level[i] + rng.normal(size=n)).sum() for i, n in enumerate(lengths)]
        return np.stack([lengths, totals], axis=1)

    means = [mean(draw().sum(axis=0)[None])[0] for _ in range(1000)]
    spreads = [spread_of(redraw(draw(), mean, n_draws=200), 60) for _ in range(50)]
    assert np.mean(spreads) == pytest.approx(np.std(means), rel=0.1)
    tokens_alone = np.sqrt(2 / (60 * 52))
    assert np.mean(spreads) > 2 * tokens_alone


def test_equal_seeds_draw_the_same_documents_so_that_differences_can_be_known():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=40)
    a, b = (
        np.stack([np.ones(40), hard + shift + 0.01 * rng.normal(size=40)], axis=1)
        for shift in (0.0, 0.05)
    )
    of_a, of_b = redraw(a, mean), redraw(b, mean)
    paired = Difference(0.05, spread_of(of_b - of_a, 40))
    assert paired.is_noise is False and paired.spread < 0.01
    apart = redraw(b, mean, seed=1)
    assert Difference(0.05, spread_of(apart - of_a, 40)).is_noise is True


def test_of_one_document_nothing_is_known_of_the_spread():
    sums = np.array([[10.0, 5.0]])
    assert spread_of(redraw(sums, mean), 1) is None
    assert Difference(0.1, None).is_noise is None and repr(Difference(0.1, None)) == "+0.1000"


def test_groups_are_whole_documents_and_not_more_than_there_may_be():
    documents = np.repeat(np.arange(1000), 3)
    groups = groups_of(documents, 1000)
    assert len(np.unique(groups)) == 256
    assert all(len(set(groups[documents == i])) == 1 for i in range(0, 1000, 50))
    np.testing.assert_array_equal(groups_of(np.array([2, 0, 1]), 3), [2, 0, 1])


def test_a_score_has_a_value_or_a_reason():
    score = Score(0.5, 0.1, 0.2)
    assert float(score) == 0.5 and f"{score:.1%}" == "50.0%"
    assert repr(score) == "0.5000 ± 0.1000 (control 0.2000)"
    assert score.to_dict() == {"value": 0.5, "spread": 0.1, "control": 0.2}
    nothing = Score(None, reason="nothing varies")
    assert math.isnan(float(nothing)) and f"{nothing:.3f}" == "-"
    assert nothing.to_dict()["reason"] == "nothing varies" and "nothing varies" in repr(nothing)
    for arguments in ({"value": None}, {"value": 1.0, "reason": "why"}):
        with pytest.raises(ValueError, match="either a value or a reason"):
            Score(**arguments)


def test_scores_over_seeds_have_the_deviation_of_one_seed():
    score = Score.over_seeds([1.0, 2.0, 3.0], [0.0, 1.0])
    assert (score.value, score.spread, score.control) == (2.0, 1.0, 0.5)
    assert Score.over_seeds([1.0]).spread is None


def test_a_difference_says_whether_it_is_noise():
    assert "(noise)" in repr(Difference(0.1, 0.06)) and "(noise)" not in repr(Difference(0.2, 0.06))
    assert Difference(-0.2, 0.06).to_dict() == {"value": -0.2, "spread": 0.06, "is_noise": False}
