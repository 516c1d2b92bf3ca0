"""What heads copy is what their weights say, computed apart, and what the model writes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.visualization import detect_copying_heads
from mlxterp.visualization.copying import _Circuits, _own_rank
from tests.tiny_models import VOCAB, build


def by_weights(model, layer, head):
    """The score in float64 of the weights of a llama, over its whole vocabulary."""

    def weight(module):
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            about = module.scales, module.biases, module.group_size, module.bits
            return np.array(mx.dequantize(module.weight, *about), np.float64)
        return np.array(module.weight, np.float64)

    def norm(x, module):
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + module.eps)
        return x / scale * np.array(module.weight, np.float64)

    inner, block = model.model.model, model.model.layers[layer]
    attention = block.self_attn
    width = len(weight(attention.q_proj)) // attention.n_heads
    group = head * attention.n_kv_heads // attention.n_heads
    x = norm(weight(inner.embed_tokens), block.input_layernorm)
    v = x @ weight(attention.v_proj)[group * width : (group + 1) * width].T
    written = v @ weight(attention.o_proj)[:, head * width : (head + 1) * width].T
    logits = norm(written, inner.norm) @ weight(model.model.lm_head).T
    centred = logits - logits.mean(axis=0)
    n = len(logits)
    below = sum(centred[t, u] < centred[t, t] for t in range(n) for u in range(n) if u != t)
    return below / (n * (n - 1))


@pytest.mark.parametrize("model_type", ["llama", "llama_quantized"])
def test_scores_are_those_of_the_weights(model_type):
    model = InterpretableModel(build(model_type))
    found = detect_copying_heads(model, threshold=0.0)
    assert len(found) == len(found.every) == 12
    for place, score in found.every.items():
        assert score == pytest.approx(by_weights(model, *place), abs=5e-4)
    assert np.ptp(list(found.every.values())) > 0.02


def test_a_model_that_learnt_to_copy_copies_in_its_induction_heads_alone(trained):
    found = detect_copying_heads(trained)
    assert {(head.layer, head.head) for head in found} == {(1, 0), (1, 1)}
    assert all(found.every[0, head] < 0.6 for head in (0, 1))


def test_a_head_turned_round_makes_its_tokens_less_likely(trained):
    own = detect_copying_heads(trained, layers=1).every
    projection = trained.model.layers[1].self_attn.o_proj
    weight = projection.weight
    projection.weight = -weight
    try:
        turned = detect_copying_heads(trained, layers=1).every
    finally:
        projection.weight = weight
    for place, score in own.items():
        assert turned[place] == pytest.approx(1 - score, abs=1e-6)


def test_a_bias_of_the_projection_is_no_head_and_changes_nothing():
    model = InterpretableModel(build("gpt2"))
    before = detect_copying_heads(model).every
    for block in model.model.layers:
        projection = block.attn.c_proj
        noise = mx.random.normal(projection.bias.shape, key=mx.random.key(1))
        projection.bias = projection.bias + 10 * noise
    after = detect_copying_heads(model).every
    for place, score in before.items():
        assert after[place] == pytest.approx(score, abs=5e-4)


def test_ties_count_half():
    assert _own_rank(np.zeros((4, 4))) == 0.5
    assert _own_rank(np.eye(4)) == 1 == 1 - _own_rank(-np.eye(4))


# Biases, gates, shared values, latent attention, sinks, a parallel block, several kinds of layers.
@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "phi", "qwen3_next", "deepseek_v3", "gpt_oss", "jamba", "llama_quantized"],
)
def test_heads_alone_sum_to_all_heads(model_type):
    model = InterpretableModel(build(model_type))
    tokens = mx.arange(5, 11)[:, None]
    calls = model.attention(tokens).calls
    layers = [call.layer for call in calls]
    circuits = _Circuits(model, tokens, layers)
    without = circuits.written(None)
    whole = model.run(
        tokens, capture=[f"layers.{layer}.attn_out" for layer in layers], edit=circuits.edits
    )
    for call in calls:
        parts = [circuits.written(head)[call.layer] for head in range(call.q.shape[1])]
        total = sum(part - without[call.layer] for part in parts) + without[call.layer]
        expected = whole[f"layers.{call.layer}.attn_out"][:, 0]
        assert mx.abs(total - expected).max() < 1e-5 * (1 + mx.abs(expected).max())
        assert all(mx.abs(part - without[call.layer]).max() > 1e-4 for part in parts)


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2", "afmoe", "openelm"])
def test_it_works_where_norms_follow_and_heads_differ(model_type):
    found = detect_copying_heads(InterpretableModel(build(model_type)), threshold=1.0)
    assert found == [] and all(0 < score < 1 for score in found.every.values())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", "no softmax attention"),
        ("falcon_h1", "layers.0.attn_out does not exist"),
        ("longcat_flash", "the block has no single attn"),
    ],
)
def test_models_in_which_it_means_nothing_say_so(model_type, message):
    with pytest.raises(ValueError, match=message):
        detect_copying_heads(InterpretableModel(build(model_type)))


def test_tokens_must_be_several(trained):
    with pytest.raises(ValueError, match="n_tokens must be >= 2"):
        detect_copying_heads(trained, n_tokens=1)
    assert VOCAB < 128  # so that all tokens were compared above
