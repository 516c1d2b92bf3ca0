"""Before the first step: the scale of the data and the values that parameters start from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.kernels import joined
from mlxterp.sae.objective import Objective, Params
from mlxterp.sae.optimizer import unit_rows

FITTED_TOKENS = 4096
QUANTILE_TOKENS = 512
RIDGE = 1e-6


@dataclass(frozen=True)
class Normalisation:
    """`(x - centre) * scale` per column; `mean` is the mean of the activations in any case."""

    mean: mx.array
    centre: mx.array
    scale: mx.array

    @classmethod
    def measure(
        cls,
        sample: mx.array,
        columns: Columns,
        active: bool,
        norms: Mapping[str, float] | None = None,
    ) -> Normalisation:
        """From a sample `[n_tokens, width]`: centre every site, and scale it to the mean norm that
        `norms` gives for it or else to a mean squared norm equal to its width; where not `active`,
        leave the activations as they are.

        Raises `ValueError` for a site that does not vary, or beyond what float32 can square.
        """
        sample = sample.astype(mx.float32)
        mean = sample.mean(axis=0)
        centred = sample - mean
        variance = centred.square().mean(axis=0)
        scales = []
        for name, part in columns.slices.items():
            mean_variance = variance[part].mean()
            # Compared, because the mean is rounded: equal rows may seem to vary around it.
            if mx.array_equal(sample[1:, part], sample[:-1, part]):
                raise ValueError(f"The activations of {name!r} are the same on every token.")
            if not (mean_variance > 0).item() or mx.isinf(mean_variance).item():
                raise ValueError(f"The activations of {name!r} are too large or small for float32.")
            scale = mx.rsqrt(mean_variance)
            if norms and name in norms:
                scale = norms[name] / mx.linalg.norm(centred[:, part], axis=-1).mean()
            scales.append(mx.broadcast_to(scale, (part.stop - part.start,)))
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


def balanced_norms(coder: SparseCoder) -> dict[str, float]:
    """The mean norm that sites are to have which a coder writes, or reads, together: the same for
    all of them, the root of the mean of their widths."""
    return {
        name: math.sqrt(columns.width / len(columns.names))
        for columns in (coder.reads, coder.writes)
        for name in columns.names
        if len(columns.names) > 1
    }


def check_blocks(coder: SparseCoder, config: SAEConfig) -> None:
    """Raises `ValueError` for settings that a coder of several blocks cannot have."""
    refused = {"tied_weights": False, "decoder_unit_norm": False, "resample_dead_every": 0}
    for field, needed in refused.items():
        if len(coder.blocks) > 1 and getattr(config, field) != needed:
            raise ValueError(
                f"{field} must be {needed} for a coder whose features write different sites, got "
                f"{getattr(config, field)}."
            )


def initial_params(
    coder: SparseCoder,
    normalisation: Normalisation,
    columns: Columns,
    config: SAEConfig,
    sample: mx.array,
) -> dict[str, mx.array]:
    """Decoder rows of unit norm, the encoder's, and the values that go with them.

    A coder that writes what it reads starts with random decoder rows and their transpose as the
    encoder. Otherwise encoder rows are random, and each decoder row is the direction in which the
    target lies from its mean when the feature is active. Biases are at the middle of the data, and
    the encoder is scaled so that the first code reconstructs as well as it can, at least as well
    as the mean.

    `sample` `[n_tokens, width]` are activations, not normalised. Raises `ValueError` for settings
    that the coder cannot have.
    """
    check_blocks(coder, config)
    data = normalisation.apply(sample[:FITTED_TOKENS])
    middle = normalisation.origin
    if config.bias_init == "geometric_median":
        middle = geometric_median(normalisation.apply(sample))
    b_in, b_out = (columns.take(middle, s.names) for s in (coder.reads, coder.writes))
    x, y = (columns.take(data, s.names) for s in (coder.reads, coder.writes))
    skip = {}
    if coder.has_skip:
        skip["W_skip"] = _initial_skip(columns, coder, config, normalisation.apply(sample))
        b_out = b_out - skip["W_skip"] @ b_in
    W_enc, W_dec = _random_maps(coder, config)
    blocks = list(zip(coder.blocks, coder.of_blocks(W_enc), strict=True))
    b_enc = joined([-(W @ b_in[block.reads]) for block, W in blocks])
    params = {"W_dec": W_dec, "b_dec": mx.array(b_out), "b_enc": b_enc, **skip}
    pre = [(x[:QUANTILE_TOKENS] - b_in)[:, block.reads] @ W.T for block, W in blocks]
    threshold = _exceeded_by(mx.concatenate(pre, axis=-1), config.wanted_l0 * len(blocks))
    scale = mx.array(1.0)
    own = coder.activation_function.trained(threshold)
    objective = Objective(coder, config, config.k)
    if not _transposes(coder, config):
        params["W_dec"] = _regressed(objective, {**params, "W_enc": W_enc, **own}, x, y)
    if config.scale_init and not config.tied_weights:
        y_hat = objective.reconstruct({**params, "W_enc": W_enc, **own}, x)
        bias = objective.bias(params, x)
        scale = _best_scale(y_hat - bias, y - bias)
    params["b_enc"] *= scale
    if not config.tied_weights:
        params["W_enc"] = W_enc * scale
    if config.initial_threshold is not None:
        threshold, scale = mx.array(config.initial_threshold), mx.array(1.0)
    return params | coder.activation_function.trained(threshold * scale)


def _transposes(coder: SparseCoder, config: SAEConfig) -> bool:
    """Whether the encoder starts as the transpose of the decoder."""
    if config.tied_weights and coder.d_in != coder.d_out:
        raise ValueError(
            f"tied_weights needs equal widths; the coder reads {coder.d_in} and writes "
            f"{coder.d_out} columns."
        )
    return config.tied_weights or (coder.reads == coder.writes and len(coder.blocks) == 1)


def _random_maps(coder: SparseCoder, config: SAEConfig) -> tuple[mx.array, mx.array]:
    """`W_enc` and `W_dec`, with rows of unit norm; in a coder of several blocks those of each."""
    key = mx.random.key(config.seed)
    if _transposes(coder, config):
        W_dec = unit_rows(mx.random.normal(coder.W_dec.shape, key=key))
        return mx.array(W_dec), W_dec
    keys = mx.random.split(key, len(coder.blocks) + 1)
    decoders = [
        unit_rows(mx.random.normal(W.shape, key=k))
        for W, k in zip(coder.decoder_blocks(), keys[1:], strict=True)
    ]
    W_enc = unit_rows(mx.random.normal(coder.W_enc.shape, key=keys[0]))
    return W_enc, coder.joined_decoder(decoders)


def _initial_skip(
    columns: Columns, coder: SparseCoder, config: SAEConfig, data: mx.array
) -> mx.array:
    """`W_skip` `[d_out, d_in]`: zero, or what is best by itself, by least squares."""
    if config.skip_init == "zero":
        return mx.zeros((coder.d_out, coder.d_in))
    x, y = (np.array(columns.take(data, s.names), np.float64) for s in (coder.reads, coder.writes))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
    return mx.array(np.linalg.solve(gram, x.T @ y).T.astype(np.float32))


def _regressed(objective: Objective, params: Params, x: mx.array, y: mx.array) -> mx.array:
    """The decoder of `params`, where a feature is active at all with the row `sum_b z_b (y_b - y')`
    as a unit vector, where `y'` is what is written without features."""
    coder = objective.coder
    left_over = y - objective.bias(params, x)
    codes = objective.codes(params, x)
    rows = []
    for block, code, old in zip(
        coder.blocks, codes, coder.decoder_blocks(params["W_dec"]), strict=True
    ):
        z = code.values if code.pairs is None else code.pairs.dense(code.values)
        new = z.T @ left_over[:, block.writes]
        usable = mx.linalg.norm(new, axis=-1, keepdims=True) > 0
        rows.append(mx.where(usable, unit_rows(new), old))
    return coder.joined_decoder(rows)


def _exceeded_by(pre: mx.array, wanted_l0: float) -> mx.array:
    """The value that `wanted_l0` of the entries of a row of `[n_tokens, n_features]` exceed on
    average; above 0."""
    entries = np.array(pre).reshape(-1)
    n = min(round(wanted_l0 * len(pre)), len(entries) - 1)
    return mx.array(max(float(np.partition(entries, len(entries) - 1 - n)[-1 - n]), 1e-3))


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

    The code is scaled so that decoder rows have norm 1 or, with several sites, that their norms at
    the sites, in the units of each, have the same sum for all features.
    """
    centre_in, scale_in = (columns.take(a, coder.reads.names) for a in _of(normalisation))
    centre_out, scale_out = (columns.take(a, coder.writes.names) for a in _of(normalisation))
    site_scale = mx.stack([scale_out[part.start] for part in coder.writes.slices.values()])
    # One number for all sites, so that features keep their weights in a selection.
    unit = mx.exp(mx.log(site_scale).mean())
    encoders = coder.of_blocks(params.get("W_enc", params["W_dec"]))
    decoders = coder.decoder_blocks(params["W_dec"])
    W_enc, b_enc, W_dec, gains = [], [], [], []
    for i, block in enumerate(coder.blocks):
        gain = mx.maximum(coder.site_norms(decoders[i], block).sum(axis=-1) / unit, 1e-12)
        read = encoders[i] * scale_in[block.reads]
        shift = read @ centre_in[block.reads]
        W_enc.append(read * gain[:, None])
        b_enc.append((coder.of_blocks(params["b_enc"])[i] - shift) * gain)
        W_dec.append(decoders[i] / scale_out[block.writes] / gain[:, None])
        gains.append(gain)
    coder.W_enc, coder.b_enc = joined(W_enc), joined(b_enc)
    coder.W_dec = coder.joined_decoder(W_dec)
    coder.b_dec = params["b_dec"] / scale_out + centre_out
    if coder.has_skip:
        coder.W_skip = params["W_skip"] * scale_in / scale_out[:, None]
        coder.b_dec = coder.b_dec - coder.W_skip @ centre_in
    if "site_scale" in coder:
        coder.site_scale = site_scale
    coder.activation_function.set_arrays(params, averaged, joined(gains), 1 / unit)
    mx.eval(coder.parameters())


def _of(normalisation: Normalisation) -> tuple[mx.array, mx.array]:
    return normalisation.centre, normalisation.scale
