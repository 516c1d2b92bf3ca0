"""Queries, keys, values and patterns are those that the model really uses."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.architecture import Architecture
from mlxterp.attention import attend, attention, attention_pattern, expand_heads
from mlxterp.model import InterpretableModel
from tests.tiny_models import MODEL_TYPES, build

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]])
WITHOUT = {"gemma2", "mamba", "mamba2", "rwkv7"}  # by hand, for a soft-cap; no softmax
SEVERAL = {"longcat_flash": [0, 0, 1, 1], "nanbeige": [0, 1, 2, 0, 1, 2]}
SOME = {
    "bailing_hybrid": [1, 3], "bailing_moe_linear": [1, 3], "granitemoehybrid": [1],
    "jamba": [1, 3], "lfm2": [2], "lfm2-vl": [2], "lfm2_moe": [2], "nemotron-nas": [0, 2],
    "nemotron_h": [1], "olmo_hybrid": [3], "plamo2": [1, 3], "qwen3_5": [3], "qwen3_5_moe": [3],
    "qwen3_next": [3], "recurrent_gemma": [2],
}  # fmt: skip


def reference(q, k, scale, mask=None, sinks=None):
    """The pattern in float64, query by query."""
    q, k = (np.array(x, np.float64) for x in (q, k))
    batch, heads, n, _ = q.shape
    group, m = heads // k.shape[1], k.shape[2]
    pattern = np.zeros((batch, heads, n, m))
    whole = None if mask is None or isinstance(mask, str) else np.array(mask)
    if whole is not None:
        whole = np.broadcast_to(whole, pattern.shape)
    for b, h, i in np.ndindex(batch, heads, n):
        scores = scale * k[b, h // group] @ q[b, h, i]
        if isinstance(mask, str):
            scores[m - n + i + 1 :] = -np.inf
        elif whole is not None:
            row = whole[b, h, i]
            scores = np.where(row, scores, -np.inf) if row.dtype == bool else scores + row
        highest = scores.max() if sinks is None else max(scores.max(), float(sinks[h]))
        weights = np.exp(scores - highest)
        sink = 0 if sinks is None else np.exp(float(sinks[h]) - highest)
        pattern[b, h, i] = weights / (weights.sum() + sink)
    return pattern


# These multiply what attention returns by a gate, before the output projection.
GATED = {
    "afmoe", "laguna", "muse_glimmer", "qwen3_5", "qwen3_5_moe", "qwen3_next", "spark2_5",
    "step3p5",
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - WITHOUT))
def test_pattern_times_values_is_what_the_model_computed(model_type):
    model = InterpretableModel(build(model_type))
    architecture = model.architecture
    plain = architecture.model(TOKENS)
    found = attention(architecture, TOKENS)
    assert mx.array_equal(architecture.model(TOKENS), plain)
    every = list(range(len(architecture.blocks)))
    assert [c.layer for c in found.calls] == SEVERAL.get(model_type, SOME.get(model_type, every))
    for call in found.calls:
        pattern = reference(call.q, call.k, call.scale, call.mask, call.sinks)
        z = np.array(call.z)
        assert call.pattern.shape == (2, call.q.shape[1], 9, 9)
        assert np.abs(np.array(call.pattern) - pattern).max() < 1e-5
        assert np.abs(pattern @ np.array(call.v, np.float64) - z).max() < 1e-5
        assert np.abs(z).max() > 1e-2
    if model_type != "longcat_flash":  # of which no block has one attention
        projected_from_heads(model, model_type in GATED)


def projected_from_heads(model, gated):
    """The pattern times the values is what the output projection receives, heads side by side."""
    with model.trace(TOKENS) as trace:
        last = {call.layer: call for call in trace.attention.calls}
    for layer, call in last.items():
        z = np.array(call.pattern, np.float64) @ np.array(call.v, np.float64)
        received = np.array(trace.activations[f"layers.{layer}.attn_z"])
        same = np.abs(z.swapaxes(1, 2).reshape(received.shape) - received).max() < 1e-5
        assert same != gated


@pytest.mark.parametrize("model_type", sorted(WITHOUT))
def test_a_model_without_says_so(model_type):
    with pytest.raises(ValueError, match="no layer of this model .*scaled_dot_product_attention"):
        attention(Architecture(build(model_type)), TOKENS)


def test_a_layer_without_is_named():
    architecture = Architecture(build("jamba"))
    with pytest.raises(ValueError, match=r"layers 0, 2 of this model .* layers 1 do"):
        attention(architecture, TOKENS, [0, 1, 2])
    assert list(attention(architecture, TOKENS, -1)) == [3]
    for wrong in (4, [], [-5]):
        with pytest.raises(ValueError, match="layers must be of -4 to 3"):
            attention(architecture, TOKENS, wrong)


def test_a_layer_that_attends_twice_has_no_single_entry():
    found = attention(Architecture(build("longcat_flash")), TOKENS)
    assert list(found) == [0, 1]
    with pytest.raises(ValueError, match="attended 2 times"):
        found[0]
    with pytest.raises(KeyError, match="layer 5 is not held"):
        found[5]


def test_windows_and_sinks_are_seen():
    window = attention(Architecture(build("mistral")), TOKENS)[0].pattern  # the last 4 tokens
    distance = mx.arange(9)[:, None] - mx.arange(9)
    outside = (distance < 0) | (distance >= 4)
    assert mx.where(outside, window, 0).max() == 0
    assert mx.allclose(window.sum(axis=-1), mx.array(1.0))
    sinks = attention(Architecture(build("gpt_oss")), TOKENS)[0].pattern.sum(axis=-1)
    assert sinks.max() < 0.999


MASKS = {
    "none": None,
    "causal": "causal",
    "boolean": mx.tril(mx.ones((5, 7), mx.bool_), 2)[None, None],
    "additive": mx.random.normal((2, 4, 5, 7), key=mx.random.key(5)),
}


@pytest.mark.parametrize("sinks", [None, mx.array([0.5, -1.0, 2.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_all_kinds_of_masks(n_kv_heads, mask, sinks):
    keys = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((2, 4, 5, 8), key=keys[0])
    k, v = (mx.random.normal((2, n_kv_heads, 7, 8), key=key) for key in keys[1:])
    pattern = attention_pattern(q, k, 0.3, MASKS[mask], sinks)
    expected = reference(q, k, 0.3, MASKS[mask], sinks)
    assert np.abs(np.array(pattern) - expected).max() < 1e-6
    fast = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=0.3, mask=MASKS[mask], sinks=sinks
    )  # fmt: skip
    z = expected @ np.array(expand_heads(v, 4), np.float64)
    assert np.abs(np.array(fast) - z).max() < 1e-5
    assert np.abs(np.array(attend(pattern, v)) - z).max() < 1e-5


def test_a_mask_of_another_name_is_refused():
    with pytest.raises(ValueError, match='mask must be "causal"'):
        attention_pattern(mx.ones((1, 1, 2, 2)), mx.ones((1, 1, 2, 2)), 1.0, "window")


def test_the_model_takes_text_edits_and_layers(demo):
    found = demo.attention("The old man went down to the sea", layers=[1, 4])
    assert list(found) == [1, 4]
    assert "layer 4: 4 heads" in repr(found)
    zero = {"layers.0": mx.zeros_like}
    changed = demo.attention("The old man went down to the sea", 1, edit=zero)[1].pattern
    assert not mx.allclose(changed, found[1].pattern)


def test_a_trace_holds_the_attention_of_its_own_pass(demo):
    text, half = "The old man went down to the sea", {"layers.0": lambda x: x / 2}
    with demo.trace(text, half) as trace:
        weights = trace.activations["layers.2.self_attn.attention_weights"]
    assert mx.array_equal(weights, demo.attention(text, 2, edit=half)[2].pattern)
    assert not mx.allclose(weights, demo.attention(text, 2)[2].pattern)
    names = [name for name in trace.activations if name.endswith(".attention_weights")]
    assert names == [f"model.model.layers.{i}.self_attn.attention_weights" for i in range(6)]
    for spelling in (names[2], "layers.-4.attn.attention_weights", "h.2.attn.attention_weights"):
        assert trace.activations[spelling] is trace.attention[2].pattern
    assert "layers.9.attn.attention_weights" not in trace.activations
    assert "layers.2.mlp.attention_weights" not in trace.activations


def test_a_trace_that_holds_no_attention_says_why(demo):
    with demo.trace("The old man", capture="layers.1.mlp") as trace:
        pass
    assert list(trace.activations) == ["model.model.layers.1.mlp"]
    for without in (trace, demo.trace("The old man")):
        with pytest.raises(ValueError, match="this trace holds no attention.* leave capture out"):
            without.attention.calls
    with InterpretableModel(build("mamba")).trace(TOKENS) as trace:
        pass
    with pytest.raises(ValueError, match="no layer of this model .*scaled_dot_product_attention"):
        trace.attention.calls
    assert not [name for name in trace.activations if name.endswith(".attention_weights")]


def test_a_layer_that_attends_twice_has_no_weights_of_its_own_in_a_trace():
    with InterpretableModel(build("nanbeige")).trace(TOKENS) as trace:
        pass
    assert [call.layer for call in trace.attention.calls] == [0, 1, 2, 0, 1, 2]
    assert not [name for name in trace.activations if name.endswith(".attention_weights")]
    assert 1 in trace.attention and 3 not in trace.attention


def test_derivatives_go_through_what_is_held():
    model = InterpretableModel(build("llama"))

    def total(delta):
        edit = {"layers.0": lambda x: x + delta}
        return model.attention(TOKENS, 2, edit=edit)[2].scores[0, 0, 3, 1]

    slope = mx.grad(total)(mx.zeros((2, 9, 32)))
    assert mx.abs(slope[0, :4]).max() > 0
    assert mx.abs(slope[0, 4:]).max() == 0
    assert mx.abs(slope[1]).max() == 0


def test_the_function_returns_when_the_pass_ends_or_fails():
    original = mx.fast.scaled_dot_product_attention
    model = InterpretableModel(build("llama"))
    model.attention(TOKENS)
    assert mx.fast.scaled_dot_product_attention is original

    def fail(x):
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError):
        model.attention(TOKENS, edit={"layers.1.attn": fail})
    assert mx.fast.scaled_dot_product_attention is original
