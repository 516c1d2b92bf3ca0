import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import load_sae
from mlxterp.sae.checkpoint import build
from mlxterp.sae.formats import dictionary_learning
from mlxterp.sae.formats.reading import read_foreign
from mlxterp.sae.formats.tensors import open_tensors
from mlxterp.sae.formats.torch_writing import torch_file
from mlxterp.sae.formats.writing import write_foreign
from tests.sae import kinds
from tests.sae.formats import golden

FORMAT = "dictionary_learning"
CLASSES = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "batch_topk",
}  # fmt: skip


def changed(name: str, folder, config: dict | None = None, **arrays):
    """A copy of a trainer's folder, with changes."""
    path = golden.copy(FORMAT, f"{name}/trainer_0", folder)
    golden.change_json(path / "config.json", **(config or {}))
    if arrays:
        golden.change_arrays(path / "ae.pt", **arrays)
    return path


@pytest.mark.parametrize("name", CLASSES)
def test_codes_and_reconstructions_are_those_of_the_library(name):
    sae = golden.load(FORMAT, f"{name}/trainer_0")
    golden.agrees(sae, FORMAT, name)
    assert sae.activation_name == CLASSES[name]
    assert sae.site == ("layers.3.mlp" if name == "GatedAutoEncoder" else "layers.3.resid_post")
    assert sae.metadata.model == {"name": "EleutherAI/pythia-70m-deduped"}
    assert sae.metadata.source["dict_class"] == name
    groups = [8, 8, 16] if name == "MatryoshkaBatchTopKSAE" else None
    assert sae.metadata.source.get("group_sizes") == groups


@pytest.mark.parametrize("name", ["JumpReluAutoEncoder", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_feature_that_meets_its_threshold_exactly_is_inactive(name):
    sae = golden.load(FORMAT, f"{name}/trainer_0")
    assert golden.n_at_threshold(sae, golden.expected(FORMAT, name)["x"]) >= 1


def test_fewer_features_than_k_are_active_where_fewer_are_positive():
    n = (golden.expected(FORMAT, "AutoEncoderTopK")["z"] != 0).sum(axis=1)
    assert 0 <= n.min() < 4 == n.max()  # agreement is tested above


def test_of_features_that_tie_one_is_active_as_in_the_library():
    sae, wanted = golden.load(FORMAT, "ties/trainer_0"), golden.expected(FORMAT, "ties")
    z = np.array(sae.encode(mx.array(wanted["x"])))
    assert ((z != 0).sum(axis=1) == 5).all() and ((wanted["z"] != 0).sum(axis=1) == 5).all()
    pairs = [code.reshape(-1, 2, 16).sum(axis=1) for code in (z, wanted["z"])]
    np.testing.assert_allclose(*pairs, atol=1e-5)
    np.testing.assert_allclose(np.array(sae(mx.array(wanted["x"]))), wanted["y"], atol=1e-5)


def test_a_checkpoint_is_read_with_the_configuration_of_its_run():
    sae = golden.load(FORMAT, "AutoEncoder/trainer_0/checkpoints/ae_50.pt")
    golden.agrees(sae, FORMAT, "AutoEncoder")
    golden.agrees(golden.load(FORMAT, "AutoEncoder/trainer_0/ae.pt"), FORMAT, "AutoEncoder")


def test_the_decoder_of_an_auto_encoder_has_rows_of_norm_one(tmp_path):
    path = changed("AutoEncoder", tmp_path, decoder__weight=lambda W: W * (np.arange(32) > 0))
    norms = np.array(mx.linalg.norm(load_sae(path).W_dec, axis=1))
    np.testing.assert_allclose(norms, [0] + [1] * 31, atol=1e-6)


@pytest.mark.parametrize(
    ("submodule", "io", "site"),
    [
        ("resid_pre_layer_12", "out", "layers.12.resid_pre"),
        ("mlp_out_layer_0", "out", "layers.0.mlp_out"),
        ("model.layers.7", "out", "layers.7.resid_post"),
        ("model.layers.7", "in", "layers.7.resid_pre"),
        ("gpt_neox.layers.2.mlp", "out", "layers.2.mlp"),
        ("gpt_neox.layers.2.mlp", "in", "layers.2.mlp_in"),
        ("resid_post_layer_3", "in", None),
        ("resid_post_layer_3", "in_and_out", None),
        ("my_module", "out", None),
        (None, "out", None),
    ],
)
def test_the_site_is_that_of_the_module_or_has_to_be_given(submodule, io, site, tmp_path):
    path = changed("AutoEncoderNew", tmp_path, {"submodule_name": submodule})
    config = json.loads((path / "config.json").read_text())
    config["buffer"]["io"] = io
    (path / "config.json").write_text(json.dumps(config))
    if site is None:
        with pytest.raises(ValueError, match=r"config.json does not say which site .*: give site="):
            load_sae(path)
        site = "layers.3.attn_out"
        assert load_sae(path, site=site).site == site
    else:
        assert load_sae(path).site == site


@pytest.mark.parametrize(
    ("name", "config", "arrays", "message"),
    [
        ("AutoEncoder", {"dict_class": "IdentityDict"}, {}, r"'dict_class' .* got 'IdentityDict'"),
        ("AutoEncoder", {"dict_size": 16}, {}, r"must be of 16 features and width 8, .* \(32, 8\)"),
        ("JumpReluAutoEncoder", {"activation_dim": 9}, {}, "must be of 32 features and width 9"),
        ("AutoEncoder", {}, {"bias": None}, r"ae.pt has no key 'bias'"),
        ("AutoEncoder", {}, {"encoder__weight": lambda W: W[0]}, r"got shape \(8,\)"),
        ("AutoEncoderNew", {}, {"decoder__weight": lambda W: W.T}, r"must have shape \(8, 32\)"),
        ("AutoEncoderTopK", {}, {"encoder__bias": lambda b: b[:5]}, r"must have shape \(32,\)"),
        ("GatedAutoEncoder", {}, {"r_mag": None}, "has no key 'r_mag'"),
        ("GatedAutoEncoder", {}, {"encoder__weight": golden.with_nan}, "not finite"),
        ("JumpReluAutoEncoder", {}, {"threshold": lambda t: t[0]}, r"must have shape \(32,\)"),
        ("MatryoshkaBatchTopKSAE", {}, {"W_dec": golden.with_nan}, "'W_dec' holds num.* not fin"),
        ("BatchTopKSAE", {"k": 5}, {}, "'k' is 4, in config.json it is 5"),
        ("BatchTopKSAE", {}, {"k": lambda k: k * 0}, "'k' must be a whole number >= 1, got 0"),
        ("BatchTopKSAE", {}, {"threshold": lambda t: t * 0 - 1}, "'threshold' is -1.0, as before"),
        ("MatryoshkaBatchTopKSAE", {}, {"threshold": lambda t: t * 0 - 1}, "threshold_start_step"),
        ("BatchTopKSAE", {}, {"threshold": None}, "has no key 'threshold'"),
        ("AutoEncoderTopK", {"k": None}, {"k": None}, "'k' must be a whole number >= 1, got None"),
        ("AutoEncoderTopK", {"k": 33}, {"k": lambda k: k * 0 + 33}, r"k must be in \[1, .* 32\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(name, config, arrays, message, tmp_path):
    path = changed(name, tmp_path, config, **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(path)


def test_k_of_the_configuration_serves_where_the_weights_have_none(tmp_path):
    path = changed("AutoEncoderTopK", tmp_path, k=None, threshold=None)
    golden.agrees(load_sae(path), FORMAT, "AutoEncoderTopK")


def test_a_configuration_without_trainer_is_not_recognised(tmp_path):
    path = changed("AutoEncoder", tmp_path)
    (path / "config.json").write_text('{"trainer": [1]}')
    with pytest.raises(ValueError, match="looks like none of the formats"):
        load_sae(path)
    with pytest.raises(ValueError, match=r"'dict_class' of 'trainer' must be one of .* got \[1\]"):
        load_sae(path, format=FORMAT)


# What is written


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_is_read_again_to_the_same_codes(name, tmp_path):
    parts = read_foreign(golden.ROOT / FORMAT / name / "trainer_0")
    path = write_foreign(parts, FORMAT, tmp_path / "trainer_0")
    assert {file.name for file in path.iterdir()} == {"ae.pt", "config.json"}
    again = load_sae(path)
    golden.agrees(again, FORMAT, name)
    assert again.reads == parts.reads and again.metadata.model == parts.metadata.model
    assert write_foreign(parts, FORMAT, path) == path  # it may be replaced


def test_what_is_written_has_the_keys_and_shapes_of_the_library(tmp_path):
    for name in ("AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "BatchTopKSAE"):
        original = golden.ROOT / FORMAT / name / "trainer_0"
        path = write_foreign(read_foreign(original), FORMAT, tmp_path / name)
        with open_tensors(path / "ae.pt") as ours, open_tensors(original / "ae.pt") as theirs:
            assert {n: (ours.shape(n), ours.dtype(n)) for n in ours.names} == {
                n: (theirs.shape(n), theirs.dtype(n)) for n in theirs.names
            }
        config = json.loads((path / "config.json").read_text())
        wanted = json.loads((original / "config.json").read_text())
        for key in ("dict_class", "activation_dim", "dict_size", "layer", "lm_name", "k"):
            assert config["trainer"].get(key) == wanted["trainer"].get(key)


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        ("transcoder", "topk", "knows SAEs only, got a transcoder"),
        ("crosscoder", "relu", "knows SAEs only, got a crosscoder"),
        ("sae", "abs_topk", "knows the activation functions .* got abs_topk"),
    ],
)
def test_what_the_library_does_not_have_is_not_written(kind, function, message, tmp_path):
    coder = kinds.make(kind, function)
    arrays = {k: a for file in coder.array_files().values() for k, a in file.items()}
    parts = dictionary_learning.Parts(
        coder.kind, coder.reads, coder.writes, function, arrays, coder.activation_function.options
    )
    assert repr(build(parts)) == repr(coder)
    with pytest.raises(ValueError, match=message):
        write_foreign(parts, FORMAT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_norm_of_tokens_is_not_written(tmp_path):
    parts = read_foreign(golden.ROOT / "openai" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt")
    with pytest.raises(ValueError, match="normalises no tokens, got token_norm='layer_norm'"):
        write_foreign(parts, FORMAT, tmp_path / "out")


def test_a_file_of_torch_holds_arrays_of_any_number_of_dimensions(tmp_path):
    arrays = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        "b": np.array(7, dtype=np.int32),
        "c": np.array([1, 2**40], dtype=np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    (tmp_path / "x.pt").write_bytes(torch_file(arrays))
    with open_tensors(tmp_path / "x.pt") as file:
        assert file.names == list(arrays) and file.value("b") == 7
        for name, array in arrays.items():
            assert np.array_equal(np.array(file.read(name)), array.astype(np.float32))
    with pytest.raises(ValueError, match="'d' must be of float32, int32, int64, got float64"):
        torch_file({"d": np.zeros(2)})
