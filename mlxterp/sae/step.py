"""One training step as one function: gradients, clipping, Adam, decoder norm, firing counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.kernels import decode_pairs, pre_activations_at
from mlxterp.sae.losses import auxiliary, l1, squared_error

State = dict[str, Any]
Step = Callable[[State, mx.array, mx.array], State]

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Normalisation:
    """`(x - centre) * scale` per column; `mean` is the mean of the activations in any case."""

    mean: mx.array
    centre: mx.array
    scale: mx.array

    @classmethod
    def measure(cls, sample: mx.array, columns: Columns, active: bool) -> Normalisation:
        """From a sample `[n_tokens, width]`: centre every site and scale it to a mean squared norm
        equal to its width; where not `active`, leave the activations as they are.

        Raises `ValueError` for a site that does not vary, or beyond what float32 can square.
        """
        sample = sample.astype(mx.float32)
        mean = sample.mean(axis=0)
        variance = (sample - mean).square().mean(axis=0)
        scales = []
        for name, part in columns.slices.items():
            mean_variance = variance[part].mean()
            # Compared, because the mean is rounded: equal rows may seem to vary around it.
            if mx.array_equal(sample[1:, part], sample[:-1, part]):
                raise ValueError(f"The activations of {name!r} are the same on every token.")
            if not (mean_variance > 0).item() or mx.isinf(mean_variance).item():
                raise ValueError(f"The activations of {name!r} are too large or small for float32.")
            scales.append(mx.broadcast_to(mx.rsqrt(mean_variance), (part.stop - part.start,)))
        if not active:
            return cls(mean, mx.zeros_like(mean), mx.ones_like(mean))
        return cls(mean, mean, mx.concatenate(scales))

    def fold(self, params: dict[str, mx.array], columns: Columns, coder: SparseCoder) -> None:
        """Write into `coder` the arrays that do on raw activations what `params` do on normalised.

        The code is scaled so that decoder rows keep a mean norm of 1.
        """
        centre_in = columns.take(self.centre, coder.reads.names)
        scale_in = columns.take(self.scale, coder.reads.names)
        centre_out = columns.take(self.centre, coder.writes.names)
        scale_out = columns.take(self.scale, coder.writes.names)
        W_enc = params.get("W_enc", params["W_dec"]) * scale_in
        W_dec = params["W_dec"] / scale_out
        gain = mx.linalg.norm(W_dec, axis=-1).mean()
        coder.W_enc = W_enc * gain
        coder.b_enc = (params["b_enc"] - W_enc @ centre_in) * gain
        coder.W_dec = W_dec / gain
        coder.b_dec = params["b_dec"] / scale_out + centre_out
        mx.eval(coder.parameters())


def initial_params(
    coder: SparseCoder, normalisation: Normalisation, columns: Columns, tied: bool, seed: int
) -> dict[str, mx.array]:
    """Random decoder rows of unit norm, the encoder as their transpose, the bias at the mean."""
    W_dec = mx.random.normal((coder.n_features, coder.d_out), key=mx.random.key(seed))
    W_dec = _unit_rows(W_dec)
    mean = (normalisation.mean - normalisation.centre) * normalisation.scale
    params = {
        "W_dec": W_dec,
        "b_dec": columns.take(mean, coder.writes.names),
        "b_enc": -(W_dec @ columns.take(mean, coder.writes.names)),
    }
    return params if tied else {"W_enc": mx.array(W_dec), **params}


def initial_state(params: dict[str, mx.array]) -> State:
    """Parameters, Adam's moments, counters and metric sums; every feature counts as living."""
    n_features = params["W_dec"].shape[0]
    zeros = {name: mx.zeros_like(array) for name, array in params.items()}
    return {
        "params": params,
        "m": zeros,
        "v": {name: mx.zeros_like(array) for name, array in params.items()},
        "t": mx.array(0.0),
        "fired": mx.zeros((n_features,), mx.float32),
        "fired_before": mx.full((n_features,), mx.inf),
        "counted": mx.array(0.0),
        "counted_before": mx.array(0.0),
        "skipped": mx.array(0.0),
        "skipped_in_a_row": mx.array(0.0),
        "sums": zero_sums(),
    }


def zero_sums() -> dict[str, mx.array]:
    """Metric sums over no step."""
    return {name: mx.array(0.0) for name in ("loss", "error", "energy", "l0", "n")}


def dead_features(state: State, threshold: float) -> mx.array:
    """Boolean `[n_features]`: fired on less than this share of the tokens counted.

    Firing is counted in half a window while the half before it is remembered; during the first
    half of the first window no feature is dead.
    """
    counted = state["counted"] + state["counted_before"]
    # At least half a firing, so that with a tiny threshold "dead" means "never".
    return state["fired"] + state["fired_before"] < mx.maximum(threshold * counted, 0.5)


def prepare(
    batch: mx.array, columns: Columns, normalisation: Normalisation, coder: SparseCoder
) -> tuple[mx.array, mx.array]:
    """What the coder reads and what it shall write, normalised, from a batch `[n, width]`."""
    data = (batch.astype(mx.float32) - normalisation.centre) * normalisation.scale
    return columns.take(data, coder.reads.names), columns.take(data, coder.writes.names)


def resample(
    state: State,
    x: mx.array,
    y: mx.array,
    coder: SparseCoder,
    threshold: float,
    rng: np.random.Generator,
) -> State:
    """Point dead features at tokens that are reconstructed badly.

    Tokens are drawn with a probability proportional to their squared loss. The decoder row becomes
    the token's normalised target, the encoder row its input with a fifth of the mean norm of living
    rows, the bias zero; Adam starts anew for these rows.

    Reference: Bricken et al. 2023, "Towards Monosemanticity", appendix.
    """
    dead = np.flatnonzero(np.array(dead_features(state, threshold)))
    params = dict(state["params"])
    W_enc = params.get("W_enc", params["W_dec"])
    pre = mx.addmm(params["b_enc"], x, W_enc.T)
    y_hat = coder.activation_function(pre) @ params["W_dec"] + params["b_dec"]
    weights = np.array((y_hat - y).square().sum(axis=-1).square(), dtype=np.float64)
    if len(dead) == 0 or not np.isfinite(weights).all() or weights.sum() <= 0:
        return state
    drawn, rows = _draw(weights, len(dead), rng), mx.array(dead)
    alive = 1 - mx.zeros((coder.n_features,)).at[rows].add(1.0)
    norms = mx.linalg.norm(W_enc, axis=-1)
    norm = 0.2 * (norms * alive).sum() / mx.maximum(alive.sum(), 1)
    new = {"W_dec": _unit_rows(y[drawn]), "b_enc": mx.zeros((len(dead),))}
    if "W_enc" in params:
        new["W_enc"] = norm * _unit_rows(x[drawn])
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


def _unit_rows(array: mx.array) -> mx.array:
    return array / mx.maximum(mx.linalg.norm(array, axis=-1, keepdims=True), 1e-12)


def _with_rows(array: mx.array, rows: mx.array, values: mx.array) -> mx.array:
    copy = mx.array(array)
    copy[rows] = values
    return copy


def _loss(
    params: dict[str, mx.array],
    x: mx.array,
    y: mx.array,
    dead: mx.array,
    coder: SparseCoder,
    config: SAEConfig,
    k_auxiliary: int,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    W_enc, W_dec = params.get("W_enc", params["W_dec"]), params["W_dec"]
    pre = mx.stop_gradient(mx.addmm(params["b_enc"], x, W_enc.T))
    indices = mx.stop_gradient(coder.activation_function.select(pre))
    values = mx.maximum(pre_activations_at(pre, indices, x, W_enc, params["b_enc"]), 0)
    y_hat = decode_pairs(values, indices, W_dec) + params["b_dec"]
    error = squared_error(y_hat, y)
    loss = error
    if config.lambda_sparse:
        loss = loss + config.lambda_sparse * l1(values)
    if k_auxiliary:
        revival = auxiliary(y - y_hat, x, pre, dead, k_auxiliary, W_enc, params["b_enc"], W_dec)
        loss = loss + config.auxiliary_coefficient * revival
    return loss, error, values, indices


def _adam(
    p: mx.array, m: mx.array, v: mx.array, g: mx.array, lr: mx.array, root: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    m = m + (1 - BETA_1) * (g - m)
    v = v + (1 - BETA_2) * (g.square() - v)
    return p - lr * m / (mx.sqrt(v) * root + EPSILON), m, v


def _norm(gradients: dict[str, mx.array]) -> mx.array:
    # Summed by columns: MLX's flat sum loses several percent on large arrays on the CPU.
    squares = [g.square().sum(axis=0).sum() for g in gradients.values()]
    return mx.sqrt(mx.stack(squares).sum())


def _update(state: State, gradients: dict[str, mx.array], lr: mx.array, clip: float) -> State:
    """Adam with clipping on a decoder of unit rows; no change where a gradient is not finite."""
    params = state["params"]
    W, g = params["W_dec"], gradients["W_dec"]
    gradients = {**gradients, "W_dec": g - (g * W).sum(axis=-1, keepdims=True) * W}
    norm = _norm(gradients)
    good = mx.isfinite(norm)
    factor = mx.minimum(clip / (norm + 1e-12), 1.0) if clip else mx.array(1.0)
    t = state["t"] + 1
    rate = lr / (1 - mx.power(BETA_1, t))
    root = mx.rsqrt(1 - mx.power(BETA_2, t))
    updated: dict[str, dict[str, mx.array]] = {"params": {}, "m": {}, "v": {}}
    for name, p in params.items():
        m, v = state["m"][name], state["v"][name]
        p_new, m_new, v_new = _adam(p, m, v, gradients[name] * factor, rate, root)
        if name == "W_dec":
            p_new = _unit_rows(p_new)
        for part, new, old in (("params", p_new, p), ("m", m_new, m), ("v", v_new, v)):
            updated[part][name] = mx.where(good, new, old)
    skipped = mx.where(good, 0.0, 1.0)
    return {
        **state,
        **updated,
        "t": mx.where(good, t, state["t"]),
        "skipped": state["skipped"] + skipped,
        "skipped_in_a_row": (state["skipped_in_a_row"] + 1) * skipped,
    }


def make_step(
    coder: SparseCoder,
    columns: Columns,
    normalisation: Normalisation,
    config: SAEConfig,
    k_auxiliary: int,
) -> Step:
    """The function `step(state, batch [n, width], learning_rate) -> state`, to be compiled.

    `k_auxiliary` is the number of dead features that the auxiliary loss uses per token; with 0 the
    step has no such term.
    """
    baseline = (normalisation.mean - normalisation.centre) * normalisation.scale

    def step(state: State, batch: mx.array, lr: mx.array) -> State:
        x, y = prepare(batch, columns, normalisation, coder)
        dead = dead_features(state, config.dead_neuron_threshold)
        objective = mx.value_and_grad(
            lambda params: _loss(params, x, y, dead, coder, config, k_auxiliary)
        )
        (loss, error, values, indices), gradients = objective(state["params"])
        energy = squared_error(y, columns.take(baseline, coder.writes.names))
        active = (values > 0).astype(mx.float32)
        new = _update(state, gradients, lr, config.gradient_clip)
        good = new["skipped"] == state["skipped"]
        fired = state["fired"].at[indices.reshape(-1)].add(active.reshape(-1))
        l0 = active.sum() / active.shape[0]
        read = {"loss": loss, "error": error, "energy": energy, "l0": l0, "n": mx.array(1.0)}
        new["fired"] = mx.where(good, fired, state["fired"])
        new["counted"] = state["counted"] + mx.where(good, float(len(batch)), 0)
        new["sums"] = {
            name: total + mx.where(good, read[name], 0) for name, total in state["sums"].items()
        }
        return new

    return step
