"""What the head makes of a hidden state."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis.predictions import best_tokens
from mlxterp.model import InterpretableModel
from tests.tiny_models import build


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "cohere"])
def test_predictions_come_from_the_head(model_type):
    """`cohere` and `gpt2` have tied heads; cohere's scale does not change the order."""
    model = InterpretableModel(build(model_type))
    done = model.run([1, 2, 3], capture=["final_layer_norm" if model_type == "gpt_neox" else
                                         "ln_f" if model_type == "gpt2" else "norm"])  # fmt: skip
    (hidden,) = done.values()
    expected = mx.argsort(-done.output[0], axis=-1)[:, :4].tolist()
    assert model.get_token_predictions(hidden[0], top_k=4) == expected
    assert model.get_token_predictions(hidden[0, -1], top_k=4) == expected[-1]
    scored = model.get_token_predictions(hidden[0, -1], top_k=4, return_scores=True)
    assert [token for token, _ in scored] == expected[-1]
    scores = [score for _, score in scored]
    assert scores == sorted(scores, reverse=True)


def test_predictions_with_a_head_of_ones_own():
    model = InterpretableModel(build("llama"))
    hidden = mx.random.normal((32,), key=mx.random.key(0))
    tied = model.get_token_predictions(hidden, 3, embedding_layer=model.model.model.embed_tokens)
    assert tied == mx.argsort(-model.model.model.embed_tokens.as_linear(hidden))[:3].tolist()
    assert tied != model.get_token_predictions(hidden, 3)
    given = model.get_token_predictions(hidden, 3, lm_head=model.model.lm_head)
    assert given == model.get_token_predictions(hidden, 3)
    with pytest.raises(ValueError, match="top_k must be 1 to 96, not 97"):
        model.get_token_predictions(hidden, 97)
    with pytest.raises(ValueError, match="hidden_state must be"):
        model.get_token_predictions(hidden[None, None])


@pytest.mark.parametrize(("n", "k"), [(4096, 1), (4096, 7), (50, 50), (3, 2)])
def test_the_best_are_those_of_a_full_sort(n, k):
    logits = np.random.default_rng(0).normal(size=(5, n)).astype(np.float32)
    logits[:, n // 2] = logits[:, 0]  # equal ones
    ids, scores = best_tokens(mx.array(logits), k)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(scores, np.take_along_axis(logits, expected, axis=-1))
    if k == n:
        np.testing.assert_array_equal(ids, expected)
