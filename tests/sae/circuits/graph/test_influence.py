import math

import numpy as np
import pytest

from mlxterp.sae.circuits.graph.influence import (
    Adjacency,
    Extent,
    Pruned,
    cumulative,
    prune,
    score,
    score_pruned,
)

# Two features, an error, two tokens; and logits of probability .6 and .3.
F0, F1, E, T0, T1, L0, L1 = range(7)
ROWS = {L0: {F0: 3, F1: -1}, L1: {F1: 1, E: 1}, F1: {F0: 1, T1: 1}, F0: {T0: 2, E: -2}}
INFLUENCES = [0.6, 0.3, 0.45, 0.3, 0.15, 0, 0]
ALWAYS = np.isin(range(7), [T0, T1, L0, L1])
ENDS = np.isin(range(7), [E, T0, T1])
TOKENS, EXPLAINED = np.isin(range(7), [T0, T1]), np.arange(7) != E


def small(rows=ROWS) -> Adjacency:
    weights = np.zeros((len(rows), 5), np.float32)
    for i, row in enumerate(rows.values()):
        for source, weight in row.items():
            weights[i, source] = weight
    starts = np.array([0, 0, 0, 0, 0, 0.6, 0.3])
    return Adjacency(weights, np.array(list(rows)), np.arange(5), starts)


def pruned(node_share=1.0, edge_share=1.0, *numbers, ends=ENDS) -> Pruned:
    graph = small()
    extent = Extent(node_share, edge_share, *numbers)
    return prune(graph, graph.influences(), extent, ALWAYS, ends)


def edges(found: Pruned) -> dict:
    return {
        (b, a): w for (a, b), w in zip(found.edges.tolist(), found.weights.tolist(), strict=True)
    }


def test_influences_are_those_worked_out_by_hand():
    np.testing.assert_allclose(small().influences(), INFLUENCES, atol=1e-12)


def test_what_has_no_inputs_has_all_the_influence_there_is():
    graph = small()
    without = ~graph.has_inputs()
    assert without.tolist() == [False, False, True, True, True, False, False]
    assert (graph.influences() + graph.starts)[without].sum() == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_influences_are_those_of_the_matrix_of_all_paths(seed, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.circuits.graph.influence.ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(seed)
    n, n_logits = 30, 4
    A = np.tril(rng.normal(size=(n, n)), -1) * (rng.random((n, n)) < 0.4)
    A[:6] = 0
    A[:, n - n_logits :] = 0
    sums = np.abs(A).sum(axis=1, keepdims=True)
    shares = np.abs(A) / np.where(sums, sums, 1)
    starts = np.zeros(n)
    starts[-n_logits:] = rng.random(n_logits)
    expected = starts @ (np.linalg.inv(np.eye(n) - shares) - np.eye(n))
    order = rng.permutation(np.arange(6, n))
    graph = Adjacency(A[order, : n - n_logits], order, np.arange(n - n_logits), starts)
    np.testing.assert_allclose(graph.influences(), expected, atol=1e-12)


def test_a_circle_is_an_error():
    graph = small(ROWS | {F0: {F1: 1.0}})
    with pytest.raises(ValueError, match="without circles"):
        graph.influences()


def test_scores_are_those_worked_out_by_hand():
    found = score(small(), TOKENS, EXPLAINED)
    assert found.replacement == pytest.approx(0.5)
    assert found.completeness == pytest.approx(2.25 / 2.7)


def test_features_that_were_not_looked_at_count_as_errors():
    rows = {target: row for target, row in ROWS.items() if target != F1}
    found = score(small(rows), TOKENS, EXPLAINED & (np.arange(7) != F1))
    assert found.replacement == pytest.approx(0.225 / 0.9)


def test_what_biases_alone_lead_to_is_no_error():
    rows = {target: row for target, row in ROWS.items() if target != F1} | {F1: {}}
    found = score(small(rows), TOKENS, EXPLAINED)
    assert found.replacement == pytest.approx(0.225 / 0.6)


def test_a_graph_without_influence_has_no_scores():
    found = score(Adjacency(np.zeros((0, 5)), np.zeros(0, int), np.arange(5), np.zeros(7)),
                  TOKENS, EXPLAINED)  # fmt: skip
    assert math.isnan(found.replacement) and math.isnan(found.completeness)


def test_everything_is_kept_for_shares_of_one():
    found = pruned(1.0, 1.0)
    assert found.nodes.all()
    assert edges(found) == {(b, a): w for b, row in ROWS.items() for a, w in row.items()}
    of_part, of_all = (
        score_pruned(small(), found, TOKENS, EXPLAINED),
        score(small(), TOKENS, EXPLAINED),
    )
    assert of_part.replacement == pytest.approx(of_all.replacement, rel=1e-14)
    assert of_part.completeness == pytest.approx(of_all.completeness, rel=1e-14)


def test_pruning_keeps_the_most_influential_nodes():
    found = pruned(0.5, 1.0)
    assert np.flatnonzero(found.nodes).tolist() == [F0, E, T0, T1, L0, L1]
    assert edges(found) == {(L0, F0): 3, (L1, E): 1, (F0, T0): 2, (F0, E): -2}


def test_scores_of_what_is_kept_count_all_else_as_error():
    found = score_pruned(small(), pruned(0.5, 1.0), TOKENS, EXPLAINED)
    assert found.replacement == pytest.approx(0.225 / 0.9)
    assert found.completeness == pytest.approx(1.275 / 1.95)


def test_nodes_that_lose_their_edges_go_until_none_is_left_dangling():
    # Of .6, .3, .3, .3 the first edge has 40 %: without its inputs, the feature goes.
    found = pruned(0.5, 0.35)
    assert np.flatnonzero(found.nodes).tolist() == [T0, T1, L0, L1]
    assert not len(found.edges) and not len(found.weights)


def test_a_number_of_nodes_is_kept():
    for n, kept in {1: [F0], 2: [F0, E], 3: [F0, F1, E], 9: [F0, F1, E]}.items():
        found = pruned(0.01, 1.0, n)
        expected = [*kept, T0, T1, L0, L1]
        assert np.flatnonzero(found.nodes).tolist() == expected


def test_no_more_than_a_number_of_edges_is_kept_and_none_is_loose():
    # Of all edges the scores are: F0 of L0 .45, the inputs of F0 .3 each, L1's and F1's .15.
    counts = {n: edges(pruned(1.0, 0.01, None, n)) for n in range(1, 10)}
    assert not counts[1]
    assert set(counts[2]) == {(L0, F0), (F0, T0)} or set(counts[2]) == {(L0, F0), (F0, E)}
    assert set(counts[3]) == {(L0, F0), (F0, T0), (F0, E)}
    assert all(len(found) <= n for n, found in counts.items())
    assert len(counts[8]) == len(counts[9]) == 8
    assert all(set(counts[n]) <= set(counts[n + 1]) for n in range(1, 9))


def test_paths_may_begin_at_what_has_no_inputs():
    found = pruned(0.5, 0.35, ends=ENDS | (np.arange(7) == F0))
    assert edges(found) == {(L0, F0): 3}


def test_the_share_of_all_influence_down_to_a_node():
    expected = [0.6, 1.35, 1.05, 1.65, 1.8, 1.8, 1.8]
    np.testing.assert_allclose(cumulative(np.array(INFLUENCES)), np.array(expected) / 1.8)
    assert cumulative(np.zeros(3)).tolist() == [0, 0, 0]
