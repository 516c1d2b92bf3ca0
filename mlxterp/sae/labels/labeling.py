"""Labels of features by a language model or by tables of tokens, each with a score beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.labels.labelers import Cost
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sae.labels.run import LabelRun
from mlxterp.sae.labels.token_labels import token_labels


def auto_label_features(
    coder: SparseCoder,
    data: FeatureData,
    labeler: Any = None,
    *,
    labels: FeatureLabels | None = None,
    features: Sequence[int] | None = None,
    num_examples: int = 20,
    verbose: bool = False,
    **options: Any,
) -> FeatureLabels:
    """Label all features that fire, or those named, and score the labels, the most useful first.

    `labeler` is the name or path of an MLX model, a loaded `(model, tokenizer)`, the address of a
    server, a function from prompt to answer, or a `Labeler`; it makes a label from `num_examples`
    examples of each feature. `options` are those of `LabelRun`: who judges, on how many contexts,
    and what the run may cost. Without a labeller the labels are made at once from tables of
    tokens, see `token_labels`, whose `options` these are then.

    Labels go to `labels` where given, and every few features into its file. What is there of the
    same labeller and settings is not asked for again, nor is a score by the same judge; the user's
    own labels are scored, but not replaced. Features without label or score are in `failures` of
    the result, with the reason. Raises `LabelerError` where labeller or judge fail 5 times in a
    row; it says what was kept.
    """
    labels = FeatureLabels(coder.n_features) if labels is None else labels
    labels.stopped = ""
    if labeler is None:
        return token_labels(data, features, labels=labels, verbose=verbose, **options)
    run = LabelRun(
        data, labeler, labels, features=features, num_examples=num_examples, verbose=verbose,
        **options,
    )  # fmt: skip
    return run.finish()


def label_cost(
    coder: SparseCoder,
    data: FeatureData,
    labeler: Any,
    *,
    labels: FeatureLabels | None = None,
    **options: Any,
) -> Cost:
    """What `auto_label_features` would take at most, from the prompts of a few of the features;
    nothing is asked. For a run bounded by `max_requests` or `max_tokens`, what it would without."""
    labels = FeatureLabels(coder.n_features) if labels is None else labels
    return LabelRun(data, labeler, labels, **options).cost()
