import json

import numpy as np
import pytest

from mlxterp.sae.similarity.matching import match
from mlxterp.sae.similarity.stability import stability
from tests.sae.kinds import KINDS
from tests.sae.similarity.coders import drawn, noised, random_units, sae_of

pytest.importorskip("scipy")

N, WIDTH = 40, 64


def three():
    """Features 0 to 9 are in all three coders, 10 to 19 in the first two; the third is larger."""
    rows = random_units(N, WIDTH)
    second, third = random_units(N, WIDTH, 1), random_units(N + 8, WIDTH, 2)
    second[:20] = noised(rows[:20], 0.9, 3)
    third[:10] = noised(rows[:10], 0.95, 4)
    order = np.random.default_rng(5).permutation(N)
    return [sae_of(rows), sae_of(second[order]), sae_of(third)], np.argsort(order)


def test_features_are_found_again_in_as_many_coders_as_have_them():
    coders, where = three()
    found = stability(coders)
    expected = np.zeros(N)
    expected[:10], expected[10:20] = 2, 1
    np.testing.assert_array_equal(found.found[0], expected)
    np.testing.assert_array_equal(found.found[1][where], expected)
    np.testing.assert_array_equal(found.found[2][:20], [2] * 10 + [0] * 10)
    assert found.stable().tolist() == list(range(10))
    assert found.stable(at_least=1).tolist() == list(range(20))
    assert found.stable(1).tolist() == sorted(where[:10].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_all_pairs_are_those_of_match(kind):
    coders = [drawn(kind, seed, n) for seed, n in enumerate((30, 30, 40))]
    found = stability(coders, seed=7)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        one = match(coders[i], coders[j], seed=7)
        for prefix, scores in (("", one.scores), ("chance_", one.chance)):
            of = {name: getattr(found, prefix + name) for name in ("shared", "mcc", "mmcs")}
            assert of["shared"][i, j] == of["shared"][j, i] == scores.shared
            assert of["mcc"][i, j] == of["mcc"][j, i] == scores.mcc
            assert (of["mmcs"][i, j], of["mmcs"][j, i]) == (scores.mmcs, scores.mmcs_back)
        np.testing.assert_array_equal(found.matchings[i, j].partners, one.partners)
    np.testing.assert_array_equal(np.diag(found.mmcs), np.ones(3))


def test_the_table_has_a_line_for_each_coder_and_one_for_chance():
    found = stability(three()[0])
    lines = [line.split() for line in repr(found).splitlines()]
    assert lines[1] == ["features", "MMCS", "MCC", "in", "all", "in", "none"]
    assert [line[-2:] for line in lines[2:5]] == [
        ["25.0%", "50.0%"], ["25.0%", "50.0%"], ["20.8%", "79.2%"]
    ]  # fmt: skip
    mcc = (found.mcc[0, 1] + found.mcc[0, 2]) / 2
    assert lines[2][3:5] == [f"{(found.mmcs[0, 1] + found.mmcs[0, 2]) / 2:.3f}", f"{mcc:.3f}"]
    assert lines[5][0] == "chance" and float(lines[5][2]) < mcc
    assert ">chance</td>" in found._repr_html_()


def test_it_can_be_saved_and_drawn():
    found = stability(three()[0])
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["shared"] == found.shared.tolist()
    assert plain["found"] == [one.tolist() for one in found.found]
    pytest.importorskip("matplotlib")
    texts = [text.get_text() for text in found.plot().axes[0].texts]
    assert texts == [f"{share:.2g}" for share in found.shared.reshape(-1)]


def test_one_coder_is_not_enough():
    with pytest.raises(ValueError, match="two coders or more, got 1"):
        stability([drawn("sae")])
