"""The functional form: capture, edit, stop, gradients, compile."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sites import Site
from mlxterp.tracing import cache_offset
from tests.tiny_models import build

TOKENS = mx.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def test_captures_only_what_is_named_in_call_order(model):
    done = model.run(TOKENS, capture=["layers.2.mlp", "layers.0.resid_post", "norm"])
    assert list(map(str, done)) == ["layers.0.resid_post", "layers.2.mlp", "model.norm"]
    assert len(done) == 3
    assert done["h.0"].shape == (2, 5, 32)
    assert done[Site(2, "mlp")] is done["model.model.layers.2.mlp"]
    assert "layers.1.mlp" not in done
    assert "nonsense" not in done


def test_reading_a_site_that_was_not_captured_says_what_was(model):
    done = model.run(TOKENS, capture="layers.0")
    with pytest.raises(KeyError, match=r"layers\.1\.mlp was not captured; captured: layers\.0"):
        done["layers.1.mlp"]


def test_captures_see_the_edit_of_their_own_site(model):
    done = model.run(TOKENS, capture="layers.1.mlp", edit={"layers.1.mlp": lambda x: x * 0 + 3})
    assert mx.all(done["layers.1.mlp"] == 3)


def test_edits_of_one_site_apply_in_order(model):
    edits = [lambda x: x + 1, lambda x: x * 2]
    done = model.run(TOKENS, capture="layers.1", edit={"layers.1": edits, "h.1.output": mx.abs})
    before = model.run(TOKENS, capture="layers.1")["layers.1"]
    np.testing.assert_allclose(done["layers.1"], mx.abs((before + 1) * 2), rtol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "granite", "gpt2"])
@pytest.mark.parametrize(
    "site", ["resid_pre", "resid_mid", "mlp_unit", "mlp_in", "attn_z", "mlp_out", "resid_post"]
)
def test_an_edit_may_change_its_argument_in_place(model_type, site):
    model = InterpretableModel(build(model_type))
    name = f"layers.1.{site}"

    def in_place(x):
        x[:, 1, :3] += 2.0
        return x

    def anew(x):
        here = (mx.arange(x.shape[1]) == 1)[:, None] & (mx.arange(x.shape[2]) < 3)
        return mx.where(here, x + 2.0, x)

    plain, changed, expected = (
        model.run(TOKENS, edit={name: edit}).output for edit in (lambda x: x, in_place, anew)
    )
    assert mx.array_equal(plain, model.run(TOKENS).output)
    assert mx.abs(changed - plain).max() > 1e-2
    assert mx.allclose(changed, expected, atol=1e-4)


def test_a_glob_edits_every_layer(model):
    done = model.run(TOKENS, capture="layers.*.mlp_out", edit={"layers.*.mlp": mx.zeros_like})
    assert len(done) == model.n_layers
    assert all(mx.all(x == 0) for x in done.values())


def test_the_context_tells_an_edit_where_it_is(model):
    seen = []

    def note(x, context):
        seen.append(context)
        return x

    model.run([[1, 2, 3], [4]], edit={"layers.-1.attn": note})
    (context,) = seen
    assert context.site == Site(2, "attn")
    assert context.layer == 2
    assert context.positions.tolist() == [0, 1, 2]
    assert (context.step, context.phase) == (0, "prefill")
    assert context.mask.tolist() == [[True, True, True], [True, False, False]]


def test_positions_follow_the_cache(model):
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model.model)
    seen = []

    def note(x, context):
        seen.append(context.positions.tolist())
        return x

    whole = model.run([[1, 2, 3, 4, 5]]).output
    model.run([[1, 2, 3]], cache=cache, edit={"layers.0": note})
    rest = model.run([[4, 5]], cache=cache, edit={"layers.0": note}).output
    assert seen == [[0, 1, 2], [3, 4]]
    assert cache_offset(cache) == 5
    np.testing.assert_allclose(rest, whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_a_second_argument_with_a_default_is_not_the_context(model):
    doubled = model.run(TOKENS, edit={"layers.1": lambda x, factor=2: x * factor}).output
    assert mx.array_equal(doubled, model.run(TOKENS, edit={"layers.1": lambda x: x * 2}).output)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda x: x[:, :1], ValueError, r"layers\.1\.mlp must return.*\[2, 5, 32\].*\[2, 1, 32\]"),
        (lambda x: None, TypeError, r"layers\.1\.mlp must return an array, not NoneType"),
        (3.0, TypeError, r"layers\.1\.mlp must be a function, not float"),
    ],
)
def test_a_bad_edit_is_an_error_that_names_the_site(model, edit, error, message):
    with pytest.raises(error, match=message):
        model.run(TOKENS, edit={"layers.1.mlp": edit})


def test_a_stopped_pass_needs_something_to_stop_after(model):
    with pytest.raises(ValueError, match="stop=True ends the pass after the last captured site"):
        model.run(TOKENS, stop=True)


def test_a_stopped_pass_does_not_call_the_later_layers(model):
    called = []
    model.run(TOKENS, capture="layers.0.mlp", stop=True,
              edit={"layers.1": lambda x: called.append(1) or x})  # fmt: skip
    assert called == []


class Twice(nn.Module):
    """Calls one and the same block twice, and its blocks return tuples."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = [TupleBlock(), TupleBlock()]

    def __call__(self, x):
        h = self.embed(x)
        for layer in (*self.layers, self.layers[0]):
            h, _ = layer(h)
        return h


class TupleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def __call__(self, x):
        return x + self.mlp(x), "state"


def test_the_last_call_is_captured_and_a_stop_waits_for_it():
    model = InterpretableModel(Twice())
    x = mx.array([[1, 2, 3]])
    stopped = model.run(x, capture=["layers.0.mlp", "layers.0"], stop=True)
    assert mx.array_equal(stopped["layers.0"], model(x))
    first = model.run(x, capture="layers.1", stop=True)["layers.1"]
    assert mx.array_equal(stopped["layers.0.mlp"], model.model.layers[0].mlp(first))


def test_edits_reach_the_first_array_of_a_tuple():
    model = InterpretableModel(Twice())
    x = mx.array([[1, 2, 3]])
    assert mx.all(model.run(x, edit={"layers.0": mx.zeros_like}).output == 0)


def test_a_module_replaced_after_wrapping_is_an_error_not_silence():
    model = InterpretableModel(build("llama"))
    model.run(TOKENS, capture="layers.1.mlp")
    model.model.layers[1].mlp = copy_of(model.model.layers[1].mlp)
    with pytest.raises(RuntimeError, match=r"did not reach layers\.1\.mlp"):
        model.run(TOKENS, capture="layers.1.mlp")
    with pytest.raises(RuntimeError, match=r"did not reach layers\.1\.mlp"):
        model.run(TOKENS, edit={"layers.1.mlp": mx.zeros_like})


def copy_of(module):
    import copy

    return copy.deepcopy(module)


def test_compiled_runs_give_the_same_and_follow_their_input(model):
    @mx.compile
    def resid(tokens):
        return model.run(tokens, capture="layers.1", stop=True)["layers.1"]

    for tokens in (TOKENS, TOKENS + 3):
        expected = model.run(tokens, capture="layers.1")["layers.1"]
        np.testing.assert_allclose(resid(tokens), expected, rtol=1e-5, atol=1e-6)


def test_the_first_run_of_a_model_may_be_inside_compile():
    fresh = InterpretableModel(build("llama"))
    compiled = mx.compile(
        lambda t: fresh.run(t, capture="layers.1.resid_mid")["layers.1.resid_mid"]
    )
    expected = fresh.run(TOKENS, capture="layers.1.resid_mid")["layers.1.resid_mid"]
    np.testing.assert_allclose(compiled(TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_runs_can_be_differentiated_by_what_an_edit_adds(model):
    def total(delta):
        return model.run(TOKENS, edit={"layers.1": lambda x: x + delta}).output.sum()

    by_hand = mx.grad(total)(mx.zeros((2, 5, 32)))
    result = model.gradients(TOKENS, "layers.1", lambda logits: logits.sum())
    np.testing.assert_allclose(result.gradients["layers.1"], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "mamba", "minicpm", "olmo2"])
def test_gradients_match_finite_differences(model_type):
    model = InterpretableModel(build(model_type))
    names = ("resid_pre", "attn", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
    sites = [site for site in model.sites() if site.layer == 1 and site.component in names]
    assert len(sites) == (4 if model_type == "mamba" else 7)

    def metric(logits):
        return (logits[:, -1, 3] - logits[:, -1, 7]).sum()

    result = model.gradients(TOKENS, sites, metric)
    assert np.isclose(result.value.item(), metric(model(TOKENS)).item(), rtol=1e-5)
    for i, site in enumerate(sites):
        direction = mx.random.normal(result.gradients[site].shape, key=mx.random.key(i))

        def at(size, site=site, direction=direction):
            done = model.run(TOKENS, edit={site: lambda x: x + size * direction})
            return metric(done.output).item()

        slope = (result.gradients[site] * direction).sum().item()
        assert np.isclose((at(1e-3) - at(-1e-3)) / 2e-3, slope, rtol=2e-2, atol=1e-2), site
        np.testing.assert_allclose(result.activations[site],
                                   model.run(TOKENS, capture=site)[site],
                                   rtol=1e-5, atol=1e-6)  # fmt: skip


def test_gradients_take_place_after_the_edits(model):
    edit = {"layers.1": lambda x: x * 0}
    result = model.gradients(TOKENS, "layers.1", lambda logits: logits.sum(), edit=edit)
    assert mx.all(result.activations["layers.1"] == 0)
    earlier = model.gradients(TOKENS, "layers.0", lambda logits: logits.sum(), edit=edit)
    assert mx.all(earlier.gradients["layers.0"] == 0)


def test_a_metric_may_use_the_activations(model):
    def metric(logits, captured):
        return captured["layers.1"].sum()

    result = model.gradients(TOKENS, "layers.1", metric)
    assert mx.all(result.gradients["layers.1"] == 1)


def test_a_metric_must_be_a_scalar(model):
    with pytest.raises(ValueError, match=r"metric must return a scalar, not the shape \[2, 5\]"):
        model.gradients(TOKENS, "layers.1", lambda logits: logits[..., 0])


def test_quantised_layers_are_captured_and_edited():
    model = InterpretableModel(build("llama_quantized"))
    site = "layers.1.mlp.down_proj"
    done = model.run(TOKENS, capture=[site, "layers.1.mlp"])
    assert mx.array_equal(done[site], done["layers.1.mlp"])
    zeroed = model.run(TOKENS, edit={site: mx.zeros_like}, capture="layers.1.mlp")
    assert mx.all(zeroed["layers.1.mlp"] == 0)
    slopes = model.gradients(TOKENS, site, lambda logits: logits.sum()).gradients[site]
    assert mx.abs(slopes).max() > 0


def test_padding_does_not_change_the_real_tokens(model):
    rows = [[5, 6, 7, 8, 9], [3, 4]]
    done = model.run(rows, capture="layers.*.resid_post")
    assert done.mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    alone = model.run(rows[1], capture="layers.*.resid_post")
    for site, array in alone.items():
        np.testing.assert_allclose(done[site][1, :2], array[0], rtol=1e-4, atol=1e-5)


def test_arguments_unknown_to_the_model_are_errors(model):
    with pytest.raises(TypeError, match="unheard_of"):
        model.run(TOKENS, unheard_of=1)


def test_half_precision_stays_half_precision():
    model = InterpretableModel(build("llama"), dtype=mx.bfloat16)
    from mlxterp import interventions as iv

    vector = mx.ones((32,), dtype=mx.float32)
    for edit in (iv.scale(2.0), iv.add_vector(vector), iv.noise(0.1), iv.replace_with(0.5),
                 iv.clamp(-1, 1), iv.zero_out):  # fmt: skip
        done = model.run(TOKENS, edit={"layers.1": edit}, capture="layers.*.resid_post")
        assert {x.dtype for x in (*done.values(), done.output)} == {mx.bfloat16}


@pytest.mark.parametrize("kind", ["run", "stopped", "gradients", "trace"])
def test_captured_arrays_are_freed_without_the_garbage_collector(model, kind):
    def use():
        if kind == "gradients":
            mx.eval(model.gradients(TOKENS, "layers.1", lambda x: x.sum()).gradients["layers.1"])
        elif kind == "trace":
            with model.trace(TOKENS) as trace:
                mx.eval(list(trace.activations.values()))
        else:
            mx.eval(list(model.run(TOKENS, capture="layers.*", stop=kind == "stopped").values()))

    use()
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(3):
            use()
        assert mx.get_active_memory() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("site", ["layers.1", "layers.1.resid_mid", "layers.1.mlp"])
def test_an_edit_may_run_the_model_itself(site):
    model = InterpretableModel(build("llama"))
    seen = []

    def edit(x):
        seen.append(model.run(TOKENS, capture="layers.1")["layers.1"])
        return 0 * x + model.unembed(0 * x).shape[0] - len(x)

    captured = model.run(TOKENS, edit={site: edit}, capture=site)
    assert len(seen) == 1
    assert mx.array_equal(seen[0], model.run(TOKENS, capture="layers.1")["layers.1"])
    assert mx.all(captured[site] == 0)


def test_layers_may_be_given_by_number():
    model = InterpretableModel(build("llama"))
    assert list(model.run(TOKENS, capture=1)) == [Site(1, "resid_post")]
    captured = model.run(TOKENS, capture=[np.int64(-1)], edit={np.int32(2): mx.zeros_like})
    assert mx.all(captured[2] == 0)
    with pytest.raises(TypeError, match="a site is a layer number, a name or a Site, not None"):
        model.run(TOKENS, capture=None)
    with pytest.raises(TypeError, match=r"edits must be given as \{site: function\}, not list"):
        model.run(TOKENS, edit=[("layers.1", mx.zeros_like)])


def test_a_metric_must_return_an_array():
    model = InterpretableModel(build("llama"))
    with pytest.raises(TypeError, match="metric must return an array, not float"):
        model.gradients(TOKENS, "layers.1", lambda logits: 1.0)
