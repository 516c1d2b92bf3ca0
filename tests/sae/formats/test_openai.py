import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import load_sae
from tests.sae.formats import golden

FORMAT = "openai"
TOP_K = "resid_post_mlp_v5_32k"
RELU = "resid_delta_mlp_v4"


def file_of(case: str) -> str:
    return f"{case}/autoencoders/8.pt"


@pytest.mark.parametrize(
    ("case", "site", "function", "norm"),
    [
        (TOP_K, "layers.8.resid_post", "topk", "layer_norm"),
        (RELU, "layers.8.mlp_out", "relu", "none"),
    ],
)
def test_codes_and_reconstructions_are_those_of_the_formula(case, site, function, norm):
    sae = golden.load(FORMAT, file_of(case))
    golden.agrees(sae, FORMAT, case)
    assert (sae.site, sae.activation_name, sae.token_norm) == (site, function, norm)
    assert sae.metadata.model == {"name": "gpt2"}
    assert sae.metadata.source["location"] == case.partition("_v")[0]
    np.testing.assert_allclose(sae.statistics.firing_rates, np.linspace(0, 0.5, 32), atol=1e-6)


def test_a_normalised_code_does_not_depend_on_size_or_mean():
    sae, x = golden.load(FORMAT, file_of(TOP_K)), golden.expected(FORMAT, TOP_K)["x"]
    moved = np.array(sae.encode(mx.array(8 * x + 5)))
    np.testing.assert_allclose(moved, np.array(sae.encode(mx.array(x))), atol=1e-3)


@pytest.mark.parametrize(
    ("location", "site"),
    [
        ("resid_delta_attn_v5_128k", "attn_out"), ("resid_delta_mlp", "mlp_out"),
        ("resid_post_attn_v5_32k", "resid_mid"), ("resid_post_mlp_v5_128k", "resid_post"),
        ("mlp_post_act_v4", None), ("elsewhere", None),
    ],
)  # fmt: skip
def test_the_site_is_that_of_the_folder_or_has_to_be_given(location, site, tmp_path):
    source = golden.copy(FORMAT, file_of(RELU), tmp_path)
    target = tmp_path / location / "autoencoders" / "11.pt"
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    if site is None:
        with pytest.raises(ValueError, match=r"11.pt does not say which site it is of: give site="):
            load_sae(target)
        assert load_sae(target, site="layers.2.mlp").site == "layers.2.mlp"
    else:
        assert load_sae(target).site == f"layers.11.{site}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"postact_fn", b"postact_gn", None),  # nothing said is ReLU
        (
            b"\x04\x00\x00\x00TopK",
            b"\x04\x00\x00\x00GELU",
            "'activation' must be ReLU, or .* 'GELU'",
        ),
        (b"\x04\x00\x00\x00ReLU", b"\x04\x00\x00\x00ELUs", "got 'TopK' followed by 'ELUs'"),
        (b"X\x01\x00\x00\x00k", b"X\x01\x00\x00\x00j", "'activation_state_dict.k' must be a whole"),
        (b"latent_bias", b"latent_BIAS", "looks like none of the formats"),
        (b"encoder.weight", b"encoder.height", "looks like none of the formats"),
    ],
)
def test_other_states_are_refused_with_the_reason(old, new, message, tmp_path):
    file = golden.copy(FORMAT, file_of(TOP_K), tmp_path)
    golden.change_pickle(file, old, new)
    if message is None:
        golden.agrees(load_sae(file), FORMAT, TOP_K)
    else:
        with pytest.raises(ValueError, match=message):
            load_sae(file)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"decoder__weight": lambda W: W.T}, r"'decoder.weight' must have shape \(8, 32\)"),
        ({"pre_bias": lambda b: b[1:]}, r"'pre_bias' must have shape \(8,\)"),
        ({"encoder__weight": lambda W: W[0]}, "'encoder.weight' must be a matrix"),
        ({"latent_bias": golden.with_nan}, "'latent_bias' holds numbers that are not finite"),
        ({"latents_activation_frequency": lambda r: r[1:]}, r"must have shape \(32,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message, tmp_path):
    file = golden.copy(FORMAT, file_of(RELU), tmp_path)
    golden.change_arrays(file, **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(file)


@pytest.mark.parametrize("rates", [np.ones(32), np.full(32, 1.5)])
def test_rates_that_are_not_measured_are_left_out(rates, tmp_path):
    file = golden.copy(FORMAT, file_of(RELU), tmp_path)
    golden.change_arrays(file, latents_activation_frequency=lambda _: rates)
    assert len(load_sae(file).statistics.firing_rates) == 0
