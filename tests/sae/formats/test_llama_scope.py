import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, Transcoder, load_sae
from tests.sae.formats import golden

FORMAT = "llama_scope"
RESIDUAL = "Llama3_1-8B-Base-L15R-8x"
TRANSCODER = "Llama3_1-8B-Base-L8TC-8x"
DISTILLED = "R1-Distill/L15R"
WEIGHTS = {
    RESIDUAL: "checkpoints/final.safetensors",
    TRANSCODER: "checkpoints/final.safetensors",
    DISTILLED: "sae_weights.safetensors",
}
CONFIGS = {RESIDUAL: "hyperparams.json", TRANSCODER: "hyperparams.json", DISTILLED: "config.json"}
NORM = "dataset_average_activation_norm"


def changed(case: str, folder, config: dict | None = None, **arrays):
    """A copy of a folder, with changes."""
    path = golden.copy(FORMAT, case, folder)
    golden.change_json(path / CONFIGS[case], **(config or {}))
    if arrays:
        golden.change_arrays(path / WEIGHTS[case], **arrays)
    return path


def weights(path, case: str) -> dict[str, np.ndarray]:
    with golden.open_tensors(path / WEIGHTS[case]) as file:
        return {name: np.array(file.read(name), dtype=np.float64) for name in file.names}


@pytest.mark.parametrize(
    ("case", "kind", "sites"),
    [
        (RESIDUAL, SAE, ("layers.15.resid_post", "layers.15.resid_post")),
        (TRANSCODER, Transcoder, ("layers.8.mlp_unit", "layers.8.mlp_out")),
        (DISTILLED, SAE, ("layers.15.resid_post", "layers.15.resid_post")),
    ],
)
def test_codes_and_reconstructions_are_those_of_the_judge(case, kind, sites):
    coder = golden.load(FORMAT, case)
    golden.agrees(coder, FORMAT, case)
    assert type(coder) is kind and (*coder.reads.names, *coder.writes.names) == sites
    assert coder.metadata.source["hook_point_in"].startswith("blocks.")
    named = {} if case == DISTILLED else {"name": "meta-llama/Llama-3.1-8B"}
    assert coder.metadata.model == named


def test_a_feature_that_meets_the_threshold_exactly_is_inactive():
    x = golden.expected(FORMAT, RESIDUAL)["x"]
    assert golden.n_at_threshold(golden.load(FORMAT, RESIDUAL), x) >= 1


@pytest.mark.parametrize("case", [TRANSCODER, DISTILLED])
@pytest.mark.parametrize("with_norms", [True, None, False])
def test_the_norms_of_decoder_rows_decide_unless_they_are_not_to(case, with_norms, tmp_path):
    """The formula of the module, in float64, with decoder rows of very different norms; they count
    where nothing is said."""
    sizes = np.linspace(0.3, 4, 32)
    path = changed(
        case, tmp_path, {"sparsity_include_decoder_norm": with_norms},
        decoder__weight=lambda W: W * sizes,
    )  # fmt: skip
    p, x = weights(path, case), golden.expected(FORMAT, case)["x"]
    s_in, s_out = (2, 4) if case == TRANSCODER else (2, 2)
    pre = s_in * x.astype(np.float64) @ p["encoder.weight"].T + p["encoder.bias"]
    norms = np.linalg.norm(p["decoder.weight"], axis=0) if with_norms is not False else 1
    if case == DISTILLED:
        active = pre * norms > np.exp(p["log_jumprelu_threshold"])
    else:
        active = pre * norms / s_out > 0.25
    coder, z = load_sae(path), pre * active
    np.testing.assert_allclose(np.array(coder.encode(mx.array(x))), z, atol=1e-5)
    y = (z @ p["decoder.weight"].T + p["decoder.bias"]) / s_out
    np.testing.assert_allclose(np.array(coder(mx.array(x))), y, atol=1e-5)


def test_a_row_of_zeros_is_of_a_feature_that_is_never_active(tmp_path):
    path = changed(RESIDUAL, tmp_path, decoder__weight=lambda W: W * (np.arange(32) != 9))
    z = load_sae(path).encode(mx.array(golden.expected(FORMAT, RESIDUAL)["x"]))
    assert not np.array(z)[:, 9].any() and np.isfinite(np.array(z)).all()


def test_biases_may_be_missing_or_come_off_the_input(tmp_path):
    path = changed(RESIDUAL, tmp_path / "a", {"use_decoder_bias": False}, decoder__bias=None)
    assert not load_sae(path).b_dec.any().item()
    path = changed(RESIDUAL, tmp_path / "b", {"apply_decoder_bias_to_pre_encoder": True})
    p, x = weights(path, RESIDUAL), golden.expected(FORMAT, RESIDUAL)["x"]
    wanted = (2 * x - p["decoder.bias"]) @ p["encoder.weight"].T + p["encoder.bias"]
    found = np.array(load_sae(path).pre_activations(mx.array(x)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_without_normalisation_nothing_is_scaled(tmp_path):
    config = {"norm_activation": "inference", NORM: None}
    path = changed(RESIDUAL, tmp_path, config)
    p, x = weights(path, RESIDUAL), golden.expected(FORMAT, RESIDUAL)["x"]
    found = np.array(load_sae(path).pre_activations(mx.array(x)))
    np.testing.assert_allclose(found, x @ p["encoder.weight"].T + p["encoder.bias"], atol=1e-5)


def test_the_norm_of_what_is_read_serves_for_the_same_hook(tmp_path):
    path = changed(RESIDUAL, tmp_path, {NORM: {"in": 2.0}})
    golden.agrees(load_sae(path), FORMAT, RESIDUAL)


def test_the_site_may_be_given(tmp_path):
    path = changed(DISTILLED, tmp_path, {"hook_point_in": None, "hook_point_out": None,
                                         "norm_activation": "none"})  # fmt: skip
    with pytest.raises(ValueError, match="does not say which site it is of: give site="):
        load_sae(path)
    assert load_sae(path, site="layers.1.mlp").site == "layers.1.mlp"
    transcoder = load_sae(golden.ROOT / FORMAT / TRANSCODER, site="a -> b")
    assert (transcoder.from_site, transcoder.to_site) == ("a", "b")


@pytest.mark.parametrize(
    ("case", "config", "arrays", "message"),
    [
        (RESIDUAL, {"act_fn": "topk"}, {}, "'act_fn' must be 'jumprelu', got 'topk'"),
        (RESIDUAL, {"norm_activation": "token-wise"}, {}, "'norm_activation' must be 'data"),
        (RESIDUAL, {"use_glu_encoder": True}, {}, "'use_glu_encoder' must be False, got True"),
        (DISTILLED, {"sae_type": "crosscoder"}, {}, "'sae_type' must be 'sae', got 'crosscoder'"),
        (RESIDUAL, {NORM: None}, {}, "the average norm of the activations, is missing for 'in'"),
        (TRANSCODER, {NORM: {"in": 2.0}}, {}, "is missing for 'out'"),
        (RESIDUAL, {NORM: {"in": 0.0, "out": 1.0}}, {}, "must be > 0, got 0.0"),
        (RESIDUAL, {NORM: {"in": "2", "out": 1.0}}, {}, "must be > 0, got '2'"),
        (RESIDUAL, {"jump_relu_threshold": None}, {}, "must be a number >= 0, got None"),
        (RESIDUAL, {"jump_relu_threshold": -0.5}, {}, "must be a number >= 0, got -0.5"),
        (RESIDUAL, {"d_sae": 64}, {}, r"'encoder.weight' must have shape \(64, 16\), got"),
        (RESIDUAL, {"d_sae": "32"}, {}, "must be whole numbers, got 16 and '32'"),
        (DISTILLED, {"expansion_factor": 3}, {}, r"must have shape \(48, 16\)"),
        (DISTILLED, {"expansion_factor": None}, {}, "must be whole numbers, got 16 and None"),
        (RESIDUAL, {"hook_point_in": "blocks.1.hook_q"}, {}, "No site of ours is the hook"),
        (RESIDUAL, {}, {"decoder__bias": None}, "has no key 'decoder.bias'"),
        (RESIDUAL, {}, {"decoder__weight": lambda W: W.T}, r"must have shape \(16, 32\)"),
        (RESIDUAL, {}, {"encoder__bias": golden.with_nan}, "not finite"),
        (DISTILLED, {}, {"log_jumprelu_threshold": lambda t: t[1:]}, r"must have shape \(32,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(case, config, arrays, message, tmp_path):
    path = changed(case, tmp_path, config, **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(path)
