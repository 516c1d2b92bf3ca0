import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, load_sae
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.formats import sparsify
from mlxterp.sae.transcoder import Transcoder
from tests.sae import kinds
from tests.sae.formats.files import GOLDEN

PLACE = GOLDEN / "sparsify"
EXPECTED = np.load(PLACE / "expected.npz")
X = mx.array(EXPECTED["x"])
FILES = {
    "layers.3": ("topk", "layers.3.resid_post", "layers.3.resid_post"),
    "layers.7": ("topk", "layers.7.resid_post", "layers.7.resid_post"),
    "layers.5.mlp": ("topk", "layers.5.mlp_in", "layers.5.mlp"),
    "layers.6.mlp": ("groupmax", "layers.6.mlp_in", "layers.6.mlp"),
    "h.2.attn": ("groupmax", "layers.2.attn", "layers.2.attn"),
}


def copied(name: str, place: Path, **changes) -> Path:
    shutil.copytree(PLACE / name, place, dirs_exist_ok=True)
    config = json.loads((place / "cfg.json").read_text()) | changes
    (place / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return place


def test_all_golden_files_are_compared():
    assert {path.name for path in PLACE.iterdir() if path.is_dir()} == {*FILES}


@pytest.mark.parametrize("name", FILES)
def test_codes_and_reconstructions_are_those_of_sparsify(name):
    coder, (function, reads, writes) = load_sae(PLACE / name), FILES[name]
    z, expected = np.array(coder.encode(X)), EXPECTED[f"{name}.z"]
    np.testing.assert_array_equal(z != 0, expected != 0)
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.array(coder(X)), EXPECTED[f"{name}.y"], rtol=0, atol=1e-5)
    assert (coder.activation_name, coder.k) == (function, 4)
    assert (coder.reads.names, coder.writes.names) == ((reads,), (writes,))
    assert type(coder) is (SAE if reads == writes else Transcoder)
    assert coder.has_skip == (name == "layers.5.mlp")
    assert coder.metadata.source["format"] == "sparsify"
    assert coder.metadata.source["hookpoint"] == name


def test_several_runs_of_one_module_lie_below_it(tmp_path):
    path = copied("layers.3", tmp_path / "layers.3" / "seed1")
    assert load_sae(path).reads.names == ("layers.3.resid_post",)


def test_a_folder_of_another_name_needs_a_site(tmp_path):
    path = copied("layers.3", tmp_path / "mine")
    with pytest.raises(ValueError, match="does not say which site .* site='layers.5.mlp'"):
        load_sae(path)
    assert load_sae(path, site="layers.9.mlp").reads.names == ("layers.9.mlp",)
    path = copied("layers.5.mlp", tmp_path / "yours")
    with pytest.raises(ValueError, match="site='layers.5.mlp_in -> layers.5.mlp'"):
        load_sae(path)
    coder = load_sae(path, site="layers.1.mlp_in -> layers.1.mlp_out")
    assert coder.writes.names == ("layers.1.mlp_out",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 9}, r"'encoder.weight' must have shape \(36, 9\), got \(32, 8\)"),
        ({"num_latents": 10**15}, "'encoder.weight' must have shape"),
        ({"expansion_factor": 10**15}, "'encoder.weight' must have shape"),
        ({"d_in": True}, "'d_in' must be a whole number, got True"),
        ({"k": 0}, "'k' must be a whole number, got 0"),
        ({"num_latents": -1}, "'num_latents' must be a whole number, got -1"),
        ({"k": 33}, r"k must be in \[1, n_features = 32\], got 33"),
        ({"activation": "relu"}, "'activation' must be topk or groupmax, got 'relu'"),
        ({"activation": "groupmax", "k": 5}, "k of groupmax must divide n_features = 32, got 5"),
        ({"signed": True}, "'signed' codes"),
        ({"skip_connection": True}, "has no key 'W_skip'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_sae(copied("layers.3", tmp_path / "layers.3", **changes))


def test_old_configurations_have_defaults(tmp_path):
    path = copied("layers.3", tmp_path / "layers.3", activation="absent", num_latents="absent",
                  transcode="absent", skip_connection="absent", signed=False)  # fmt: skip
    np.testing.assert_allclose(np.array(load_sae(path)(X)), EXPECTED["layers.3.y"], atol=1e-5)


def test_a_file_without_decoder_or_with_nan_is_refused(tmp_path):
    path = copied("layers.3", tmp_path / "layers.3")
    arrays: dict = mx.load(str(path / "sae.safetensors"))  # pyright: ignore
    mx.eval(arrays)
    bad = arrays | {"encoder.bias": mx.full((32,), mx.inf)}
    mx.save_safetensors(str(path / "sae.safetensors"), bad)
    with pytest.raises(ValueError, match="'encoder.bias' holds numbers that are not finite"):
        load_sae(path)
    del arrays["W_dec"]
    mx.save_safetensors(str(path / "sae.safetensors"), arrays)
    with pytest.raises(ValueError, match="has no decoder"):
        load_sae(path)


def random_coder(function: str, transcode: bool, skip: bool = False) -> BaseSAE:
    reads, writes = Columns(("layers.3.mlp_in",), (8,)), Columns(("layers.3.mlp",), (8,))
    if transcode:
        coder: BaseSAE = Transcoder(reads, writes, 30, function, 5, skip=skip)
    else:
        coder = SAE(writes, writes, 30, function, 5)
    rng = np.random.default_rng(0)
    for arrays in coder.array_files().values():
        for name, array in arrays.items():
            coder.set_array(name, mx.array(rng.normal(0, 1, array.shape).astype(np.float32)))
    return coder


@pytest.mark.parametrize("function", ["topk", "groupmax"])
@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_what_is_written_is_read_as_it_was(tmp_path, function, kind):
    coder = random_coder(function, kind != "sae", kind == "skip")
    path = coder.export("sparsify", tmp_path / "out")
    config = json.loads((path / "cfg.json").read_text())
    assert config["num_latents"] == 30 and config["transcode"] == (kind != "sae")
    assert json.loads((path / "mlxterp.json").read_text())["hookpoint"] == "layers.3.mlp"
    again = load_sae(path)
    assert (again.reads, again.writes) == (coder.reads, coder.writes)
    assert type(again) is type(coder) and again.k == 5 and again.activation_name == function
    np.testing.assert_allclose(np.array(again.encode(X)), np.array(coder.encode(X)), atol=1e-5)
    np.testing.assert_allclose(np.array(again(X)), np.array(coder(X)), atol=1e-5)


def test_what_sparsify_cannot_express_is_refused(tmp_path):
    columns, other = Columns(("layers.3.mlp",), (8,)), Columns(("layers.3.attn",), (6,))
    coders = {
        "functions topk and groupmax, got jumprelu": SAE(columns, columns, 32, "jumprelu"),
        "normalises no tokens": SAE(columns, columns, 32, "topk", 4, token_norm="layer_norm"),
        "sites of one width only": Transcoder(columns, other, 32, "topk", 4),
        "SAEs and transcoders only, got a crosscoder": kinds.make("crosscoder", "topk"),
    }
    for message, coder in coders.items():
        with pytest.raises(ValueError, match=message):
            coder.export("sparsify", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groupmax_keeps_the_largest_of_each_group():
    columns = Columns(("layers.3.mlp",), (8,))
    coder = SAE(columns, columns, 32, "groupmax", 4)
    pre = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    pre[0] = -1
    z = np.array(coder.activation_function(mx.array(pre))).reshape(50, 4, 8)
    groups = pre.reshape(50, 4, 8)
    expected = np.where(groups == groups.max(-1, keepdims=True), np.maximum(groups, 0), 0)
    np.testing.assert_array_equal(z, expected)
    assert not z[0].any()
    again = np.array(coder.activation_function(mx.array(pre).reshape(5, 10, 32)))
    np.testing.assert_array_equal(again.reshape(50, 4, 8), expected)


def test_recognition_never_raises(tmp_path):
    assert sparsify.recognise(PLACE / "layers.3") and not sparsify.recognise(PLACE)
    assert not sparsify.recognise(tmp_path / "nowhere")
    for name in ("cfg.json", "sae.safetensors"):
        for content in (b"", b"{", b"[" * 100_000, b"\xff"):
            (tmp_path / name).write_bytes(content)
            assert not sparsify.recognise(tmp_path)
