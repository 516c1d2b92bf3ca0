import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.features.interpretation import interpret_features
from tests.sae.features import coders


def code(n_features: int, **values: float) -> mx.array:
    row = np.zeros(n_features, np.float32)
    for name, value in values.items():
        row[int(name[1:])] = value
    return mx.array(row)


def test_the_strongest_are_listed_by_size_with_what_they_promote(sae):
    found = sae.interpret_features(code(512, f3=2.0, f9=-5.0, f7=0.5), top_k=2, labels={9: "nine"})
    ((first, second),) = found
    assert (first.feature_id, first.value, first.label) == (9, -5.0, "nine")
    assert (second.feature_id, second.value, second.label) == (3, 2.0, None)
    for feature in (first, second):
        effects = sae.logit_effects(feature.feature_id, top_k=5)
        assert feature.promotes == tuple(token for token, _ in effects.top)
    assert repr(found).splitlines()[0].startswith("feature 9: -5.000  nine  raises ")


def test_codes_of_texts_can_be_added_and_taken_apart(sae, model):
    a, b, c = (sae.encode_text(model, text)[-1] for text in ("import os", "import sys", "def f"))
    expected = np.array(a - b + c)
    (row,) = sae.interpret_features(a - b + c, top_k=4)
    order = np.argsort(-np.abs(expected))[:4]
    assert [f.feature_id for f in row] == order.tolist()
    assert [f.value for f in row] == pytest.approx(expected[order])
    assert sae.interpret_features(a - a)[0] == ()
    assert repr(sae.interpret_features(a - a)) == "no feature is active"


def test_every_token_of_a_text_and_of_several_has_a_row(sae):
    one, two = sae.encode_text(["import os", "def"])
    assert len(sae.interpret_features(one)) == len(one)
    both = sae.interpret_features([one, two], top_k=3)
    assert both.rows == (
        *sae.interpret_features(one, top_k=3).rows,
        *sae.interpret_features(two, top_k=3).rows,
    )
    assert both[0] == () and "row 0: no feature is active" in repr(both)  # a special token
    assert len(sae.interpret_features(mx.zeros((2, 3, 512)))) == 6


def test_what_is_not_known_is_left_out(model):
    columns = Columns(("layers.2.mlp.gate_proj",), (384,))
    made = coders.filled(SAE(columns, columns, 9, k=2))
    for source in (None, model):  # no model, and rows that are not as wide as its stream
        ((feature,),) = interpret_features(made, source, code(9, f4=1.5))
        assert repr(feature) == "feature 4: +1.500"
    assert made.interpret_features(code(9, f4=1.5))[0] == (feature,)


def test_labels_and_tokens_are_shown_safely(sae):
    found = sae.interpret_features(code(512, f3=2.0), labels={3: "<script>\u202e"})
    assert "<script>\\u202e" in repr(found) and "\u202e" not in repr(found)
    html = found._repr_html_()
    assert "&lt;script&gt;\\u202e" in html and "<script" not in html
    assert found.to_dict()["rows"][0][0]["feature_id"] == 3


@pytest.mark.parametrize("shape", [(), (511,), (2, 128)])
def test_another_width_is_an_error(sae, shape):
    with pytest.raises(ValueError, match=r"code must have shape \[\.\.\., 512\], got "):
        sae.interpret_features(mx.zeros(shape))
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0"):
        sae.interpret_features(mx.zeros(512), top_k=0)
