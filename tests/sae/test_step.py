import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import kernels
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.step import (
    Normalisation,
    dead_features,
    initial_params,
    initial_state,
    make_step,
    prepare,
    resample,
)
from tests.sae.reference import ReferenceTrainer

D, N, K, BATCH = 8, 40, 4, 32
COLUMNS = Columns(("layers.0.mlp",), (D,))
UNCHANGED = Normalisation(mx.zeros((D,)), mx.zeros((D,)), mx.ones((D,)))


@pytest.fixture(params=[True, False], ids=["segments", "dense products"])
def form(request, monkeypatch):
    monkeypatch.setattr(kernels, "_uses_segments", lambda: request.param)


def batches(n: int, seed: int = 0, scale: float = 1.0) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(D, D))
    return [
        mx.array((scale * rng.normal(size=(BATCH, D)) @ mixing).astype(np.float32))
        for _ in range(n)
    ]


def state_and_params(tied: bool = False):
    coder = SparseCoder(COLUMNS, COLUMNS, N, k=K)
    params = initial_params(coder, UNCHANGED, COLUMNS, tied, seed=1)
    rng = np.random.default_rng(2)
    # Away from the special initial values, so that every term of every gradient shows.
    for name in ("b_enc", "b_dec", "W_enc"):
        if name in params:
            params[name] += mx.array(0.3 * rng.normal(size=params[name].shape).astype(np.float32))
    return coder, params, initial_state(params)


def with_dead(state: dict, dead: np.ndarray) -> dict:
    fired = mx.array(np.where(dead, 0.0, 1e6).astype(np.float32))
    return {**state, "fired": fired, "fired_before": mx.zeros((N,)), "counted": mx.array(1e4)}


def dead_mask(n: int = 15) -> np.ndarray:
    dead = np.zeros(N, bool)
    dead[np.random.default_rng(3).permutation(N)[:n]] = True
    return dead


VARIANTS = {
    "plain": {},
    "with l1": {"lambda_sparse": 0.05},
    "clipped": {"gradient_clip": 0.05},
    "clip out of reach": {"gradient_clip": 1e3},
    "auxiliary": {"k_auxiliary": 6},
    "auxiliary with more than there are": {"k_auxiliary": 20},
    "tied": {"tied_weights": True},
    "everything": {
        "lambda_sparse": 0.01, "gradient_clip": 0.1, "k_auxiliary": 6, "tied_weights": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_the_dense_reference(variant, form):
    check_against_reference(VARIANTS[variant], compiled=False)


def test_compiled_step_equals_the_dense_reference(form):
    # MLX compiles CPU kernels once per machine, which takes seconds: one variant has every term.
    check_against_reference(VARIANTS["everything"], compiled=True)


def check_against_reference(options: dict, compiled: bool) -> None:
    options = {"gradient_clip": 0.0, **options}
    k_auxiliary = options.pop("k_auxiliary", 0)
    config = SAEConfig(k=K, auxiliary_coefficient=0.5, **options)
    coder, params, state = state_and_params(config.tied_weights)
    dead = dead_mask()
    state = with_dead(state, dead)
    reference = ReferenceTrainer(
        params, K, config.lambda_sparse, 0.5, k_auxiliary, config.gradient_clip
    )
    step = make_step(coder, COLUMNS, UNCHANGED, config, k_auxiliary)
    step = mx.compile(step) if compiled else step
    rate = 0.01
    for i, batch in enumerate(batches(4)):
        # The reference sees the features that the real one counts as dead.
        now_dead = np.array(dead_features(state, config.dead_neuron_threshold))
        before = state
        state = step(state, batch, mx.array(rate))
        mx.eval(state)
        loss, z, norm = reference.step(batch, batch, now_dead, rate)
        assert norm > config.gradient_clip or config.gradient_clip == 1e3
        loss_sum = (state["sums"]["loss"] - before["sums"]["loss"]).item()
        assert loss_sum == pytest.approx(loss, rel=2e-5)
        fired = np.array(state["fired"] - before["fired"])
        np.testing.assert_allclose(fired, (z > 0).sum(axis=0), atol=0.1)
        for name, expected in reference.m.items():
            scale = np.abs(expected).max()
            # After the first step the first moment is a tenth of the clipped gradient.
            found = np.array(state["m"][name])
            np.testing.assert_allclose(
                found, expected, rtol=1e-3, atol=2e-5 * scale, err_msg=f"{name} at step {i}"
            )
            np.testing.assert_allclose(
                np.array(state["v"][name]), reference.v[name], rtol=2e-3, atol=1e-4 * scale**2
            )
            np.testing.assert_allclose(
                np.array(state["params"][name]), reference.params[name], atol=2e-2 * rate
            )
    if k_auxiliary:
        assert np.abs(reference.m["b_enc"][dead]).max() > 0


def test_the_auxiliary_loss_moves_dead_features_and_no_others(form):
    coder, _, state = state_and_params()
    dead = dead_mask()
    state = with_dead(state, dead)
    gradients = {}
    for k_auxiliary in (0, 6):
        step = make_step(coder, COLUMNS, UNCHANGED, SAEConfig(k=K, gradient_clip=0), k_auxiliary)
        gradients[k_auxiliary] = step(state, batches(1)[0], mx.array(0.0))["m"]
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        added = np.abs(np.array(gradients[6][name] - gradients[0][name]))
        if name == "b_dec":
            assert not added.any()
            continue
        # Not exactly zero: a GPU adds what belongs to one feature in any order.
        rounding = 1e-6 * np.abs(np.array(gradients[0][name])).max()
        assert added[~dead].max() < rounding < 1e-2 * added[dead].max(), name
        reached = added[dead].reshape(dead.sum(), -1).max(axis=1) > 1e-6
        assert reached.all(), name


def test_decoder_rows_keep_unit_norm():
    coder, _, state = state_and_params()
    step = make_step(coder, COLUMNS, UNCHANGED, SAEConfig(k=K), 0)
    for batch in batches(5):
        state = step(state, batch, mx.array(0.3))
    norms = np.linalg.norm(np.array(state["params"]["W_dec"], np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e30])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(value):
    coder, _, state = state_and_params()
    step = make_step(coder, COLUMNS, UNCHANGED, SAEConfig(k=K), 0)
    good, bad = batches(2)
    state = step(state, good, mx.array(0.01))
    after = step(step(state, bad_entry(bad, value), mx.array(0.01)), bad * value, mx.array(0.01))
    for part in ("params", "m", "v", "sums"):
        for name, array in state[part].items():
            assert mx.array_equal(after[part][name], array), (part, name)
    for name in ("t", "fired", "fired_before", "counted"):
        assert mx.array_equal(after[name], state[name]), name
    assert after["skipped"].item() == 2 and after["skipped_in_a_row"].item() == 2
    recovered = step(after, good, mx.array(0.01))
    assert recovered["skipped"].item() == 2 and recovered["skipped_in_a_row"].item() == 0
    assert not mx.array_equal(recovered["params"]["W_dec"], state["params"]["W_dec"])


def bad_entry(batch: mx.array, value: float) -> mx.array:
    array = np.array(batch)
    array[3, 2] = value
    return mx.array(array)


def test_sums_add_up_loss_error_energy_and_l0():
    coder, params, state = state_and_params()
    step = make_step(coder, COLUMNS, UNCHANGED, SAEConfig(k=K), 0)
    expected = dict.fromkeys(("error", "energy", "l0"), 0.0)
    reference = ReferenceTrainer(params, K)
    for batch in batches(3):
        loss, z, _ = reference.gradients(batch, batch, np.zeros(N, bool))
        expected["error"] += loss
        expected["energy"] += np.mean(np.array(batch, np.float64) ** 2)
        expected["l0"] += (z > 0).sum(axis=1).mean()
        state = step(state, batch, mx.array(0.0))
    found = {name: total.item() for name, total in state["sums"].items()}
    assert found["n"] == 3 and found["loss"] == found["error"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_feature_is_dead_below_the_threshold_of_two_half_windows():
    state = {
        "fired": mx.array([0.0, 1.0, 0.0, 2.0, 0.0]),
        "fired_before": mx.array([0.0, 0.0, 1.0, 7.0, mx.inf]),
        "counted": mx.array(400.0),
        "counted_before": mx.array(600.0),
    }
    # 1000 tokens: a threshold of 0.005 asks for 5 firings, one of 1e-6 for any at all.
    assert dead_features(state, 0.005).tolist() == [True, True, True, False, False]
    assert dead_features(state, 1e-6).tolist() == [True, False, False, False, False]
    assert dead_features(state, 0.0).tolist() == [True, False, False, False, False]


def test_no_feature_is_dead_at_the_start():
    assert not dead_features(state_and_params()[2], 0.5).any().item()


def test_normalisation_centres_and_scales_each_site_by_itself():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(500, 5)) * [1, 2, 30, 40, 50] + [5, -5, 100, 0, -7]
    columns = Columns(("a", "b"), (2, 3))
    normalisation = Normalisation.measure(mx.array(sample.astype(np.float32)), columns, True)
    coder = SparseCoder(columns, columns, 10, k=2)
    x, y = prepare(mx.array(sample.astype(np.float32)), columns, normalisation, coder)
    x = np.array(x, np.float64)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    for part in (slice(0, 2), slice(2, 5)):
        width = part.stop - part.start
        assert (x[:, part] ** 2).sum(axis=1).mean() == pytest.approx(width, rel=1e-4)
    centred = sample - sample.mean(axis=0)
    by_hand = centred[:, 2:] * np.sqrt(3 / (centred[:, 2:] ** 2).sum(axis=1).mean())
    np.testing.assert_allclose(x[:, 2:], by_hand, atol=1e-4)
    assert mx.array_equal(y, mx.array(x.astype(np.float32)))


def test_without_normalisation_activations_stay_as_they_are():
    sample = batches(1)[0]
    normalisation = Normalisation.measure(sample, COLUMNS, False)
    x, _ = prepare(sample, COLUMNS, normalisation, SparseCoder(COLUMNS, COLUMNS, N, k=K))
    assert mx.array_equal(x, sample)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1234.5])
def test_equal_rows_do_not_vary_whatever_rounding_says(value):
    with pytest.raises(ValueError, match="the same on every token"):
        Normalisation.measure(mx.full((3000, D), value), COLUMNS, True)


@pytest.mark.parametrize("factor", [1e25, 1e-25])
def test_activations_beyond_float32_are_refused(factor):
    with pytest.raises(ValueError, match="too large or small for float32"):
        Normalisation.measure(batches(1)[0] * factor, COLUMNS, True)


def test_a_site_that_does_not_vary_is_named():
    sample = mx.concatenate([mx.random.normal((50, 2), key=mx.random.key(0)), mx.ones((50, 3))], 1)
    with pytest.raises(ValueError, match="'b' are the same on every token"):
        Normalisation.measure(sample, Columns(("a", "b"), (2, 3)), True)


@pytest.mark.parametrize("tied", [False, True])
def test_the_folded_coder_does_on_raw_activations_what_was_trained(tied):
    rng = np.random.default_rng(5)
    raw = rng.normal(size=(64, D)) * rng.uniform(1, 9, D) + rng.normal(size=D) * 20
    normalisation = Normalisation.measure(mx.array(raw.astype(np.float32)), COLUMNS, True)
    coder, params, _ = state_and_params(tied)
    normalisation.fold(params, COLUMNS, coder)

    p = {name: np.array(array, np.float64) for name, array in params.items()}
    centre, scale = (np.array(a, np.float64) for a in (normalisation.centre, normalisation.scale))
    pre = ((raw - centre) * scale) @ p.get("W_enc", p["W_dec"]).T + p["b_enc"]
    z = np.where(pre >= np.sort(pre, axis=1)[:, -K, None], np.maximum(pre, 0), 0)
    expected = (z @ p["W_dec"] + p["b_dec"]) / scale + centre
    x = mx.array(raw.astype(np.float32))
    np.testing.assert_allclose(np.array(coder(x)), expected, rtol=1e-4, atol=1e-3)
    # Codes are in units of the raw activation, because the decoder's rows have unit norm.
    np.testing.assert_allclose(np.array(coder.encode(x)), z / scale[0], rtol=1e-4, atol=1e-3)
    norms = np.linalg.norm(np.array(coder.W_dec, np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def test_the_decoder_starts_at_the_mean_and_the_encoder_at_its_transpose():
    coder = SparseCoder(COLUMNS, COLUMNS, N, k=K)
    sample = batches(1)[0] + 3
    normalisation = Normalisation.measure(sample, COLUMNS, False)
    params = initial_params(coder, normalisation, COLUMNS, False, seed=0)
    mean = np.array(sample, np.float64).mean(axis=0)
    np.testing.assert_allclose(np.array(params["b_dec"]), mean, rtol=1e-4, atol=1e-5)
    assert mx.array_equal(params["W_enc"], params["W_dec"])
    pre_of_mean = np.array(params["W_enc"], np.float64) @ mean + np.array(params["b_enc"])
    np.testing.assert_allclose(pre_of_mean, 0, atol=1e-4)
    other = initial_params(coder, normalisation, COLUMNS, False, seed=1)
    again = initial_params(coder, normalisation, COLUMNS, False, seed=0)
    assert mx.array_equal(params["W_dec"], again["W_dec"])
    assert not mx.array_equal(params["W_dec"], other["W_dec"])


@pytest.mark.parametrize("tied", [False, True])
def test_resampling_starts_dead_features_anew_and_leaves_the_living_alone(tied):
    coder, _, state = state_and_params(tied)
    step = make_step(coder, COLUMNS, UNCHANGED, SAEConfig(k=K), 0)
    (batch,) = batches(1)
    dead = dead_mask()
    state = with_dead(step(state, batch, mx.array(0.01)), dead)
    new = resample(state, batch, batch, coder, 1e-6, np.random.default_rng(0))
    for name in state["params"]:
        if name == "b_dec":
            assert mx.array_equal(new["params"][name], state["params"][name])
            continue
        for part in ("params", "m", "v"):
            before, after = np.array(state[part][name]), np.array(new[part][name])
            np.testing.assert_array_equal(after[~dead], before[~dead])
            if part != "params":
                assert not after[dead].any()
    W_dec, b_enc = np.array(new["params"]["W_dec"]), np.array(new["params"]["b_enc"])
    assert not b_enc[dead].any()
    tokens = np.array(batch) / np.linalg.norm(np.array(batch), axis=1, keepdims=True)
    similarity = W_dec[dead] @ tokens.T
    np.testing.assert_allclose(similarity.max(axis=1), 1, atol=1e-5)
    assert len(set(similarity.argmax(axis=1))) == dead.sum(), "two features took the same token"
    if not tied:
        norms = np.linalg.norm(np.array(state["params"]["W_enc"]), axis=1)
        expected = W_dec[dead] * 0.2 * norms[~dead].mean()
        np.testing.assert_allclose(np.array(new["params"]["W_enc"])[dead], expected, atol=1e-5)
    assert not dead_features(new, 1e-6).any().item(), "a new feature is dead at once"


def test_resampling_prefers_tokens_that_are_reconstructed_badly():
    coder, _, state = state_and_params()
    (batch,) = batches(1, scale=1e-3)
    far = mx.array(np.eye(BATCH, D, dtype=np.float32)[5] * 1e3)
    batch = mx.where(mx.arange(BATCH)[:, None] == 5, far, batch)
    dead = np.arange(N) == 7
    new = resample(with_dead(state, dead), batch, batch, coder, 1e-6, np.random.default_rng(0))
    np.testing.assert_allclose(np.array(new["params"]["W_dec"])[7], np.eye(D)[5], atol=1e-6)


def test_resampling_with_no_dead_feature_or_a_bad_batch_changes_nothing():
    coder, _, state = state_and_params()
    (batch,) = batches(1)
    rng = np.random.default_rng(0)
    none_dead = with_dead(state, dead_mask(0))
    assert resample(none_dead, batch, batch, coder, 1e-6, rng) is none_dead
    bad = batch * mx.nan
    some_dead = with_dead(state, dead_mask())
    assert resample(some_dead, bad, bad, coder, 1e-6, rng) is some_dead
