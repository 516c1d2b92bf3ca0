import json

import numpy as np
import pytest

from mlxterp.sae.features.co_occurrence import CoOccurrence, co_occurrence, most_frequent
from mlxterp.sae.features.codes import SparseCodes

# Which features fire on which token.
FIRING = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0]], bool)


def codes(firing=FIRING) -> SparseCodes:
    tokens, features = np.nonzero(firing)
    starts = np.searchsorted(tokens, np.arange(len(firing) + 1))
    places = np.arange(len(firing))
    values = np.ones(len(tokens), np.float16)
    return SparseCodes(np.array([0]), places, starts, features, values, 1.0, firing.shape[1])


@pytest.mark.parametrize(
    ("by", "of_0_and_1", "of_1_and_0"),
    [("jaccard", 2 / 4, 2 / 4), ("conditional", 2 / 4, 1.0), ("count", 2, 2)],
)
def test_scores_are_those_counted_by_hand(by, of_0_and_1, of_1_and_0):
    found = co_occurrence(codes(), [0, 1, 2], by)
    np.testing.assert_array_equal(found.counts, [[4, 2, 2], [2, 2, 0], [2, 0, 3]])
    assert found.scores[0, 1] == pytest.approx(of_0_and_1)
    assert found.scores[1, 0] == pytest.approx(of_1_and_0)
    assert found.scores[1, 2] == 0 and np.isnan(np.diag(found.scores)).all()
    assert found.n_tokens == 5


def test_pairs_come_in_the_order_of_their_scores():
    found = co_occurrence(codes(), [0, 1, 2], "conditional")
    assert found.pairs == ((0, 1, 1.0), (0, 2, pytest.approx(2 / 3)), (1, 2, 0.0))
    assert repr(found).splitlines() == [
        "3 features on 5 tokens",
        "  features  together  conditional",
        "  0 and 1          2        1.000",
        "  0 and 2          2        0.667",
        "  1 and 2          0        0.000",
    ]
    assert "<td>0 and 2</td>" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["features"] == [0, 1, 2] and plain["scores"][0][0] is None


def test_a_map_has_a_row_and_a_column_for_each_feature():
    found = co_occurrence(codes(), [2, 0])
    ax, bar = found.plot().axes
    image = ax.get_images()[0].get_array()
    np.testing.assert_allclose(image.filled(-1), [[-1, 2 / 5], [2 / 5, -1]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "0"]
    assert "Jaccard" in bar.get_ylabel()


def test_the_most_frequent_stand_beside_those_that_they_fire_with():
    firing = np.zeros((40, 6), bool)
    firing[:20, 0] = firing[2:18, 3] = True
    firing[20:39, 1] = firing[20:35, 2] = True  # so that the next after 0 by frequency is 1
    firing[39, 4] = True
    assert most_frequent(codes(firing), 4) == [0, 3, 1, 2]
    assert most_frequent(codes(firing), 9) == [0, 3, 1, 2, 4]  # 5 never fires
    assert most_frequent(codes(np.zeros((3, 2), bool)), 5) == []


def test_features_of_a_coder_are_compared(sae):
    data = sae.collect(verbose=False)
    found = data.co_occurrence(n=5)
    assert isinstance(found, CoOccurrence) and len(found.features) == 5
    np.testing.assert_array_equal(found.counts, data.co_activation(found.features))
    best = data.co_active(found.features[0], 1)[0]
    pair = data.co_occurrence([found.features[0], best.feature_id, found.features[0]])
    assert pair.features == (found.features[0], best.feature_id)
    assert pair.scores[0, 1] == pytest.approx(best.score)
    with pytest.raises(ValueError, match="feature_id must be in"):
        data.co_occurrence([10**6])
