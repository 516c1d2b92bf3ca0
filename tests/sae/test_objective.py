import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import kernels
from mlxterp.sae.activation_functions import ACTIVATION_FUNCTIONS
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.objective import Objective
from tests.sae.kinds import KINDS, dense_decoder, dense_encoder, make
from tests.sae.reference import Reference, trained_threshold

BATCH, N, K = 24, 30, 4
NAMES = sorted(ACTIVATION_FUNCTIONS)
SELECTING = [name for name in NAMES if ACTIVATION_FUNCTIONS[name].selects]
PREFIXES, BOUNDS = (0.2, 0.5), (6, 15)


@pytest.fixture(params=[True, False], ids=["segments", "dense products"])
def form(request, monkeypatch):
    if request.param and mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("segments are the form of the CPU")
    monkeypatch.setattr(kernels, "_uses_segments", lambda: request.param)


class Problem:
    """A coder of one of the kinds; parameters, data, dead features."""

    def __init__(self, name: str, tied: bool = False, seed: int = 0, kind: str = ""):
        rng = np.random.default_rng(seed)
        self.coder = make(kind or ("sae" if tied else "transcoder"), name, N, K)
        d_in, d_out = self.coder.d_in, self.coder.d_out
        rows = len(self.coder.W_dec)
        arrays = {
            "W_dec": rng.normal(size=self.coder.W_dec.shape) * rng.uniform(0.3, 0.7, (rows, 1)),
            "b_dec": rng.normal(size=d_out),
            "b_enc": 0.3 * rng.normal(size=N),
        }
        if not tied:
            arrays["W_enc"] = 0.5 * rng.normal(size=self.coder.W_enc.shape)
        if self.coder.has_skip:
            arrays["W_skip"] = 0.5 * rng.normal(size=(d_out, d_in))
        if name == "jumprelu":
            arrays |= trained_threshold(rng.uniform(0.2, 0.9, N))
        if name == "gated":
            arrays |= {"log_gain": 0.5 * rng.normal(size=N), "offset": 0.5 * rng.normal(size=N)}
        self.params = {n: mx.array(a.astype(np.float32)) for n, a in arrays.items()}
        self.x = mx.array(rng.normal(size=(BATCH, d_in)).astype(np.float32))
        self.y = mx.array((1 + rng.normal(size=(BATCH, d_out))).astype(np.float32))
        if self.coder.reads == self.coder.writes:
            self.y = self.x
        self.dead = np.isin(np.arange(N), rng.permutation(N)[:9])

    def gradients(self, config: SAEConfig, n_revived: int = 0, coefficient: float = 0.0):
        objective = Objective(self.coder, config, K, n_revived)
        (loss, found), gradients = mx.value_and_grad(objective)(
            self.params, self.x, self.y, mx.array(self.dead), mx.array(coefficient)
        )
        gradients = {name: np.array(g, np.float64) for name, g in gradients.items()}
        return loss.item(), found, gradients

    def reference(self, config: SAEConfig, n_revived: int = 0, coefficient: float = 0.0):
        coder = self.coder
        blocks = tuple((b.features, b.reads, b.writes) for b in coder.blocks)
        weights = config.weights_of(coder.writes.names)
        importance = None
        if weights is not None:
            importance = np.repeat(weights, coder.writes.widths)
            importance = mx.array(importance / importance.mean(), mx.float64)
        reference = Reference(
            config,
            bounds=BOUNDS if config.matryoshka_prefixes else (),
            k_auxiliary=self.y.shape[1] // 2 if n_revived else 0,
            sites=tuple(coder.writes.slices.values()),
            blocks=blocks,
            importance=importance,
        )
        params = dict(self.params)
        if len(blocks) > 1:
            params["W_enc"] = dense_encoder(coder, params["W_enc"])
            params["W_dec"] = dense_decoder(coder, params["W_dec"])
        loss, terms, gradients = reference.gradients(params, self.x, self.y, self.dead, coefficient)
        if len(blocks) > 1:
            W_enc, W_dec = gradients["W_enc"], gradients["W_dec"]
            gradients["W_enc"] = np.concatenate([W_enc[f, r] for f, r, _ in blocks])
            rows = [W_dec[f, w].reshape(-1, coder.W_dec.shape[1]) for f, _, w in blocks]
            gradients["W_dec"] = np.concatenate(rows)
        return loss, terms, gradients


def config_of(name: str, **options) -> SAEConfig:
    return SAEConfig(
        activation_function=name, k=K, bandwidth=0.6, auxiliary_coefficient=0.5, **options
    )


def check(problem: Problem, config: SAEConfig, n_revived: int, coefficient: float) -> None:
    loss, found, gradients = problem.gradients(config, n_revived, coefficient)
    expected_loss, terms, expected = problem.reference(config, n_revived, coefficient)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found["error"].item() == pytest.approx(terms["error"].item(), rel=1e-5)
    active = terms["z"] != 0
    assert found["l0"].item() == pytest.approx(active.sum() / BATCH, rel=1e-6)
    assert found["firings"].tolist() == active.sum(axis=0).tolist()
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        largest = np.abs(gradient).max()
        assert largest > 1e-4, f"{name} has no gradient to test"
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=0, atol=1e-5 * largest, err_msg=name
        )


VARIANTS = list(itertools.product([(), PREFIXES], [False, True], [True, False]))
IDS = [
    f"{'matryoshka' if p else 'plain'}-{'tied' if t else 'two maps'}-{'unit' if u else 'free'}"
    for p, t, u in VARIANTS
]


def check_variant(name: str, variant) -> None:
    prefixes, tied, unit_norm = variant
    config = config_of(
        name, lambda_sparse=0.1, matryoshka_prefixes=prefixes, decoder_unit_norm=unit_norm
    )
    check(Problem(name, tied), config, n_revived=16, coefficient=0.1)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("name", SELECTING)
def test_functions_that_select_have_the_loss_and_gradients_of_the_dense_form(name, variant, form):
    check_variant(name, variant)


@pytest.mark.parametrize("unit_norm", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_has_the_loss_and_gradients_of_the_dense_form(name, kind, unit_norm, form):
    problem = Problem(name, kind=kind)
    weights = [1.0, 2.5] if len(problem.coder.writes.names) == 2 else None
    config = config_of(
        name, lambda_sparse=0.1, decoder_unit_norm=unit_norm, component_weights=weights
    )
    check(problem, config, n_revived=16, coefficient=0.1)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SELECTING)))
def test_penalised_functions_have_the_loss_and_gradients_of_the_dense_form(name, variant):
    check_variant(name, variant)


PENALTIES = [(name, p) for name in NAMES for p in ACTIVATION_FUNCTIONS[name].penalties]


@pytest.mark.parametrize("unit_norm", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize(("name", "penalty"), PENALTIES)
def test_every_penalty_of_every_function_equals_the_reference(name, penalty, unit_norm):
    config = config_of(
        name, lambda_sparse=1.0, sparsity_penalty=penalty, decoder_unit_norm=unit_norm
    )
    check(Problem(name), config, n_revived=0, coefficient=0.7)


def test_the_quadratic_penalty_looks_at_the_target():
    problem = Problem("jumprelu")
    losses = {}
    for target in (3.0, 6.0):
        config = config_of("jumprelu", sparsity_penalty="quadratic", target_l0=target)
        loss, found, _ = problem.gradients(config, coefficient=2.0)
        losses[target] = loss - 2 * (found["l0"].item() / target - 1) ** 2
    assert losses[3.0] == pytest.approx(losses[6.0], rel=1e-5)


def test_without_a_penalty_the_coefficient_does_not_count():
    problem = Problem("topk")
    losses = [problem.gradients(config_of("topk"), coefficient=c)[0] for c in (0.0, 5.0)]
    assert (
        losses[0] == losses[1] == pytest.approx(problem.reference(config_of("topk"))[0], rel=1e-5)
    )


def active(problem: Problem, config: SAEConfig) -> mx.array:
    (code,) = Objective(problem.coder, config, K).codes(problem.params, problem.x)
    values = code.values if code.pairs is None else code.pairs.dense(code.values)
    return values != 0


def same_active_features(config: SAEConfig, tied: bool) -> Problem:
    """The first problem whose active features do not hang on what bfloat16 cannot tell apart."""
    exact = config.replace(precision="float32")
    problems = (Problem(config.activation_function, tied, seed) for seed in range(50))
    return next(p for p in problems if mx.array_equal(active(p, config), active(p, exact)))


@pytest.mark.parametrize("tied", [False, True], ids=["two maps", "tied"])
@pytest.mark.parametrize("prefixes", [(), PREFIXES], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_products_are_near_the_reference(name, prefixes, tied, form):
    options = {
        "lambda_sparse": 0.1, "decoder_unit_norm": False, "matryoshka_prefixes": prefixes,
    }  # fmt: skip
    config = config_of(name, precision="bfloat16", **options)
    problem = same_active_features(config, tied)
    loss, _, gradients = problem.gradients(config, 16, 0.1)
    expected_loss, _, expected = problem.reference(config_of(name, **options), 16, 0.1)
    assert loss == pytest.approx(expected_loss, rel=0.02) and loss != expected_loss
    for key, gradient in expected.items():
        found = gradients[key]
        cosine = (found * gradient).sum() / np.linalg.norm(found) / np.linalg.norm(gradient)
        assert cosine > 0.99, key
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(gradient), rel=0.02), key
        assert problem.params[key].dtype == mx.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_code_in_training_is_dense_or_at_pairs_and_counts_its_firings(name):
    problem = Problem(name)
    _, terms, _ = problem.reference(config_of(name))
    code = Objective(problem.coder, config_of(name), K).encode(problem.params, problem.x)
    assert (code.pairs is not None) == (name in SELECTING)
    values = code.values if code.pairs is None else code.pairs.dense(code.values)
    np.testing.assert_allclose(np.array(values), terms["z"], atol=1e-5)
    assert code.firings().tolist() == (terms["z"] != 0).sum(axis=0).tolist()
    y_hat = Objective(problem.coder, config_of(name), K).reconstruct(problem.params, problem.x)
    expected = terms["z"] @ np.array(problem.params["W_dec"], np.float64)
    expected = expected + np.array(problem.params["b_dec"])
    np.testing.assert_allclose(np.array(y_hat), expected, atol=2e-5)


def test_more_active_values_than_float32_can_count_one_by_one_are_counted():
    n_features, n_tokens = 4200, 4096
    site = Columns(("a",), (1,))
    coder = SparseCoder(site, site, n_features, "relu", None)
    params = {name: mx.zeros((n_features, 1)) for name in ("W_enc", "W_dec")}
    params |= {"b_enc": mx.ones((n_features,)), "b_dec": mx.zeros((1,))}
    x = mx.zeros((n_tokens, 1))
    _, found = Objective(coder, config_of("relu"), K)(params, x, x, mx.array(False), mx.array(1.0))
    assert n_tokens * n_features > 2**24 and found["l0"].item() == n_features


def test_k_is_that_of_the_objective_and_not_of_the_coder():
    problem = Problem("topk")
    code = Objective(problem.coder, config_of("topk"), 9).encode(problem.params, problem.x)
    assert len(code.values) == 9 * BATCH


def test_the_gate_reconstructs_through_a_frozen_decoder():
    """What the gate's reconstruction adds, by hand: no gradient for `W_dec` and `b_dec`."""
    problem = Problem("gated")
    p = {name: np.array(array, np.float64) for name, array in problem.params.items()}
    x, y = np.array(problem.x, np.float64), np.array(problem.y, np.float64)
    pre = x @ p["W_enc"].T + p["b_enc"]
    gate = np.maximum(pre, 0)
    z = (pre > 0) * np.maximum(np.exp(p["log_gain"]) * pre + p["offset"], 0)
    error, from_gate = (c @ p["W_dec"] + p["b_dec"] - y for c in (z, gate))
    size = y.size
    loss, _, gradients = problem.gradients(config_of("gated"))
    assert loss == pytest.approx(((error**2).sum() + (from_gate**2).sum()) / size, rel=1e-5)
    np.testing.assert_allclose(gradients["W_dec"], 2 * z.T @ error / size, atol=1e-5)
    np.testing.assert_allclose(gradients["b_dec"], 2 * error.sum(axis=0) / size, atol=1e-5)
    at_gate = (pre > 0) * (from_gate @ p["W_dec"].T)
    at_code = (z > 0) * np.exp(p["log_gain"]) * (error @ p["W_dec"].T)
    expected = 2 * (at_gate + at_code).sum(axis=0) / size
    np.testing.assert_allclose(gradients["b_enc"], expected, atol=1e-5)


@pytest.mark.parametrize("n_revived", [9, 16, N])
def test_looking_at_more_rows_than_are_dead_changes_nothing(n_revived):
    check(Problem("topk"), config_of("topk"), n_revived, 0.0)


def test_the_auxiliary_loss_with_fewer_rows_looks_at_dead_features_only():
    problem = Problem("topk")
    plain = problem.gradients(config_of("topk"))[2]
    revived = problem.gradients(config_of("topk"), n_revived=4)[2]
    changed = np.abs(revived["b_enc"] - plain["b_enc"]) > 1e-6
    assert 0 < changed.sum() <= 4 and problem.dead[changed].all()


def test_with_no_dead_feature_the_auxiliary_loss_is_a_constant():
    problem = Problem("topk")
    problem.dead = np.zeros(N, bool)
    plain, revived = (problem.gradients(config_of("topk"), n_revived=n)[2] for n in (0, 16))
    for name, gradient in plain.items():
        np.testing.assert_allclose(revived[name], gradient, atol=1e-7)


@pytest.mark.parametrize(
    ("prefixes", "bounds"),
    [((0.5,), (15,)), ((1e-6, 0.1), (1, 3)), ((0.5, 0.51, 0.9999), (15, 29))],
)
def test_prefixes_hold_at_least_one_feature_and_no_bound_is_twice(prefixes, bounds):
    problem = Problem("relu")  # every feature is active somewhere
    config = config_of("relu", matryoshka_prefixes=prefixes)
    loss, _, gradients = problem.gradients(config)
    reference = Reference(config, bounds)
    expected, _, by_hand = reference.gradients(problem.params, problem.x, problem.y, problem.dead)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradients["W_dec"], by_hand["W_dec"], atol=1e-5)
