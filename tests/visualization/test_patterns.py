"""Patterns come from traces, from attention and from arrays, and what is missing is said."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxterp import InterpretableModel
from mlxterp.visualization import get_attention_patterns, previous_token_score
from tests.tiny_models import build

TEXT = "def add(first, second):"


@pytest.fixture(scope="module")
def trace(demo):
    with demo.trace(TEXT) as trace:
        pass
    return trace


def test_a_trace_and_its_attention_have_the_same_patterns(demo, trace):
    patterns = get_attention_patterns(trace)
    again = get_attention_patterns(demo.attention(TEXT))
    assert list(patterns) == list(again) == [*range(6)]
    for layer, pattern in patterns.items():
        assert pattern.shape == (1, 4, 9, 9) and pattern.dtype == np.float32
        np.testing.assert_allclose(pattern.sum(axis=-1), 1, atol=1e-5)
        assert np.triu(pattern, 1).max() == 0
        np.testing.assert_array_equal(pattern, again[layer])
        np.testing.assert_array_equal(pattern, np.array(demo.attention(TEXT, layer)[layer].pattern))


def test_layers_are_chosen_in_their_order_and_from_the_end(trace):
    assert list(get_attention_patterns(trace, 2)) == [2]
    assert list(get_attention_patterns(trace, [3, 0, -1])) == [3, 0, 5]
    patterns = get_attention_patterns(trace, [1, 2])
    assert list(get_attention_patterns(patterns, [2])) == [2]


@pytest.mark.parametrize("layers", [6, -7, [0, 9], []])
def test_a_layer_that_is_not_there_is_an_error(trace, layers):
    with pytest.raises(ValueError, match=r"layers must be of \[0, 1, 2, 3, 4, 5\], which have"):
        get_attention_patterns(trace, layers)


def test_what_holds_no_patterns_says_so(demo):
    with demo.trace(TEXT, capture="layers.0.mlp") as trace:
        pass
    with pytest.raises(ValueError, match="this trace holds no attention"):
        get_attention_patterns(trace)
    with pytest.raises(TypeError, match="must be a Trace or an Attention, not list"):
        get_attention_patterns([1, 2])
    with pytest.raises(ValueError, match=r"the shape \[B, H, S, T\], not \[3, 3\]"):
        get_attention_patterns({0: np.eye(3)})


def test_models_without_softmax_attention_and_layers_without_say_so():
    tokens = mx.array([[1, 2, 3]])
    with InterpretableModel(build("mamba2")).trace(tokens) as trace:
        pass
    with pytest.raises(ValueError, match="they have no softmax attention"):
        get_attention_patterns(trace)
    with InterpretableModel(build("jamba")).trace(tokens) as trace:
        pass
    assert list(get_attention_patterns(trace)) == [1, 3]
    with pytest.raises(ValueError, match=r"layers must be of \[1, 3\]"):
        get_attention_patterns(trace, 0)
    with InterpretableModel(build("nanbeige")).trace(tokens) as trace:
        pass
    with pytest.raises(ValueError, match="attended 2 times: take them from .calls"):
        get_attention_patterns(trace)


def test_half_precision_becomes_float32():
    model = InterpretableModel(build("llama"))
    model.model.set_dtype(mx.bfloat16)
    with model.trace(mx.array([[1, 2, 3, 4]])) as trace:
        pass
    assert get_attention_patterns(trace, 0)[0].dtype == np.float32


def test_with_a_cache_queries_are_the_last_of_the_keys(demo):
    ids = demo.encode(TEXT)
    cache = make_prompt_cache(demo.model)
    mx.eval(demo.run(ids[:5], cache=cache).output)
    patterns = get_attention_patterns(demo.attention(ids[5:], cache=cache))
    for layer, whole in get_attention_patterns(demo.attention(ids)).items():
        assert patterns[layer].shape == (1, 4, len(ids) - 5, len(ids))
        np.testing.assert_allclose(patterns[layer], whole[:, :, 5:], atol=1e-5)
        late = previous_token_score(patterns[layer])
        np.testing.assert_allclose(late, np.diagonal(whole, -1, 2, 3)[..., 4:].mean(-1), atol=1e-5)
