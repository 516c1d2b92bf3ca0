"""Before the first step: the scale of the data and the values that parameters start from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.objective import Objective
from mlxterp.sae.optimizer import unit_rows

FITTED_TOKENS = 4096
QUANTILE_TOKENS = 512


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

    def apply(self, activations: mx.array) -> mx.array:
        """Normalised activations `[n_tokens, width]` in float32."""
        return (activations.astype(mx.float32) - self.centre) * self.scale

    @property
    def origin(self) -> mx.array:
        """Where the mean of the activations lies after normalisation."""
        return (self.mean - self.centre) * self.scale


def geometric_median(sample: mx.array, n_rounds: int = 100, tolerance: float = 1e-5) -> mx.array:
    """The point `[width]` with the least summed distance to the rows of `[n_tokens, width]`.

    Weiszfeld's iteration, until the sum changes by less than the share `tolerance`.
    """
    median, last = sample.mean(axis=0), math.inf
    for _ in range(n_rounds):
        distances = mx.linalg.norm(sample - median, axis=-1)
        weights = 1 / mx.maximum(distances, 1e-6)
        median = (weights / weights.sum()) @ sample
        total = float(distances.sum())
        if abs(last - total) < tolerance * total:
            break
        last = total
    return median


def initial_params(
    coder: SparseCoder,
    normalisation: Normalisation,
    columns: Columns,
    config: SAEConfig,
    sample: mx.array,
) -> dict[str, mx.array]:
    """Random decoder rows of unit norm; the encoder as their transpose, scaled; the bias at the
    middle of the data, subtracted by the encoder's; and what the activation function trains.

    `sample` `[n_tokens, width]` are activations, not normalised.
    """
    W_dec = mx.random.normal((coder.n_features, coder.d_out), key=mx.random.key(config.seed))
    W_dec = unit_rows(W_dec)
    data = normalisation.apply(sample[:FITTED_TOKENS])
    middle = normalisation.origin
    if config.bias_init == "geometric_median":
        middle = geometric_median(normalisation.apply(sample))
    b_in, b_out = (columns.take(middle, s.names) for s in (coder.reads, coder.writes))
    x, y = (columns.take(data, s.names) for s in (coder.reads, coder.writes))
    W_enc = _transposed(W_dec, coder, config)
    params = {"W_dec": W_dec, "b_dec": mx.array(b_out), "b_enc": -(W_enc @ b_in)}
    threshold = _exceeded_by((x[:QUANTILE_TOKENS] - b_in) @ W_enc.T, config.wanted_l0)
    scale = mx.array(1.0)
    if config.scale_init and not config.tied_weights:
        own = coder.activation_function.trained(threshold)
        y_hat = Objective(coder, config, config.k).reconstruct({**params, "W_enc": W_enc, **own}, x)
        scale = _best_scale(y_hat - b_out, y - b_out)
    params["b_enc"] *= scale
    if not config.tied_weights:
        params["W_enc"] = W_enc * scale
    if config.initial_threshold is not None:
        threshold, scale = mx.array(config.initial_threshold), mx.array(1.0)
    return params | coder.activation_function.trained(threshold * scale)


def _exceeded_by(pre: mx.array, wanted_l0: float) -> mx.array:
    """The value that `wanted_l0` of the entries of a row of `[n_tokens, n_features]` exceed on
    average; above 0."""
    entries = np.array(pre).reshape(-1)
    n = min(round(wanted_l0 * len(pre)), len(entries) - 1)
    return mx.array(max(float(np.partition(entries, len(entries) - 1 - n)[-1 - n]), 1e-3))


def _transposed(W_dec: mx.array, coder: SparseCoder, config: SAEConfig) -> mx.array:
    if coder.d_in == coder.d_out:
        return mx.array(W_dec)
    if config.tied_weights:
        raise ValueError(
            f"tied_weights needs equal widths; the coder reads {coder.d_in} and writes "
            f"{coder.d_out} columns."
        )
    key = mx.random.split(mx.random.key(config.seed))[1]
    return unit_rows(mx.random.normal((coder.n_features, coder.d_in), key=key))


def _best_scale(y_hat: mx.array, y: mx.array) -> mx.array:
    """The factor with which `y_hat` is nearest to `y`, by least squares."""
    explained, size = (y_hat * y).sum(axis=0).sum(), y_hat.square().sum(axis=0).sum()
    usable = (explained > 0) & mx.isfinite(size)
    return mx.where(usable, explained / mx.where(usable, size, 1), 1)


def fold(
    params: dict[str, mx.array],
    averaged: dict[str, mx.array],
    normalisation: Normalisation,
    columns: Columns,
    coder: SparseCoder,
) -> None:
    """Write into `coder` the arrays that do on raw activations what `params` do on normalised.

    The code is scaled so that decoder rows have norm 1, each by itself where the activation
    function treats every feature by itself, and otherwise on average.
    """
    centre_in, scale_in = (columns.take(a, coder.reads.names) for a in _of(normalisation))
    centre_out, scale_out = (columns.take(a, coder.writes.names) for a in _of(normalisation))
    W_enc = params.get("W_enc", params["W_dec"]) * scale_in
    W_dec = params["W_dec"] / scale_out
    gain = mx.linalg.norm(W_dec, axis=-1)
    if not coder.activation_function.per_feature:
        gain = mx.full(gain.shape, gain.mean())
    gain = mx.maximum(gain, 1e-12)
    coder.W_enc = W_enc * gain[:, None]
    coder.b_enc = (params["b_enc"] - W_enc @ centre_in) * gain
    coder.W_dec = W_dec / gain[:, None]
    coder.b_dec = params["b_dec"] / scale_out + centre_out
    coder.activation_function.set_arrays(params, averaged, gain)
    mx.eval(coder.parameters())


def _of(normalisation: Normalisation) -> tuple[mx.array, mx.array]:
    return normalisation.centre, normalisation.scale
