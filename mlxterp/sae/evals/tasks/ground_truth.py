"""Whether a coder found the features that activations were made of."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.tasks.absorption import check_reads_what_it_writes
from mlxterp.sae.evals.tasks.random_coder import random_coder
from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.sae.evals.tasks.synthetic import Drawn, SyntheticFeatures
from mlxterp.sae.similarity.directions import needed

RANDOM = "random directions"
TOKENS_AT_ONCE = 1024


def recovery(
    coder: SparseCoder | Sequence[SparseCoder],
    synthetic: SyntheticFeatures,
    *,
    n_tokens: int = 10_000,
    seeds: int = 5,
) -> TaskResult:
    """How much of the known features a coder has learned; chance is as many random directions.

    With c[j, i] the cosine of the true direction j with decoder row i (its size, where codes have
    both signs), and every true feature j matched with one feature of the coder, m(j), so that the
    sum of cosines is largest:

        MCC                    mean over pairs of c[j, m(j)]
        MMCS                   mean_j max_i c[j, i]; large for wide coders, and for duplicates
        MMCS back              mean over features i that fire of max_j c[j, i]
        uniqueness             how many true features are nearest to one that fires, over how many
                               fire
        precision, recall, F1  of m(j) firing where j does, mean over j
        size of values         sum of z'_m(j) * c[j, m(j)] * |W_dec[m(j)]| over that of z_j, on
                               tokens where both fire, mean over j: below 1 is shrinkage
        L0 over the true L0, dead features, explained variance

    Of several coders, such as of several seeds of training, every value is of one coder, and the
    spread is that of training; of a single coder it is that of `seeds` draws of `n_tokens` tokens,
    which the first four hardly know. Raises `ValueError` for a coder of another width.

    References: for MCC, arXiv 2505.20254; for MMCS, Sharkey et al. 2022.
    """
    several = [coder] * seeds if isinstance(coder, SparseCoder) else [*coder]
    if not several or n_tokens < 1:
        raise ValueError(
            f"recovery needs a coder, a seed and a token at least, got {len(several)} and "
            f"{n_tokens}."
        )
    found, chance = [], []
    for seed, one in enumerate(several):
        check_reads_what_it_writes(one, "Recovery of features")
        if one.d_in != synthetic.width:
            raise ValueError(
                f"The coder must have the features' width {synthetic.width}, got {one.d_in}."
            )
        drawn = synthetic.draw(n_tokens, seed)
        random = random_coder(one, mx.array(drawn.activations), seed)
        for scores, own in ((found, one), (chance, random)):
            scores.append(_scores(own, synthetic, drawn))
    figures = {
        name: Values(
            tuple(scores[name] for scores in found),
            {RANDOM: tuple(scores[name] for scores in chance)},
        )
        for name in found[0]
    }
    settings = {"features": repr(synthetic), "n_tokens": n_tokens, "n_draws": len(several)}
    return TaskResult("ground truth", figures, settings=settings)


def _scores(coder: SparseCoder, synthetic: SyntheticFeatures, drawn: Drawn) -> dict[str, float]:
    z, y_hat = _through(coder, drawn.activations)
    rows = np.array(coder.W_dec.astype(mx.float32), np.float64)
    norms = np.linalg.norm(rows, axis=1)
    cosines = synthetic.directions @ np.divide(rows, norms[:, None], np.zeros_like(rows),
                                               where=norms[:, None] > 0).T  # fmt: skip
    compared = np.abs(cosines) if coder.activation_name == "abs_topk" else cosines
    true, own = needed("scipy.optimize").linear_sum_assignment(compared, maximize=True)
    fires = (z != 0).any(axis=0)
    nearest = compared.argmax(axis=0)[fires]
    x = drawn.activations.astype(np.float64)
    variance = np.square(x - x.mean(axis=0)).sum()
    return {
        "MCC": float(compared[true, own].mean()),
        "MMCS": float(compared.max(axis=1).mean()),
        "MMCS back": float(compared.max(axis=0)[fires].mean()) if fires.any() else float("nan"),
        "uniqueness": len(np.unique(nearest)) / max(1, len(nearest)),
        **_firing(drawn.codes, z, true, own, cosines[true, own] * norms[own]),
        "L0 over the true L0": float((z != 0).sum() / max(1, (drawn.codes != 0).sum())),
        "dead features": float((~fires).mean()),
        "explained variance": float(1 - np.square(x - y_hat).sum() / variance),
    }


def _firing(
    codes: np.ndarray, z: np.ndarray, true: np.ndarray, own: np.ndarray, gains: np.ndarray
) -> dict[str, float]:
    """How pairs of features `true` and `own` `[n_pairs]` fire together, over all true features."""
    n = codes.shape[1]
    is_on, fires = codes[:, true] != 0, z[:, own] != 0
    both = (is_on & fires).sum(axis=0)

    def mean(shares: np.ndarray) -> float:
        return float(shares.sum() / n)

    sizes = np.where(is_on & fires, z[:, own] * gains, 0).sum(axis=0, dtype=np.float64)
    truth = np.where(is_on & fires, codes[:, true], 0).sum(axis=0, dtype=np.float64)
    known = truth > 0
    return {
        "precision": mean(both / np.maximum(1, fires.sum(axis=0))),
        "recall": mean(both / np.maximum(1, is_on.sum(axis=0))),
        "F1": mean(2 * both / np.maximum(1, is_on.sum(axis=0) + fires.sum(axis=0))),
        "size of values": float((sizes[known] / truth[known]).mean()) if known.any()
        else float("nan"),
    }  # fmt: skip


def _through(coder: SparseCoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes and what is reconstructed from them."""
    codes, written = [], []
    for start in range(0, len(x), TOKENS_AT_ONCE):
        z = coder.encode(mx.array(x[start : start + TOKENS_AT_ONCE]))
        codes.append(np.array(z.astype(mx.float32)))
        written.append(np.array(coder.decode(z).astype(mx.float32)))
    return np.concatenate(codes), np.concatenate(written).astype(np.float64)
