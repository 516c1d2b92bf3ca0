"""Transcoders of circuit-tracer, against itself."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.coder import Columns
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.sae import SAE
from mlxterp.sae.transcoder import Transcoder

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "circuit_tracer"
EXPECTED = np.load(GOLDEN / "expected.npz")


def agree(coder, case):
    x, z, y = (EXPECTED[f"{case}/{part}"] for part in "xzy")
    np.testing.assert_allclose(coder.encode(x), z, atol=1e-5)
    assert np.array_equal(np.array(coder.encode(x)) != 0, z != 0)  # thresholds are strict
    np.testing.assert_allclose(coder(x), y, atol=1e-5, rtol=1e-5)


def same(coder, other):
    assert (type(coder), coder.reads, coder.writes) == (type(other), other.reads, other.writes)
    for name, arrays in coder.array_files().items():
        for key, array in arrays.items():
            assert mx.array_equal(array, other.array_files()[name][key]), key


def copied(case, tmp_path):
    return Path(shutil.copytree(GOLDEN / case, tmp_path / case))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("case", ["relu_set", "jumprelu_set"])
def test_layers_of_a_set(case, layer):
    coder = load_sae(GOLDEN / case, site=f"layers.{layer}")
    assert type(coder) is Transcoder
    assert coder.from_site == f"layers.{layer}.mlp_in"
    assert coder.to_site == f"layers.{layer}.{'mlp_out' if case[0] == 'j' else 'mlp'}"
    assert coder.has_skip == (layer == 1)
    assert coder.metadata.model == {"name": "google/gemma-3-270m"}
    assert coder.metadata.source["format"] == "circuit_tracer"
    assert coder.metadata.source["scan"] == "someone/transcoders"
    agree(coder, f"{case}/{layer}")
    same(coder, load_sae(GOLDEN / case / f"layer_{layer}.safetensors"))
    same(coder, load_sae(GOLDEN / case, site=coder.to_site))


def test_shapes_say_which_way_round_a_matrix_is():
    site = "layers.0.mlp_in -> layers.0.mlp"
    coder = load_sae(GOLDEN / "other_way_round", site=site)
    agree(coder, "relu_set/0")
    same(coder, load_sae(GOLDEN / "relu_set", site="layers.0"))


@pytest.mark.parametrize("case", ["relu_clt", "jumprelu_clt"])
def test_across_layers(case):
    coder = load_sae(GOLDEN / case)
    assert type(coder) is CrossLayerTranscoder
    assert coder.reads.names == tuple(f"layers.{i}.resid_mid" for i in range(3))
    assert coder.writes.names == tuple(f"layers.{i}.mlp_out" for i in range(3))
    agree(coder, case)


@pytest.mark.parametrize("case", ["relu_clt", "jumprelu_clt"])
def test_written_across_layers_they_are_the_same_files(case, tmp_path):
    coder = load_sae(GOLDEN / case)
    path = coder.export("circuit_tracer", tmp_path / "clt")
    assert {file.name for file in path.iterdir()} == {
        file.name for file in (GOLDEN / case).iterdir()
    }
    for file in (GOLDEN / case).glob("*.safetensors"):
        ours, theirs = mx.load(str(path / file.name)), mx.load(str(file))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[key], theirs[key]) for key in theirs)
    same(coder, load_sae(path))


def test_layers_are_written_into_one_set(tmp_path):
    coders = [load_sae(GOLDEN / "jumprelu_set", site=f"layers.{i}") for i in range(3)]
    for coder in [*coders, coders[1]]:  # one of them again
        path = coder.export("circuit_tracer", tmp_path / "set")
    assert sorted(file.name for file in path.iterdir()) == [
        "config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors",
    ]  # fmt: skip
    for i, coder in enumerate(coders):
        same(coder, load_sae(path, site=f"layers.{i}"))
    other = load_sae(GOLDEN / "relu_set", site="layers.0")
    with pytest.raises(ValueError, match="something else than a set with"):
        other.export("circuit_tracer", path)


def test_batch_top_k_is_written_as_the_threshold_that_it_has(tmp_path):
    columns = [Columns((f"layers.2.{name}",), (4,)) for name in ("mlp_in", "mlp_out")]
    coder = Transcoder(*columns, 6, "batch_topk", 2)
    coder.W_enc, coder.W_dec = (
        mx.random.normal(coder[name].shape, key=mx.random.key(i))
        for i, name in enumerate(("W_enc", "W_dec"))
    )
    coder.activation_function.threshold = mx.array(0.5)
    found = load_sae(coder.export("circuit_tracer", tmp_path / "set"))
    assert found.activation_name == "jumprelu"
    x = mx.random.normal((20, 4), key=mx.random.key(9))
    assert mx.array_equal(found.encode(x), coder.encode(x))


def test_what_cannot_be_written(tmp_path):
    one, other = (Columns((f"layers.2.{name}",), (4,)) for name in ("mlp_in", "mlp_out"))
    sites = [Columns(tuple(f"layers.{i}.{n}" for i in (1, 2)), (4, 4)) for n in ("mlp_in", "mlp")]
    later = Columns(("layers.3.mlp_out",), (4,))
    for coder, message in (
        (SAE(one, one, 6, k=2), "transcoders only, got a sae"),
        (Transcoder(one, other, 6, k=2), "functions relu and jumprelu"),
        (Transcoder(one, later, 6, "relu"), "same sites in every layer"),
        (Transcoder(one, Columns(("layers.2.mlp_out",), (8,)), 6, "relu"), "of one width only"),
        (Transcoder(one, Columns(("model.norm",), (4,)), 6, "relu"), "No site of ours|hook"),
        (CrossLayerTranscoder(*sites, 6, "relu"), r"all layers from the first .* \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            coder.export("circuit_tracer", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_set_needs_a_layer(tmp_path):
    with pytest.raises(ValueError, match=r"of the layers 0, 1, 2: name one .*site=None"):
        load_sae(GOLDEN / "relu_set")
    with pytest.raises(ValueError, match=r"of the layers 0, 1, 2: .*'layers\.7'"):
        load_sae(GOLDEN / "relu_set", site="layers.7")
    with pytest.raises(ValueError, match="must name a layer"):
        load_sae(GOLDEN / "relu_set", site="mlp")
    with pytest.raises(ValueError, match=r"not of site='layers\.1\.resid_post'"):
        load_sae(GOLDEN / "relu_set", site="layers.1.resid_post")
    with pytest.raises(ValueError, match="does not name the hooks"):
        load_sae(GOLDEN / "other_way_round")
    with pytest.raises(ValueError, match="across layers, whose sites it names"):
        load_sae(GOLDEN / "relu_clt", site="layers.1")


def test_files_that_the_configuration_lists(tmp_path):
    path = copied("relu_set", tmp_path)
    config = path / "config.yaml"
    text = config.read_text()
    (path / "part").mkdir()
    (path / "layer_1.safetensors").rename(path / "part" / "x.safetensors")
    (path / "layer_2.safetensors").unlink()
    places = ["layer_0.safetensors", "hf://someone/repo/part/x.safetensors?revision=main",
              "hf://someone/repo/elsewhere/y.safetensors"]  # fmt: skip
    config.write_text(text + "transcoders:\n" + "".join(f"- {place}\n" for place in places))
    agree(load_sae(path, site="layers.1"), "relu_set/1")
    with pytest.raises(ValueError, match=r"no file of layer 2, .*y\.safetensors"):
        load_sae(path, site="layers.2")
    config.write_text(text + "transcoders:\n- {layer: 1, filepath: part/x.safetensors}\n")
    agree(load_sae(path, site="layers.1"), "relu_set/1")
    config.write_text(text + "transcoders: [../../secret.safetensors]\n")
    with pytest.raises(ValueError, match="outside of its folder"):
        load_sae(path, site="layers.0")


def changed(path, **arrays):
    kept = dict(mx.load(str(path))) | {name.replace("__", "."): a for name, a in arrays.items()}
    mx.save_safetensors(str(path), {name: a for name, a in kept.items() if a is not None})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"W_dec": mx.zeros((32, 9))}, r"'W_dec' must have shape \(32, 8\), got \(32, 9\)"),
        ({"W_enc": mx.zeros((31, 8))}, "'W_enc' must have shape"),
        ({"b_enc": mx.zeros((32, 1))}, "holds no transcoder"),
        ({"W_skip": mx.zeros((9, 8))}, r"'W_skip' must have shape \(8, 8\)"),
        ({"b_dec": None}, r"missing, \['b_dec'\]"),
        ({"log_thresholds": mx.zeros((32,))}, r"unknown, \['log_thresholds'\]"),
        ({"b_enc": mx.full((32,), float("nan"))}, "not finite"),
        ({"threshold": mx.zeros((31,))}, r"'threshold' must have shape \(32,\)"),
        ({"threshold": mx.full((32,), -0.5)}, "below zero"),
    ],
)
def test_wrong_arrays_are_refused(arrays, message, tmp_path):
    path = copied("relu_set", tmp_path)
    changed(path / "layer_0.safetensors", **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(path, site="layers.0")


@pytest.mark.parametrize("shape", [(), (1,), (1, 32)])
def test_thresholds_of_other_shapes(shape, tmp_path):
    path = copied("relu_set", tmp_path)
    changed(path / "layer_0.safetensors", threshold=mx.full(shape, 0.5))
    coder = load_sae(path, site="layers.0")
    x = EXPECTED["relu_set/0/x"]
    pre = np.array(coder.pre_activations(x))
    np.testing.assert_array_equal(coder.encode(x), np.where(pre > 0.5, pre, 0))


def test_wrong_files_across_layers_are_refused(tmp_path):
    path = copied("jumprelu_clt", tmp_path)
    (path / "W_dec_1.safetensors").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"lacks \['W_dec_1\.safetensors'\]"):
        load_sae(path)
    (tmp_path / "away").rename(path / "W_dec_1.safetensors")
    changed(path / "W_enc_2.safetensors", W_skip_2=mx.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"skip connections \('W_skip_2'\) are not read"):
        load_sae(path)
    changed(path / "W_enc_2.safetensors", W_skip_2=None, threshold_2=None)
    with pytest.raises(ValueError, match="some layers have a threshold"):
        load_sae(path)
    changed(path / "W_dec_2.safetensors", W_dec_2=mx.zeros((16, 2, 8)))
    with pytest.raises(ValueError, match=r"'W_dec_2' must have shape \(16, 1, 8\)"):
        load_sae(path)


def test_wrong_configurations_are_refused(tmp_path):
    path = copied("relu_clt", tmp_path)
    config = path / "config.yaml"
    for text, message in (
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: " + "x" * (1 << 20), "too large"),
        ("feature_input_hook: hook_mlp\nfeature_output_hook: hook_mlp_out", "No site of ours"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_sae(path, format="circuit_tracer")
