import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.attention import Attention
from mlxterp.sae.circuits.attention.heads import prefix_matching, previous_token, unusual_attention
from mlxterp.sae.testbeds import WordTokenizer, induction
from tests import tiny_models
from tests.fakes import FakeSource


class Fixed(FakeSource):
    """Of one layer with two heads, whose patterns are given."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern

    def frozen(self, at=None):
        raise AssertionError

    def attention(self, tokens, layers=None, *, edit=None):
        n = tokens.shape[1]
        return Attention([Call(4, mx.array(self.pattern[:, :n, :n])[None])])


class Call:
    def __init__(self, layer, pattern):
        self.layer, self.pattern = layer, pattern


def pattern() -> np.ndarray:
    """Of four queries; head 0 always looks one back, head 1 rests at the first but for the last
    query, which looks at 2."""
    return np.array(
        [
            [[1, 0, 0, 0], [0.8, 0.2, 0, 0], [0.1, 0.8, 0.1, 0], [0.1, 0.1, 0.7, 0.1]],
            [[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0.8, 0.1, 0.1, 0], [0.2, 0.1, 0.6, 0.1]],
        ],
        np.float32,
    )


def test_prefix_matching_is_the_attention_behind_the_same_token():
    found = prefix_matching(Fixed(pattern()), [10, 11, 12, 11])  # the last saw 12 after 11
    assert (found[4, 0].score, found[4, 1].score) == (pytest.approx(0.7), pytest.approx(0.6))
    # After token 10, which was at 0 and 1, come positions 1 and 2, but not the query itself.
    found = prefix_matching(Fixed(pattern()), [10, 10, 10, 11])
    assert found[4, 1].score == pytest.approx(0.1)
    two = prefix_matching(Fixed(pattern()), [[10, 11, 12, 11], [10, 10, 10, 11]])
    assert two[4, 1].score == pytest.approx((0.6 + 0.1) / 2)


def test_attention_to_the_token_before_is_the_mean_over_queries():
    found = previous_token(Fixed(pattern()), [10, 11, 12, 13])
    assert found[4, 0].score == pytest.approx((0.8 + 0.8 + 0.7) / 3)
    assert [head.head for head in found.heads] == [0, 1]


def test_what_a_head_does_by_rule_is_not_unusual():
    found = unusual_attention(Fixed(pattern()), [10, 11, 12, 13])
    first, second = found.heads
    assert (first.head, first.key, first.attention) == (1, 2, pytest.approx(0.6))
    # Others give 0.1 to the key at 2, and (0.9 + 0.1) / 2 to what is one before them.
    assert first.usual == pytest.approx(0.5) and first.score == pytest.approx(0.1)
    assert second.score < 0.05
    rest = unusual_attention(Fixed(pattern()), [10, 11, 12, 13], key=0)
    assert rest[4, 1].usual == pytest.approx((1 + 0.9 + 0.8) / 3)
    assert rest[4, 1].score == pytest.approx(0.2 - 0.9)


def test_heads_of_the_induction_circuit_are_found():
    bed = induction()
    model = InterpretableModel(bed.model, tokenizer=bed.tokenizer)
    rows = bed.sequences(4).tolist()
    found = prefix_matching(model, rows)
    assert found.heads[0].layer == 1 and found.heads[0].score > 0.99 and found[0, 0].score < 0.01
    assert previous_token(model, rows).heads[0].layer == 0
    assert previous_token(model, rows)[0, 0].score == pytest.approx(1, abs=1e-3)
    looks = unusual_attention(model, rows[0])
    assert (looks.heads[0].layer, looks.heads[0].key) == (1, bed.step(rows[0]).key)


def test_layers_without_attention_are_left_out():
    words = [f"w{i}" for i in range(tiny_models.VOCAB)]
    model = InterpretableModel(tiny_models.build("jamba"), tokenizer=WordTokenizer(words))
    found = previous_token(model, [5, 6, 7])
    assert {head.layer for head in found.heads} == {1, 3}
    with pytest.raises(ValueError, match=r"There is no head \(0, 0\); layers .* are \[1, 3\]"):
        found[0, 0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: prefix_matching(m, [10, 11, 12]), "tokens must have some that prefix matching"),
        (lambda m: prefix_matching(m, []), "at least one token, got \\[\\]"),
        (lambda m: previous_token(m, [10]), "attention to the token before is about"),
        (lambda m: unusual_attention(m, ""), "prompt must be a text, or ids"),
        (lambda m: unusual_attention(m, [10, 11], 2), r"query must be in \[-2, 1\], got 2"),
        (lambda m: unusual_attention(m, [10, 11], 0, 1), "key must not come after the query at 0"),
        (lambda m: previous_token(FakeSource(), [10, 11]), "The attention of fake cannot be read"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(Fixed(pattern()))


def test_heads_are_told_in_tables_and_figures(demo):
    found = unusual_attention(Fixed(pattern()), [10, 11, 12, 13])
    assert found.table().rows[0] == ("4.1", "2 “*”", "0.600", "0.500", "0.100")
    assert repr(found).startswith("Attention from 3 “+”")
    assert json.loads(json.dumps(found.to_dict()))["heads"][0]["key"] == 2
    matched = prefix_matching(Fixed(pattern()), [10, 11, 12, 11])
    assert matched.table().rows == (("4.0", "0.700"), ("4.1", "0.600"))
    assert "prefix matching" in matched._repr_html_() and len(matched.strongest(1)) == 1
    pytest.importorskip("matplotlib")
    ax = matched.plot().axes[0]
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.7, 0.6]], rtol=1e-6)
    assert replace(matched, heads=matched.heads[:1]).plot().axes
