"""How much of a coder is found again in coders of other seeds, as a task of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.sae.similarity.stability import stability

RANDOM = "random directions"
FIGURES = {"MCC": "mcc", "MMCS": "mmcs", "shared features": "shared"}


def seed_stability(coder: SparseCoder, others: Sequence[SparseCoder], **options: Any) -> TaskResult:
    """What a coder has in common with each of others, such as ones trained from other seeds.

    `MCC` is the mean cosine of pairs that are matched one to one, `MMCS` the mean over the coder's
    features of the largest cosine with any of the other, `shared features` the share of pairs that
    are alike in both matrices; beside each stands what as many random directions have. The spread
    is over the others. `options` are those of `similarity.stability`, whose result says which
    features are stable. Raises `ValueError` without another coder.

    Reference: Paulo and Belrose 2025, arXiv 2501.16615.
    """
    if not others:
        raise ValueError("Stability needs other coders to look in: others=[...].")
    found = stability([coder, *others], **options)
    figures = {}
    for name, attribute in FIGURES.items():
        own, chance = getattr(found, attribute), getattr(found, f"chance_{attribute}")
        controls = {RANDOM: tuple(chance[0, 1:].tolist())}
        figures[name] = Values(tuple(own[0, 1:].tolist()), controls)
    return TaskResult("stability", figures, settings={"n_others": len(others), **options})
