"""How strong a crosscoder's features are in each of two models, measured on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.losses import TANH_SCALE
from mlxterp.sae.sharing import norms_of, ratio, site_batches

ROWS = 8192


class Sums(NamedTuple):
    """Sums over `n_tokens` tokens, in float64. With f the code of a feature, e the error and r the
    reconstruction without its bias, both times `site_scale`, and d a feature's decoder row in the
    stronger model, times the same:

    `firings`, `squares` `f^2`, `pulls` (what the penalty's gradient multiplies): `[n_features]`;
    `error_products` `f e`: `[n_features, d_out]`; for each site, `[n_features, 2]`,
    `error_energies` `f^2 |e|^2`, and `covariances` of f with `d . r`, zero for unequal widths.
    """

    n_tokens: int
    firings: np.ndarray
    squares: np.ndarray
    pulls: np.ndarray
    error_products: np.ndarray
    error_energies: np.ndarray
    covariances: np.ndarray


def collect(
    coder: SparseCoder,
    dataset: ActivationDataset,
    penalty: str | None,
    rows: mx.array,
    directions: mx.array | None,
    max_tokens: int | None,
) -> Sums:
    """The sums of one pass; `rows` `[n_features, d_out]` are the decoder's, times `site_scale`."""
    n, n_features = 0, coder.n_features
    firings, codes, squares, pulls = (np.zeros(n_features) for _ in range(4))
    products = np.zeros(rows.shape)
    energies, aligned = np.zeros((n_features, 2)), np.zeros((n_features, 2))
    written_sum = np.zeros(coder.d_out)
    parts = list(coder.writes.slices.values())
    weights = mx.array(norms_of(coder).sum(axis=1), mx.float32)
    scale = _by_column(coder)
    for x, y in site_batches(coder, dataset, max_tokens, "diff"):
        pre = coder.pre_activations(x)
        z = coder.activation_function(pre).astype(mx.float32)
        y = y - coder.b_dec - (x @ coder.W_skip.T if coder.has_skip else 0)
        written = z @ rows
        error = y * scale - written
        penalised = mx.maximum(pre, 0) if coder.activation_function.from_gate else mx.abs(z)
        n += len(y)
        firings += np.array((z != 0).sum(axis=0))
        codes += np.array(z.sum(axis=0))
        squares += np.array(z.square().sum(axis=0))
        pulls += np.array(_pull(penalty, penalised, weights).sum(axis=0))
        lengths = mx.stack([error[:, part].square().sum(axis=-1) for part in parts], axis=-1)
        energies += np.array(z.square().T @ lengths)
        for i in range(0, n_features, ROWS):
            products[i : i + ROWS] += np.array(z[:, i : i + ROWS].T @ error)
        if directions is not None:
            written_sum += np.array(written.sum(axis=0))
            for m, part in enumerate(parts):
                aligned[:, m] += np.array((z * (written[:, part] @ directions.T)).sum(axis=0))
    if directions is not None:
        # About the mean, so that it does not matter what the biases are.
        means = np.array(directions, np.float64) @ (written_sum / n).reshape(2, -1).T
        aligned -= codes[:, None] * means
    return Sums(n, firings, squares, pulls, products, energies, aligned)


def _by_column(coder: SparseCoder) -> mx.array:
    """`site_scale` for each column, `[d_out]`."""
    widths = enumerate(coder.writes.widths)
    return mx.concatenate([mx.broadcast_to(coder.site_scale[i], (d,)) for i, d in widths])


def _pull(penalty: str | None, values: mx.array, weights: mx.array) -> mx.array:
    """The derivative of a token's penalty by the summed norm of each decoder row."""
    if penalty == "l1":
        return values
    if penalty == "tanh":
        slope = 1 - mx.tanh(TANH_SCALE * values * weights).square()
        return TANH_SCALE * values * slope
    return mx.zeros_like(values)


def _penalty(coder: SparseCoder, coefficient: float | None) -> tuple[str | None, float | None]:
    """The sparsity penalty that a coder was trained with, and its coefficient at the end."""
    config = _config(coder)
    weight = config.get("lambda_sparse", 0.0) if coefficient is None else coefficient
    if not 0 <= weight < np.inf:
        raise ValueError(f"coefficient must be a number >= 0, got {coefficient}.")
    if coefficient is None:
        reports = getattr(getattr(coder, "statistics", None), "training", ())
        found = [r["sparsity_coefficient"] for r in reports if "sparsity_coefficient" in r]
        coefficient = found[-1] if found else config.get("lambda_sparse") or None
    penalty = SAEConfig(
        activation_function=coder.activation_name,  # type: ignore[arg-type]
        sparsity_penalty=config.get("sparsity_penalty"),
        lambda_sparse=weight,
    ).penalty
    return (penalty, coefficient) if penalty in ("l1", "tanh") else (None, None)


def _config(coder: SparseCoder) -> Mapping[str, Any]:
    return getattr(getattr(coder, "metadata", None), "config", {})


def shrinkage(
    coder: SparseCoder, sums: Sums, penalty: str | None, coefficient: float | None
) -> np.ndarray:
    """How much the sparsity penalty takes from each decoder norm, `[n_features, 2]`.

    Training minimises, with sites at the same scale and component weights v of mean 1,

        E sum_m v_m |y_m - y'_m|^2 / d_out + coefficient * E sum_i f_i sum_m |d_im|

    Where one feature f with the row `a_m u_m` is alone, the best row has the norm
    `max(a_m - delta_m, 0)`:

        delta_m = coefficient * d_out * E[f | on] / (2 v_m E[f^2 | on])

    so that every norm below delta is lost: such a feature seems to be exclusive. The factor d_out
    is there because the error is a mean over columns. Norm and f scale inversely, so this holds in
    the units of a trained coder. With the tanh penalty `f` is replaced by the penalty's slope. Zero
    for coders that select, and for penalties that count; NaN without a coefficient. For the later
    ones of nested groups of features it is larger.

    Reference: the penalty is that of Lindsey et al. 2024, "Sparse Crosscoders"; Minder et al. 2025,
    arXiv 2504.02922, describe its artefacts.
    """
    if penalty is None:
        return np.zeros((coder.n_features, 2))
    if coefficient is None:
        return np.full((coder.n_features, 2), np.nan)
    pull = coefficient * coder.d_out * ratio(sums.pulls, 2 * sums.squares)
    return ratio(pull[:, None], _component_weights(coder))


def _component_weights(coder: SparseCoder) -> np.ndarray:
    """What the error at each site counted in training, 1 on average over the columns."""
    writes, given = coder.writes, _config(coder).get("component_weights")
    weights = SAEConfig(component_weights=given).weights_of(writes.names)
    if weights is None:
        return np.ones(len(writes.names))
    return np.array(weights) / np.average(weights, weights=writes.widths)


@dataclass(frozen=True)
class LatentScaling:
    """What `latent_scaling` measures: an entry for each feature, and for each site where two.

    `strengths` `[n_features, 2]`: `|Y_m^T f| / |f|^2`, less what noise gives, in units of
    `coder.decoder_norms`. The others as in `diffing.ModelDiff`.
    """

    strengths: np.ndarray
    ratios: np.ndarray
    noise: np.ndarray
    nu_error: np.ndarray
    nu_reconstruction: np.ndarray
    shrinkage: np.ndarray
    firings: np.ndarray
    n_tokens: int
    coefficient: float | None


def latent_scaling(
    coder: SparseCoder,
    dataset: ActivationDataset,
    coefficient: float | None = None,
    max_tokens: int | None = None,
) -> LatentScaling:
    """How well a feature's code f explains each of two sites, in one pass.

        beta_m = argmin sum_t |beta f_t d - Y_tm|^2 = d . (Y_m^T f) / (|f|^2 |d|^2)
        nu = beta_weaker / beta_stronger

    d is the decoder row of the stronger site, by norm. Y_m is the error with the feature's own part
    added back, `Y_m^T f = E_m^T f + |f|^2 d_m`, or the reconstruction about its mean. Without a
    direction, the best row for the former has the norm `|Y_m^T f| / |f|^2`; errors that have
    nothing to do with f add the mean of `sum_t f_t^2 |e_t|^2` to the square of `|Y_m^T f|`, which
    is taken off.

    Reference: Minder et al. 2025, arXiv 2504.02922.
    """
    parts = list(coder.writes.slices.values())
    stronger = norms_of(coder).argmax(axis=1)
    penalty, coefficient = _penalty(coder, coefficient)
    rows = coder.W_dec.astype(mx.float32) * _by_column(coder)
    directions = None
    if len(set(coder.writes.widths)) == 1:
        second = mx.array(stronger[:, None] == 1)
        directions = mx.where(second, rows[:, parts[1]], rows[:, parts[0]])
    sums = collect(coder, dataset, penalty, rows, directions, max_tokens)
    strengths, noise, along = _projected(sums, rows, directions, parts)
    return LatentScaling(
        strengths=strengths,
        ratios=_weaker_to_stronger(strengths, stronger),
        noise=ratio(of_site(noise, 1 - stronger), of_site(strengths, stronger)),
        nu_error=_weaker_to_stronger(along, stronger),
        nu_reconstruction=_weaker_to_stronger(sums.covariances, stronger),
        shrinkage=shrinkage(coder, sums, penalty, coefficient),
        firings=sums.firings,
        n_tokens=sums.n_tokens,
        coefficient=coefficient,
    )


def _projected(
    sums: Sums, rows: mx.array, directions: mx.array | None, parts: list[slice]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each feature and site: its strength, what noise alone gives, and `d . (Y_m^T f)`, which
    is 0 without directions."""
    found, noise, along = np.zeros((3, len(rows), 2))
    for m, part in enumerate(parts):
        product = sums.error_products[:, part] + sums.squares[:, None] * np.array(rows[:, part])
        energy = np.square(product).sum(axis=1) - sums.error_energies[:, m]
        found[:, m] = ratio(np.sqrt(np.maximum(energy, 0)), sums.squares)
        noise[:, m] = ratio(np.sqrt(sums.error_energies[:, m]), sums.squares)
        if directions is not None:
            along[:, m] = (product * np.array(directions)).sum(axis=1)
    return found, noise, along


def of_site(values: np.ndarray, sites: np.ndarray) -> np.ndarray:
    """For every feature the entry of `values` `[n_features, 2]` at its site."""
    return values[np.arange(len(values)), sites]


def _weaker_to_stronger(values: np.ndarray, stronger: np.ndarray) -> np.ndarray:
    """The ratio; infinite where even the stronger site has less than nothing."""
    below = of_site(values, stronger)
    return np.where(below < 0, np.inf, ratio(of_site(values, 1 - stronger), below))
