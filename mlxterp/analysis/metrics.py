"""What is measured of a run's logits, to compare it with another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.behavior.targets import row_by_row, token_id
from mlxterp.sae.source import ActivationSource

Token = str | int
Answers = Token | Sequence[Token]
Measure = Callable[[mx.array], mx.array]
DISTANCES = {  # of logits from those of the clean run
    "l2": "distance of the logits from the clean ones, negative",
    "mse": "mean squared difference of the logits from the clean ones, negative",
    "cosine": "cosine of the logits and the clean ones",
    "kl": "KL divergence from the clean run, negative",
}
METRICS = (*DISTANCES, "logit_diff", "probability")


@dataclass(frozen=True)
class Metric:
    """`measure(logits) -> [B]` of the logits `[B, vocab]` at one position or, if it takes the
    `whole`, of `[B, S, vocab]`: the more of what the clean run does, the larger."""

    name: str
    label: str
    measure: Measure
    whole: bool = False

    @property
    def is_distance(self) -> bool:
        """Whether it is at its largest, without a slope, in the clean run."""
        return self.name in DISTANCES


def find_metric(
    model: ActivationSource,
    metric: str | Measure,
    clean: mx.array,
    answers: Answers | None = None,
) -> Metric:
    """The metric that is asked for, of logits x where the clean run has `clean [vocab]`.

        l2           -|x - clean|
        mse          -mean((x - clean)^2)
        cosine       x . clean / (|x| |clean|)
        kl           -KL(softmax(clean) || softmax(x))
        logit_diff   x[right] - x[wrong]        of answers=(right, wrong)
        probability  softmax(x)[right]          of answers=right, by default the likeliest one

    A function gets `logits [1, S, vocab]` and returns one number. Raises `ValueError` for another
    name, and for answers that are not as many, not one token each, or not asked for.
    """
    if not isinstance(metric, str):
        if not callable(metric):
            raise ValueError(f"metric must be a name or a function of logits, got {metric!r}.")
        name = getattr(metric, "__name__", "metric")
        return Metric("function", name, row_by_row(metric), whole=True)
    if metric not in METRICS:
        raise ValueError(
            f"metric must be one of {', '.join(METRICS)}, or a function, got {metric!r}."
        )
    clean = clean.astype(mx.float32)
    if metric in DISTANCES:
        if answers is not None:
            raise ValueError(f"answers are for logit_diff and probability, not for {metric!r}.")
        return Metric(metric, DISTANCES[metric], _distance(metric, clean))
    ids, texts = _answers(model, metric, answers, clean)
    if metric == "probability":
        return Metric(metric, f"probability of {texts[0]!r}", _probability(ids[0]))
    return Metric(metric, f"logit of {texts[0]!r} less that of {texts[1]!r}", _difference(*ids))


def _distance(name: str, clean: mx.array) -> Measure:
    size = mx.linalg.norm(clean)
    log_clean = clean - mx.logsumexp(clean)

    def measure(logits: mx.array) -> mx.array:
        x = logits.astype(mx.float32)
        if name == "l2":
            return -mx.sqrt((x - clean).square().sum(axis=-1))
        if name == "mse":
            return -(x - clean).square().mean(axis=-1)
        if name == "cosine":
            return (x @ clean) / (mx.linalg.norm(x, axis=-1) * size)
        log = x - mx.logsumexp(x, axis=-1, keepdims=True)
        return -(mx.exp(log_clean) * (log_clean - log)).sum(axis=-1)

    return measure


def _probability(token: int) -> Measure:
    return lambda logits: mx.softmax(logits.astype(mx.float32), axis=-1)[:, token]


def _difference(right: int, wrong: int) -> Measure:
    def measure(logits: mx.array) -> mx.array:
        return logits[:, right].astype(mx.float32) - logits[:, wrong].astype(mx.float32)

    return measure


def _answers(
    model: Any, metric: str, answers: Answers | None, clean: mx.array
) -> tuple[list[int], list[str]]:
    """Ids and texts of the answers."""
    count = 2 if metric == "logit_diff" else 1
    if answers is None and count == 1:
        answers = int(mx.argmax(clean))
    given = [answers] if isinstance(answers, (str, int, np.integer)) else [*(answers or ())]
    if len(given) != count:
        wanted = "(right, wrong)" if count == 2 else "one token"
        raise ValueError(f"answers must be {wanted} for {metric!r}, got {answers!r}.")
    ids = [token_id(model, token, clean.shape[-1], "answers") for token in given]
    if len(set(ids)) < len(ids):
        raise ValueError(f"answers must be different tokens, got {answers!r}.")
    return ids, texts_of(model, ids)


def texts_of(model: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, or its id where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(i) for i in ids]
    return model.to_str_tokens(list(ids))
