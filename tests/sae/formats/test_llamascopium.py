"""Coders of llamascopium, against itself."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.checkpoint import load_sae

GOLDEN = Path(__file__).parents[2] / "golden" / "formats" / "llamascopium"
EXPECTED = np.load(GOLDEN / "expected.npz")
AT = "layers.2.resid_post"
BETWEEN = ("layers.2.mlp_unit", "layers.2.mlp_out")
SITES = {
    "transcoder_relu": BETWEEN, "transcoder_jumprelu": BETWEEN, "transcoder_plain": BETWEEN,
    "sae_jumprelu": (AT,),
    "sae_topk": (AT,), "sae_topk_without_norms": (AT,), "sae_token_wise": (AT,),
    "sae_inference": (AT,),
    "crosscoder": tuple(f"layers.{i}.resid_post" for i in (2, 3, 4)),
    "clt_jumprelu": (), "clt_topk": (), "clt_plain": (),
}  # fmt: skip


def copied(case, tmp_path, **changes):
    path = Path(shutil.copytree(GOLDEN / case, tmp_path / case))
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("case", SITES)
def test_codes_and_reconstructions(case):
    coder = load_sae(GOLDEN / case)
    assert coder.metadata.source["format"] == "llamascopium"
    if case.startswith("clt"):
        assert coder.kind == "cross_layer_transcoder"
        assert coder.reads.names == tuple(f"layers.{i}.resid_mid" for i in range(3))
        assert coder.writes.names == tuple(f"layers.{i}.mlp_out" for i in range(3))
    else:
        assert coder.kind == case.split("_")[0]
        assert SITES[case] in (coder.reads.names, coder.reads.names + coder.writes.names)
    x, z, y = (EXPECTED[f"{case}/{part}"] for part in "xzy")
    np.testing.assert_allclose(coder.encode(x), z, atol=1e-5, rtol=1e-5)
    assert np.array_equal(np.array(coder.encode(x)) != 0, z != 0)
    np.testing.assert_allclose(coder(x), y, atol=2e-5, rtol=1e-5)


def test_the_cases_tell_scales_and_norms_apart():
    """Each of the factors that are folded changes what is active, or by how much."""
    for case in ("transcoder_jumprelu", "clt_jumprelu"):
        coder = load_sae(GOLDEN / case)
        x, z, y = (EXPECTED[f"{case}/{part}"] for part in "xzy")
        kept = coder.activation_function.threshold
        coder.activation_function.threshold = kept * 1.5
        assert not np.array_equal(np.array(coder.encode(x)) != 0, z != 0)
        coder.activation_function.threshold = kept / 1.5
        assert not np.array_equal(np.array(coder.encode(x)) != 0, z != 0)
        assert 0.05 < (z != 0).mean() < 0.7
        assert np.abs(y).max() > 1


def test_a_site_that_is_given():
    assert load_sae(GOLDEN / "sae_topk", site="layers.7.attn_out").reads.names == (
        "layers.7.attn_out",
    )
    coder = load_sae(GOLDEN / "transcoder_relu", site="layers.7.mlp_in -> layers.7.mlp")
    assert (coder.from_site, coder.to_site) == ("layers.7.mlp_in", "layers.7.mlp")
    with pytest.raises(ValueError, match="must name both sites"):
        load_sae(GOLDEN / "transcoder_relu", site="layers.7.mlp")
    with pytest.raises(ValueError, match="says itself which sites"):
        load_sae(GOLDEN / "crosscoder", site="layers.7.mlp")


def test_a_row_of_zeros_is_a_feature_that_is_never_active(tmp_path):
    path = copied("transcoder_jumprelu", tmp_path)
    weights = dict(mx.load(str(path / "sae_weights.safetensors")))
    weights["W_D"][4] = 0
    mx.eval(weights)
    mx.save_safetensors(str(path / "sae_weights.safetensors"), weights)
    z = np.array(load_sae(path).encode(EXPECTED["transcoder_jumprelu/x"]))
    expected = EXPECTED["transcoder_jumprelu/z"].copy()
    expected[:, 4] = 0
    np.testing.assert_allclose(z, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("lorsa", {}, "'lorsa' is not read: it has attention heads for features"),
        ("lorsa", {"sae_type": "molt"}, "'molt' is not read: its features are matrices"),
        ("crosscoder", {"act_fn": "jumprelu"}, "every site decides by its own decoder norm"),
        ("crosscoder", {"norm_activation": "token-wise"}, "'dataset-wise' or 'inference', got"),
        ("clt_topk", {"act_fn": "layertopk"}, "'act_fn' must be 'relu' or 'jumprelu' or 'topk'"),
        ("sae_topk", {"act_fn": "batchtopk"}, "depends on the other tokens of a batch"),
        ("sae_topk", {"norm_activation": "batch-wise"}, "depends on the other tokens"),
        ("transcoder_relu", {"norm_activation": "token-wise"}, "'norm_activation' must be"),
        ("sae_topk", {"use_glu_encoder": True}, "'use_glu_encoder' must be False"),
        ("sae_topk", {"d_model": 9}, r"W_D' must have shape \(36, 9\), got \(32, 8\)"),
        ("sae_topk", {"expansion_factor": 1e9}, "W_D' must have shape"),
        ("sae_topk", {"expansion_factor": -1}, "must be numbers > 0"),
        ("sae_topk", {"d_model": "8"}, "must be numbers > 0"),
        ("sae_topk", {"hook_point_in": 3}, "'hook_point_in' must name hooks"),
        ("sae_topk", {"hook_point_in": "blocks.2.hook_x"}, "No site of ours is the hook"),
        ("sae_topk", {"top_k": 0}, "k must"),
        ("sae_topk", {"top_k": [3]}, r"'top_k' must be a whole number, got \[3\]"),
        ("clt_topk", {"hook_points_out": ["blocks.0.hook_mlp_out"]}, "as many hook points in"),
        ("crosscoder", {"hook_points": ["blocks.2.hook_resid_post"] * 2}, "W_E|once only"),
    ],
)
def test_what_is_refused(case, changes, message, tmp_path):
    path = copied(case, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_sae(path)


def test_wrong_weights_are_refused(tmp_path):
    path = copied("clt_jumprelu", tmp_path)
    file = path / "sae_weights.safetensors"
    kept = dict(mx.load(str(file)))
    mx.eval(kept)
    norm = "dataset_average_activation_norm.blocks.1.hook_resid_mid"
    for key, array, message in (
        (norm, mx.array(0.0), "must be > 0, got 0"),
        (norm, None, f"has no key '{norm}'"),
        ("W_D.1", mx.zeros((3, 16, 8)), r"'W_D\.1' must have shape \(2, 16, 8\)"),
        ("b_D.2", None, r"has no key 'b_D\.2'"),
        ("activation_function.log_jumprelu_threshold", mx.zeros((16,)), r"must have shape \(3, 16"),
        ("b_E", mx.full((3, 16), float("inf")), "not finite"),
    ):
        arrays = {name: a for name, a in (kept | {key: array}).items() if a is not None}
        mx.save_safetensors(str(file), arrays)
        with pytest.raises(ValueError, match=message):
            load_sae(path)


def test_weights_of_several_devices_are_refused(tmp_path):
    path = copied("clt_topk", tmp_path)
    (path / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights; looked for sae_weights"):
        load_sae(path, format="llamascopium")
    (path / "sae_weights.dcp").mkdir()
    with pytest.raises(ValueError, match="save it again on one device"):
        load_sae(path)
