import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, load_sae
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.formats import saelens
from mlxterp.sae.metadata import Metadata, Statistics
from mlxterp.sae.transcoder import Transcoder
from tests.sae import kinds
from tests.sae.formats.files import GOLDEN

PLACE = GOLDEN / "saelens"
EXPECTED = np.load(PLACE / "expected.npz")
X = mx.array(EXPECTED["x"])
FILES = sorted(path.name for path in PLACE.iterdir() if path.is_dir())
READ = [name for name in FILES if not name.startswith("refused")]


def close(coder: BaseSAE, name: str) -> None:
    """Codes and reconstructions agree, and the same features are active."""
    z, expected = np.array(coder.encode(X)), EXPECTED[f"{name}.z"]
    np.testing.assert_array_equal(z != 0, expected != 0)
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.array(coder(X)), EXPECTED[f"{name}.y"], rtol=0, atol=1e-5)


def change(path: Path, **values) -> None:
    config = json.loads((path / "cfg.json").read_text())
    config = {key: value for key, value in (config | values).items() if value != "absent"}
    (path / "cfg.json").write_text(json.dumps(config))


def rewrite(path: Path, **arrays) -> None:
    """Other arrays in the file; None takes one out."""
    file = str(path / "sae_weights.safetensors")
    old: dict = mx.load(file)  # pyright: ignore
    mx.eval(old)
    mx.save_safetensors(file, {k: v for k, v in (old | arrays).items() if v is not None})


@pytest.fixture
def copied(tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(PLACE / name, tmp_path / name))

    return copy


@pytest.mark.parametrize("name", READ)
def test_codes_and_reconstructions_are_those_of_saelens(name):
    coder = load_sae(PLACE / name)
    close(coder, name)
    assert coder.metadata.source["format"] == "saelens"
    assert coder.metadata.model == {"name": "gpt2-small"}


@pytest.mark.parametrize(
    ("name", "kind", "function", "reads", "writes", "norm"),
    [
        ("standard", SAE, "relu", "layers.3.resid_post", None, "none"),
        ("standard_layer_norm", SAE, "relu", "layers.3.resid_post", None, "layer_norm"),
        ("topk_rescaled", SAE, "topk", "layers.3.resid_post", None, "rescale"),
        ("abstopk", SAE, "abs_topk", "layers.3.resid_post", None, "none"),
        ("batchtopk", SAE, "batch_topk", "layers.3.resid_post", None, "none"),
        ("batchtopk_fraction", SAE, "jumprelu", "layers.3.resid_post", None, "none"),
        ("gated", SAE, "gated", "layers.3.resid_post", None, "none"),
        ("hook_z", SAE, "topk", "layers.3.attn_z", None, "none"),
        ("old_topk", SAE, "topk", "layers.3.resid_post", None, "none"),
        ("transcoder", Transcoder, "relu", "layers.3.resid_post", "layers.3.mlp_out", "none"),
        ("jumprelu_skip_transcoder", Transcoder, "jumprelu", "layers.3.resid_post",
         "layers.3.mlp_out", "none"),
    ],
)  # fmt: skip
def test_kind_and_sites_are_those_of_the_configuration(name, kind, function, reads, writes, norm):
    coder = load_sae(PLACE / name)
    assert type(coder) is kind and coder.activation_name == function and coder.token_norm == norm
    assert coder.reads.names == (reads,) and coder.writes.names == (writes or reads,)
    assert coder.k == (4 if "topk" in function else None)
    assert coder.has_skip == ("skip" in name)


def test_firing_rates_come_from_the_file_of_sparsity():
    rates = load_sae(PLACE / "standard").statistics.firing_rates
    np.testing.assert_allclose(rates, EXPECTED["rates"], rtol=1e-5)
    assert rates[0] == 0 and rates[1] == 1
    assert load_sae(PLACE / "topk").statistics.firing_rates.shape == (0,)


def test_what_the_file_says_and_we_do_not_use_is_kept():
    source = load_sae(PLACE / "batchtopk").metadata.source
    assert source["architecture"] == "batchtopk" and source["dataset_path"] == "a/dataset"
    assert source["training_architecture_details"]["topk_threshold_lr"] == 0.01
    old = load_sae(PLACE / "old_topk").metadata.source
    assert old["hook_name"] == "blocks.3.hook_resid_post" and old["context_size"] == 128


@pytest.mark.parametrize("name", ["matching_pursuit", "temporal"])
def test_what_makes_no_code_of_one_token_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"cfg.json: the architecture {name} .* is not read"):
        load_sae(PLACE / f"refused_{name}")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("standard", {"architecture": "lasso"}, "'architecture' must be one of .* got 'lasso'"),
        ("standard", {"d_sae": 10**15}, r"'W_enc' must have shape \(8, 1000000000000000\)"),
        ("standard", {"d_in": 9}, r"'W_enc' must have shape \(9, 32\), got \(8, 32\)"),
        ("standard", {"d_in": "8"}, "'d_in' must be a whole number >= 1, got '8'"),
        ("standard", {"d_sae": "absent"}, "no key 'd_sae'"),
        ("topk", {"k": 0}, "'k' must be a whole number >= 1, got 0"),
        ("topk", {"k": 33}, r"k must be in \[1, n_features = 32\]"),
        ("topk", {"k": "absent"}, "'k' must be a whole number"),
        ("topk", {"k": 10**400}, "k must be in"),
        ("standard", {"architecture": ["topk"]}, "'architecture' must be one of"),
        ("standard", {"normalize_activations": []}, "'normalize_activations' must be one of"),
        ("standard", {"apply_b_dec_to_input": 1}, "must be true or false, got 1"),
        ("standard", {"normalize_activations": "covariance_whitening"}, "whitening is folded"),
        ("transcoder", {"apply_b_dec_to_input": True}, "a transcoder cannot subtract 'b_dec'"),
        ("transcoder", {"d_out": "absent"}, "'d_out' must be a whole number"),
        ("standard", {"metadata": {}}, "does not say which site.*site='layers.8.resid_post'"),
        ("transcoder", {"metadata": {}}, "site='layers.8.mlp_in -> layers.8.mlp_out'"),
        ("standard", {"metadata": {"hook_name": "blocks.3.x"}}, "hook 'blocks.3.x'.*Give site="),
        ("standard", {"metadata": {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 2}},
         "of one head, number 2"),
        ("old_standard", {"activation_fn_str": "tanh-relu"}, "must be relu or topk, got 'tanh-rel"),
        ("old_topk", {"activation_fn_kwargs": {}}, "'k' must be a whole number"),
        ("batchtopk", {"architecture": "standard"}, r"holds \['topk_threshold'\], which the arch"),
        ("jumprelu", {"architecture": "standard"}, r"holds \['threshold'\]"),
        ("standard", {"architecture": "jumprelu"}, "has no key 'threshold'"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(copied, name, values, message):
    path = copied(name)
    change(path, **values)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(path)
    assert str(path) in str(error.value) or "n_features" in message


def test_weights_that_are_wrong_are_refused(copied):
    path = copied("standard")
    rewrite(path, W_dec=mx.full((32, 8), mx.nan))
    with pytest.raises(ValueError, match="'W_dec' holds numbers that are not finite"):
        load_sae(path)
    rewrite(path, W_dec=None)
    with pytest.raises(ValueError, match="has no key 'W_dec'"):
        load_sae(path)
    rewrite(path, W_dec=mx.zeros((32, 8)), scaling_factor=mx.full((32,), 2.0))
    with pytest.raises(ValueError, match="'scaling_factor' is there and not 1"):
        load_sae(path)


def test_a_given_site_takes_the_place_of_that_of_the_file(copied):
    coder = load_sae(PLACE / "standard", site="layers.5.mlp")
    assert coder.reads.names == ("layers.5.mlp",)
    coder = load_sae(PLACE / "transcoder", site="layers.5.mlp_in -> layers.5.mlp")
    assert (coder.reads.names, coder.writes.names) == (("layers.5.mlp_in",), ("layers.5.mlp",))
    with pytest.raises(ValueError, match="must name both sites of a transcoder"):
        load_sae(PLACE / "transcoder", site="layers.5.mlp_in")


def test_the_logarithm_of_a_threshold_is_read(copied):
    path = copied("jumprelu")
    threshold = load_sae(path).activation_function.arrays["threshold"]
    rewrite(path, threshold=None, log_threshold=mx.log(threshold))
    close(load_sae(path), "jumprelu")


def test_a_scale_that_is_not_known_is_said(copied):
    path = copied("standard")
    change(path, normalize_activations="expected_average_only_in")
    with pytest.warns(UserWarning, match="does not say by which factor"):
        close(load_sae(path), "standard")
    for factor in (0, -1, "large", 10**400):
        (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        with pytest.raises(ValueError, match="'scaling_factor' must be in"):
            load_sae(path)


def test_old_files_go_by_their_old_names(copied):
    path = copied("old_standard")
    change(path, normalize_activations=True)
    (path / "activation_scaler.json").write_text('{"scaling_factor": 1.0}')
    close(load_sae(path), "old_standard")
    change(path, normalize_activations="absent", hook_point="absent")
    with pytest.raises(ValueError, match="does not say which site"):
        load_sae(path)


def random_coder(kind: str, function: str, norm: str = "none") -> BaseSAE:
    reads, writes = Columns(("layers.3.mlp_in",), (8,)), Columns(("layers.3.mlp_out",), (6,))
    if kind == "sae":
        coder: BaseSAE = SAE(reads, reads, 32, function, 4, token_norm=norm)
    else:
        skip = kind == "skip transcoder"
        coder = Transcoder(reads, writes, 32, function, 4, skip=skip, token_norm=norm)
    rng = np.random.default_rng(0)
    for arrays in coder.array_files().values():
        for name, array in arrays.items():
            values = rng.normal(0, 0.5, array.shape).astype(np.float32)
            coder.set_array(name, mx.array(np.abs(values) if name == "threshold" else values))
    coder.metadata = Metadata({"name": "a/model"}, {"context_length": 64})
    coder.statistics = Statistics(firing_rates=np.linspace(0, 1, 32).round(4))
    return coder


WRITTEN = [
    ("sae", "relu", "none", "standard"), ("sae", "topk", "none", "topk"),
    ("sae", "abs_topk", "none", "abstopk"), ("sae", "batch_topk", "none", "jumprelu"),
    ("sae", "jumprelu", "rescale", "jumprelu"), ("sae", "gated", "none", "gated"),
    ("sae", "topk", "layer_norm", "topk"), ("transcoder", "relu", "none", "transcoder"),
    ("transcoder", "relu", "layer_norm", "transcoder"),
    ("transcoder", "batch_topk", "none", "jumprelu_transcoder"),
    ("skip transcoder", "relu", "none", "skip_transcoder"),
    ("skip transcoder", "jumprelu", "none", "jumprelu_skip_transcoder"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "function", "norm", "architecture"), WRITTEN)
def test_what_is_written_is_read_as_it_was(tmp_path, kind, function, norm, architecture):
    coder = random_coder(kind, function, norm)
    path = coder.export("saelens", tmp_path / "out")
    config = json.loads((path / "cfg.json").read_text())
    assert config["architecture"] == architecture
    assert config["metadata"]["hook_name"] == "blocks.3.mlp.hook_in"
    assert config["metadata"]["model_name"] == "a/model"
    assert config["metadata"]["sae_lens_version"] == "6.0.0"  # without it the rest is not read
    assert config["metadata"]["context_size"] == 64
    assert config["metadata"].get("hook_name_out") == (
        None if kind == "sae" else "blocks.3.hook_mlp_out"
    )
    again = load_sae(path)
    assert type(again) is type(coder) and again.reads == coder.reads
    assert again.writes == coder.writes and again.token_norm == norm
    np.testing.assert_allclose(np.array(again.encode(X)), np.array(coder.encode(X)), atol=1e-6)
    np.testing.assert_allclose(np.array(again(X)), np.array(coder(X)), atol=1e-5)
    rates = coder.statistics.firing_rates
    np.testing.assert_allclose(again.statistics.firing_rates, rates, atol=1e-6)


def test_a_site_without_a_hook_goes_by_our_name(tmp_path):
    columns = Columns(("model.embed_tokens",), (8,))
    path = SAE(columns, columns, 32, "relu").export("saelens", tmp_path / "out")
    assert "model.embed_tokens" in (path / "cfg.json").read_text()
    assert load_sae(path).reads == columns


def test_heads_are_said_to_be_joined(tmp_path):
    columns = Columns(("layers.2.attn_z",), (8,))
    path = SAE(columns, columns, 32, "relu").export("saelens", tmp_path / "out")
    assert json.loads((path / "cfg.json").read_text())["reshape_activations"] == "hook_z"


@pytest.mark.parametrize(
    ("kind", "function"),
    [("crosscoder", "topk"), ("cross-layer transcoder", "relu"), ("transcoder", "topk"),
     ("transcoder", "gated"), ("transcoder", "abs_topk")],
)  # fmt: skip
def test_what_saelens_has_no_class_for_is_refused(tmp_path, kind, function):
    coder = kinds.make(kind, function)
    with pytest.raises(
        ValueError, match=f"SAELens has no class for a {coder.kind} with {function}"
    ):
        coder.export("saelens", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groupmax_is_refused_too(tmp_path):
    columns = Columns(("layers.2.mlp",), (8,))
    with pytest.raises(ValueError, match="has no class for a sae with groupmax"):
        SAE(columns, columns, 32, "groupmax", 4).export("saelens", tmp_path / "out")


def test_an_older_export_is_replaced_and_nothing_else(tmp_path):
    coder = random_coder("sae", "relu")
    coder.export("saelens", tmp_path / "out")
    coder.b_dec = coder.b_dec + 1
    path = coder.export("saelens", tmp_path / "out")
    np.testing.assert_allclose(np.array(load_sae(path).b_dec), np.array(coder.b_dec))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not overwritten"):
        coder.export("saelens", tmp_path / "else")


@pytest.mark.parametrize("name", ["", "cfg.json", "sae_weights.safetensors"])
def test_recognition_never_raises(tmp_path, name):
    assert not saelens.recognise(tmp_path / "nowhere")
    assert saelens.recognise(PLACE / "standard") and not saelens.recognise(PLACE)
    for content in (b"", b"{", b"[" * 100_000, b"\xff"):
        if name:
            (tmp_path / name).write_bytes(content)
        assert not saelens.recognise(tmp_path)
