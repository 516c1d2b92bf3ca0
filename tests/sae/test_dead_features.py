import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.dead_features import (
    MAX_WINDOW,
    dead_features,
    firing_rates,
    half_window,
    initial_counts,
    next_half,
    resample,
    rows_to_revive,
)
from tests.sae.kinds import KINDS, settings
from tests.sae.runs import config, in_memory, run_of

N, D, BATCH = 40, 8, 32


def fire(state: dict, fired: list[float], n_tokens: float) -> dict:
    return {
        **state,
        "fired": state["fired"] + mx.array(fired),
        "counted": state["counted"] + n_tokens,
    }


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


def test_no_feature_is_dead_in_the_first_half_window():
    state = initial_counts(2)
    assert not dead_features(state, 0.5).any().item()
    state = fire(state, [0, 50], 100)
    assert not dead_features(state, 0.9).any().item()
    assert dead_features(next_half(state), 0.1).tolist() == [True, False]


def test_counting_covers_the_present_half_window_and_the_one_before():
    state = next_half(fire(initial_counts(3), [10, 0, 1], 100))
    state = fire(state, [0, 0, 2], 50)
    np.testing.assert_allclose(firing_rates(state), [10 / 150, 0, 3 / 150], rtol=1e-6)
    assert dead_features(state, 0.03).tolist() == [False, True, True]
    # Another half window on, the first is forgotten.
    state = next_half(fire(state, [0, 0, 0], 50))
    np.testing.assert_allclose(firing_rates(state), [0, 0, 2 / 100], rtol=1e-6)
    assert dead_features(state, 0.01).tolist() == [True, True, False]


def test_rates_of_the_first_half_window_are_those_of_what_was_counted():
    state = initial_counts(2)
    assert firing_rates(state).tolist() == [0, 0]
    np.testing.assert_allclose(firing_rates(fire(state, [5, 0], 20)), [0.25, 0])


def test_a_resampled_feature_has_no_rate_until_it_is_counted_anew():
    state = next_half(fire(initial_counts(2), [10, 0], 100))
    state = {**state, "fired": mx.array([3.0, mx.inf]), "counted": mx.array(50.0)}
    np.testing.assert_allclose(firing_rates(state), [13 / 150, 0], rtol=1e-6)
    state = next_half(state)
    assert firing_rates(fire(state, [1, 4], 50))[1] == 0
    assert not dead_features(fire(state, [1, 0], 50), 0.5)[1].item(), "judged by what it was"
    state = fire(next_half(fire(state, [1, 4], 50)), [1, 6], 50)
    np.testing.assert_allclose(firing_rates(state), [0.02, 0.1], rtol=1e-6)
    # The same where it was resampled within the first half window.
    first = {**initial_counts(2), "fired": mx.array([3.0, mx.inf]), "counted": mx.array(50.0)}
    np.testing.assert_allclose(firing_rates(first), [0.06, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "steps"), [(None, 2), (64, 1), (300, 5), (1, 1), (160, 2), (100_000, 1562)]
)
def test_half_a_window_is_a_whole_number_of_steps(wanted, steps):
    # 40 steps of 32 tokens: a twentieth are 64 tokens, and half of them one step.
    n_steps = 80 if wanted is None else 40
    assert half_window(wanted, n_steps, 32) == steps


def test_the_usual_window_of_a_long_run_is_bounded():
    assert half_window(None, 10**7, 1000) == MAX_WINDOW // 2000


@pytest.mark.parametrize(
    ("n_dead", "rows"),
    [(0, 0), (1, 16), (16, 16), (17, 64), (64, 64), (65, 256), (256, 256), (4096, 4096),
     (4097, 5000), (5000, 5000)],
)  # fmt: skip
def test_the_rows_of_the_auxiliary_loss_hold_all_dead_features_in_few_sizes(n_dead, rows):
    assert rows_to_revive(n_dead, 5000) == rows


def test_there_are_never_more_rows_than_features():
    assert [rows_to_revive(n, 10) for n in (0, 1, 10)] == [0, 10, 10]
    assert all(n <= rows_to_revive(n, 300) <= 300 for n in range(1, 301))


def batch(seed=0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array((rng.normal(size=(BATCH, D)) @ rng.normal(size=(D, D))).astype(np.float32))


def dead_mask(n=15) -> np.ndarray:
    dead = np.zeros(N, bool)
    dead[np.random.default_rng(3).permutation(N)[:n]] = True
    return dead


def state_with(dead: np.ndarray, tied=False, d_out=D) -> dict:
    """Random parameters and moments, in which these features are dead."""
    rng = np.random.default_rng(2)
    shapes = {"W_dec": (N, d_out), "b_dec": (d_out,), "b_enc": (N,), "W_enc": (N, D)}
    shapes = {name: shape for name, shape in shapes.items() if not (tied and name == "W_enc")}

    def arrays():
        return {n: mx.array(rng.normal(size=s).astype(np.float32)) for n, s in shapes.items()}

    fired = mx.array(np.where(dead, 0.0, 1e6).astype(np.float32))
    counts = {"fired": fired, "fired_before": mx.zeros((N,)), "counted": mx.array(1e4)}
    state = {**initial_counts(N), **counts, "params": arrays(), "m": arrays(), "v": arrays()}
    np.testing.assert_array_equal(np.array(dead_features(state, 1e-6)), dead)
    return state


def resampled(state: dict, x: mx.array, y: mx.array | None = None, y_hat=0.0, seed=0) -> dict:
    y = x if y is None else y
    rng = np.random.default_rng(seed)
    return resample(state, x, y, mx.broadcast_to(mx.array(y_hat), y.shape), 1e-6, rng)


@pytest.mark.parametrize("tied", [False, True])
def test_resampling_starts_dead_features_anew_and_leaves_the_living_alone(tied):
    dead, x = dead_mask(), batch()
    state = state_with(dead, tied)
    new = resampled(state, x)
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
    directions = np.array(x) / np.linalg.norm(np.array(x), axis=1, keepdims=True)
    similarity = W_dec[dead] @ directions.T
    np.testing.assert_allclose(similarity.max(axis=1), 1, atol=1e-5)
    assert len(set(similarity.argmax(axis=1))) == dead.sum(), "two features took the same token"
    if not tied:
        norms = np.linalg.norm(np.array(state["params"]["W_enc"]), axis=1)
        expected = W_dec[dead] * 0.2 * norms[~dead].mean()
        np.testing.assert_allclose(np.array(new["params"]["W_enc"])[dead], expected, atol=1e-5)
    assert not dead_features(new, 1e-6).any().item(), "a new feature is dead at once"
    assert mx.array_equal(state["params"]["W_dec"], state_with(dead, tied)["params"]["W_dec"])


def test_the_decoder_points_at_the_target_and_the_encoder_at_the_input():
    dead, x, y = dead_mask(), batch(), batch(1)[:, :5]
    params = resampled(state_with(dead, d_out=5), x, y)["params"]
    units = [np.array(a) / np.linalg.norm(np.array(a), axis=1, keepdims=True) for a in (x, y)]
    rows = (np.array(params["W_dec"])[dead] @ units[1].T).argmax(axis=1)
    np.testing.assert_allclose(np.array(params["W_dec"])[dead], units[1][rows], atol=1e-5)
    W_enc = np.array(params["W_enc"])[dead]
    W_enc /= np.linalg.norm(W_enc, axis=1, keepdims=True)
    np.testing.assert_allclose(W_enc, units[0][rows], atol=1e-5)


def test_a_skip_connection_stays_as_it_is():
    dead, x = dead_mask(), batch()
    state = state_with(dead)
    for part in ("params", "m", "v"):
        state[part]["W_skip"] = mx.ones((D, D))
    new = resampled(state, x)
    assert all(
        mx.array_equal(new[part]["W_skip"], mx.ones((D, D))) for part in ("params", "m", "v")
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "cross-layer" not in kind])
def test_a_run_of_a_coder_of_one_block_resamples_its_dead_features(kind):
    options = {"dead_neuron_threshold": 0.05, "resample_dead_every": 4, **settings(kind)}
    training, _ = in_memory(kind=kind)
    run = run_of(config(**options), training, kind=kind)
    for n in range(4):
        batch = next(training.batches(32, epoch=n))
        run.advance(batch)
    new = np.isinf(np.array(run.state["fired"]))
    assert 0 < new.sum() < run.coder.n_features
    # Rows that point at the tokens of the batch, of all sites that are written.
    _, y = run.builder.split(batch)
    y = np.array(y) / np.linalg.norm(np.array(y), axis=1, keepdims=True)
    cosines = np.array(run.state["params"]["W_dec"]) @ y.T
    np.testing.assert_allclose(cosines[new].max(axis=1), 1, atol=1e-5)
    assert (cosines[~new].max(axis=1) < 1 - 1e-4).all()
    if run.coder.has_skip:
        assert mx.isfinite(run.state["params"]["W_skip"]).all().item()


def test_resampling_features_that_write_different_sites_is_refused():
    kind = "cross-layer transcoder"
    options = config(**settings(kind)).replace(resample_dead_every=4)
    with pytest.raises(ValueError, match="resample_dead_every must be 0 .* got 4"):
        run_of(options, in_memory(kind=kind)[0], kind=kind)


class Choice:
    """Stands for a random generator: notes how tokens are drawn, and takes the first ones."""

    def choice(self, n, size, replace, p):
        self.chances, self.replace = p, replace
        return np.arange(size) % n


def test_tokens_are_drawn_in_proportion_to_their_squared_loss():
    # Squared errors of 1, 2 and 0: their squares make shares of 1/5, 4/5 and nothing.
    x = mx.array(np.eye(3, D, dtype=np.float32)) * mx.array([[1.0], [2**0.5], [0.0]])
    rng = Choice()
    resample(state_with(dead_mask(2)), x, x + 5, mx.full((3, D), 5.0), 1e-6, rng)
    np.testing.assert_allclose(rng.chances, [0.2, 0.8, 0], rtol=1e-5, atol=1e-9)
    assert not rng.replace
    # Three features and two tokens to learn from: one has to serve twice.
    resample(state_with(dead_mask(3)), x, x + 5, mx.full((3, D), 5.0), 1e-6, rng)
    assert rng.replace


def test_the_drawn_tokens_follow_from_the_generator():
    a, b, c = (resampled(state_with(dead_mask()), batch(), seed=n)["params"] for n in (0, 0, 1))
    assert mx.array_equal(a["W_dec"], b["W_dec"]) and not mx.array_equal(a["W_dec"], c["W_dec"])


def test_a_token_is_drawn_twice_only_where_there_are_too_few():
    dead, x = dead_mask(15), batch()[:4]
    W_dec = np.array(resampled(state_with(dead), x)["params"]["W_dec"])[dead]
    assert len(np.unique(W_dec.round(4), axis=0)) <= 4


def test_resampling_with_no_dead_feature_or_nothing_to_learn_changes_nothing():
    none_dead = state_with(dead_mask(0))
    assert resampled(none_dead, batch()) is none_dead
    state = state_with(dead_mask())
    assert resampled(state, batch() * mx.nan) is state
    assert resampled(state, batch(), mx.ones((BATCH, D)), 1.0) is state
