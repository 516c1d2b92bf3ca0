"""With patterns and scales held and MLPs cut, what remains is affine, and its derivative exact."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import constants, freezing
from mlxterp.architecture import Architecture
from mlxterp.constants import Recording
from mlxterp.freezing import check, frozen, record
from mlxterp.hooks import Hooks
from mlxterp.model import InterpretableModel
from tests.tiny_models import MODEL_TYPES, build

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]])
FAMILIES = ("llama", "gemma3_text", "gemma2", "gpt2", "qwen3", "phi", "gpt_oss", "olmoe")
NAMES = ("rms_norm", "layer_norm", "scaled_dot_product_attention", "softmax")
NOT_AFFINE = {
    # gates on what attention returns
    "afmoe", "laguna", "muse_glimmer", "spark2_5", "step3p5",
    # values that are rounded or clipped
    "afm7", "dbrx",
    # states, convolutions, linear attention
    "bailing_hybrid", "bailing_moe_linear", "falcon_h1", "granitemoehybrid", "jamba", "lfm2",
    "lfm2-vl", "lfm2_moe", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "plamo2", "qwen3_5",
    "qwen3_5_moe", "qwen3_next", "recurrent_gemma", "rwkv7",
    # gated inputs of each layer; several streams
    "gemma4", "gemma4_text", "gemma3n",
    # MLPs that are not the one of the block
    "longcat_flash",
}  # fmt: skip
CUT = {"layers.*.mlp": mx.stop_gradient}


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def functions():
    return [getattr(owner, n) for n, owner in zip(NAMES, [mx.fast] * 3 + [mx], strict=True)]


def last(model, delta=0.0, edit=None, at=0):
    edits = {**(edit or {}), f"layers.{at}": lambda x: x + delta}
    return model.run(TOKENS, capture="layers.2", edit=edits)["layers.2"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_values_are_those_of_the_plain_pass(model_type):
    model = build(model_type)
    architecture = Architecture(model)
    plain = model(TOKENS)
    with frozen(architecture):
        assert mx.array_equal(model(TOKENS), plain)
    with frozen(architecture, record(architecture, TOKENS)):
        assert mx.allclose(model(TOKENS), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_check_tells_which_models_become_affine(model_type):
    found = check(Architecture(build(model_type)), TOKENS)
    assert found.holds == (model_type not in NOT_AFFINE)
    assert found.error < 1e-5 or not found
    assert ("not affine from layers." in repr(found)) == (model_type in NOT_AFFINE)


def test_the_bundled_model_becomes_affine(demo):
    assert check(demo.architecture, TOKENS).error < 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("mode", ["derivatives", "values"])
def test_the_check_fails_without_freezing(model_type, mode, monkeypatch):
    def half(architecture, recording=None):
        if mode == "values":  # constants of each pass in the place of the recorded ones
            return frozen(architecture)
        return Hooks() if recording is None else frozen(architecture, recording)

    architecture = Architecture(build(model_type))
    monkeypatch.setattr(freezing, "frozen", half)
    assert check(architecture, TOKENS).error > 0.05


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "rms_norm"), ("gpt2", "layer_norm"), ("gemma2", "softmax"),
        ("llama", "scaled_dot_product_attention"),
    ],
)  # fmt: skip
def test_the_check_fails_where_one_function_is_left_out(model_type, name, monkeypatch):
    architecture = Architecture(build(model_type))
    monkeypatch.setattr(
        constants.Live, name, lambda self, function, *args, **kwargs: function(*args, **kwargs)
    )
    assert check(architecture, TOKENS).error > 0.05


def test_derivatives_are_not_the_plain_ones_but_those_of_a_played_back_pass(model):
    d = mx.random.normal((2, 9, 32), key=mx.random.key(1))
    c = mx.random.normal((2, 9, 32), key=mx.random.key(2))

    def slope():
        return (mx.grad(lambda x: (last(model, x, CUT) * c).sum())(mx.zeros_like(d)) * d).sum()

    plain = slope()
    with model.frozen():
        held = slope()
    clean = model.run(TOKENS, capture="layers.*.mlp")
    keep = {site: lambda x, site=site: clean[site] for site in clean}
    with model.frozen(at=TOKENS):
        rise = ((last(model, d, keep) - last(model, 0.0, keep)) * c).sum()
        assert mx.allclose(slope(), held, rtol=1e-4)
    assert mx.allclose(rise, held, rtol=1e-4)
    assert abs(plain.item() - held.item()) > 0.05 * abs(held.item())


def test_many_cotangents_at_once(model):
    cotangents = mx.random.normal((5, 2, 9, 32), key=mx.random.key(3))

    def slopes(c):
        return mx.vjp(lambda x: last(model, x, CUT), [mx.zeros((2, 9, 32))], [c])[1][0]

    with model.frozen():
        together = mx.vmap(slopes)(cotangents)
        one_by_one = mx.stack([slopes(c) for c in cotangents])
    assert mx.allclose(together, one_by_one, rtol=1e-4, atol=1e-5)
    assert not mx.allclose(together, mx.vmap(slopes)(cotangents), rtol=1e-2, atol=1e-2)


def test_gradients_of_the_model_are_frozen(model):
    def metric(logits):
        return logits[:, -1, 3].sum()

    plain = model.gradients(TOKENS, "layers.0", metric, edit=CUT)
    with model.frozen():
        held = model.gradients(TOKENS, "layers.0", metric, edit=CUT)
    assert held.value == plain.value
    assert not mx.allclose(held.gradients["layers.0"], plain.gradients["layers.0"], rtol=1e-2)


def test_one_recorded_row_serves_many(model):
    recording = record(model.architecture, TOKENS[:1])
    many = mx.concatenate([TOKENS[:1]] * 3)
    with model.frozen(at=recording):
        assert mx.allclose(model(many), model(TOKENS[:1]), atol=1e-5)
        for wrong in (TOKENS[:1, :5], mx.array([[1] * 12])):
            with pytest.raises(ValueError, match="of a pass of another shape"):
                model(wrong)
    with (
        model.frozen(at=Recording({})),
        pytest.raises(ValueError, match="calls rms_norm more often"),
    ):
        model(TOKENS)


def test_every_pass_plays_back_from_its_beginning(model):
    """Also after one that was stopped, or failed, in the middle."""
    with model.frozen(at=TOKENS):
        expected = model(TOKENS)
        model.run(TOKENS, capture="layers.0.attn", stop=True)
        assert mx.array_equal(model(TOKENS), expected)
        with pytest.raises(TypeError):
            model.run(TOKENS, edit={"layers.1.self_attn.o_proj": lambda x: None})
        assert mx.array_equal(model(TOKENS), expected)
        assert mx.array_equal(model.model.lm_head(model.model.model(TOKENS)), expected)


def test_what_is_no_part_of_the_model_is_left_alone(model):
    x = mx.random.normal((3, 8), key=mx.random.key(0))

    def norm(x):
        return mx.fast.rms_norm(x, None, 1e-5).square()[:, 0].sum()

    def normed(x, seen):
        seen.append(mx.grad(norm)(x[0, :, :8]))
        return x

    expected = mx.grad(norm)(x)
    outside, inside = [], []
    model.run(TOKENS, edit={"layers.1": lambda x: normed(x, outside)})
    for at in (None, TOKENS):
        with model.frozen(at):
            model.run(TOKENS, capture="layers.0", stop=True)
            assert mx.array_equal(mx.grad(norm)(x), expected)
            model.run(TOKENS, edit={"layers.1": lambda x: normed(x, inside)})
        assert mx.allclose(inside.pop(), outside[0], atol=1e-5)


def test_the_innermost_block_acts(model):
    plain = model(TOKENS)
    other = record(model.architecture, TOKENS[::-1])
    with model.frozen(at=other):
        swapped = model(TOKENS)
        with model.frozen():
            assert mx.array_equal(model(TOKENS), plain)
        assert mx.array_equal(model(TOKENS), swapped)
        inner = record(model.architecture, TOKENS)
    assert not mx.allclose(swapped, plain, atol=1e-2)
    with model.frozen(at=inner):
        assert mx.allclose(model(TOKENS), plain, atol=1e-5)


def test_other_threads_are_not_affected(model):
    plain, found = model(TOKENS), []
    mx.eval(plain)
    with model.frozen(at=record(model.architecture, TOKENS[::-1])):
        thread = threading.Thread(target=lambda: found.append(np.array(model(TOKENS))))
        thread.start()
        thread.join()
        assert not mx.allclose(model(TOKENS), plain, atol=1e-2)
    assert np.array_equal(found[0], np.array(plain))


def test_nothing_is_left_when_the_block_ends(model):
    before, classes = functions(), {type(m) for _, m in model.named_modules()}
    with pytest.raises(ArithmeticError), model.frozen():
        with model.frozen(at=TOKENS):
            assert functions() != before
        assert functions() != before
        raise ArithmeticError
    assert functions() == before
    assert {type(m) for _, m in model.named_modules()} == classes


def test_half_precision_keeps_its_type():
    model = build("llama")
    model.set_dtype(mx.bfloat16)
    architecture = Architecture(model)
    plain = model(TOKENS)
    with frozen(architecture):
        assert mx.array_equal(model(TOKENS), plain)
    with frozen(architecture, record(architecture, TOKENS)):
        again = model(TOKENS)
    assert again.dtype == plain.dtype == mx.bfloat16
    assert mx.allclose(again.astype(mx.float32), plain.astype(mx.float32), rtol=0.05, atol=0.05)
