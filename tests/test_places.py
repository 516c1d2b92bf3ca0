"""What the output projection of the attention receives, and norms before their gain."""

from functools import cache, partial

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sites import Site, UnknownSiteError
from tests.tiny_models import build

TOKENS = mx.array([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])
PROJECTIONS = {
    "llama": "self_attn.o_proj", "llama_quantized": "self_attn.o_proj", "gpt2": "attn.c_proj",
    "gemma2": "self_attn.o_proj", "gemma3_text": "self_attn.o_proj", "qwen3": "self_attn.o_proj",
    "gpt_neox": "attention.dense", "phi": "self_attn.dense", "phi3": "self_attn.o_proj",
    "mistral": "self_attn.o_proj", "internlm2": "attention.wo",
    "deepseek_v3": "self_attn.o_proj", "exaone": "attn.attention.out_proj",
    "dbrx": "norm_attn_norm.attn.out_proj",
}  # fmt: skip
NORMS = {  # of attention and MLP
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
    "gpt2": ("ln_1", "ln_2"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm"),
    "phi": ("input_layernorm", "input_layernorm"),
}
LAYER_NORMS = {"gpt2", "gpt_neox", "phi"}


@cache
def wrapped(model_type: str) -> InterpretableModel:
    return InterpretableModel(build(model_type))


@pytest.mark.parametrize("model_type", PROJECTIONS)
def test_the_heads_are_what_the_output_projection_receives(model_type):
    model = wrapped(model_type)
    projection = model.architecture.modules[
        f"{model.architecture.block_paths[1]}.{PROJECTIONS[model_type]}"
    ]
    assert model.architecture.place(Site(1, "attn_z")).module is projection
    done = model.run(TOKENS, capture=["layers.1.attn_z", "layers.1.attn"])
    np.testing.assert_allclose(
        projection(done["layers.1.attn_z"]), done["layers.1.attn"], rtol=1e-6, atol=1e-6
    )
    assert model.width("layers.1.attn_z") == done["layers.1.attn_z"].shape[-1]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gpt_neox", "phi3", "qwen3"])
def test_the_heads_are_joined_in_their_order(model_type):
    model = wrapped(model_type)
    heads = model.attention(TOKENS, 1)[1].z
    z = model.run(TOKENS, capture="blocks.1.attn.hook_z")["layers.1.attn_z"]
    assert mx.array_equal(heads.swapaxes(1, 2).reshape(z.shape), z)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_an_edit_of_a_head_changes_the_attention_by_its_part_of_the_projection(model_type):
    model = wrapped(model_type)
    sites = ["layers.1.attn_z", "layers.1.attn"]
    edit = {"layers.1.attn_z": lambda z: z * (mx.arange(z.shape[-1]) >= 8)}
    plain, edited = (model.run(TOKENS, capture=sites, edit=e) for e in (None, edit))
    assert not mx.any(edited["layers.1.attn_z"][..., :8])
    projection = model.architecture.place(Site(1, "attn_z")).module
    part = plain["layers.1.attn_z"][..., :8] @ projection.weight[:, :8].T
    np.testing.assert_allclose(
        edited["layers.1.attn"], plain["layers.1.attn"] - part, rtol=1e-4, atol=1e-5
    )


def test_attention_that_is_no_single_module_has_no_heads_and_says_why():
    with pytest.raises(UnknownSiteError, match="attn_z does not exist.*no single attn"):
        wrapped("longcat_flash").site("layers.0.attn_z")
    with pytest.raises(UnknownSiteError, match="not what one projection in it makes"):
        wrapped("nemotron_h").site("layers.3.attn_z")


@pytest.mark.parametrize("model_type", NORMS)
def test_units_are_what_a_norm_makes_of_the_stream_before_its_gain(model_type):
    model = wrapped(model_type)
    for part, norm, stream in zip(
        ("attn", "mlp"), NORMS[model_type], ("resid_pre", "resid_mid"), strict=True
    ):
        sequential = f"layers.1.{stream}" in model.sites()
        names = [f"layers.1.{n}" for n in (stream if sequential else "resid_pre", f"{part}_unit")]
        done = model.run(TOKENS, capture=[*names, f"layers.1.{norm}"])
        x = np.array(done[names[0]], np.float64)
        if model_type in LAYER_NORMS:
            x = x - x.mean(-1, keepdims=True)
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(done[names[1]], expected, rtol=1e-4, atol=1e-5)
        assert not np.allclose(done[names[1]], done[f"layers.1.{norm}"], atol=1e-2)


def test_an_edit_of_a_unit_goes_through_the_gain():
    model = wrapped("gemma2")
    sites = ["layers.1.mlp_unit", "layers.1.mlp_in"]
    edit = {
        "layers.1.mlp_in": lambda x: x + 1,  # which comes after that of the unit
        "layers.1.mlp_unit": lambda x: x * 0 + 2,
    }
    done = model.run(TOKENS, capture=sites, edit=edit)
    gain = 1 + model.layers[1].pre_feedforward_layernorm.weight
    expected = mx.broadcast_to(2 * gain + 1, done["layers.1.mlp_in"].shape)
    np.testing.assert_allclose(done["layers.1.mlp_in"], expected, rtol=1e-5)


def test_gradients_of_units_are_those_of_what_the_mlp_receives_times_the_gain():
    model = wrapped("llama")
    sites = ["layers.1.mlp_unit", "layers.1.mlp_in"]
    slopes = [
        model.gradients(TOKENS, [s], lambda logits: logits.square().mean()).gradients[s]
        for s in sites
    ]
    gain = model.layers[1].post_attention_layernorm.weight
    np.testing.assert_allclose(slopes[0], slopes[1] * gain, rtol=1e-4, atol=1e-8)


def test_a_changed_gain_is_seen():
    model = InterpretableModel(build("llama"))
    before = model.run(TOKENS, capture="layers.0.attn_unit")["layers.0.attn_unit"]
    norm = model.layers[0].input_layernorm
    norm.weight = norm.weight * 2 + 1
    after = model.run(TOKENS, capture="layers.0.attn_unit")["layers.0.attn_unit"]
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)


def test_units_are_found_in_a_compiled_function():
    model = InterpretableModel(build("llama"))
    plain = model.run(TOKENS, capture="layers.1.mlp_unit")["layers.1.mlp_unit"]

    @partial(mx.compile, inputs=[model.model.state])
    def compiled(tokens):
        sites = ["layers.1.mlp_unit", "layers.2.attn_unit", "*.o_proj"]
        return list(model.run(tokens, capture=sites).values())

    found = compiled(TOKENS)
    assert len(found) == 5
    assert any(x.shape == plain.shape and mx.allclose(x, plain, atol=1e-5) for x in found)


def test_blocks_without_such_a_norm_say_so():
    with pytest.raises(UnknownSiteError, match="no norm with a gain makes what it receives"):
        wrapped("olmo2").site("layers.0.mlp_unit")
    model = InterpretableModel(build("llama"))
    model.layers[1].post_attention_layernorm.weight[5] = 0
    with pytest.raises(UnknownSiteError, match="some gains of its norm are zero"):
        model.site("layers.1.mlp_unit")
    assert "layers.1.mlp_unit" not in model.sites()
    assert "layers.0.mlp_unit" in model.sites()
