"""Names of sites in other libraries."""

import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sae.formats.names import (
    FAMILIES,
    from_hugging_face,
    from_transformer_lens,
    to_hookpoint,
    to_hugging_face,
    to_transformer_lens,
)
from tests.tiny_models import build

HOOKS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "attn.hook_z": "attn_z",
    "attn.hook_in": "attn_in", "attn.hook_out": "attn", "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp", "ln1.hook_normalized": "attn_unit", "ln2.hook_normalized": "mlp_unit",
}  # fmt: skip
COMPONENTS = ("resid_pre", "attn_in", "attn_z", "attn", "attn_out", "mlp_in", "mlp", "mlp_out",
              "resid_post")  # fmt: skip
# What these are called in models of a family.
MODELS = {"llama": "llama", "gemma2": "gemma3_text", "gpt2": "gpt2", "gpt_neox": "gpt_neox"}


@pytest.mark.parametrize(("hook", "component"), HOOKS.items())
def test_hooks_there_and_back(hook, component):
    name, site = f"blocks.12.{hook}", f"layers.12.{component}"
    assert from_transformer_lens(name) == site
    assert to_transformer_lens(site) == name


def test_other_hooks_are_read():
    for hook, component in (
        ("hook_in", "resid_pre"), ("hook_out", "resid_post"), ("ln2.hook_out", "mlp_in"),
        ("hook_mlp_in", "resid_mid"),
    ):  # fmt: skip
        assert from_transformer_lens(f"blocks.0.{hook}") == f"layers.0.{component}"


def test_the_embedding_is_the_stream_where_nothing_is_added_to_it():
    assert from_transformer_lens("hook_embed", "google/gemma-2-2b") == "layers.0.resid_pre"
    assert from_transformer_lens("hook_embed", "EleutherAI/gpt-neox-20b") == "layers.0.resid_pre"
    for name in ("gpt2-small", "openai-community/gpt2", "facebook/opt-125m", "gpt-neo-125M"):
        assert from_transformer_lens("hook_embed", name) == "model.wte"
    with pytest.raises(ValueError, match=r"no model is named: give site='layers\.0\.resid_pre'"):
        from_transformer_lens("hook_embed")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.3.hook_resid_pots", r"nearest is blocks\.N\.hook_resid_post"),
        ("blocks.3.attn.hook_pattern", r"known are hook_embed, blocks\.N\.hook_resid_pre"),
        ("blocks.3.hook_q_input", "No site of ours is the hook"),
        ("blocks.3", "No site of ours"),
        ("blocks.x.hook_resid_pre", "No site of ours"),
        ("hook_pos_embed", "No site of ours"),
        ("", "No site of ours"),
    ],
)
def test_unknown_hooks(name, message):
    with pytest.raises(ValueError, match=message):
        from_transformer_lens(name)


def test_sites_without_a_hook():
    for site in ("layers.3.mlp.gate_proj", "model.norm", "layers.x.mlp", ""):
        with pytest.raises(ValueError, match=r"No site of ours is the site .*layers\.N\.resid_pre"):
            to_transformer_lens(site)


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("layers.10", "layers.10.resid_post"),
        ("layers.5.mlp", "layers.5.mlp"),
        ("h.3.attn", "layers.3.attn"),
        ("model.layers.8", "layers.8.resid_post"),
        ("model.layers.8.output", "layers.8.resid_post"),
        ("model.layers.8.input", "layers.8.resid_pre"),
        ("model.layers.8.mlp.output", "layers.8.mlp"),
        ("model.layers.8.mlp.input", "layers.8.mlp_in"),
        ("model.layers.8.self_attn.input", "layers.8.attn_in"),
        ("model.layers.8.self_attn.o_proj.input", "layers.8.attn_z"),
        ("model.layers.8.self_attn.o_proj", "layers.8.attn"),
        ("model.layers.8.self_attn.q_proj", "layers.8.self_attn.q_proj"),
        ("model.layers.8.mlp.down_proj.output", "layers.8.mlp.down_proj"),
        ("model.layers.8.pre_feedforward_layernorm.output", "layers.8.mlp_in"),
        ("model.layers.8.pre_feedforward_layernorm.input", "layers.8.resid_mid"),
        ("model.layers.8.post_feedforward_layernorm.output", "layers.8.mlp_out"),
        ("model.layers.8.post_attention_layernorm.output", "layers.8.post_attention_layernorm"),
        ("model.layers.8.input_layernorm.output", "layers.8.attn_in"),
        ("model.language_model.layers.8.mlp", "layers.8.mlp"),
        ("transformer.h.3.attn.c_proj.input", "layers.3.attn_z"),
        ("transformer.h.3.ln_2.output", "layers.3.mlp_in"),
        ("gpt_neox.layers.2.attention.dense.input", "layers.2.attn_z"),
        ("gpt_neox.layers.2.mlp", "layers.2.mlp"),
        ("embed_tokens", "model.embed_tokens"),
        ("transformer.wte", "model.wte"),
        ("gpt_neox.embed_in", "model.embed_in"),
        ("lm_head", "lm_head"),
    ],
)
def test_modules_of_hugging_face(path, site):
    assert from_hugging_face(path) == site


def test_the_side_may_be_given():
    assert from_hugging_face("layers.5.mlp", side="input") == "layers.5.mlp_in"
    assert from_hugging_face("layers.5.mlp.input", side="input") == "layers.5.mlp_in"
    for path, side in (("layers.5.mlp.input", "output"), ("layers.5.mlp", "above")):
        with pytest.raises(ValueError, match=r'side must be "input" or "output"'):
            from_hugging_face(path, side=side)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layers.5.mpl", r"nearest is layers\.N\.mlp\); known are layers\.N, layers\.N\.input"),
        ("layers.5.mlp.down_proj.input", "No site of ours is the module"),
        ("embed_tokens.input", "No site of ours"),
        ("layers.5.post_attention_layernorm.input", r"give site='layers\.5\.attn'"),
        ("layers", "No site of ours"),
        ("", "No site of ours"),
    ],
)
def test_unknown_modules(path, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_there_and_back(family):
    for component in (*COMPONENTS, *["resid_mid"] * (family != "gpt_neox")):
        site, path = f"layers.3.{component}", to_hugging_face(f"layers.3.{component}", family)
        found = from_hugging_face(path) if component != "resid_mid" or family != "llama" else site
        same = {"mlp_out": "mlp", "attn_out": "attn"} if family != "gemma2" else {}
        same |= {"attn_out": "post_attention_layernorm"} if family == "gemma2" else {}
        assert found == f"layers.3.{same.get(component, component)}", path


@pytest.mark.parametrize(("family", "model_type"), MODELS.items())
def test_the_modules_are_there_in_models_of_the_family(family, model_type):
    model = InterpretableModel(build(model_type))
    for component in COMPONENTS:
        inner, _, side = to_hugging_face(f"layers.1.{component}", family).rpartition(".")
        module = model.architecture.modules[inner.replace("transformer.h", "model.h").replace(
            "gpt_neox.layers", "model.h"
        )]  # fmt: skip
        place = model.architecture.place(model.site(1, component))
        assert place.module is module, component
        assert place.is_input == (side == "input") or component == "resid_pre"


def test_hookpoints():
    assert to_hookpoint("layers.10.resid_post") == "layers.10"
    assert to_hookpoint("layers.5.mlp") == "layers.5.mlp"
    assert to_hookpoint("layers.3.attn", "gpt2") == "h.3.attn"
    with pytest.raises(ValueError, match=r"what a module returns, got 'layers\.3\.mlp_in'"):
        to_hookpoint("layers.3.mlp_in")
    with pytest.raises(ValueError, match="family must be one of llama, gemma2"):
        to_hookpoint("layers.3.mlp", "bert")
    with pytest.raises(ValueError, match="No site of ours is the site"):
        to_hugging_face("layers.3.mlp_unit")
