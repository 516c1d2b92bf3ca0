"""Names of TransformerLens hold what they do there, its hooks are edits, nnterp's names read."""

from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gpt2, llama

from mlxterp import interventions as iv
from mlxterp.analysis.hook_names import BLOCK, HookNames, full_name
from mlxterp.model import InterpretableModel
from tests.pages import checked
from tests.tiny_models import MODEL_TYPES, build

GOLDEN = Path(__file__).parents[1] / "golden" / "analysis"
TEXT = "The function returns"
# What has no counterpart: scales of norms, what leaves the MLP's neurons, the unembedding's names.
WITHOUT = ("hook_scale", "mlp.hook_post", "unembed.hook_in", "unembed.hook_out")
NORMED = ("gemma3n", "gemma4", "gemma4_text")  # a norm stands between hook_v and what is attended
FEW = (
    "cohere", "gemma2", "gemma4", "gpt2", "gpt_neox", "longcat_flash", "mamba", "nanbeige", "olmo2",
    "phi", "qwen3", "qwen3_next",
)  # fmt: skip
SIZES = dict(
    llama=dict(
        hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, vocab_size=12, rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    gpt2=dict(
        n_ctx=32, n_embd=16, n_head=4, n_layer=2, n_positions=32, layer_norm_epsilon=1e-5,
        vocab_size=12,
    ),
)  # fmt: skip


def golden(kind):
    """A tiny model with the weights in the file, and all that TransformerLens cached of it."""
    stored = np.load(GOLDEN / f"hooks_{kind}.npz")
    module = {"llama": llama, "gpt2": gpt2}[kind]
    model = module.Model(module.ModelArgs(model_type=kind, **SIZES[kind]))
    names = [name for name in stored.files if name.startswith("weights/")]
    weights = {name.removeprefix("weights/"): mx.array(stored[name]) for name in names}
    if kind == "gpt2":
        del weights["lm_head.weight"]
        weights = {name.removeprefix("transformer."): array for name, array in weights.items()}
    model.load_weights(list(model.sanitize(weights).items()))
    return InterpretableModel(model), stored


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_activation_is_that_of_transformer_lens(kind):
    model, stored = golden(kind)
    logits, cache = model.run_with_cache(mx.array(stored["tokens"]))
    np.testing.assert_allclose(logits, stored["logits"], atol=1e-5)
    theirs = {n.removeprefix("hooks/") for n in stored.files if n.startswith("hooks/")}
    assert set(cache) == {name for name in theirs if not name.endswith(WITHOUT)}
    for name in cache:
        expected = stored[f"hooks/{name}"]
        assert cache[name].shape == expected.shape, name
        seen = np.isfinite(expected)  # scores of hidden keys are infinite there, very low here
        found = np.where(seen, np.array(cache[name]), 0)
        np.testing.assert_allclose(found, np.where(seen, expected, 0), atol=1e-5, err_msg=name)
        assert (np.array(cache[name])[~seen] < -1e30).all()


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in MODEL_TYPES],
)
def test_names_hold_what_they_say_in_every_architecture(model_type):
    model = InterpretableModel(build(model_type))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    logits, cache = model.run_with_cache(tokens)
    assert mx.allclose(logits, model.run(tokens).output, atol=1e-4)
    mx.eval(dict(cache))
    for i in range(model.n_layers):
        if ("resid_mid", i) in cache:
            total = cache["resid_pre", i] + cache["attn_out", i]
            assert mx.allclose(cache["resid_mid", i], total, atol=1e-4)
        if ("pattern", i) in cache and model_type not in NORMED:
            pattern, v = cache["pattern", i], cache["v", i].swapaxes(1, 2)
            z = pattern @ mx.repeat(v, pattern.shape[1] // v.shape[1], axis=1)
            assert mx.allclose(z, model.attention(tokens)[i].z, atol=1e-4)


def test_keys_are_full_short_and_ours(demo):
    _, cache = demo.run_with_cache(TEXT)
    held = demo.run(TEXT, capture=["layers.3", "layers.5.mlp_out", "layers.0.resid_pre"])
    pattern = demo.attention(TEXT)[2].pattern
    same = {
        "layers.3": ["blocks.3.hook_resid_post", ("resid_post", 3), ("resid_post", -3),
                     "resid_post3", "layers.3.resid_post", "h.3", ("resid_post", 3, None)],
        "layers.5.mlp_out": [("mlp_out", 5), "mlp_out5", "layers.5.mlp_out"],
        "layers.0.resid_pre": ["hook_embed", "embed", ("embed",), ("resid_pre", 0)],
    }  # fmt: skip
    for site, keys in same.items():
        for key in keys:
            assert key in cache
            assert mx.array_equal(cache[key], held[site]), key
    for key in [
        ("pattern", 2),
        ("attn", 2),
        ("pattern", 2, "attn"),
        ("pattern", 2, "a"),
        "pattern2",
    ]:
        assert mx.allclose(cache[key], pattern, atol=1e-6), key
    assert mx.array_equal(cache["normalized", 1, "ln1"], cache["blocks.1.ln1.hook_normalized"])
    assert full_name("normalized1ln1", 6) == "blocks.1.ln1.hook_normalized"
    assert full_name("layers.3.mlp", 6) == "layers.3.mlp"
    assert repr(cache) == f"HookCache({len(cache)} activations)" and len(cache) == 6 * 17 + 2
    cells = checked(cache._repr_html_()).cells
    assert ["blocks.3.attn.hook_pattern", "[1, 4, 5, 5] float32"] in cells


def test_what_has_no_counterpart_is_an_error_that_says_so(demo):
    _, cache = demo.run_with_cache(TEXT, names_filter="blocks.1.hook_mlp_out")
    assert list(cache) == ["blocks.1.hook_mlp_out"]
    for key, why in {
        ("scale", 3, "ln1"): "the scale of a norm",
        "ln_final.hook_scale": "the scale of a norm",
        ("post", 2): "is no site",
        "blocks.3.hook_resid_pots": r"nearest are blocks\.3\.hook_resid_post",
        ("resid_post", 6): "no layer 6",
        "blocks.6.hook_resid_post": "layers are 0 to 5",
        "layers.3.mpl": "nearest existing",
        3: "a hook is a name",
    }.items():
        assert key not in cache
        with pytest.raises(ValueError, match=why):
            cache[key]
    with pytest.raises(KeyError, match="not in the cache; it has blocks.1.hook_mlp_out"):
        cache["resid_post", 2]


@pytest.mark.parametrize("stop", [0, 2, -1, 6])
def test_stopping_at_a_layer_returns_what_would_enter_it(demo, stop):
    out, cache = demo.run_with_cache(TEXT, stop_at_layer=stop)
    layer = stop % 6 if stop < 0 else stop
    where = f"layers.{layer}.resid_pre" if layer < 6 else "layers.5.resid_post"
    assert mx.array_equal(out, demo.run(TEXT, capture=where)[where])
    layers = {int(name.split(".")[1]) for name in cache if name.startswith("blocks")}
    assert layers == set(range(layer))
    assert "ln_final.hook_normalized" not in cache


def test_stopping_where_it_makes_no_sense_is_an_error(demo):
    with pytest.raises(ValueError, match=r"blocks\.3\.hook_mlp_out is not reached"):
        demo.run_with_cache(TEXT, names_filter=["blocks.3.hook_mlp_out"], stop_at_layer=3)
    with pytest.raises(ValueError, match="stop_at_layer must be -6 to 6, got 7"):
        demo.run_with_cache(TEXT, stop_at_layer=7)


def test_filters_and_the_batch_axis(demo):
    wanted = [f"blocks.{i}.attn.hook_pattern" for i in range(6)]
    _, cache = demo.run_with_cache(TEXT, names_filter=lambda name: name.endswith("hook_pattern"))
    assert list(cache) == wanted
    alone = demo.run_with_cache(TEXT, wanted[:1], remove_batch_dim=True)[1]
    assert mx.array_equal(alone["pattern", 0], cache["pattern", 0][0])
    _, two = demo.run_with_cache([TEXT, TEXT], names_filter=wanted)
    with pytest.raises(ValueError, match="needs one text, and the batch has 2"):
        two.remove_batch_dim()


def test_hooks_are_edits(demo):
    seen = []

    def scaled(value, hook, factor=1.0):
        seen.append((hook.name, hook.layer(), value.shape))
        return value * factor

    hooks = [("blocks.2.hook_mlp_out", partial(scaled, factor=3.0))]
    found = demo.run_with_hooks(TEXT, fwd_hooks=hooks)
    assert seen == [("blocks.2.hook_mlp_out", 2, (1, len(demo.encode(TEXT)), 128))]
    assert mx.array_equal(found, demo.run(TEXT, edit={"layers.2.mlp_out": iv.scale(3.0)}).output)
    with demo.hooks(fwd_hooks=hooks) as model:
        assert model is demo
        assert mx.array_equal(demo.run(TEXT).output, found)
        # To look for the hooks of a model is no use of it.
        seen.clear()
        demo.run_with_cache(TEXT, names_filter=["blocks.0.attn.hook_q"])
        assert len(seen) == 1
    assert not mx.allclose(demo.run(TEXT).output, found)


def test_a_hook_that_returns_nothing_changes_nothing(demo):
    plain = demo.run(TEXT).output
    held = {}
    function = lambda value, hook: held.update({hook.name: value})  # noqa: E731
    found = demo.run_with_hooks(TEXT, [(lambda name: name.endswith("resid_post"), function)])
    assert mx.array_equal(found, plain)
    assert list(held) == [f"blocks.{i}.hook_resid_post" for i in range(6)]


@pytest.mark.parametrize("hook", ["attn.hook_z", "attn.hook_v", "attn.hook_q"])
def test_hooks_of_heads_change_one_head(demo, hook):
    name = f"blocks.1.{hook}"

    def without_head(value, hook):
        return mx.where(mx.arange(value.shape[2])[:, None] == 1, 0.0, value)

    site, width = {"z": ("attn_z", 32), "v": ("attn.v_proj", 32), "q": ("attn.q_proj", 32)}[
        hook[-1]
    ]
    columns = (mx.arange(demo.width(f"layers.1.{site}")) // width) == 1
    edit = {f"layers.1.{site}": lambda x: mx.where(columns, 0.0, x)}
    expected = demo.run(TEXT, edit=edit).output
    assert mx.array_equal(demo.run_with_hooks(TEXT, [(name, without_head)]), expected)
    assert not mx.allclose(expected, demo.run(TEXT).output, atol=1e-3)


def test_the_final_norm_is_edited_before_its_gain():
    model, stored = golden("gpt2")
    tokens = mx.array(stored["tokens"])
    plain = model.run(tokens).output
    name = "ln_final.hook_normalized"
    same = model.run_with_hooks(tokens, [(name, lambda value, hook: value * 1.0)])
    np.testing.assert_allclose(same, plain, atol=1e-5)
    none = model.run_with_hooks(tokens, [(name, lambda value, hook: value * 0.0)])
    bias = mx.array(stored["weights/transformer.ln_f.bias"])
    expected = bias @ mx.array(stored["weights/transformer.wte.weight"]).T
    np.testing.assert_allclose(none, mx.broadcast_to(expected, none.shape), atol=1e-5)


def test_hooks_that_cannot_be_are_errors(demo):
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn\.hook_pattern can be read but not changed"
    ):
        demo.run_with_hooks(TEXT, [(("pattern", 1), lambda value, hook: value)])
    with pytest.raises(TypeError, match="a hook is a pair"):
        demo.run_with_hooks(TEXT, [("blocks.1.hook_mlp_out", 3)])
    with pytest.raises(
        ValueError, match=r"must return an array of \[1, \d, 128\], or None, not \[128\]"
    ):
        demo.run_with_hooks(TEXT, [(("mlp_out", 1), lambda value, hook: value[0, 0])])
    hooks = [("hook_embed", lambda value, hook: hook.layer())]
    with pytest.raises(ValueError, match="hook_embed is in no layer"):
        demo.run_with_hooks(TEXT, hooks)


def test_the_width_of_a_projection_must_be_that_of_the_heads():
    # The queries of qwen3_next have gates beside them.
    names = {hook.name for hook in HookNames(InterpretableModel(build("qwen3_next"))).all()}
    assert not any(name.endswith("hook_q") for name in names)
    assert any(name.endswith("hook_rot_q") for name in names)
    assert len(BLOCK) == len(set(BLOCK))


ACCESSORS = {
    "layers_output": "resid_post", "layers_input": "resid_pre", "attentions_output": "attn",
    "attentions_input": "attn_in", "mlps_output": "mlp", "mlps_input": "mlp_in",
}  # fmt: skip


def test_accessors_of_nnterp_read_the_trace(demo):
    with demo.trace(TEXT) as trace:
        saved = {name: getattr(demo, name)[3].save() for name in ACCESSORS}
        logits, last = demo.logits.save(), demo.layers_output[-1].save()
        assert len(list(demo.layers_output)) == len(demo.layers_output) == 6
        projected = demo.project_on_vocab(demo.layers_output[5])
    for name, component in ACCESSORS.items():
        expected = demo.run(TEXT, capture=f"layers.3.{component}")[f"layers.3.{component}"]
        assert mx.array_equal(saved[name], expected), name
        assert repr(getattr(demo, name)) == f"LayerValues(layers.*.{component})"
    assert mx.array_equal(logits, trace.output)
    np.testing.assert_allclose(projected, logits, atol=1e-4)
    np.testing.assert_allclose(demo.project_on_vocab(last), logits, atol=1e-4)
    assert mx.array_equal(trace.saved_values["layers.3.resid_post.output"], saved["layers_output"])


def test_probabilities_follow_the_last_real_token(demo):
    texts = [TEXT, "if"]
    with demo.trace(texts):
        together = demo.next_token_probs.save()
    assert together.shape == (2, demo.vocab_size)
    for row, text in zip(together, texts, strict=True):
        alone = mx.softmax(demo.run(text).output[0, -1], axis=-1)
        np.testing.assert_allclose(row, alone, atol=1e-5)


def test_accessors_are_for_traces_and_only_read(demo):
    with demo.trace(TEXT):
        with pytest.raises(TypeError, match=r"interventions=\{'layers\.3\.resid_post': function\}"):
            demo.layers_output[3] = 0
        with pytest.raises(TypeError, match="interventions="):
            demo.layers_output[3][:, -1] = 0
        with pytest.raises(IndexError, match="layer 6 does not exist"):
            demo.layers_output[6]
    for name in ("logits", "next_token_probs"):
        with pytest.raises(RuntimeError, match="only inside a trace"):
            getattr(demo, name).save()
