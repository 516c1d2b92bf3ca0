"""Explained variance by all the formulas in use: one default, the others by name."""

from __future__ import annotations

import math

import numpy as np

from mlxterp.sae.evals.sums import SiteSums

# y: activations, y': what the coder writes, r = y - y', i: a token, d: a column.
DEFINITIONS = {
    "global_mean": (
        "1 - sum_i |r_i|^2 / sum_i |y_i - mean(y)|^2",
        "the default here; SAELens since 2026",
    ),
    "without_offset": (
        "1 - sum_d Var(r_d) / sum_d Var(y_d)",
        "dictionary_learning; does not see a constant error",
    ),
    "per_token": (
        "mean_i (1 - |r_i|^2 / |y_i - mean of the batch|^2)",
        "SAELens's explained_variance_legacy; tokens near the mean decide",
    ),
    "quasi_uncentred": (
        "1 - E|r|^2 / (E|y|^2 - (E|y|^2 / d)^2)",
        "SAEBench 0.6; depends on the scale of the activations",
    ),
    "uncentred": (
        "1 - sum_i |r_i|^2 / sum_i |y_i|^2",
        "notebooks; counts the mean as explained",
    ),
    "normalized_mse": (
        "1 - mean_i |r_i|^2 / |y_i|^2",
        "OpenAI's normalized MSE, from 1",
    ),
    "per_batch": (
        "mean over batches of the default",
        "sparsify's FVU, OpenMOSS; depends on the size of the batches",
    ),
    "per_prompt": (
        "mean over contexts of the default",
        "circuit-tracer; few tokens each",
    ),
}  # fmt: skip
"""Formula, and who uses it, of each definition of explained variance."""


def varies(variance: float, squares: float) -> bool:
    """Whether a variance, a difference of sums of squares, is more than their rounding."""
    return variance > 1e-12 * squares


def explained_variances(sums: SiteSums) -> dict[str, float | None]:
    """Explained variance by each of the `DEFINITIONS`; `None` where it has no value."""
    t = sums.totals
    n, width = t["n"], sums.width
    if not varies(t["variance"], t["squares"]):
        return dict.fromkeys(DEFINITIONS)
    quasi = t["squares"] / n - (t["squares"] / n / width) ** 2
    unexplained = {
        "global_mean": t["error"] / t["variance"],
        "without_offset": t["error_variance"] / t["variance"],
        "per_token": t["error_parts"] / n,
        "quasi_uncentred": t["error"] / n / quasi if quasi > 0 else math.nan,
        "uncentred": t["error"] / t["squares"],
        "normalized_mse": t["error_shares"] / n,
        "per_batch": _mean(sums.batches),
        "per_prompt": _mean(sums.prompts),
    }
    return {name: None if math.isnan(x) else 1 - x for name, x in unexplained.items()}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan
