from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset, SAEConfig
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.latent_scaling import latent_scaling
from mlxterp.sae.objective import Objective

SITES = ("a", "b")


def random_coder(n: int = 10, widths=(6, 6), seed: int = 0, **options) -> SparseCoder:
    columns = Columns(SITES, widths)
    coder = SparseCoder(columns, columns, n, **{"activation_function": "relu", **options})
    rng = np.random.default_rng(seed)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        coder[name] = mx.array(rng.normal(size=coder[name].shape).astype(np.float32))
    coder.site_scale = mx.array([0.5, 2.0])
    return coder


def data(n_tokens: int, widths=(6, 6), mean: float = 0.0):
    rng = np.random.default_rng(1)
    arrays = {
        s: (rng.normal(size=(n_tokens, d)) * (i + 1) + mean).astype(np.float32)
        for i, (s, d) in enumerate(zip(SITES, widths, strict=True))
    }
    return arrays, ActivationDataset.from_activations(arrays)


def by_hand(coder: SparseCoder, arrays: dict) -> dict[str, np.ndarray]:
    """Everything by its definition, feature by feature, in float64, for a ReLU coder."""
    W_enc, b_enc, W_dec, b_dec = (
        np.array(coder[name], np.float64) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    x = np.concatenate(list(arrays.values()), axis=1).astype(np.float64)
    z = np.maximum(x @ W_enc.T + b_enc, 0)
    error = x - z @ W_dec - b_dec
    reconstruction = z @ W_dec + b_dec
    scale = np.array(coder.site_scale, np.float64)
    parts = list(coder.writes.slices.values())
    norms = np.stack([np.linalg.norm(W_dec[:, p], axis=1) for p in parts], axis=1) * scale
    found = {key: [] for key in ("strengths", "nu_error", "nu_reconstruction", "noise")}
    for j in range(coder.n_features):
        f, s = z[:, j], norms[j].argmax()
        d = W_dec[j, parts[s]] * scale[s]
        betas, strengths, noise = np.zeros((2, 2)), np.zeros(2), np.zeros(2)
        for m, part in enumerate(parts):
            e = error[:, part] * scale[m]
            Y = e + np.outer(f, W_dec[j, part] * scale[m])
            R = reconstruction[:, part] * scale[m]
            R = R - R.mean(axis=0)
            if len(set(coder.writes.widths)) == 1:
                # The scalar beta for which beta f d is nearest to the target.
                design = np.outer(f, d).reshape(-1, 1)
                betas[m, 0] = np.linalg.lstsq(design, Y.reshape(-1), rcond=None)[0][0]
                betas[m, 1] = np.linalg.lstsq(design, R.reshape(-1), rcond=None)[0][0]
            noise[m] = np.sum(f**2 * np.sum(e**2, axis=1))
            strengths[m] = np.sqrt(max(np.sum((Y.T @ f) ** 2) - noise[m], 0)) / np.sum(f**2)
            noise[m] = np.sqrt(noise[m]) / np.sum(f**2)
        found["strengths"].append(strengths)
        found["noise"].append(noise[1 - s] / strengths[s])
        with np.errstate(invalid="ignore"):
            nu = np.where(betas[s] < 0, np.inf, betas[1 - s] / betas[s])
        found["nu_error"].append(nu[0])
        found["nu_reconstruction"].append(nu[1])
    return {key: np.array(values) for key, values in found.items()}


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_everything_follows_its_definition_in_float64(mean):
    coder, (arrays, dataset) = random_coder(), data(9000, mean=mean)
    coder.b_enc = coder.b_enc - mean * coder.W_enc.sum(axis=1)
    coder.b_dec = coder.b_dec + mean
    # As a coder that has been trained would have it: the code is worth something.
    coder.W_dec = 0.2 * coder.W_enc
    found, expected = latent_scaling(coder, dataset), by_hand(coder, arrays)
    for name in expected:
        known = expected[name][np.isfinite(expected[name])]
        close = {"rtol": 2e-3, "atol": 2e-3 * np.abs(known).max()}
        assert known.size >= 4
        np.testing.assert_allclose(getattr(found, name), expected[name], **close, err_msg=name)
    assert found.n_tokens == 9000 and (found.firings > 0).all()


def test_nu_looks_at_the_reconstruction_about_its_mean():
    coder, (_, dataset) = random_coder(), data(3000)
    before = latent_scaling(coder, dataset).nu_reconstruction
    coder.b_dec = coder.b_dec + 50
    np.testing.assert_array_equal(latent_scaling(coder, dataset).nu_reconstruction, before)


def test_sites_of_different_widths_are_compared_without_a_direction():
    coder, (arrays, dataset) = random_coder(widths=(6, 9)), data(4000, widths=(6, 9))
    found, expected = latent_scaling(coder, dataset), by_hand(coder, arrays)
    np.testing.assert_allclose(found.strengths, expected["strengths"], rtol=2e-3)
    np.testing.assert_allclose(found.noise, expected["noise"], rtol=2e-3)
    assert np.isnan(found.nu_error).all() and np.isnan(found.nu_reconstruction).all()


def test_what_noise_alone_gives_is_taken_off():
    """A feature of B that fires a hundred times, against noise in A."""
    columns = Columns(SITES, (32, 32))
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        f = np.zeros((2000, 1))
        f[:100] = rng.uniform(0.5, 1.5, (100, 1))
        coder = SparseCoder(columns, columns, 1, activation_function="relu")
        row = np.concatenate([np.zeros(32), np.eye(32)[0]])[None].astype(np.float32)
        coder.W_enc = coder.W_dec = mx.array(row)
        noise = 0.3 * rng.normal(size=(2000, 32))
        b = np.concatenate([f, np.zeros((2000, 31))], axis=1)
        dataset = ActivationDataset.from_activations(
            {"a": noise.astype(np.float32), "b": b.astype(np.float32)}
        )
        found.append(latent_scaling(coder, dataset))
    noise = np.mean([scaling.noise for scaling in found])
    assert noise == pytest.approx(0.3 * np.sqrt(32 / 108), rel=0.05)
    squares = [scaling.strengths[0, 0] ** 2 for scaling in found]
    assert np.mean(squares) < 0.25 * noise**2


def test_features_that_never_fire_have_no_strength():
    coder, (_, dataset) = random_coder(), data(300)
    coder.b_enc = mx.where(mx.arange(10) == 3, -1e6, coder.b_enc)
    found = latent_scaling(coder, dataset)
    assert found.firings[3] == 0 and np.isnan(found.strengths[3]).all()
    assert np.isnan(found.nu_error[3]) and np.isnan(found.noise[3])
    assert np.isfinite(np.delete(found.strengths, 3, axis=0)).all()


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
@pytest.mark.parametrize("penalty", ["l1", "tanh"])
def test_shrinkage_is_where_the_gradient_of_the_objective_vanishes(penalty, weights):
    """The decoder norms that `Objective` leaves are the true ones less the shrinkage."""
    rng = np.random.default_rng(0)
    f = mx.array(np.where(rng.random((4000, 1)) < 0.3, rng.uniform(0.2, 1.0, (4000, 1)), 0.0))
    f = f.astype(mx.float32)
    columns, units = Columns(SITES, (5, 8)), [rng.normal(size=d) for d in (5, 8)]
    units = [mx.array((u / np.linalg.norm(u)).astype(np.float32)) for u in units]
    true = (0.9, 0.5)
    y = mx.concatenate([a * f * u for a, u in zip(true, units, strict=True)], axis=1)
    coefficient = 0.02
    settings = {
        "activation_function": "relu", "lambda_sparse": coefficient, "sparsity_penalty": penalty,
        "component_weights": weights,
    }  # fmt: skip
    coder = SparseCoder(columns, columns, 1, activation_function="relu")
    coder.W_enc = mx.concatenate([units[0] / true[0], mx.zeros((8,))])[None]
    coder.metadata = SimpleNamespace(config=SAEConfig(**settings).to_dict())
    dataset = ActivationDataset.from_activations({"a": y[:, :5], "b": y[:, 5:]})

    norms = np.array(true)
    for _ in range(30):  # the slope of tanh depends on the norms that it makes
        rows = [float(n) * u for n, u in zip(norms, units, strict=True)]
        coder.W_dec = mx.concatenate(rows)[None]
        (lost,) = latent_scaling(coder, dataset).shrinkage
        norms = np.array(true) - lost
    assert (lost > 0.01).all() and (norms > 0.01).all()
    assert lost[1] == pytest.approx(lost[0] * (1 if weights is None else 3), rel=1e-5)

    objective = Objective(coder, SAEConfig(**settings), k=1)
    params = {name: coder[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    def loss(W_dec):
        arguments = y, y, mx.zeros((1,), mx.bool_), mx.array(coefficient)
        return objective({**params, "W_dec": W_dec}, *arguments)[0]

    at_optimum = float(mx.abs(mx.grad(loss)(coder.W_dec)).max())
    elsewhere = float(mx.abs(mx.grad(loss)(coder.W_dec * 1.1)).max())
    assert at_optimum < 0.02 * elsewhere


@pytest.mark.parametrize(
    "function, options, config",
    [("topk", {"k": 3}, {}), ("batch_topk", {"k": 3}, {}), ("jumprelu", {}, {}),
     ("jumprelu", {}, {"lambda_sparse": 0.3}), ("gated", {}, {"sparsity_penalty": "l1"})],
)  # fmt: skip
def test_only_penalties_on_values_shrink(function, options, config):
    coder, (_, dataset) = random_coder(activation_function=function, **options), data(300)
    coder.metadata = SimpleNamespace(config=config)
    training = ({"loss": 1.0, "sparsity_coefficient": 0.5},)
    coder.statistics = SimpleNamespace(training=training)
    found = latent_scaling(coder, dataset)
    if function == "gated":
        assert found.coefficient == 0.5 and (found.shrinkage > 0).all()
    else:
        assert found.coefficient is None and (found.shrinkage == 0).all()


def test_the_coefficient_is_the_callers_or_the_last_reported_or_the_configured():
    coder, (_, dataset) = random_coder(), data(300)
    unknown = latent_scaling(coder, dataset)
    assert unknown.coefficient is None and np.isnan(unknown.shrinkage).all()
    coder.metadata = SimpleNamespace(config={"lambda_sparse": 0.1})
    configured = latent_scaling(coder, dataset)
    reports = tuple({"sparsity_coefficient": c} for c in (0.7, 0.2)) + ({"fvu": 0.1},)
    coder.statistics = SimpleNamespace(training=reports)
    reported = latent_scaling(coder, dataset)
    given = latent_scaling(coder, dataset, coefficient=0.3)
    assert [s.coefficient for s in (configured, reported, given)] == [0.1, 0.2, 0.3]
    np.testing.assert_allclose(given.shrinkage, 3 * configured.shrinkage, rtol=1e-6)
    with pytest.raises(ValueError, match="coefficient must be a number >= 0, got -1"):
        latent_scaling(coder, dataset, coefficient=-1)


def test_topk_with_a_penalty_shrinks_as_well():
    coder, (_, dataset) = random_coder(activation_function="topk", k=3), data(300)
    coder.metadata = SimpleNamespace(config={"lambda_sparse": 0.1})
    found = latent_scaling(coder, dataset)
    assert found.coefficient == 0.1 and (found.shrinkage[found.firings > 0] > 0).all()


def test_shrinkage_does_not_depend_on_the_scale_of_the_code():
    """Codes twice as large go with rows and shrinkage half as large."""
    coder, (_, dataset) = random_coder(), data(1000)
    before = latent_scaling(coder, dataset, coefficient=0.1)
    coder.W_enc, coder.b_enc, coder.W_dec = 2 * coder.W_enc, 2 * coder.b_enc, coder.W_dec / 2
    after = latent_scaling(coder, dataset, coefficient=0.1)
    np.testing.assert_allclose(after.shrinkage, before.shrinkage / 2, rtol=1e-5)
    np.testing.assert_allclose(after.strengths, before.strengths / 2, rtol=1e-4)
    np.testing.assert_allclose(after.ratios, before.ratios, rtol=1e-4)
