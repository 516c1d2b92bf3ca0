"""Losses, gradients and updates against those that SAELens and dictionary_learning compute.

Their losses are sums over the columns where ours are means, so that everything of ours is `D` times
smaller, coefficients included. Some of their encoders read `x - b_dec`: `centred` converts.
"""

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import kernels
from mlxterp.sae.activation_functions import BatchTopK
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.objective import Objective
from mlxterp.sae.optimizer import adam, initial_moments, with_norm
from mlxterp.sae.parallel import UNDIVIDED
from tests.sae.reference import threshold_gradient, trained_threshold

FOLDER = Path(__file__).parent.parent / "golden"
D, N, K = 8, 32, 4
CORE = ("W_enc", "b_enc", "W_dec", "b_dec")
# The levels of the nested files are 4 and 12 of 32 features wide.
PREFIXES = (4 / 32, 12 / 32)
COLUMNS = Columns(("site",), (D,))

Arrays = dict[str, np.ndarray]


@pytest.fixture(params=[True, False], ids=["segments", "dense products"])
def form(request, monkeypatch):
    monkeypatch.setattr(kernels, "_uses_segments", lambda: request.param)


@cache
def load(name: str) -> tuple[Arrays, dict]:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    cases = json.loads(str(arrays.pop("meta")))["cases"] if "meta" in arrays else {}
    return arrays, cases


def inputs() -> Arrays:
    return load("inputs")[0]


class Golden:
    """One case of a file: its losses, its gradients, and the parameters that it starts from."""

    def __init__(self, name: str, case: str):
        arrays, cases = load(name)
        self.losses, decoder = cases[case]["losses"], cases[case]["decoder"]
        prefix = f"{case}/grad_"
        self.gradients = {
            key.removeprefix(prefix): array
            for key, array in arrays.items()
            if key.startswith(prefix)
        }
        self.params = {name: inputs()[name] for name in CORE} | {"W_dec": inputs()[decoder]}


def ours(
    name: str, params: Arrays, coefficient: float = 0.0, n_revived: int = 0, x=None, **options
):
    """Our loss, gradients and code on the same weights, in the libraries' units."""
    options = {"decoder_unit_norm": False, "bandwidth": 0.5, "k": K, **options}
    config = SAEConfig(activation_function=name, lambda_sparse=coefficient, **options)
    coder = SparseCoder(COLUMNS, COLUMNS, N, name, K)
    objective = Objective(coder, config, K, n_revived)
    arrays = {key: mx.array(array.astype(np.float32)) for key, array in params.items()}
    x = mx.array(inputs()["x"][0] if x is None else x)
    dead = mx.array(inputs()["dead"])
    (loss, found), gradients = mx.value_and_grad(objective)(
        arrays, x, x, dead, mx.array(coefficient / D)
    )
    code = objective.encode(arrays, x)
    z = code.values if code.pairs is None else code.pairs.dense(code.values)
    gradients = {key: D * np.array(g, np.float64) for key, g in gradients.items()}
    return D * loss.item(), gradients, np.array(z), D * found["error"].item()


def centred(params: Arrays) -> Arrays:
    """Parameters of ours that do what `params` do to `x - b_dec`."""
    return {**params, "b_enc": params["b_enc"] - params["W_enc"] @ params["b_dec"]}


def of_centred(gradients: Arrays, params: Arrays) -> Arrays:
    """The gradients of `params` from ours of `centred(params)`, by the chain rule."""
    at_bias = gradients["b_enc"]
    return {
        **gradients,
        "W_enc": gradients["W_enc"] - np.outer(at_bias, params["b_dec"]),
        "b_dec": gradients["b_dec"] - params["W_enc"].T @ at_bias,
    }


def near(found, expected, err_msg: str = "") -> None:
    expected = np.array(expected)
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest, err_msg=err_msg)


def same_gradients(found: Arrays, expected: Arrays, names) -> None:
    for name in names:
        near(found[name], expected[name], name)


@pytest.mark.parametrize(
    ("file", "name"), [("saelens_topk", "topk"), ("saelens_batchtopk", "batch_topk")]
)
def test_top_k_without_auxiliary_loss_equals_saelens(file, name, form):
    """Its auxiliary loss is another one: no ReLU, no division by the residual's variance."""
    golden = Golden(file, "plain")
    loss, gradients, z, error = ours(name, golden.params)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])
    near(z, load(file)[0]["z"])
    same_gradients(gradients, golden.gradients, CORE)


def test_top_k_of_a_centred_input_equals_saelens(form):
    golden = Golden("saelens_topk", "centred")
    loss, gradients, _, _ = ours("topk", centred(golden.params))
    near(loss, golden.losses["loss"])
    same_gradients(of_centred(gradients, golden.params), golden.gradients, CORE)


@pytest.mark.parametrize(("file", "name"), [("dl_topk", "topk"), ("dl_batchtopk", "batch_topk")])
def test_top_k_with_the_auxiliary_loss_equals_dictionary_learning(file, name, form):
    golden = Golden(file, "aux")
    options = {"n_revived": 16, "auxiliary_coefficient": 1 / 32 / D}
    loss, gradients, z, error = ours(name, centred(golden.params), **options)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["l2_loss"])
    ten_times = ours(name, centred(golden.params), n_revived=16, auxiliary_coefficient=10 / D)[0]
    near((ten_times - error) / 10, golden.losses["auxk_loss"])
    near(z, load(file)[0]["z"])
    same_gradients(of_centred(gradients, golden.params), golden.gradients, CORE)


def test_the_smallest_value_kept_equals_that_of_saelens():
    """Its running threshold moves by a hundredth of it; ours is the plain mean at first."""
    (case,) = (c for name, c in load("saelens_batchtopk")[1].items() if name == "plain")
    golden = Golden("saelens_batchtopk", "plain")
    _, _, z, _ = ours("batch_topk", golden.params)
    function = BatchTopK(K)
    smallest = UNDIVIDED.smallest(mx.array(z))
    found = function.average(function.averaged(), smallest)["threshold"].item()
    after = 0.99 * case["threshold_before"] + 0.01 * found
    assert after == pytest.approx(case["threshold_after"], rel=1e-5)


def check_updates(name: str, file: str) -> None:
    """Their parameters read `x - b_dec`. Adam's update depends on the parametrisation, and so our
    gradients are converted to theirs before our projection, clipping and Adam."""
    arrays, cases = load(file)
    case = cases["update"]
    params = {key: mx.array(inputs()[key]) for key in CORE}
    moments = initial_moments(params)
    options = {"n_revived": 16, "auxiliary_coefficient": 1 / 32 / D}
    for i, x in enumerate(inputs()["x"]):
        now = {key: np.array(array, np.float64) for key, array in params.items()}
        loss, gradients, _, _ = ours(name, centred(now), x=x, **options)
        near(loss, case["losses"][i])
        gradients = of_centred(gradients, now)
        gradients = {key: mx.array(gradients[key].astype(np.float32)) for key in CORE}
        gradients, norm = with_norm(gradients, params, unit_norm=True)
        rate = mx.array(case["learning_rate"])
        assert norm.item() > case["clip"]
        params, moments = adam(params, moments, gradients, norm, rate, case["clip"], True)
        for key in CORE:
            after = arrays.get(f"update/after_{i + 1}/{key}")
            if after is not None:
                near(np.array(params[key]), after, f"{key} after {i + 1}")


def test_full_updates_of_top_k_equal_dictionary_learning(form):
    check_updates("topk", "dl_topk")


def test_full_updates_of_batch_top_k_equal_dictionary_learning(form):
    check_updates("batch_topk", "dl_batchtopk")


def test_matryoshka_without_auxiliary_loss_equals_saelens(form):
    """Theirs is the sum over the three levels, ours the mean."""
    golden = Golden("saelens_matryoshka", "plain")
    options = {"matryoshka_prefixes": PREFIXES}
    loss, gradients, _, error = ours("batch_topk", golden.params, **options)
    near(3 * loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])
    same_gradients({n: 3 * g for n, g in gradients.items()}, golden.gradients, CORE)


def test_matryoshka_with_the_auxiliary_loss_equals_dictionary_learning(form):
    """It divides by the number of levels twice, ours once; the auxiliary loss it does not."""
    golden = Golden("dl_matryoshka", "aux")
    options = {"matryoshka_prefixes": PREFIXES, "n_revived": 16}
    options["auxiliary_coefficient"] = 3 / 32 / D
    loss, gradients, _, _ = ours("batch_topk", centred(golden.params), **options)
    near(loss / 3, golden.losses["loss"])
    gradients = of_centred({n: g / 3 for n, g in gradients.items()}, golden.params)
    same_gradients(gradients, golden.gradients, CORE)


def jump(golden: Golden, coefficient: float, penalty: str, **options):
    threshold = inputs()["threshold"].astype(np.float64)
    params = golden.params | trained_threshold(threshold)
    options = {"sparsity_penalty": penalty, **options}
    loss, gradients, z, error = ours("jumprelu", params, coefficient, **options)
    gradients["threshold"] = threshold_gradient(gradients, threshold)
    return loss, gradients, z, error


@pytest.mark.parametrize(("case", "penalty"), [("step", "l0"), ("tanh", "tanh")])
def test_jump_relu_equals_saelens(case, penalty):
    golden = Golden("saelens_jumprelu", case)
    loss, gradients, z, error = jump(golden, 0.3, penalty)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])
    near(loss - error, golden.losses["l0_loss"])
    near(z, load("saelens_jumprelu")[0]["z"])
    same_gradients(gradients, golden.gradients, (*CORE, "threshold"))


def test_jump_relu_s_quadratic_loss_equals_dictionary_learning():
    """All but the threshold's gradient, which there looks at one side of the threshold. Where no
    pre-activation lies in reach on the other side, that is the same as well."""
    golden = Golden("dl_jumprelu", "loss")
    options = {"target_l0": 5.0}
    loss, gradients, _, error = jump(golden, 0.7, "quadratic", **options)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["l2_loss"])
    same_gradients(gradients, golden.gradients, CORE)

    a = {name: array.astype(np.float64) for name, array in inputs().items()}
    below = a["threshold"] - (a["x"][0] @ a["W_enc"].T + a["b_enc"])
    same = ~((below > 0) & (below < 0.25)).any(axis=0) & (a["threshold"] > 0.25)
    assert same.sum() >= 3 and np.abs(golden.gradients["threshold"][same]).max() > 0.05
    near(gradients["threshold"][same], golden.gradients["threshold"][same])


def test_jump_relu_s_quadratic_gradient_follows_from_the_step_of_saelens():
    """SAELens squares every token's count, ours is of the mean: the chain rule through its `step`,
    for which `l0_loss = 0.3 * mean count`, gives the threshold's gradient."""
    step = Golden("saelens_jumprelu", "step")
    target, mean_count = 5.0, step.losses["l0_loss"] / 0.3
    _, gradients, _, error = jump(step, 0.7, "quadratic", target_l0=target)
    at_error = jump(step, 0.0, "l0")[1]["threshold"]
    at_count = (step.gradients["threshold"] - at_error) / 0.3
    expected = at_error + 0.7 * 2 * (mean_count / target - 1) / target * at_count
    near(gradients["threshold"], expected)


def of_two_maps(golden: Golden) -> Arrays:
    """Our parameters from those of the paper's gate and magnitudes."""
    found = {name: inputs()[name].astype(np.float64) for name in ("b_gate", "b_mag", "r_mag")}
    params = {name: golden.params[name] for name in ("W_enc", "W_dec", "b_dec")}
    offset = found["b_mag"] - np.exp(found["r_mag"]) * found["b_gate"]
    return {**params, "b_enc": found["b_gate"], "log_gain": found["r_mag"], "offset": offset}


def to_two_maps(gradients: Arrays) -> Arrays:
    """The gradients of the paper's parameters from ours, by the chain rule."""
    gain, at_offset = np.exp(inputs()["r_mag"].astype(np.float64)), gradients["offset"]
    return {
        **gradients,
        "b_mag": at_offset,
        "b_gate": gradients["b_enc"] - gain * at_offset,
        "r_mag": gradients["log_gain"] - gain * inputs()["b_gate"] * at_offset,
    }


GATED = ("W_enc", "b_gate", "b_mag", "r_mag")


def test_gated_equals_saelens_but_for_the_frozen_decoder():
    """SAELens lets the gate's reconstruction train the decoder; that part is added by hand."""
    golden = Golden("saelens_gated", "unit")
    params = of_two_maps(golden)
    loss, gradients, z, error = ours("gated", params, 0.4)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])
    near(z, load("saelens_gated")[0]["z"])
    same_gradients(to_two_maps(gradients), golden.gradients, GATED)
    x = inputs()["x"][0].astype(np.float64)
    gate = np.maximum(x @ params["W_enc"].T + params["b_enc"], 0)
    slope = 2 / len(x) * (gate @ params["W_dec"] + params["b_dec"] - x)
    near(gradients["W_dec"] + gate.T @ slope, golden.gradients["W_dec"])
    near(gradients["b_dec"] + slope.sum(axis=0), golden.gradients["b_dec"])


def test_gated_with_norms_has_the_loss_of_saelens():
    golden = Golden("saelens_gated", "norms")
    loss, _, _, error = ours("gated", of_two_maps(golden), 0.4)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])


def test_gated_equals_dictionary_learning():
    """Its penalty knows no decoder norms, as ours with rows of norm 1."""
    golden = Golden("dl_gated", "loss")
    params = of_two_maps(golden)
    loss, gradients, z, error = ours("gated", centred(params), 0.4, decoder_unit_norm=True)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])
    near(z, load("dl_gated")[0]["z"])
    found = to_two_maps(of_centred(gradients, params))
    same_gradients(found, golden.gradients, (*GATED, "W_dec", "b_dec"))


@pytest.mark.parametrize("case", ["unit", "norms"])
def test_relu_with_l1_weighted_by_decoder_norms_equals_saelens(case):
    golden = Golden("saelens_standard", case)
    loss, gradients, z, error = ours("relu", golden.params, 0.4)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])
    near(loss - error, golden.losses["l1_loss"])
    near(z, load("saelens_standard")[0]["z"])
    same_gradients(gradients, golden.gradients, CORE)


def test_relu_with_l1_weighted_by_decoder_norms_equals_dictionary_learning():
    """Its `AutoEncoder`; with `AutoEncoderNew` it squares the norms, for which ours has no form."""
    golden = Golden("dl_standard", "autoencoder")
    loss, gradients, _, error = ours("relu", centred(golden.params), 0.4)
    near(loss, golden.losses["loss"])
    near(error, golden.losses["mse_loss"])
    same_gradients(of_centred(gradients, golden.params), golden.gradients, CORE)
