"""Steering in a forward pass: every mode and kind against NumPy in float64, places, exactness."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.steering.edits import splice, steering_edit
from mlxterp.tracing import EditContext
from tests.sae import kinds
from tests.tiny_models import build

MODES = ("add", "clamp", "min_clamp", "scale", "ablate")
ONE_PASS = [kind for kind in kinds.KINDS if kind != "crosscoder"]  # whose code a pass knows
SITE = "layers.2.resid_post"
PROMPT = "The function returns a new list of"
STRENGTHS = {0: 2.0, 2: 1.5, 5: -1.0, 7: -0.25, 11: 0.5, 20: 3.0, 23: 1.5, 27: -2.0}
MAXIMA = np.linspace(0.5, 2.0, 30)


def coder(kind: str) -> SparseCoder:
    made = kinds.make(kind)
    for i, name in enumerate(sorted(made.parameters())):
        if name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
            made[name] = mx.random.normal(made[name].shape, key=mx.random.key(i))
    return made


def expected(made, sites, mode, strengths, keep_error):
    """The activations `{write site: array}` by the formula, in float64."""
    x = np.concatenate([sites[name] for name in made.reads.names], axis=-1).astype(np.float64)
    pre = x @ kinds.dense_encoder(made).astype(np.float64).T + np.array(made.b_enc, np.float64)
    z = np.zeros_like(pre)
    for block in made.blocks:
        own = pre[..., block.features]
        kept = own >= np.sort(own, axis=-1)[..., -4, None]
        z[..., block.features] = np.where(kept, np.maximum(own, 0), 0)
    new = z.copy()
    for i, strength in strengths.items():
        amount = strength * MAXIMA[i]
        new[..., i] = {
            "add": z[..., i] + amount, "clamp": amount, "min_clamp": np.maximum(z[..., i], amount),
            "scale": strength * z[..., i], "ablate": 0,
        }[mode]  # fmt: skip
    W_dec = kinds.dense_decoder(made).astype(np.float64)
    y = np.concatenate([sites[name] for name in made.writes.names], axis=-1).astype(np.float64)
    if keep_error:
        y = y + (new - z) @ W_dec
    else:
        y = new @ W_dec + np.array(made.b_dec, np.float64)
        y += x @ np.array(made.W_skip, np.float64).T if made.has_skip else 0
    return {name: y[..., part] for name, part in made.writes.slices.items()}


def passed(edits, sites):
    """The sites after the edits, in the order of a model: layer by layer, what is read first."""
    context = EditContext(None, positions=mx.arange(5), prompt_end=5)
    order = ("in.0", "out.0", "in.1", "out.1")
    assert set(edits) <= set(order)
    found = dict(sites)
    for name in order:
        if name in edits:
            found[name] = np.array(edits[name](mx.array(sites[name]), context))
    return found


def activations():
    rows = kinds.of_sites(kinds.activations(10))
    return {name: np.array(x).reshape(2, 5, -1) for name, x in rows.items()}


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ONE_PASS)
def test_every_mode_is_its_formula(kind, mode, keep_error):
    made, sites = coder(kind), activations()
    strengths = dict.fromkeys(STRENGTHS, 1.0) if mode == "ablate" else STRENGTHS
    edits = steering_edit(made, strengths, mode=mode, maxima=MAXIMA, keep_error=keep_error)
    found = passed(edits, sites)
    wanted = expected(made, sites, mode, strengths, keep_error)
    for name, y in wanted.items():
        np.testing.assert_allclose(found[name], y, rtol=2e-5, atol=2e-4)
        assert np.abs(y - sites[name]).max() > 0.01
    assert all(np.array_equal(found[n], sites[n]) for n in sites.keys() - wanted.keys())


def test_a_crosscoder_adds_at_all_its_sites_or_at_one():
    made, sites = coder("crosscoder"), activations()
    wanted = expected(made, sites, "add", STRENGTHS, True)
    found = passed(steering_edit(made, STRENGTHS, maxima=MAXIMA), sites)
    for name, y in wanted.items():
        np.testing.assert_allclose(found[name], y, rtol=2e-5, atol=2e-4)
    assert list(steering_edit(made, 3, maxima=MAXIMA, site="out.0")) == ["out.0"]


@pytest.mark.parametrize("mode", MODES[1:])
def test_what_needs_the_code_of_a_crosscoder_is_refused(mode):
    with pytest.raises(ValueError, match="not known within one pass: features can be added"):
        steering_edit(coder("crosscoder"), 3, mode=mode, maxima=MAXIMA)


def test_strengths_multiply_and_are_in_units_of_the_maximum_or_of_the_activation():
    made, x = coder("sae"), mx.zeros((1, 2, 6))
    W, by_mode = np.array(made.W_dec), {}
    for name, features, options in (
        ("one", 4, {"maxima": MAXIMA}),
        ("several", [4, 9], {"maxima": MAXIMA}),
        ("own", {4: 0.5, 9: -2}, {"maxima": MAXIMA}),
        ("raw", {4: 0.5, 9: -2}, {"unit": "activation"}),
        ("negative", 4, {"maxima": -MAXIMA}),
    ):
        (edit,) = steering_edit(made, features, 3.0, **options).values()
        by_mode[name] = np.array(edit(x))[0, 1]
    a, b = MAXIMA[4] * W[4], MAXIMA[9] * W[9]
    np.testing.assert_allclose(by_mode["one"], 3 * a, rtol=1e-5)
    np.testing.assert_allclose(by_mode["several"], 3 * (a + b), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_mode["own"], 1.5 * a - 6 * b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_mode["raw"], 1.5 * W[4] - 6 * W[9], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_mode["negative"], 3 * a, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"collect\(dataset\) first, or give .* unit='activation'"),
        ({"maxima": np.zeros(30)}, "Feature 3 never fired"),
        ({"maxima": np.ones(7)}, "maxima must have 30 values, got 7"),
        ({"mode": "ablate", "strength": 2.0}, "mode='ablate' has no strength"),
        ({"mode": "double"}, r"mode must be one of \('add', .*got 'double'"),
        ({"unit": "max", "phase": "later"}, "phase must be None or one of .*got 'later'"),
        ({"unit": "mean"}, "unit must be one of"),
        ({"strength": float("nan"), "unit": "activation"}, "strength must be finite"),
        ({"features": [], "unit": "activation"}, "at least one feature"),
        ({"features": [1, 30], "unit": "activation"}, r"feature_id must be in \[0, 29\], got 30"),
        ({"features": "3", "unit": "activation"}, r"feature_id must be in \[0, 29\], got '3'"),
        ({"site": "in.1", "unit": "activation"}, r"\['in.1'\] are missing; there are \['in.0'\]"),
        ({"positions": 3, "unit": "activation"}, r"positions must be several .*write \[3\]"),
        ({"positions": [1.5], "unit": "activation"}, "positions must be whole numbers"),
        ({"positions": slice(None, None, -1), "unit": "activation"}, "step of 1 or more"),
    ],
)
def test_bad_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        steering_edit(coder("sae"), **{"features": 3, **arguments})


def test_a_feature_of_a_later_layer_does_not_write_an_earlier_one():
    made = coder("cross-layer transcoder")
    assert list(steering_edit(made, 20, maxima=MAXIMA)) == ["out.1"]
    assert set(steering_edit(made, 20, maxima=MAXIMA, mode="scale")) == {"in.1", "out.1"}
    with pytest.raises(ValueError, match=r"do not write 'out.0', but \['out.1'\]"):
        steering_edit(made, 20, maxima=MAXIMA, site="out.0")


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16 if x.dtype == mx.bfloat16 else mx.uint32))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", ONE_PASS)
def test_what_changes_no_value_changes_no_bit(kind, dtype):
    made = coder(kind)
    made.b_enc = mx.where(mx.arange(30) == 7, -1e6, made.b_enc)  # which therefore never fires
    sites = {
        name: mx.array(x) * mx.array([1e-30, 1.0] * 5).reshape(2, 5, 1)
        for name, x in activations().items()
    }
    sites = {name: mx.where(mx.abs(x) < 0.3, -0.0, x).astype(dtype) for name, x in sites.items()}
    nothing = [
        {"features": STRENGTHS, "strength": 0.0},
        {"features": [*STRENGTHS], "mode": "scale"},
        {"features": 7, "mode": "ablate"},
        {"features": 7, "mode": "clamp", "strength": 0.0},
        {"features": 7, "mode": "min_clamp", "strength": -2.0},
        {"features": 2, "strength": 5.0, "positions": [77]},
        {"features": 2, "strength": 5.0, "phase": "decode"},
        {"features": 2, "mode": "ablate", "keep_error": False, "phase": "decode"},
    ]
    for options in nothing:
        context = EditContext(None, positions=mx.arange(5), prompt_end=5)
        for name, edit in steering_edit(made, maxima=MAXIMA, **options).items():
            found = edit(sites[name], context)
            assert found.dtype == dtype
            assert np.array_equal(bits(found), bits(sites[name])), options
    for name, edit in steering_edit(made, 2, 5.0, maxima=MAXIMA, positions=[1]).items():
        assert not np.array_equal(bits(edit(sites[name], context)), bits(sites[name]))


def columns(*names: str, width: int = 128) -> Columns:
    return Columns(names, (width,) * len(names))


def random_coder(made: SparseCoder, scale: float = 0.2) -> SparseCoder:
    for i, name in enumerate(("W_enc", "b_enc", "W_dec", "b_dec")):
        made[name] = scale * mx.random.normal(made[name].shape, key=mx.random.key(i))
    return made


def of_the_model():
    layers = (1, 2, 4)
    return {
        "sae": random_coder(SparseCoder(columns(SITE), columns(SITE), 60, k=5)),
        "transcoder": random_coder(
            SparseCoder(columns("layers.1.mlp_in"), columns("layers.1.mlp_out"), 60, k=5)
        ),
        "cross-layer": random_coder(
            CrossLayerTranscoder(
                columns(*(f"layers.{i}.mlp_in" for i in layers)),
                columns(*(f"layers.{i}.mlp_out" for i in layers)),
                60, k=5,
            )
        ),
    }  # fmt: skip


CODERS = of_the_model()
OPTIONS = {
    "add": {"strength": 6.0},
    "positions": {"strength": 9.0, "positions": [2, 3, 9]},
    "end": {"strength": 9.0, "positions": slice(-2, None)},
    "clamp": {"strength": 9.0, "mode": "clamp"},
    "scale": {"strength": -9.0, "mode": "scale"},
    "spliced": {"strength": 9.0, "mode": "min_clamp", "keep_error": False},
}


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_steered_generation_equals_its_recomputation_without_a_cache(name, options, model):
    made, ids = CODERS[name], model.encode(PROMPT)
    n = len(ids)
    edits = steering_edit(made, [3, 4, 5, 6, 7], unit="activation", **options)
    done = model.generate(ids, max_tokens=8, edit=edits, prefill_step_size=3)
    positions = options.get("positions")
    if isinstance(positions, slice):  # which a longer run would count from its own end
        positions = slice(n - 2, None)
    again = steering_edit(
        made, [3, 4, 5, 6, 7], unit="activation", **{**options, "positions": positions}
    )
    expected = list(ids)
    for _ in range(8):
        expected.append(int(model.run(expected, edit=again).output[0, -1].argmax().item()))
    assert ids + done.tokens == expected


@pytest.mark.parametrize("name", CODERS)
def test_strength_zero_is_the_plain_model_bit_for_bit(name, model):
    made, prompts = CODERS[name], ["The function returns", "class Foo:\n    def"]
    plain = model.run(prompts).output
    generated = model.generate(PROMPT, max_tokens=8).tokens
    for options in ({"strength": 0.0}, {"strength": 1.0, "mode": "scale"}):
        edits = steering_edit(made, [0, 1, 2], unit="activation", **options)
        assert np.array_equal(bits(model.run(prompts, edit=edits).output), bits(plain))
        assert model.generate(PROMPT, max_tokens=8, edit=edits).tokens == generated
        with model.editing(edits):
            assert np.array_equal(bits(model(model.tokens(prompts)[0])), bits(plain))
    edits = steering_edit(made, [0, 1, 2], 5.0, unit="activation")
    assert not np.array_equal(bits(model.run(prompts, edit=edits).output), bits(plain))


@pytest.mark.parametrize(
    ("positions", "short", "long"),
    [
        ([0, 2], [0, 2], [0, 2]),
        ([-1], [2], [4]),
        ([-2, 0], [0, 1], [0, 3]),
        ([-4], [], [1]),
        (range(1, 3), [1, 2], [1, 2]),
        (slice(1, None), [1, 2], [1, 2, 3, 4]),
        (slice(-2, None), [1, 2], [3, 4]),
        (slice(None, -1), [0, 1], [0, 1, 2, 3]),
        (slice(-9, 2), [0, 1], [0, 1]),
        (slice(1, None, 2), [1], [1, 3]),
        (slice(-3, None, 2), [0, 2], [2, 4]),
        (np.array([1]), [1], [1]),
        ([], [], []),
    ],
)
def test_edits_take_place_at_the_positions_of_each_row_and_nowhere_else(
    positions, short, long, model
):
    edits = steering_edit(CODERS["sae"], 3, 5.0, unit="activation", positions=positions)
    rows = [[5, 6, 7], [5, 6, 7, 8, 9]]
    plain, found = (model.run(rows, capture=SITE, edit=e)[SITE] for e in (None, edits))
    changed = np.array((plain != found).any(axis=-1))
    assert np.flatnonzero(changed[0, :3]).tolist() == short
    assert np.flatnonzero(changed[1]).tolist() == long


@pytest.mark.parametrize(("phase", "edited"), [("prefill", range(9)), ("decode", range(9, 14))])
def test_a_phase_is_the_prompt_or_what_is_generated(phase, edited, model):
    ids = model.encode("def f(x):\n    return x[0]")[:9]
    seen, made = {}, CODERS["sae"]
    (edit,) = steering_edit(made, 3, 1.0, unit="activation", phase=phase).values()

    def compared(x, context):
        y = edit(x, context)
        changed = np.array((y != x).any(axis=(0, 2)))
        seen.update(zip(context.positions.tolist(), changed.tolist(), strict=True))
        return y

    model.generate(ids, max_tokens=5, edit={SITE: compared}, prefill_step_size=4)
    assert [p for p, changed in sorted(seen.items()) if changed and p < 14] == list(edited)


def test_the_end_of_a_prompt_is_an_error_where_it_is_not_known(model):
    from mlx_lm.models.cache import make_prompt_cache

    edits = steering_edit(CODERS["sae"], 3, unit="activation", positions=[-1])
    with pytest.raises(ValueError, match="which is not known where a cache may hold a part"):
        model.run([1, 2, 3], edit=edits, cache=make_prompt_cache(model.model))
    with pytest.raises(ValueError, match="needs its context"):
        edits[SITE](mx.zeros((1, 2, 128)))


def test_positions_are_an_error_where_the_cache_does_not_count(demo):
    from mlx_lm.models.cache import make_prompt_cache

    model = InterpretableModel(build("mamba"))
    site = columns("layers.1.resid_post", width=32)
    edits = steering_edit(SparseCoder(site, site, 9, k=2), 3, unit="activation", positions=[1])
    with pytest.raises(ValueError, match="does not know its positions"):
        model.run([1, 2, 3], edit=edits, cache=make_prompt_cache(model.model))


def test_a_feature_is_ablated_in_gradients_and_traces_too(model):
    made = CODERS["sae"]
    edits = steering_edit(made, 3, 8.0, mode="clamp", unit="activation")
    expected = model.run(PROMPT, edit=edits).output
    with model.trace(PROMPT, interventions=edits) as trace:
        assert mx.array_equal(trace.output, expected)
    found = model.gradients(PROMPT, "layers.4", lambda y: y[0, -1].max(), edit=edits)
    assert mx.array_equal(found.value, expected[0, -1].max())


def test_a_coder_spliced_for_a_while_is_spliced_in_every_use(model):
    made = CODERS["cross-layer"]
    expected = model.run(PROMPT, edit=splice(made)).output
    generated = model.generate(PROMPT, max_tokens=6, edit=splice(made)).tokens
    with model.editing(splice(made)):
        assert mx.array_equal(model.run(PROMPT).output, expected)
        assert mx.array_equal(model(model.tokens(PROMPT)[0]), expected)
        assert model.generate(PROMPT, max_tokens=6).tokens == generated
    with model.editing(splice(made, keep_error=True)):
        assert mx.array_equal(model.run(PROMPT).output, model(model.tokens(PROMPT)[0]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_plain_function_of_the_coder_is_an_intervention(dtype):
    demo = InterpretableModel.demo()
    model = InterpretableModel(demo.model, demo.tokenizer, dtype=dtype)
    made = CODERS["sae"]

    def doubled(x):
        z = made.encode(x)
        z[..., 3] *= 2
        return made.decode(z)

    by_hand = splice(made, features={3: lambda value: 2 * value})
    edit = {SITE: doubled}
    found, wanted = (
        model.run(PROMPT, edit=e, capture="layers.3")["layers.3"].astype(mx.float32)
        for e in (edit, by_hand)
    )
    np.testing.assert_allclose(
        found, wanted, **({"rtol": 1e-4, "atol": 1e-4} if dtype == mx.float32 else {"atol": 0.1})
    )
    with model.trace(PROMPT, interventions=edit) as trace:
        assert mx.array_equal(trace.output, model.run(PROMPT, edit=edit).output)
    generated = model.generate(PROMPT, max_tokens=6, edit=edit).tokens
    ids = model.encode(PROMPT)
    for _ in range(6):
        ids.append(int(model.run(ids, edit=edit).output[0, -1].argmax().item()))
    if dtype == mx.float32:
        assert ids[-6:] == generated
    with model.editing(edit):
        assert model.generate(PROMPT, max_tokens=6).tokens == generated
