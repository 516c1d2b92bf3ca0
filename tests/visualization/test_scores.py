"""Scores are those that loops over a pattern find, and those of patterns that are known."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.visualization import (
    copying_score,
    current_token_score,
    duplicate_token_score,
    first_token_score,
    induction_score,
    previous_token_score,
)

TOKENS = [3, 1, 4, 1, 5, 3, 3, 1]


def random_pattern(*shape, seed=0):
    """Rows that sum to 1, causal, queries being the last of the keys."""
    values = np.random.default_rng(seed).random(shape)
    queries, keys = shape[-2:]
    values = values * np.tri(queries, keys, keys - queries)
    return (values / values.sum(axis=-1, keepdims=True)).astype(np.float32)


def by_loops(pattern, wanted):
    """The mean over queries that have wanted keys, of their sum; positions are those of keys."""
    queries, keys = pattern.shape
    sums = []
    for i in range(queries):
        t = i + keys - queries
        found = [s for s in range(t + 1) if wanted(t, s)]
        if found:
            sums.append(sum(float(pattern[i, s]) for s in found))
    return np.mean(sums) if sums else 0.0


CASES = {
    "induction": (lambda p: induction_score(p, 3), lambda t, s: t >= 3 and s == t - 2),
    "previous": (previous_token_score, lambda t, s: s == t - 1),
    "current": (current_token_score, lambda t, s: s == t),
    "first": (first_token_score, lambda t, s: s == 0),
    "duplicate": (
        lambda p: duplicate_token_score(p, TOKENS),
        lambda t, s: s < t and TOKENS[s] == TOKENS[t],
    ),
}


@pytest.mark.parametrize("n_queries", [8, 6, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_score_is_what_loops_find(name, n_queries):
    score, wanted = CASES[name]
    pattern = random_pattern(n_queries, 8)
    assert score(pattern) == pytest.approx(by_loops(pattern, wanted), abs=1e-6)
    assert isinstance(score(pattern), float)


@pytest.mark.parametrize("name", CASES)
def test_many_heads_have_an_array_of_scores(name):
    score, wanted = CASES[name]
    patterns = random_pattern(2, 3, 8, 8)
    expected = [[by_loops(head, wanted) for head in row] for row in patterns]
    np.testing.assert_allclose(score(patterns), expected, atol=1e-6)
    np.testing.assert_allclose(score(mx.array(patterns)), expected, atol=1e-6)
    half = mx.array(patterns).astype(mx.bfloat16)
    np.testing.assert_allclose(score(half), expected, atol=1e-2)


def test_a_head_that_does_one_thing_only_scores_one_for_it():
    def rows(keys):
        return np.eye(8)[keys]

    period, t = 4, np.arange(8)
    assert induction_score(rows(np.maximum(t - period + 1, 0)), period) == 1
    assert induction_score(rows(np.maximum(t - period, 0)), period) == 0
    assert previous_token_score(rows(np.maximum(t - 1, 0))) == 1
    assert first_token_score(rows(0 * t)) == current_token_score(rows(t)) == 1
    assert duplicate_token_score(rows(np.maximum(t - period, 0)), [*"abcdabcd"]) == 1
    assert duplicate_token_score(rows(t), [*"abcdabcd"]) == 0


def test_too_short_a_text_scores_nothing():
    one = np.ones((1, 1))
    assert previous_token_score(one) == 0 and induction_score(one, 1) == 0
    assert induction_score(random_pattern(4, 4), 4) == induction_score(random_pattern(4, 4), 9) == 0
    assert previous_token_score(np.ones((3, 1, 1))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: induction_score(np.eye(3), 0), "seq_len must be >= 1, not 0"),
        (lambda: previous_token_score(np.ones(3)), r"the shape \[..., S, T\], not \[3\]"),
        (lambda: previous_token_score(np.ones((3, 2))), "as many keys as queries, or more"),
        (lambda: first_token_score(np.full((2, 2), np.nan)), "finite numbers only"),
        (lambda: duplicate_token_score(np.eye(3), "ab"), "tokens must be 3, one for each key"),
        (lambda: duplicate_token_score(np.eye(3), "abc"), "one that occurs twice"),
        (lambda: copying_score(np.ones((2, 3))), r"\[d_model, d_model\], not \(2, 3\)"),
        (lambda: copying_score(np.eye(2), np.ones((3, 4))), r"\[2, vocab\], not \(3, 4\)"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_copying_is_a_diagonal_that_stands_out():
    rng = np.random.default_rng(0)
    ov, out = rng.normal(size=(6, 6)), rng.normal(size=(6, 2100))
    whole = out.T @ ov @ out
    expected = np.diag(whole).mean() / np.abs(whole).mean()
    assert copying_score(ov, out) == pytest.approx(expected, rel=1e-6)
    assert copying_score(ov) == pytest.approx(np.diag(ov).mean() / np.abs(ov).mean(), rel=1e-6)
    assert copying_score(np.eye(6)) == pytest.approx(6) == -copying_score(-np.eye(6))
    assert copying_score(np.zeros((4, 4))) == 0
