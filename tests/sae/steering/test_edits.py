from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset, SAEConfig
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.steering.edits import splice, steer, steering_edit
from tests.tiny_models import build

AB = Columns(("a", "b"), (2, 3))


def coder() -> SparseCoder:
    made = SparseCoder(AB, AB, 10, k=2)
    made.W_dec = mx.random.normal((10, 5), key=mx.random.key(0))
    return made


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_steering_adds_the_strength_times_the_row(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = x + -2.5 * np.array(coder().W_dec)[3]
    found = steer(coder(), mx.array(x), feature_id=3, strength=-2.5)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6, atol=1e-6)


def test_steering_keeps_the_type_of_the_activation():
    x = mx.zeros((4, 5), mx.bfloat16)
    assert steer(coder(), x, 3, 2.0).dtype == mx.bfloat16
    assert steering_edit(coder(), 3, 2.0, unit="activation")["b"](x[:, 2:]).dtype == mx.bfloat16


def test_an_edit_adds_to_each_site_its_part_of_the_row():
    edit = steering_edit(coder(), 4, 3.0, unit="activation")
    row = np.array(coder().W_dec)[4]
    assert list(edit) == ["a", "b"]
    np.testing.assert_allclose(np.array(edit["a"](mx.ones((1, 2, 2))))[0, 1], 1 + 3 * row[:2])
    np.testing.assert_allclose(np.array(edit["b"](mx.ones((1, 2, 3))))[0, 1], 1 + 3 * row[2:])


@pytest.mark.parametrize("feature", [-1, 10])
def test_an_unknown_feature_is_refused_before_anything_runs(feature):
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 9\], got {feature}"):
        steer(coder(), mx.zeros((5,)), feature)
    with pytest.raises(ValueError, match=rf"feature_id must be in \[0, 9\], got {feature}"):
        steering_edit(coder(), feature)


def test_feature_ids_of_numpy_are_taken():
    (a, _) = steering_edit(coder(), np.int64(4), 1.0, unit="activation").values()
    np.testing.assert_allclose(np.array(a(mx.zeros((2,)))), np.array(coder().W_dec)[4, :2])


def test_another_width_is_an_error():
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 5\], got \(2, 4\)"):
        steer(coder(), mx.zeros((2, 4)), 3)
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 5\], got \(\)"):
        steer(coder(), mx.array(1.0), 3)


def test_a_steered_run_of_the_model_has_exactly_the_row_added(sae, model):
    site, tokens = sae.site, mx.array([model.encode("The function returns")])
    edit = sae.steering_edit(11, 4.0, unit="activation")
    plain, steered = (
        np.array(model.run(tokens, capture=[site], edit=e)[site]) for e in (None, edit)
    )
    np.testing.assert_allclose(steered - plain, 0 * plain + 4 * np.array(sae.W_dec[11]), atol=1e-4)
    by_hand = model.run(tokens, edit={site: lambda x: x + 4 * sae.W_dec[11]}).output
    assert mx.array_equal(model.run(tokens, edit=edit).output, by_hand)
    assert not mx.allclose(model.run(tokens).output, by_hand)


def test_a_steered_generation_differs_and_strength_zero_does_not(sae, model):
    prompt = "The function returns"
    plain = model.generate(prompt, max_tokens=12).text
    strong = max(range(20), key=lambda i: sae.statistics.firing_rates[i])

    def generate(strength):
        edit = sae.steering_edit(strong, strength, unit="activation")
        return model.generate(prompt, max_tokens=12, edit=edit).text

    assert generate(0.0) == plain
    assert generate(100.0) != plain


def test_the_largest_values_are_collected_where_they_are_needed_and_only_there(
    sae, model, monkeypatch
):
    collected = []
    data = SimpleNamespace(maxima=np.full(sae.n_features, 2.5))
    monkeypatch.setattr(sae, "_features", None)
    monkeypatch.setattr(
        type(sae), "_collected", lambda self, model: collected.append(model) or data
    )
    for options in ({"mode": "scale"}, {"mode": "ablate"}, {"unit": "activation"}):
        sae.steering_edit(11, **options)
    sae.steering_edit(11, maxima=np.ones(sae.n_features))
    assert not collected
    x = mx.zeros((1, 2, 128))
    in_units = sae.steering_edit(11, 2.0)[sae.site](x)
    assert collected == [None]
    assert mx.array_equal(in_units, sae.steering_edit(11, 5.0, unit="activation")[sae.site](x))
    arrays = ActivationDataset.from_activations({sae.site: mx.zeros((4, 128))})
    for no_texts in (None, arrays):
        monkeypatch.setattr(sae, "_training_data", no_texts)
        with pytest.raises(ValueError, match=r"call sae.collect\(dataset\) first"):
            sae.steering_edit(11, 2.0)


def test_a_coder_is_spliced_in_while_the_block_is_open(sae, model):
    prompt = "The function returns"
    plain = model.run(prompt).output
    for options in ({}, {"keep_error": True, "features": {11: 9.0}}):
        expected = model.run(prompt, edit=sae.splice(**options)).output
        with sae.spliced(**options):
            assert mx.array_equal(model.run(prompt).output, expected)
        with sae.spliced(model, **options):
            assert mx.array_equal(model.run(prompt).output, expected)
        assert not mx.array_equal(expected, plain)
        assert mx.array_equal(model.run(prompt).output, plain)
    unbound = SAE.untrained(sae.reads, sae.writes, SAEConfig())
    with pytest.raises(ValueError, match="does not know its language model"):
        unbound.spliced()


def test_activations_of_numpy_are_taken():
    x = np.ones((4, 5), np.float32)
    assert mx.array_equal(steer(coder(), x, 3, 2.0), steer(coder(), mx.array(x), 3, 2.0))


@pytest.mark.parametrize("feature", ["abc", None, float("nan"), 3.0, True])
def test_what_is_no_number_of_a_feature_is_refused(feature):
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 9\], got"):
        steering_edit(coder(), feature)


def columns(*names: str, width: int = 128) -> Columns:
    return Columns(names, (width,) * len(names))


def randomised(coder: SparseCoder, scale: float = 0.2) -> SparseCoder:
    for i, name in enumerate(sorted(coder.parameters())):
        if name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
            coder[name] = scale * mx.random.normal(coder[name].shape, key=mx.random.key(i))
    return coder


def transcoder(read: str, write: str, **options) -> SparseCoder:
    return randomised(SparseCoder(columns(read), columns(write), 60, **{"k": 5, **options}))


def cross_layer(name: str = "topk", layers=(1, 2, 4), width: int = 128) -> CrossLayerTranscoder:
    reads = columns(*(f"layers.{i}.mlp_in" for i in layers), width=width)
    writes = columns(*(f"layers.{i}.mlp_out" for i in layers), width=width)
    k = 5 if name in ("topk", "batch_topk") else None
    return randomised(CrossLayerTranscoder(reads, writes, 20 * len(layers), name, k=k))


def test_steering_one_site_adds_its_part_of_the_row():
    row = np.array(coder().W_dec)[3]
    found = steer(coder(), mx.ones((4, 3)), 3, 2.0, site="b")
    np.testing.assert_allclose(np.array(found)[1], 1 + 2 * row[2:], rtol=1e-6)
    assert list(steering_edit(coder(), 3, unit="activation", site="b")) == ["b"]
    with pytest.raises(ValueError, match=r"\['c'\] are missing; there are \['a', 'b'\]"):
        steering_edit(coder(), 3, unit="activation", site="c")
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 2\], got \(5,\)"):
        steer(coder(), mx.ones((5,)), 3, site="a")


def test_a_transcoder_steers_what_it_writes(model):
    made = transcoder("layers.2.mlp_in", "layers.3.mlp_out")
    edit = steering_edit(made, 7, 4.0, unit="activation")
    assert list(edit) == ["layers.3.mlp_out"]
    plain, steered = (
        model.run("for x in", capture=["layers.3.mlp_out"], edit=e)["layers.3.mlp_out"]
        for e in (None, edit)
    )
    assert mx.allclose(steered - plain, 4 * made.W_dec[7], atol=1e-4)


def test_a_feature_of_a_layer_steers_that_layer_and_later_ones():
    made = cross_layer()
    assert list(steering_edit(made, 25, unit="activation")) == [
        "layers.2.mlp_out",
        "layers.4.mlp_out",
    ]
    assert list(steering_edit(made, 5, unit="activation")) == list(made.writes.names)
    x, row = mx.zeros((1, 1, 128)), made.decoder_blocks()[1][25 - 20]
    found = steering_edit(made, 25, 2.0, unit="activation")["layers.4.mlp_out"](x)
    assert mx.allclose(found[0, 0], 2 * row[128:])


def test_an_identity_leaves_the_logits_as_they_are(model):
    site = "layers.2.resid_post"
    made = SparseCoder(columns(site), columns(site), 256, "relu", k=None)
    made.W_enc = made.W_dec = mx.concatenate([mx.eye(128), -mx.eye(128)])
    tokens = model.tokens("The function returns")[0]
    assert mx.array_equal(model.run(tokens).output, model.run(tokens, edit=splice(made)).output)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "sites",
    [
        ("layers.2.mlp_in", "layers.2.mlp_out"),
        ("layers.1.mlp", "layers.3.attn"),
        ("layers.2.mlp_out",) * 2,
    ],
)
def test_what_is_spliced_in_is_the_reconstruction(model, sites, skip):
    read, write = sites
    made = transcoder(read, write, skip=skip)
    tokens = model.tokens("The function returns")[0]
    clean = model.run(tokens, capture=[read])[read]
    assert not mx.allclose(clean, made(clean))
    found = model.run(tokens, capture=[write], edit=splice(made))
    assert mx.allclose(found[write], made(clean), atol=1e-5)
    by_hand = model.run(tokens, edit={write: lambda x: made(clean)}).output
    assert mx.allclose(found.output, by_hand, atol=1e-4)
    with model.trace(tokens, interventions=splice(made)) as trace:
        assert mx.array_equal(trace.output, found.output)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "relu", "jumprelu", "gated"])
def test_layers_are_written_from_what_is_read_of_the_replaced_stream(model, name):
    made = cross_layer(name)
    if name == "batch_topk":
        made.activation_function.threshold = mx.array([0.5, 1.0, 1.5])
    tokens = model.tokens("The function returns")[0]
    edit, codes = {}, []
    for i, (read, write) in enumerate(zip(made.reads.names, made.writes.names, strict=True)):
        x = model.run(tokens, capture=[read], edit=edit or None)[read]
        joined = mx.concatenate(
            [mx.zeros_like(x)] * i + [x] + [mx.zeros_like(x)] * (2 - i), axis=-1
        )
        codes.append(made.encode(joined)[..., 20 * i : 20 * i + 20])
        assert 0 < (codes[i] > 0).sum().item() < codes[i].size
        y = made.b_dec[128 * i : 128 * i + 128] + sum(
            z @ rows[:, 128 * (i - j) : 128 * (i - j) + 128]
            for j, (z, rows) in enumerate(zip(codes, made.decoder_blocks()[: i + 1], strict=True))
        )
        edit[write] = lambda _, y=y: y
    by_hand = model.run(tokens, edit=edit, capture=[*made.writes.names])
    found = model.run(tokens, edit=splice(made), capture=[*made.writes.names])
    for site in made.writes.names:
        assert mx.allclose(found[site], by_hand[site], atol=1e-4)
    assert mx.allclose(found.output, by_hand.output, atol=1e-3)
    assert not mx.allclose(found.output, model.run(tokens).output, atol=0.1)


def all_kinds():
    site = columns("layers.2.resid_post")
    return [
        randomised(SparseCoder(site, site, 60, k=5)),
        transcoder("layers.1.mlp_in", "layers.1.mlp_out", skip=True),
        cross_layer(),
    ]


@pytest.mark.parametrize("made", all_kinds(), ids=["sae", "transcoder", "cross-layer"])
def test_with_the_error_term_nothing_changes(made, model):
    tokens = model.tokens("The function returns")[0]
    found = model.run(tokens, edit=splice(made, keep_error=True)).output
    assert mx.array_equal(found, model.run(tokens).output)


@pytest.mark.parametrize("made", all_kinds(), ids=["sae", "transcoder", "cross-layer"])
def test_with_the_error_term_a_changed_feature_adds_its_row(made, model):
    tokens = model.tokens("The function returns")[0]
    site, read = made.writes.names[0], made.reads.names[0]
    clean = model.run(tokens, capture=[site, read])
    z = made.encode_block(0, clean[read])
    i = int(z[0, -1].argmax().item())
    features = {i: 0.0, (i + 1) % 20: lambda v: 3 * v + 1}
    edits = splice(made, features=features, keep_error=True)
    change = -z[..., i, None] * made.direction(i)
    change += (2 * z[..., (i + 1) % 20, None] + 1) * made.direction((i + 1) % 20)
    found = model.run(tokens, capture=[site], edit=edits)[site]
    part = made.writes.slices[site]
    assert mx.allclose(found - clean[site], change[..., part], atol=1e-4)
    whole = model.run(tokens, capture=[site], edit=splice(made, features=features))[site]
    plain = model.run(tokens, capture=[site], edit=splice(made))[site]
    assert mx.allclose(whole - plain, change[..., part], atol=1e-4)


@pytest.mark.parametrize("made", all_kinds(), ids=["sae", "transcoder", "cross-layer"])
@pytest.mark.parametrize("options", [{}, {"features": {3: 20.0}, "keep_error": True}])
def test_a_generation_with_a_splice_is_that_without_a_cache(made, options, model):
    ids = model.encode("The function returns a new list of")
    expected = list(ids)
    for _ in range(8):
        logits = model.run(expected, edit=splice(made, **options)).output
        expected.append(int(logits[0, -1].argmax().item()))
    done = model.generate(ids, max_tokens=8, edit=splice(made, **options))
    assert ids + done.tokens == expected
    plain = model.generate(ids, max_tokens=8)
    assert done.tokens != plain.tokens


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "minicpm", "mixtral"])
def test_other_architectures_are_spliced(name):
    model = InterpretableModel(build(name))
    made = cross_layer(layers=(0, 2), width=32)
    tokens = mx.array([[5, 9, 2, 7]])
    read, write = made.reads.names[0], made.writes.names[0]
    clean = model.run(tokens, capture=[read])[read]
    found = model.run(tokens, capture=[write], edit=splice(made))[write]
    first = clean, mx.zeros_like(clean)
    expected = made(mx.concatenate(first, axis=-1))[..., :32]
    assert mx.allclose(found, expected, atol=1e-4)
    same = model.run(tokens, edit=splice(made, keep_error=True)).output
    assert mx.allclose(same, model.run(tokens).output, atol=1e-5)


def test_half_precision_stays_half_precision(model):
    made = transcoder("layers.2.mlp_in", "layers.2.mlp_out")
    edit = splice(made)
    x = mx.ones((1, 3, 128), mx.bfloat16)
    assert edit["layers.2.mlp_in"](x) is x
    assert edit["layers.2.mlp_out"](x).dtype == mx.bfloat16


def test_a_splice_can_be_compiled():
    model, made = InterpretableModel(build("llama")), cross_layer(layers=(0, 1), width=32)
    tokens = mx.array([[5, 9, 2, 7]])
    run = mx.compile(lambda tokens: model.run(tokens, edit=splice(made)).output)
    expected = model.run(tokens, edit=splice(made)).output
    assert mx.allclose(run(tokens), expected, atol=1e-3)


def test_a_pass_that_was_cut_off_leaves_nothing_behind(model):
    made = cross_layer()
    edit = splice(made)
    clean = model.run("The function returns", edit=edit).output
    model.run("something else, longer", edit=edit, capture=["layers.1.mlp_in"], stop=True)
    assert mx.array_equal(model.run("The function returns", edit=edit).output, clean)


def test_a_crosscoder_cannot_be_spliced_within_one_pass():
    with pytest.raises(ValueError, match="several sites before .* coder.evaluate does so"):
        splice(coder())


def test_what_is_written_before_it_is_read_is_an_error(model):
    made = transcoder("layers.3.mlp_in", "layers.2.mlp_out")
    with pytest.raises(ValueError, match="layers.2.mlp_out is written before layers.3.mlp_in"):
        model.run("some text", edit=splice(made))


def test_an_unknown_feature_cannot_be_changed():
    made = transcoder("layers.2.mlp_in", "layers.2.mlp_out")
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 59\], got 60"):
        splice(made, features={60: 0.0})
