"""What must hold on every mlx-lm architecture."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.hooks import original_class
from mlxterp.model import InterpretableModel
from mlxterp.sites import COMPONENTS, Site
from tests.tiny_models import MODEL_TYPES, build

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]])

# Blocks that add something else than one attention and one MLP, or multiply the stream.
NOT_ADDITIVE = {
    "falcon_h1", "gemma3n", "gemma4", "gemma4_text", "granitemoehybrid", "longcat_flash",
    "rwkv7", "talkie",
}  # fmt: skip
LOOPED = {"nanbeige"}  # run their blocks several times: the last time is captured
PARALLEL = {"cohere", "cohere2", "gpt_neox", "gptj", "phi", "phixtral", "plamo"}
ONE_BRANCH = {"mamba", "mamba2", "nemotron_h", "nemotron-nas"}
SEVERAL_STREAMS = {"gemma3n"}


@cache
def wrapped(model_type: str) -> InterpretableModel:
    return InterpretableModel(build(model_type))


@cache
def plain_logits(model_type: str) -> mx.array:
    return wrapped(model_type).model(TOKENS)


def components(model: InterpretableModel, layer: int) -> list[Site]:
    return [site for site in model.sites() if site.layer == layer and site.component in COMPONENTS]


def has(model: InterpretableModel, layer: int, component: str) -> bool:
    return Site(layer, component) in model.sites()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_capturing_everything_leaves_the_logits_and_classes_as_they_are(model_type):
    model = wrapped(model_type)
    classes = [type(module) for _, module in model.named_modules()]
    done = model.run(TOKENS, capture=list(model.sites()))
    assert mx.array_equal(done.output, plain_logits(model_type))
    assert len(done) == len(model.sites()) > 5 * model.n_layers
    assert [type(module) for _, module in model.named_modules()] == classes
    assert all(original_class(module) is type(module) for _, module in model.named_modules())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_shapes_of_the_dry_run_are_those_of_a_real_one(model_type):
    model = wrapped(model_type)
    done = model.run(TOKENS, capture=list(model.sites()))
    sizes = {"B": TOKENS.shape[0], "S": TOKENS.shape[1]}
    for site, array in done.items():
        shape = model.sites()[site].shape
        if "B" in shape and "S" in shape:
            assert [sizes.get(size, size) for size in shape] == list(array.shape), site
        assert model.width(site) == array.shape[-1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attention_and_mlp_add_up_to_the_stream(model_type):
    model = wrapped(model_type)
    additive = 0
    for layer in range(model.n_layers):
        names = [s.component for s in components(model, layer)]
        assert {"resid_pre", "resid_post"} <= set(names)
        done = model.run(TOKENS, capture=[Site(layer, name) for name in names])
        parts = [done[Site(layer, name)] for name in ("attn_out", "mlp_out") if name in names]
        additive += bool(parts)
        if parts:
            total = sum(parts, done[Site(layer, "resid_pre")])
            np.testing.assert_allclose(total, done[Site(layer, "resid_post")], rtol=1e-5, atol=1e-5)
        if "resid_mid" in names:
            np.testing.assert_allclose(
                done[Site(layer, "resid_mid")] + done[Site(layer, "mlp_out")],
                done[Site(layer, "resid_post")], rtol=1e-5, atol=1e-5,
            )  # fmt: skip
    if model_type == "rwkv7":  # only its first block has a norm of its own on the stream
        assert additive == model.n_layers - 1
    else:
        assert additive == (0 if model_type in NOT_ADDITIVE else model.n_layers)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_middle_of_a_block_exists_or_says_why_not(model_type):
    model = wrapped(model_type)
    if model_type not in NOT_ADDITIVE | PARALLEL | ONE_BRANCH:
        assert all(has(model, layer, "resid_mid") for layer in range(model.n_layers))
        return
    reason = "parallel" if model_type in PARALLEL else "it adds more|it has only one"
    layer = 1 if model_type == "nemotron-nas" else 0
    assert not has(model, layer, "resid_mid")
    with pytest.raises(ValueError, match=rf"layers\.{layer}\.resid_mid does not exist.*({reason})"):
        model.run(TOKENS, capture=f"layers.{layer}.resid_mid")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_edit_of_any_component_reaches_the_logits(model_type):
    model = wrapped(model_type)
    layer = model.n_layers - 2
    for site in components(model, layer):
        edited = model.run(TOKENS, edit={site: lambda x: x + 0.5 + x[..., ::-1]}, capture=site)
        assert not mx.allclose(edited.output, plain_logits(model_type), rtol=1e-4, atol=1e-5), site
        if model_type in LOOPED:
            continue
        before = model.run(TOKENS, capture=site)[site]
        np.testing.assert_allclose(
            edited[site], before + 0.5 + before[..., ::-1], rtol=1e-4, atol=1e-4
        )
    same = model.run(TOKENS, edit={site: lambda x: x for site in components(model, layer)})
    assert mx.array_equal(same.output, plain_logits(model_type))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parts_are_written_where_they_are_read(model_type):
    model = wrapped(model_type)
    layer = model.n_layers - 2
    if has(model, layer, "attn_out"):
        done = model.run(TOKENS, edit={Site(layer, "attn_out"): mx.zeros_like},
                         capture=components(model, layer))  # fmt: skip
        rest = done[Site(layer, "mlp_out")] if has(model, layer, "mlp_out") else 0
        np.testing.assert_allclose(
            done[Site(layer, "resid_pre")] + rest, done[Site(layer, "resid_post")], atol=1e-5
        )
    if has(model, layer, "resid_mid"):
        done = model.run(TOKENS, edit={Site(layer, "resid_mid"): mx.ones_like},
                         capture=[Site(layer, n) for n in ("mlp_out", "resid_post")])  # fmt: skip
        np.testing.assert_allclose(
            1 + done[Site(layer, "mlp_out")], done[Site(layer, "resid_post")], atol=1e-4
        )
    before, after = Site(layer + 1, "resid_pre"), Site(layer, "resid_post")
    one = model.run(TOKENS, capture=before, edit={before: lambda x: x * 2})
    other = model.run(TOKENS, capture=before, edit={after: lambda x: x * 2})
    assert mx.array_equal(one[before], other[before])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stopping_early_gives_what_the_full_pass_gives(model_type):
    model = wrapped(model_type)
    sites = components(model, model.n_layers // 2)
    full = model.run(TOKENS, capture=sites)
    for site in sites:
        stopped = model.run(TOKENS, capture=site, stop=True)
        assert stopped.output is None
        assert mx.array_equal(stopped[site], full[site]), site


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_unembedding_the_last_stream_gives_the_logits(model_type):
    model = wrapped(model_type)
    hidden = model.run(TOKENS, capture="layers.-1.resid_post")["layers.-1"]
    if model_type in SEVERAL_STREAMS:
        with pytest.raises(ValueError, match="several streams"):
            model.unembed(hidden)
        return
    logits = plain_logits(model_type)
    np.testing.assert_allclose(model.unembed(hidden), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.unembed(hidden[0, 3]), logits[0, 3], rtol=1e-5, atol=1e-5)


def test_many_architectures_are_covered():
    asked = "llama qwen2 qwen3 gemma2 gemma3_text gpt2 gpt_neox phi phi3 mixtral olmoe qwen3_moe "
    asked += (
        "deepseek_v2 mamba mamba2 jamba nemotron_h qwen3_next olmo2 cohere2 dbrx exaone gpt_oss"
    )
    assert {*asked.split(), "llama_quantized"} <= set(MODEL_TYPES)
    assert len(MODEL_TYPES) >= 45
