"""The notebook form: the context manager and the proxies."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.notebook import visible
from tests.pages import NASTY, checked
from tests.tiny_models import build

TOKENS = mx.array([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def test_values_exist_in_the_body_and_after_it(model):
    with model.trace(TOKENS) as trace:
        saved = model.layers[1].self_attn.output.save()
        assert isinstance(saved, mx.array)
        assert trace.get("layers.1.self_attn.output") is saved
    assert mx.array_equal(trace.output, model(TOKENS))
    assert trace.saved_values == {"layers.1.self_attn.output": saved}
    assert trace.get("nothing") is None
    assert mx.array_equal(saved, model.run(TOKENS, capture="layers.1.attn")["layers.1.attn"])
    assert repr(trace) == f"Trace(saved_values=1, activations={len(trace.activations)})"


def test_names_are_the_paths_of_modules_in_call_order(model):
    with model.trace(TOKENS) as trace:
        pass
    names = list(trace.activations)
    assert len(names) == 3 * 14 + 5
    assert names[0] == "model.model.embed_tokens"
    assert names[-1] == "__model_output__"
    assert names.index("model.model.layers.1.self_attn.q_proj") < names.index(
        "model.model.layers.1.self_attn") < names.index("model.model.layers.1")  # fmt: skip
    assert all(isinstance(value, mx.array) for value in trace.activations.values())
    assert mx.array_equal(trace.activations["__model_output__"], trace.output)


@pytest.mark.parametrize(
    "spelling",
    ["model.model.layers.1", "layers.1", "h.1", "layers.-2", "layers.1.resid_post", "layers[1]"],
)
def test_activations_are_found_by_any_spelling(model, spelling):
    with model.trace(TOKENS) as trace:
        pass
    assert spelling in trace.activations
    assert trace.get_activation(spelling) is trace.activations["model.model.layers.1"]


def test_components_that_are_no_module_can_be_read_too(model):
    with model.trace(TOKENS) as trace:
        middle = model.layers[1].resid_mid.output.save()
        added = model.layers[1].attn_out.output
        total = model.layers[1].resid_pre.output + added
    assert mx.array_equal(middle, total)
    assert "layers.1.resid_mid" in trace.activations
    assert "model.layers.1.resid_mid" not in list(trace.activations)


def test_with_capture_nothing_else_is_held(model):
    with model.trace(TOKENS, capture=["layers.*.mlp", "layers.0.resid_mid"]) as trace:
        pass
    assert set(trace.activations) == {
        *(f"model.model.layers.{i}.mlp" for i in range(3)), "layers.0.resid_mid",
    }  # fmt: skip
    with pytest.raises(KeyError, match=r"layers\.1\.attn was not captured"):
        trace.activations["layers.1.attn"]


def test_interventions_act_and_unknown_names_are_errors(model):
    with model.trace(TOKENS, interventions={"layers.1.self_attn": mx.zeros_like}) as trace:
        assert mx.all(model.layers[1].attn.output == 0)
    assert not mx.allclose(trace.output, model(TOKENS))
    with (
        pytest.raises(ValueError, match=r"nearest existing: layers\.1\.mlp"),
        model.trace(TOKENS, interventions={"layers.1.mlpp": mx.zeros_like}),
    ):
        pass


def test_a_trace_may_stop_and_pass_arguments_on(model):
    from mlx_lm.models.cache import make_prompt_cache

    with model.trace(TOKENS, capture="layers.0", stop=True) as trace:
        pass
    assert trace.output is None
    cache = make_prompt_cache(model.model)
    with model.trace(TOKENS, capture="layers.0", cache=cache):
        pass
    assert cache[0].offset == 4


def test_layers_from_the_end_slices_and_iteration(model):
    assert len(model.layers) == 3
    assert repr(model.layers) == "LayerListProxy(length=3)"
    assert [repr(layer) for layer in model.layers[1:]] == [
        "ModuleProxy(layers.1)",
        "ModuleProxy(layers.2)",
    ]
    assert repr(model.layers[-1]) == "ModuleProxy(layers.2)"
    with pytest.raises(IndexError, match="layer 3 does not exist: layers are 0 to 2"):
        model.layers[3]
    with model.trace(TOKENS):
        assert mx.array_equal(model.layers[-1].output.save(), model.layers[2].output.save())
        assert [layer.mlp.output.shape for layer in model.layers] == [(1, 4, 32)] * 3


def test_proxies_compute_like_arrays(model):
    with model.trace(TOKENS):
        proxy = model.layers[1].mlp.output
        value = proxy.save()
        assert (proxy.shape, proxy.dtype, proxy.ndim, len(proxy)) == ((1, 4, 32), mx.float32, 3, 1)
        assert mx.array_equal(proxy[0, 1], value[0, 1])
        assert mx.array_equal(2 * proxy + proxy - 1, 3 * value - 1)
        assert mx.array_equal(1 / proxy, 1 / value)
        assert mx.array_equal(-proxy @ value.T.squeeze(), -value @ value.T.squeeze())
        assert mx.array_equal(proxy > 0, value > 0)
        assert mx.array_equal(proxy.mean(axis=-1), value.mean(axis=-1))
        np.testing.assert_array_equal(np.array(proxy), np.array(value))
        assert float(proxy[0, 0, 0]) == float(value[0, 0, 0])


def test_bfloat16_proxies_become_numpy_arrays():
    model = InterpretableModel(build("llama"), dtype=mx.bfloat16)
    with model.trace(TOKENS):
        assert np.asarray(model.output).dtype == np.float32


def test_a_proxy_outside_a_trace_is_an_error(model):
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp has a value only inside a trace"):
        model.layers[1].mlp.output.save()
    with pytest.raises(RuntimeError, match="only inside a trace"):
        model.output.shape
    with model.trace(TOKENS):
        proxy = model.layers[1].output
    assert proxy.shape == (1, 4, 32)


def test_a_proxy_reads_the_trace_of_its_own_model(model):
    other = InterpretableModel(build("llama", seed=1))
    with model.trace(TOKENS) as outer, other.trace(TOKENS) as inner:
        assert mx.array_equal(model.output.save(), outer.output)
        assert mx.array_equal(other.output.save(), inner.output)


def test_assigning_in_a_body_is_an_error_that_says_what_to_use(model):
    with model.trace(TOKENS):
        with pytest.raises(TypeError, match=r"interventions=\{'layers\.1\.mlp': function\}"):
            model.layers[1].mlp.output = mx.zeros((1, 4, 32))
        with pytest.raises(TypeError, match="interventions="):
            model.layers[1].mlp.output[0] = 0


def test_proxies_reach_parameters_and_submodules(model):
    block = model.model.layers[1]
    proxy = model.layers[1]
    assert proxy.self_attn.q_proj.weight is block.self_attn.q_proj.weight
    assert repr(proxy.attn.q_proj) == "ModuleProxy(layers.1.attn.q_proj)"
    x = mx.ones((1, 2, 32))
    assert mx.array_equal(proxy.mlp(x), block.mlp(x))
    with pytest.raises(
        AttributeError, match=r"layers\.1 has no 'self_atn'; the nearest.*self_attn"
    ):
        proxy.self_atn
    with model.trace(TOKENS):
        assert proxy.attn.q_proj.output.shape == (1, 4, 32)


def test_gpt2_answers_to_the_same_names():
    model = InterpretableModel(build("gpt2"))
    with model.trace(TOKENS) as trace:
        assert mx.array_equal(model.layers[0].attn.output.save(), trace.activations["h.0.attn"])
        assert mx.array_equal(
            model.layers[0].self_attn.output.save(), trace.activations["h.0.attn"]
        )
    assert "model.model.h.0.attn" in list(trace.activations)


def test_modules_that_only_some_inputs_reach_are_left_out():
    model = InterpretableModel(build("dbrx"))
    with model.trace(TOKENS[:, :1]) as trace:
        names = [name for name in trace.activations if name.count(".") == 6]
        assert 0 < len([n for n in names if "experts" in n]) < 3 * 4
    assert mx.array_equal(trace.output, model(TOKENS[:, :1]))


def test_the_output_can_be_read_whatever_is_captured(model):
    with model.trace(TOKENS, capture="layers.0") as trace:
        assert model.output.save() is trace.output
    assert trace.tokens is TOKENS
    with (
        model.trace(TOKENS, capture="layers.0", stop=True),
        pytest.raises(KeyError, match="__model_output__ was not captured"),
    ):
        model.output.save()


def test_iterating_over_a_proxy_ends(model):
    with model.trace(TOKENS):
        rows = list(model.layers[0].output)
    assert [row.shape for row in rows] == [(4, 32)]


def test_modules_that_were_exchanged_after_wrapping_are_an_error():
    model = InterpretableModel(build("llama"))
    model.sites()
    nn.quantize(model.model, group_size=32, class_predicate=lambda path, _: "q_proj" in path)
    with pytest.raises(RuntimeError, match=r"did not reach.*q_proj.*wrap it again"):
        model.trace(TOKENS).__enter__()
    with InterpretableModel(model.model).trace(TOKENS) as trace:
        assert "layers.0.self_attn.q_proj" in trace.activations


def test_a_notebook_shows_what_a_trace_holds(model):
    trace = model.trace(TOKENS, {"layers.0.mlp": lambda x: x})
    assert "not entered yet" in checked(trace._repr_html_()).text
    with trace:
        model.layers[1].mlp.output.save()
    page = checked(trace._repr_html_())
    assert ["tokens", "[1, 4]"] in page.cells and ["interventions", "layers.0.mlp"] in page.cells
    assert ["layers.*.mlp.output", "1", "[1, 4, 32] float32"] in page.cells
    assert ["layers.*.mlp", "0-2", "[1, 4, 32] float32"] in page.cells
    assert "Saved values (1)" in page.text
    assert ["layers.*.mlp", "0-2", "[1, 4, 32] float32"] in checked(
        trace.activations._repr_html_()
    ).cells


def test_a_notebook_shows_captured_sites_without_computing_them(model, monkeypatch):
    monkeypatch.setattr(mx, "eval", None)
    with model.trace(TOKENS, capture=["layers.*.mlp", "layers.1"]) as trace:
        pass
    rows = [
        ["layers.*.mlp", "0-2", "[1, 4, 32] float32"],
        ["layers.*.resid_post", "1", "[1, 4, 32] float32"],
    ]
    for shown in (trace, model.run(TOKENS, capture=["layers.*.mlp", "layers.1"])):
        page = checked(shown._repr_html_())
        assert all(row in page.cells for row in rows) and "Modules in layers" not in page.text


def test_any_text_of_a_trace_is_shown_as_text(demo):
    text = NASTY.replace("\ud83d", "")  # which no tokenizer takes
    with demo.trace(text) as trace:
        pass
    assert ["text", visible(text)] in checked(trace._repr_html_()).cells
    with demo.trace("lion " * 100) as trace:
        pass
    assert trace._repr_html_().count("lion") == 40 and "…" in trace._repr_html_()
