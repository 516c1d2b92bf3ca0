"""Features that hardly ever fire: how they are counted, and how they get a new start."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.optimizer import unit_rows

MAX_WINDOW = 10_000_000

State = dict[str, Any]


def initial_counts(n_features: int) -> dict[str, mx.array]:
    """Nothing counted, and every feature living: firings in this half window and the one before."""
    return {
        "fired": mx.zeros((n_features,)),
        "fired_before": mx.full((n_features,), mx.inf),
        "counted": mx.array(0.0),
        "counted_before": mx.array(0.0),
    }


def half_window(wanted: int | None, n_steps: int, batch_size: int) -> int:
    """Steps in half a window of `wanted` tokens, by default a twentieth of the run."""
    if wanted is None:
        wanted = min(n_steps * batch_size // 20, MAX_WINDOW)
    return max(1, round(wanted / 2 / batch_size))


def next_half(state: State) -> State:
    """Counting starts anew, and what was counted is remembered for half a window."""
    for name in ("fired", "counted"):
        state = {**state, f"{name}_before": state[name], name: mx.zeros_like(state[name])}
    return state


def dead_features(state: State, threshold: float) -> mx.array:
    """Boolean `[n_features]`: fired on less than this share of the tokens counted.

    Firing is counted in half a window while the half before it is remembered; during the first
    half of the first window no feature is dead.
    """
    counted = state["counted"] + state["counted_before"]
    # At least half a firing, so that with a tiny threshold "dead" means "never".
    return state["fired"] + state["fired_before"] < mx.maximum(threshold * counted, 0.5)


def firing_rates(state: State) -> np.ndarray:
    """The share of the tokens counted on which each feature fired, `[n_features]`."""
    known = mx.isfinite(state["fired"]) & mx.isfinite(state["fired_before"])
    first = state["counted_before"] == 0
    fired = state["fired"] + mx.where(first, 0, state["fired_before"])
    counted = mx.maximum(state["counted"] + state["counted_before"], 1)
    return np.array(mx.where(known | (first & mx.isfinite(state["fired"])), fired / counted, 0))


def rows_to_revive(n_dead: int, n_features: int) -> int:
    """How many features the auxiliary loss looks at: `n_dead` rounded up to 16, 64, 256, ..., so
    that few different steps are compiled."""
    if n_dead == 0:
        return 0
    return min(4 ** max(2, math.ceil(math.log(n_dead, 4) - 1e-9)), n_features)


def resample(
    state: State,
    x: mx.array,
    y: mx.array,
    y_hat: mx.array,
    threshold: float,
    rng: np.random.Generator,
) -> State:
    """Point dead features at tokens of which `y_hat` is a bad reconstruction.

    `x` is what is read `[batch, d_in]`, `y` what is to be written `[batch, d_out]`. Tokens are
    drawn with a probability proportional to their squared loss. The decoder row becomes the token's
    normalised target, the encoder row its input with a fifth of the mean norm of living rows, the
    bias zero, thresholds and the like the mean of living ones; Adam starts anew for these rows.

    Reference: Bricken et al. 2023, "Towards Monosemanticity", appendix.
    """
    dead = np.flatnonzero(np.array(dead_features(state, threshold)))
    params = dict(state["params"])
    W_enc = params.get("W_enc", params["W_dec"])
    weights = np.array((y_hat - y).square().sum(axis=-1).square(), dtype=np.float64)
    if len(dead) == 0 or not np.isfinite(weights).all() or weights.sum() <= 0:
        return state
    drawn, rows = _draw(weights, len(dead), rng), mx.array(dead)
    alive = 1 - mx.zeros((len(W_enc),)).at[rows].add(1.0)

    def mean_of_living(values: mx.array) -> mx.array:
        return (values * alive).sum() / mx.maximum(alive.sum(), 1)

    norm = 0.2 * mean_of_living(mx.linalg.norm(W_enc, axis=-1))
    # The activation function's own arrays have one entry for each feature.
    others = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
    own = [name for name in params if name not in others]
    new = {name: mx.full((len(dead),), mean_of_living(params[name])) for name in own}
    new |= {"W_dec": unit_rows(y[drawn]), "b_enc": mx.zeros((len(dead),))}
    if "W_enc" in params:
        new["W_enc"] = norm * unit_rows(x[drawn])
    moments = {part: dict(state[part]) for part in ("m", "v")}
    for name, values in new.items():
        params[name] = _with_rows(params[name], rows, values)
        for moment in moments.values():
            moment[name] = _with_rows(moment[name], rows, mx.zeros_like(values))
    fired = _with_rows(state["fired"], rows, mx.full((len(dead),), mx.inf))
    return {**state, "params": params, **moments, "fired": fired}


def _draw(weights: np.ndarray, n: int, rng: np.random.Generator) -> mx.array:
    # Two features made of one token would stay the same for ever.
    repeat = bool(n > np.count_nonzero(weights))
    return mx.array(rng.choice(len(weights), size=n, replace=repeat, p=weights / weights.sum()))


def _with_rows(array: mx.array, rows: mx.array, values: mx.array) -> mx.array:
    copy = mx.array(array)
    copy[rows] = values
    return copy
