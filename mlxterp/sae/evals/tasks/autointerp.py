"""What labels of features are worth, as a task of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.labels.labeling import auto_label_features
from mlxterp.sae.labels.labels import FeatureLabels, Label
from mlxterp.sae.labels.scores import Score

LEAST_FIRING = 15  # tokens
OTHERS_LABEL, ALWAYS_NO = "another feature's label", "always no"


def autointerp(
    coder: SparseCoder,
    data: FeatureData,
    labeler: Any = None,
    *,
    n_features: int = 100,
    seed: int = 0,
    **options: Any,
) -> TaskResult:
    """How well labels say where features fire, on documents that the labels were not made from.

    Of the features that fire on more than 15 tokens `n_features` are drawn at random and labelled
    by `auto_label_features`: by a language model, whose judge is shown contexts with and without
    the feature (`detection`) and contexts with right and wrong marks (`fuzzing`); or without a
    `labeler` by tables of tokens, whose rules are scored on all tokens, at the features' natural
    rates, so that F1 says more than balanced accuracy. Labels that the coder has already are left
    alone.

    Beside each stand what the label of another feature scores on the same contexts, which is what
    labels that are too general have, and what saying always no scores. The spread is one standard
    error over the features. Scores of different judges cannot be compared. `options` are those of
    `auto_label_features`.

    References: Paulo et al. 2024, arXiv 2410.13928; for models with random weights, which come near
    trained ones in these scores, arXiv 2501.17727.
    """
    if n_features < 1:
        raise ValueError(f"n_features must be >= 1, got {n_features}.")
    alive = np.flatnonzero(data.firing_counts > LEAST_FIRING)
    if not len(alive):
        raise ValueError(f"No feature fires on more than {LEAST_FIRING} tokens of the data.")
    chosen = np.random.default_rng(seed).permutation(alive)[:n_features].tolist()
    labels = auto_label_features(
        coder, data, labeler, labels=FeatureLabels(coder.n_features), features=chosen, **options
    )
    kinds = ("tokens",) if labeler is None else ("detection", "fuzzing")
    found = [label for _, label in sorted(labels.items())]
    figures = {}
    for kind in kinds:
        for name, read in (("F1", _f1), ("balanced accuracy", _balanced)):
            if values := _values(found, kind, read):
                figures[f"{name} of {kind}"] = values
    if not figures:
        raise ValueError(f"No label could be scored: {labels.failures or labels.stopped!r}.")
    if labeler is not None:
        figures = dict(sorted(figures.items(), key=lambda item: item[0].startswith("F1")))
    by = "tables of tokens" if labeler is None else found[0].source
    settings = {"labeler": by, "n_features": len(chosen), "seed": seed}
    return TaskResult("autointerp", figures, settings=settings)


def _values(labels: Sequence[Label], kind: str, read: Callable[[Score], float]) -> Values | None:
    """One kind of score of all labels that have it, with the controls."""
    scores = [score for label in labels if (score := getattr(label, kind)) is not None]
    # A judge is asked about another feature's label in detection alone.
    controls = [] if kind == "fuzzing" else [x for label in labels if (x := label.control)]
    silent = [Score(0, s.hits + s.misses, 0, s.rejections + s.false_alarms) for s in scores]
    beside = {OTHERS_LABEL: controls, ALWAYS_NO: silent}
    if not scores:
        return None
    return Values(
        tuple(map(read, scores)),
        {name: tuple(map(read, of)) for name, of in beside.items() if of},
        by_seed=False,
    )


def _f1(score: Score) -> float:
    return score.f1


def _balanced(score: Score) -> float:
    return score.balanced_accuracy
