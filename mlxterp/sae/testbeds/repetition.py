"""Sequences that repeat, and how well a model goes on with them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def repetitions(
    n: int, n_words: int, period: int, length: int | None = None, seed: int = 0
) -> np.ndarray:
    """`n` random sequences that repeat after `period` tokens, `[n, 1 + length]`.

    Token 0 begins each; `period` different ones of the others follow, again and again, until there
    are `length` of them, by default two periods. Raises `ValueError` where there are not so many.
    """
    if not 1 <= period < n_words:
        raise ValueError(f"period must be in [1, n_words - 1 = {n_words - 1}], got {period}.")
    length = 2 * period if length is None else length
    for name, value in {"n": n, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")
    rng = np.random.default_rng(seed)
    rows = rng.permuted(np.tile(np.arange(1, n_words), (n, 1)), axis=1)
    rows = rows[:, np.arange(length) % period]
    return np.pad(rows, [(0, 0), (1, 0)]).astype(np.int32)


def repetition_accuracy(model: nn.Module, tokens: np.ndarray, period: int) -> float:
    """The share of the tokens `[n, S]` that a model foresees, of those that it can: all from the
    second token of the second period on.

    Raises `ValueError` where there is none.
    """
    if tokens.ndim != 2 or not 1 <= period <= tokens.shape[1] - 3:
        raise ValueError(
            f"tokens must have shape [n, >= period + 3 = {period + 3}], got {list(tokens.shape)}."
        )
    logits: Any = model(mx.array(tokens[:, :-1]))
    foreseen = np.array(logits.argmax(axis=-1))[:, period + 1 :]
    return float((foreseen == tokens[:, period + 2 :]).mean())
