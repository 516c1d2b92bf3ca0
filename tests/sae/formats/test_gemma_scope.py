import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import CrossLayerTranscoder, Transcoder, load_sae
from tests.sae.formats import golden

FORMAT = "gemma_scope"
SECOND = "gemma-scope-2-270m-pt"
CLT = f"{SECOND}/clt/width_262k_l0_big"
# Case of the golden file: folder, what it reads, what it writes, the model.
CASES = {
    "gemma-scope-2b-pt-res": (
        "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71",
        "layers.3.resid_post", "layers.3.resid_post", "google/gemma-2-2b",
    ),
    "gemma-scope-9b-it-mlp": (
        "gemma-scope-9b-it-mlp/layer_4/width_65k/average_l0_20",
        "layers.4.mlp_out", "layers.4.mlp_out", "google/gemma-2-9b-it",
    ),
    "gemma-scope-27b-pt-att": (
        "gemma-scope-27b-pt-att/layer_5/width_131k/average_l0_9",
        "layers.5.attn_z", "layers.5.attn_z", "google/gemma-2-27b",
    ),
    "embedding": (
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6",
        "model.embed_tokens", "model.embed_tokens", "google/gemma-2-2b",
    ),
    "gemma-scope-2b-pt-transcoders": (
        "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_76",
        "layers.3.mlp_unit", "layers.3.mlp_out", "google/gemma-2-2b",
    ),
} | {
    folder: (
        f"{SECOND}/{folder}", f"layers.5.{reads}", f"layers.5.{writes}", "google/gemma-3-270m-pt"
    )
    for folder, reads, writes in (
        ("resid_post/layer_5_width_16k_l0_big", "resid_post", "resid_post"),
        ("attn_out/layer_5_width_16k_l0_big", "attn_z", "attn_z"),
        ("mlp_out/layer_5_width_16k_l0_big", "mlp_out", "mlp_out"),
        ("transcoder/layer_5_width_16k_l0_big", "mlp_in", "mlp_out"),
        ("transcoder/layer_5_width_16k_l0_big_affine", "mlp_in", "mlp_out"),
    )
}  # fmt: skip
RESIDUAL = CASES["gemma-scope-2b-pt-res"][0]
AFFINE = f"{SECOND}/transcoder/layer_5_width_16k_l0_big_affine"


@pytest.mark.parametrize("case", CASES)
def test_codes_and_reconstructions_are_those_of_the_judge(case):
    folder, reads, writes, model = CASES[case]
    coder = golden.load(FORMAT, folder)
    golden.agrees(coder, FORMAT, case)
    assert (coder.reads.names, coder.writes.names) == ((reads,), (writes,))
    assert coder.metadata.model == {"name": model}
    assert coder.has_skip == case.endswith("affine")
    assert golden.n_at_threshold(coder, golden.expected(FORMAT, case)["x"]) >= 1


def test_width_and_l0_come_from_the_folder_or_the_configuration():
    first, second = golden.load(FORMAT, RESIDUAL), golden.load(FORMAT, AFFINE)
    assert (first.metadata.source["width"], first.metadata.source["l0"]) == ("16k", "71")
    assert (second.metadata.source["width"], second.metadata.source["l0"]) == (32, 5)
    assert golden.load(FORMAT, f"{RESIDUAL}/params.npz").site == "layers.3.resid_post"


def test_a_skip_connection_is_applied_to_the_columns_that_are_read():
    transcoder = golden.load(FORMAT, AFFINE)
    x = mx.array(np.eye(8, dtype=np.float32)[:1])
    with golden.open_tensors(golden.ROOT / FORMAT / AFFINE / "params.safetensors") as file:
        row = np.array(file.read("affine_skip_connection"))[0]
    skipped = np.array(transcoder(x) - transcoder.decode(transcoder.encode(x)))[0]
    np.testing.assert_allclose(skipped, row, atol=1e-5)


def test_where_the_path_is_silent_the_site_has_to_be_given(tmp_path):
    path = golden.copy(FORMAT, RESIDUAL, tmp_path / "here").rename(tmp_path / "mine")
    with pytest.raises(ValueError, match="does not say which site .*: give site='layers.8.resid_p"):
        load_sae(path)
    sae = load_sae(path, site="layers.2.mlp_out")
    golden.agrees(sae, FORMAT, "gemma-scope-2b-pt-res")
    assert sae.site == "layers.2.mlp_out" and sae.metadata.model == {}


def test_both_sites_of_a_transcoder_may_be_given(tmp_path):
    path = golden.copy(FORMAT, AFFINE, tmp_path)
    with pytest.raises(ValueError, match="site must name both sites of a transcoder, .* got 'lay"):
        load_sae(path, site="layers.2.mlp_in")
    coder = load_sae(path, site="layers.2.mlp_in -> layers.2.mlp")
    assert (coder.from_site, coder.to_site) == ("layers.2.mlp_in", "layers.2.mlp")


def test_gemma_scope_2_without_configuration_is_known_by_its_folders(tmp_path):
    path = golden.copy(FORMAT, AFFINE, tmp_path)
    (path / "config.json").unlink()
    coder = load_sae(path)
    assert isinstance(coder, Transcoder) and coder.metadata.source["l0"] == "big"
    assert (coder.from_site, coder.to_site) == ("layers.5.mlp_in", "layers.5.mlp_out")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"threshold": lambda t: t[1:]}, r"'threshold' must have shape \(32,\), got \(31,\)"),
        ({"W_dec": lambda W: W.T}, r"'W_dec' must have shape \(32, 8\), got \(8, 32\)"),
        ({"W_enc": lambda W: W[0]}, "'w_enc' has shape .*: not an SAE"),
        ({"b_enc": golden.with_nan}, "'b_enc' holds numbers that are not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message, tmp_path):
    path = golden.copy(FORMAT, RESIDUAL, tmp_path)
    golden.change_arrays(path / "params.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(path)


def test_a_file_without_thresholds_is_not_recognised_but_named(tmp_path):
    path = golden.copy(FORMAT, RESIDUAL, tmp_path)
    golden.change_arrays(path / "params.npz", threshold=None)
    with pytest.raises(ValueError, match="looks like none of the formats"):
        load_sae(path)
    with pytest.raises(ValueError, match=r"has no keys \['threshold'\]"):
        load_sae(path, format=FORMAT)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_scaling_factor_is_only_read_where_it_changes_nothing(factor, tmp_path):
    path = golden.copy(FORMAT, RESIDUAL, tmp_path)
    with golden.open_tensors(path / "params.npz") as file:
        arrays = {name: np.array(file.read(name)) for name in file.names}
    arrays["scaling_factor"] = np.where(np.arange(32) == 5, factor, 1).astype(np.float32)
    golden.write_arrays(path / "params.npz", arrays)
    if factor == 1:
        golden.agrees(load_sae(path), FORMAT, "gemma-scope-2b-pt-res")
    else:
        with pytest.raises(ValueError, match="a 'scaling_factor' other than 1 is not read"):
            load_sae(path)


@pytest.mark.parametrize(("key", "value"), [("type", "crosscoder"), ("architecture", "gated")])
def test_other_kinds_are_refused(key, value, tmp_path):
    path = golden.copy(FORMAT, AFFINE, tmp_path)
    golden.change_json(path / "config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"'jump_relu' are read, not .*{value}"):
        load_sae(path)


# Cross-layer transcoders


def test_a_cross_layer_transcoder_agrees():
    coder = golden.load(FORMAT, CLT)
    golden.agrees(coder, FORMAT, "clt")
    assert isinstance(coder, CrossLayerTranscoder) and coder.n_features == 48
    assert coder.reads.names == tuple(f"layers.{i}.mlp_in" for i in range(3))
    assert coder.writes.names == tuple(f"layers.{i}.mlp_out" for i in range(3))


def test_decoders_from_the_own_layer_on_are_the_same(tmp_path):
    path = golden.copy(FORMAT, CLT, tmp_path)
    for i in range(3):
        golden.change_arrays(path / f"params_layer_{i}.safetensors", w_dec=lambda W, i=i: W[:, i:])
    (path / "config.json").unlink()
    golden.agrees(load_sae(path), FORMAT, "clt")


def test_features_that_write_to_an_earlier_layer_are_refused(tmp_path):
    path = golden.copy(FORMAT, CLT, tmp_path)

    def write_back(W):
        W = np.array(W)
        W[5, 1, 2] = 1e-3
        return W

    golden.change_arrays(path / "params_layer_1.safetensors", w_dec=write_back)
    assert load_sae(path).n_features == 48  # their own layer
    golden.change_arrays(path / "params_layer_2.safetensors", w_dec=write_back)
    with pytest.raises(ValueError, match="features of layer 2 write to layer 1"):
        load_sae(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "params_layer_1.safetensors").unlink(), r"lacks the files .* \[1\]"),
        (
            lambda p: golden.change_arrays(
                p / "params_layer_2.safetensors", w_dec=lambda W: W[:, :2]
            ),
            r"'w_dec' must have shape \(16, 3, 8\), or \(16, 1, 8\) .* got \(16, 2, 8\)",
        ),
        (
            lambda p: golden.change_arrays(p / "params_layer_2.safetensors", b_enc=golden.with_nan),
            "not finite",
        ),
        (
            lambda p: golden.change_arrays(
                p / "params_layer_1.safetensors", w_enc=lambda W: W[:, :8]
            ),
            r"'w_enc' must have shape \(8, 16\)",
        ),
        (lambda p: golden.change_json(p / "config.json", type="crosscoder"), "not 'crosscoder'"),
        (
            lambda p: golden.change_json(p / "config.json", hf_hook_point_in="model.layers.1"),
            r"a hook of all layers has '\{all\}', got 'model.layers.1'",
        ),
    ],
)
def test_cross_layer_transcoders_that_do_not_fit_are_refused(change, message, tmp_path):
    path = golden.copy(FORMAT, CLT, tmp_path)
    change(path)
    with pytest.raises(ValueError, match=message):
        load_sae(path)


def test_skip_connections_of_a_cross_layer_transcoder_are_refused(tmp_path):
    path = golden.copy(FORMAT, CLT, tmp_path)
    file = path / "params_layer_0.safetensors"
    with golden.open_tensors(file) as tensors:
        arrays = {name: np.array(tensors.read(name)) for name in tensors.names}
    golden.write_arrays(file, arrays | {"affine_skip_connection": np.eye(8, dtype=np.float32)})
    with pytest.raises(ValueError, match="with skip connections .* are not read"):
        load_sae(path)


def test_the_repository_is_known_in_the_cache_of_the_hub_too(tmp_path):
    source = golden.copy(FORMAT, RESIDUAL, tmp_path / "a")
    cache = tmp_path / "models--google--gemma-scope-9b-pt-mlp" / "snapshots" / "0a1b"
    folder = cache / "layer_17" / "width_16k" / "average_l0_3"
    folder.mkdir(parents=True)
    (folder / "params.npz").symlink_to(source / "params.npz")
    sae = load_sae(folder)
    assert sae.site == "layers.17.mlp_out" and sae.metadata.model["name"] == "google/gemma-2-9b"
