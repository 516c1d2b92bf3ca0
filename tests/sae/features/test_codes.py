import numpy as np
import pytest

from mlxterp.sae.features.codes import SparseCodes, association

N_TOKENS, N_FEATURES, LENGTH = 60, 9, 8


def dense(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.5, 2, (N_TOKENS, N_FEATURES)) * (rng.random((N_TOKENS, N_FEATURES)) < 0.3)
    z[:, 4] = 0  # dead
    z[:, 5] = z[:, 6]  # always together
    return np.round(z, 2)


def codes_of(z: np.ndarray) -> SparseCodes:
    """Every third context is missing, and every fifth token of the others does not count."""
    places = np.arange(len(z) * 2)
    places = places[(places // LENGTH % 3 != 1) & (places % 5 != 0)][: len(z)]
    rows, features = np.nonzero(z)
    starts = np.append(0, np.cumsum((z != 0).sum(axis=1)))
    return SparseCodes(
        np.unique(places // LENGTH), places, starts, features.astype(np.uint16),
        (z[rows, features] / 4).astype(np.float16), 4.0, N_FEATURES,
    )  # fmt: skip


def test_a_feature_has_its_tokens_and_values():
    z = dense()
    codes = codes_of(z)
    assert codes.n_tokens == N_TOKENS
    np.testing.assert_array_equal(codes.firing_counts, (z != 0).sum(axis=0))
    for feature in range(N_FEATURES):
        rows, values = codes.of(feature)
        np.testing.assert_array_equal(rows, np.flatnonzero(z[:, feature]))
        np.testing.assert_allclose(values, z[rows, feature], rtol=1e-3)


def test_values_are_found_by_context():
    z = dense()
    codes = codes_of(z)
    for context in range(max(codes.contexts) + 2):
        found = codes.in_context(2, context, LENGTH)
        if context not in codes.contexts:
            assert found is None
            continue
        expected = np.zeros(LENGTH)
        for row in np.flatnonzero(codes.positions // LENGTH == context):
            expected[codes.positions[row] % LENGTH] = z[row, 2]
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_features_that_fire_together_are_counted():
    z = dense()
    active = (z != 0).astype(int)
    codes = codes_of(z)
    for feature in range(N_FEATURES):
        np.testing.assert_array_equal(codes.together(feature), active[:, feature] @ active)
    some = [6, 0, 5]
    expected = active[:, some].T @ active[:, some]
    np.testing.assert_array_equal(codes.counts_together(some), expected)


def test_association_measures_are_those_of_two_by_two_tables():
    active = dense() != 0
    counts, one = active.sum(axis=0), active[:, 0]
    together = one @ active.astype(int)
    found = {
        by: association(together, counts, 0, N_TOKENS, by)
        for by in ("count", "conditional", "jaccard", "phi", "npmi")
    }
    for feature in range(1, N_FEATURES):
        other = active[:, feature]
        both = (one & other).sum()
        assert found["count"][feature] == both
        assert found["conditional"][feature] == pytest.approx(both / one.sum())
        assert found["jaccard"][feature] == pytest.approx(both / (one | other).sum())
        if feature == 4:
            assert found["phi"][4] == found["jaccard"][4] == 0
            continue
        assert found["phi"][feature] == pytest.approx(np.corrcoef(one, other)[0, 1])
        mutual = np.log(both * N_TOKENS / (one.sum() * other.sum()))
        assert found["npmi"][feature] == pytest.approx(mutual / -np.log(both / N_TOKENS))


def test_the_same_tokens_are_the_strongest_association():
    active = dense() != 0
    together, counts = active[:, 5] @ active.astype(int), active.sum(axis=0)
    for by in ("conditional", "jaccard", "phi", "npmi"):
        assert association(together, counts, 5, N_TOKENS, by)[6] == pytest.approx(1)


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match=r"by must be one of \['conditional', .*got 'cosine'"):
        association(np.ones(3), np.ones(3), 0, 5, "cosine")
