import math

import numpy as np
import pytest

from mlxterp.sae.labels.scores import Mean, Score, wilson


def test_figures_are_those_of_the_counts():
    score = Score(hits=6, misses=2, false_alarms=3, rejections=9)
    assert score.n == 20 and score.base_rate == 0.4
    assert score.recall == 0.75 and score.precision == pytest.approx(6 / 9)
    assert score.balanced_accuracy == (0.75 + 0.75) / 2
    assert score.f1 == pytest.approx(2 * 0.75 * (6 / 9) / (0.75 + 6 / 9))


@pytest.mark.parametrize(("n_firing", "n_silent"), [(10, 10), (4, 10), (1, 1000)])
def test_who_always_says_the_same_scores_one_half(n_firing, n_silent):
    always = Score(n_firing, 0, n_silent, 0)
    never = Score(0, n_firing, 0, n_silent)
    assert always.balanced_accuracy == never.balanced_accuracy == 0.5
    assert never.f1 == never.precision == 0


def test_wilson_intervals_are_the_known_ones():
    np.testing.assert_allclose(wilson(9, 10), (0.9, 0.5958, 0.9821), atol=1e-4)
    np.testing.assert_allclose(wilson(0, 10), (0.0, 0.0, 0.2775), atol=1e-4)
    assert wilson(10, 10)[1:] == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0, 0, 1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, p, q, covered = np.random.default_rng(0), 0.9, 0.6, 0
    for _ in range(1000):
        hits, rejections = rng.binomial(10, p), rng.binomial(10, q)
        low, high = Score(hits, 10 - hits, 10 - rejections, rejections).interval
        covered += low <= (p + q) / 2 <= high
    assert 0.93 < covered / 1000 <= 0.985


def test_intervals_lie_in_0_to_1_and_shrink():
    low, high = Score(10, 0, 0, 10).interval
    assert high == 1 and 0.75 < low < 0.85
    assert Score(1000, 0, 0, 1000).interval[0] > 0.99


def test_scores_come_back_from_plain_values():
    score = Score(6, 2, 3, 9, 5)
    values = score.to_dict()
    assert values["balanced_accuracy"] == 0.75 and values["misses"] == 2
    assert Score.from_dict(values) == score
    assert "0.750" in repr(score) and "5 unanswered" in repr(score)
    for wrong in ({}, {**values, "hits": -1}, {**values, "hits": "6"}):
        with pytest.raises(ValueError, match="A score has the counts"):
            Score.from_dict(wrong)


def test_means_have_the_interval_of_their_features():
    values = np.random.default_rng(1).normal(0.7, 0.1, 100)
    mean = Mean.of(values.tolist())
    error = 1.96 * values.std() / math.sqrt(100)
    assert mean.value == pytest.approx(values.mean()) and mean.n == 100
    assert mean.low == pytest.approx(mean.value - error, abs=0.005)
    assert mean.high == pytest.approx(mean.value + error, abs=0.005)
    alone = Mean.of([0.5])
    assert (alone.low, alone.high) == (0, 1)
