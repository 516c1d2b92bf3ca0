"""Names of sites, and how they are found in models of any build."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxterp.model import InterpretableModel
from mlxterp.sites import Site, SiteTable, UnknownSiteError
from tests.pages import checked
from tests.tiny_models import build


@pytest.fixture(scope="module")
def llama():
    return InterpretableModel(build("llama"))


@pytest.fixture(scope="module")
def gpt2():
    return InterpretableModel(build("gpt2"))


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("layers.1", "layers.1.resid_post"),
        ("layers[1]", "layers.1.resid_post"),
        ("layers.1.output", "layers.1.resid_post"),
        ("layers.1.residual", "layers.1.resid_post"),
        ("model.layers.1", "layers.1.resid_post"),
        ("model.model.layers.1", "layers.1.resid_post"),
        ("layers.-1.mlp", "layers.2.mlp"),
        ("model.layers.-1.self_attn", "layers.2.attn"),
        ("h.1.attn", "layers.1.attn"),
        ("transformer.h.1.mlp", "layers.1.mlp"),
        ("blocks.1.hook_mlp_out", "layers.1.mlp_out"),
        ("blocks.1.hook_resid_mid", "layers.1.resid_mid"),
        ("layers.1.self_attn.output", "layers.1.attn"),
        ("layers.1.attention", "layers.1.attn"),
        ("layers.1.feed_forward", "layers.1.mlp"),
        ("layers.1.attn.q_proj", "layers.1.self_attn.q_proj"),
        ("model.model.layers.1.mlp.gate_proj.output", "layers.1.mlp.gate_proj"),
        ("embed_tokens", "model.embed_tokens"),
        ("model.model.embed_tokens", "model.embed_tokens"),
        ("norm", "model.norm"),
        ("model.lm_head", "lm_head"),
        ("model", "model"),
        ("logits", "__model_output__"),
        ("__model_output__", "__model_output__"),
    ],
)
def test_usual_spellings(llama, spelling, expected):
    site = llama.site(spelling)
    assert str(site) == expected
    assert llama.site(str(site)) == site
    assert Site.from_string(str(site)) == site


def test_the_same_spellings_fit_another_build(gpt2):
    for spelling in ("layers.1.attn", "h.1.attn", "model.h.1.attn", "blocks.1.self_attn"):
        assert gpt2.site(spelling) == Site(1, "attn")
    assert gpt2.site("wte") == Site(None, "model.wte")
    assert gpt2.site("layers.0.ln_1") == Site(0, "ln_1")


def test_layer_and_component(llama):
    assert llama.site(1, "mlp") == Site(1, "mlp")
    assert llama.site(-1, "residual") == Site(2, "resid_post")
    assert llama.site(0) == Site(0, "resid_post")
    assert llama.site(Site(1, "mlp")) == Site(1, "mlp")
    with pytest.raises(ValueError, match="component is for a layer number"):
        llama.site("layers.1", "mlp")


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("layers.1.mpl", r"no site 'layers\.1\.mpl'.*nearest existing: layers\.1\.mlp"),
        ("layers.1.self_attn.qproj", r"nearest existing: layers\.1\.self_attn\.q_proj"),
        ("layers.9.mlp", r"no layer 9 .*layers are 0 to 2 \(or -3 to -1"),
        ("layers.-4", r"no layer -4 "),
        ("lmhead", r"nearest existing: lm_head"),
        ("layers.*.nothing", r"no site 'layers\.0\.nothing'"),
        ("vision.layers.1.mlp", r"no site 'vision\.layers\.1\.mlp'"),
        ("", r"no site ''"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest_existing(llama, spelling, message):
    with pytest.raises(UnknownSiteError, match=message):
        llama.run([1, 2], capture=spelling)
    with pytest.raises(ValueError, match=message):
        llama.run([1, 2], edit={spelling: mx.zeros_like})


def test_globs(llama):
    def names(pattern):
        return list(map(str, llama.run([1, 2], capture=pattern)))

    assert names("layers.*.mlp") == [f"layers.{i}.mlp" for i in range(3)]
    assert names("model.model.layers[*].self_attn") == [f"layers.{i}.attn" for i in range(3)]
    assert names("layers.*") == [f"layers.{i}.resid_post" for i in range(3)]
    assert set(names("layers.1.mlp.*")) == {
        f"layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    assert names("*.o_proj") == [f"layers.{i}.self_attn.o_proj" for i in range(3)]


def test_a_glob_takes_the_layers_that_have_the_site():
    model = InterpretableModel(build("nemotron-nas"))
    layers = [site.layer for site in model.run([1, 2], capture="layers.*.mlp")]
    assert 0 < len(layers) < model.n_layers


def test_the_table(llama):
    table = llama.sites()
    assert len(table) == len(list(table)) == 3 * (12 + 10) + 5
    assert "layers.1.mlp" in table
    assert Site(1, "mlp") in table
    assert "layers.1.nothing" not in table
    assert "layers.*.mlp " in repr(table)
    assert "[B, S, 48]" in repr(table)
    assert "0-2" in repr(table)
    page = checked(table._repr_html_())
    assert ["layers.*.mlp", "0-2", "[B, S, 32] float32"] in page.cells
    assert ["model.norm", "[B, S, 32] float32"] in page.cells  # which is in no layer
    summaries = ["Components of layers (12)", "Modules in layers (10)", "Outside of layers (5)"]
    assert [name for name in summaries if name in page.text] == summaries
    assert [attributes for tag, attributes in page.tags if tag == "details"] == [
        {"open": None}, {}, {"open": None},
    ]  # fmt: skip
    positions = [str(site) for site in table]
    order = ["layers.0.resid_pre", "layers.0.attn_unit", "layers.0.attn_in", "layers.0.attn_z",
             "layers.0.attn", "layers.0.attn_out", "layers.0.resid_mid", "layers.0.mlp_unit",
             "layers.0.mlp_in", "layers.0.mlp", "layers.0.mlp_out",
             "layers.0.resid_post", "layers.1.resid_pre", "model.norm",
             "__model_output__"]  # fmt: skip
    assert sorted(order, key=positions.index) == order


def test_widths(llama):
    assert llama.width("layers.1.mlp.gate_proj") == 48
    assert llama.width(Site(1, "resid_mid")) == 32
    assert llama.width("logits") == llama.vocab_size == 96
    assert llama.d_model == 32


class Toy(nn.Module):
    """No language model: floats in, blocks in a list of another name."""

    def __init__(self):
        super().__init__()
        self.stages = [nn.Linear(4, 4) for _ in range(3)]

    def __call__(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def test_modules_that_are_no_language_models_take_floats():
    model = InterpretableModel(Toy())
    x = mx.ones((2, 4))
    done = model.run(x, capture=["layers.1", "layers.1.resid_pre"])
    assert done["stages.1"].shape == (2, 4)
    assert mx.array_equal(model.model.stages[1](done["layers.1.resid_pre"]), done["layers.1"])


def test_a_model_without_layers_says_what_to_give():
    with pytest.raises(AttributeError, match="Linear has no list of layers.*layer_attr"):
        InterpretableModel(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="'stagez'"):
        InterpretableModel(Toy(), layer_attr="stagez")
    assert InterpretableModel(Toy(), layer_attr="stages").n_layers == 3


class Uncalled(nn.Module):
    """Goes through the parts of its blocks without calling the blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = [nn.Module() for _ in range(2)]
        for layer in self.layers:
            layer.mlp = nn.Linear(4, 4)

    def __call__(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer.mlp(h)
        return h


def test_blocks_that_are_never_called_have_parts_but_no_stream():
    model = InterpretableModel(Uncalled())
    assert model.run([1, 2], capture="layers.1.mlp")["layers.1.mlp"].shape == (1, 2, 4)
    with pytest.raises(ValueError, match="never calls its blocks"):
        model.run([1, 2], capture="layers.1")
    assert Site(1, "resid_post") not in model.sites()


def test_finding_the_sites_loads_no_weight():
    from mlx_lm.models import llama

    size = dict(hidden_size=2048, num_hidden_layers=8, intermediate_size=8192, vocab_size=50_000)
    args = llama.ModelArgs(model_type="llama", num_attention_heads=16, rms_norm_eps=1e-5, **size)
    model = InterpretableModel(llama.Model(args))
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert len(model.sites()) > 100
    assert Site(0, "resid_mid") in model.sites()
    assert mx.get_peak_memory() - before < 2e7


def test_knowing_the_sites_keeps_no_weight_alive():
    model = InterpretableModel(build("llama"))
    gc.collect()
    before = mx.get_active_memory()
    model.run([1, 2, 3], capture="layers.1.resid_mid")
    model.model.update(tree_map(lambda x: x + 1, model.model.parameters()))
    mx.eval(model.model.parameters())
    gc.collect()
    assert mx.get_active_memory() - before < 10_000


def test_overrides_of_the_embedding_and_the_head():
    module = build("llama")
    model = InterpretableModel(module, embedding_path="model.embed_tokens", lm_head_path="lm_head")
    assert model.architecture.embedding is module.model.embed_tokens
    assert model.architecture.head is module.lm_head
    with pytest.raises(ValueError, match="embedding_path.*model.embed_tokens"):
        InterpretableModel(module, embedding_path="model.embed")
    given = InterpretableModel(module, norm_path="model.layers.0.input_layernorm")
    assert given.architecture.final_norm is module.model.layers[0].input_layernorm


@pytest.mark.parametrize(
    ("model_type", "path"),
    [("llama", "model.norm"), ("gpt2", "model.ln_f"), ("mamba", "backbone.norm_f"),
     ("gpt_neox", "model.final_layer_norm"), ("lfm2", "model.embedding_norm")],
)  # fmt: skip
def test_the_final_norm_is_found(model_type, path):
    architecture = InterpretableModel(build(model_type)).architecture
    assert architecture.final_norm is architecture.modules[path]


def test_other_integers_are_layers_and_other_types_are_errors(llama):
    assert llama.site(np.int64(1), "mlp") == Site(1, "mlp")
    with pytest.raises(TypeError):
        llama.site(1.5)


def test_a_table_is_indexed_by_names_too(demo):
    assert demo.sites()["layers.0.mlp"] is demo.sites()[Site(0, "mlp")]


def test_a_table_of_arrays_computes_nothing():
    arrays = {Site(i, "<b>"): mx.zeros((2, 3), mx.bfloat16) / 0 for i in (0, 1)}
    table = SiteTable.of_arrays("two", arrays)
    assert table.rows() == [("layers.*.<b>", "0-1", "[2, 3] bfloat16")]
    assert checked(table._repr_html_()).cells[1] == ["layers.*.<b>", "0-1", "[2, 3] bfloat16"]
