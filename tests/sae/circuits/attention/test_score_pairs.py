import math

import numpy as np
import pytest

from mlxterp.sae.circuits.attention import score_pairs
from mlxterp.sae.circuits.attention.score_pairs import QKAttribution
from mlxterp.sae.circuits.nodes import Node

SITE = "layers.3.resid_post"


def made(**changes) -> QKAttribution:
    """Two dimensions; sources and scores by hand."""
    values = {
        "layer": 4, "head": 1, "query": 2, "key": 1, "against": "mean",
        "queries": (Node("feature", SITE, 7, 2, 1.5), Node("error", SITE, -1, 2)),
        "keys": (Node("feature", SITE, 9, 1, 2.0), Node("embedding", "", 5, 0)),
        "Q": np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]),  # sum (1.5, 2)
        "K": np.array([[4.0, 0.0, -1.0], [0.0, 0.5, 0.0]]),  # sum (3, 0.5)
        "all_keys": np.array([[1.0, 4.0, 1.0], [0.0, 0.5, 1.0]]),
        "scores": np.array([2.5, 8.5, 4.0, np.nan]), "pattern": np.array([0.1, 0.6, 0.3, 0.0]),
        "levels": (SITE,), "tokens": ("<s>", " a", "<b>b</b>", "c"),
    }  # fmt: skip
    return QKAttribution(**values | changes)


def test_figures_worked_out_by_hand():
    found = made()
    assert (found.score, found.attention, found.baseline) == (8.5, 0.6, 5.0)
    assert found.contrast == 3.5
    assert found.query_effects.tolist() == [3.0, 1.0, 1.5]
    assert found.key_effects.tolist() == [6.0, 1.0, -1.5]
    assert found.gap == 1.5 * 3 + 2 * 0.5 - 3.5
    assert made(constant=-2.0).gap == 0.0
    assert found.over_keys.tolist() == [[1, 4, 1], [0, 1, 2], [0.5, 2, 0.5]]
    assert found.parts == {
        ("feature", "feature"): 4, ("feature", "embedding"): 0, ("feature", "biases"): -1,
        ("error", "feature"): 0, ("error", "embedding"): 1, ("error", "biases"): 0,
        ("biases", "feature"): 2, ("biases", "embedding"): 0, ("biases", "biases"): -0.5,
    }  # fmt: skip
    assert found.explained == 4 / 3.5


@pytest.mark.parametrize("against, baseline", [("mean", 5.0), (None, 0.0), (2, 4.0)])
def test_the_score_is_set_against_what_is_asked_for(against, baseline):
    found = made(against=against)
    assert found.baseline == baseline and found.contrast == 8.5 - baseline


def test_the_strongest_pairs_come_first_whatever_their_sign():
    found = made()
    assert found.strongest() == [(0, 0), (-1, 0), (0, -1), (1, 1), (-1, -1)]
    assert [pair.score for pair in found.pairs(3)] == [4.0, 2.0, -1.0]
    first, second, *_ = found.pairs()
    assert (first.query, first.key, first.share) == (found.queries[0], found.keys[0], 4 / 3.5)
    assert second.query is None
    assert found.strongest(features=True) == [(0, 0)]
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        found.strongest(0)


@pytest.mark.parametrize("at_once", [1, 7, 100, 10**6])
@pytest.mark.parametrize("n", [1, 5, 40, 10**4])
def test_no_pair_is_missed_by_looking_at_the_longest_only(monkeypatch, at_once, n):
    monkeypatch.setattr(score_pairs, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(4, m)) * rng.exponential(size=m) ** 3 for m in (23, 31))
    q[:, 4] = 0
    found = score_pairs._largest(q, k, n)
    sizes = np.abs(q.T @ k)
    expected = np.sort(sizes[sizes > 0])[::-1][:n]
    np.testing.assert_allclose([sizes[pair] for pair in found], expected)
    assert len(set(found)) == len(found)


def test_most_pairs_are_never_looked_at(monkeypatch):
    monkeypatch.setattr(score_pairs, "AT_ONCE", 10_000)
    rng = np.random.default_rng(0)
    looked = []

    class Columns(np.ndarray):
        def __matmul__(self, other):
            looked.append(self.shape[0] * other.shape[1])
            return np.asarray(self) @ other

    q, k = (rng.normal(size=(8, 3000)) * rng.exponential(size=3000) ** 4 for _ in range(2))
    score_pairs._largest(q.view(Columns), k, 10)
    assert max(looked) <= 10_000 and sum(looked) < 0.01 * 3000**2


def test_shares_of_nothing_are_no_number():
    found = made(scores=np.array([8.5, 8.5, 8.5, np.nan]))
    assert found.contrast == 0 and math.isnan(found.pairs(1)[0].share)
    assert math.isnan(found.explained)
    assert found.to_dict()["explained"] is None


def test_tables_say_what_there_is():
    found = made()
    assert repr(found).splitlines()[:2] == [
        "Head 4.1 from 2 “<b>b</b>” to 1 “␣a”: attention 60.0%, score 8.5, "
        "3.5 above that of the mean of 3 keys;",
        "  of this features × features add 114.3%",
    ]
    rows = [line.split("  ") for line in repr(found).splitlines()[3:]]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["L3/7 at 2 “<b>b</b>”", "L3/9 at 1 “␣a”", "+4", "114.3%"],
        ["biases", "L3/9 at 1 “␣a”", "+2", "57.1%"],
        ["L3/7 at 2 “<b>b</b>”", "biases", "-1", "-28.6%"],
        ["L3 error at 2 “<b>b</b>”", "embedding <s> at 0", "+1", "28.6%"],
        ["biases", "biases", "-0.5", "-14.3%"],
    ]
    assert found.source_table("key").rows == (
        ("L3/9 at 1 “␣a”", "2", "+6", "171.4%"),
        ("biases", "", "-1.5", "-42.9%"),
        ("embedding <s> at 0", "", "+1", "28.6%"),
    )
    assert [row[0] for row in found.source_table("query", 2).rows] == [
        "L3/7 at 2 “<b>b</b>”", "biases",
    ]  # fmt: skip
    assert found.part_table().rows[2] == ("biases", "+2", "+0", "-0.5")
    assert "<b>b</b>" not in found._repr_html_() and "&lt;b&gt;b" in found._repr_html_()
    assert "of the score features × features" in repr(made(against=None))
    assert "4.5 above that of key 2;" in repr(made(against=2))
    with pytest.raises(ValueError, match="side must be 'query' or 'key', got 'value'"):
        found.source_table("value")


def test_the_heat_map_has_the_sources_of_the_strongest_pairs():
    pytest.importorskip("matplotlib")
    (ax, _) = made().plot(3).axes
    np.testing.assert_allclose(ax.images[0].get_array(), [[4, -1], [2, -0.5]])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["L3/7 at 2 “<b>b</b>”", "biases"]
    assert ax.get_xlabel() == "key 1 ␣a"
    with pytest.raises(ValueError, match="no pair to draw"):
        made(Q=np.zeros((2, 3))).plot()


def test_without_its_model_it_cannot_be_validated():
    with pytest.raises(ValueError, match="needs the model that the score was found in"):
        made().validate()
