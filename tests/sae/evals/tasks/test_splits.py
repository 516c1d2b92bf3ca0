import numpy as np
import pytest

from mlxterp.sae.evals.tasks.splits import overlap, split


def examples(n=400, n_groups=40, rate=0.3):
    rng = np.random.default_rng(0)
    return rng.random(n) < rate, rng.integers(0, n_groups, n)


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_parts_share_no_document_and_are_half_true(rate):
    y, groups = examples(rate=rate)
    for seed in range(5):
        train, test = split(y, groups, seed)
        assert not set(groups[train]) & set(groups[test])
        for part in (train, test):
            assert y[part].mean() == 0.5 and len(np.unique(part)) == len(part)
        assert 0.15 < len(test) / (len(train) + len(test)) < 0.4
        assert overlap(len(train), len(test)) == len(test) / len(train)


def test_seeds_draw_other_documents():
    y, groups = examples()
    assert set(split(y, groups, 0).test) != set(split(y, groups, 1).test)
    np.testing.assert_array_equal(split(y, groups, 0).test, split(y, groups, 0).test)


def test_too_few_examples_are_refused():
    y = np.arange(400) < 15
    with pytest.raises(ValueError, match="too few examples: 15 of the rarer label"):
        split(y, np.arange(400))
    with pytest.raises(ValueError, match="in 1 documents"):
        split(np.arange(400) < 200, np.zeros(400))
