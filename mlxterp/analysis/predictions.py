"""What the head makes of a hidden state."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp.analysis.source import Readable
from mlxterp.sae.kernels import top_k


def get_token_predictions(
    model: Readable,
    hidden_state: mx.array,
    top_k: int = 10,
    return_scores: bool = False,
    embedding_layer: nn.Module | None = None,
    lm_head: nn.Module | None = None,
) -> list:
    """The `top_k` ids (or `(id, score)`) of a hidden state `[d_model]`, the likeliest first.

    A batch `[B, d_model]` gives a list of lists. The state goes straight into the head: apply the
    final norm before, or use `InterpretableModel.unembed`, which does. Raises `ValueError` for
    another shape or a `top_k` out of range.
    """
    if hidden_state.ndim not in (1, 2):
        raise ValueError(
            f"hidden_state must be [d_model] or [B, d_model], not {hidden_state.shape}"
        )
    logits = _project(model, hidden_state, embedding_layer, lm_head)
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k must be 1 to {logits.shape[-1]}, not {top_k}")
    rows, values = best_tokens(logits.reshape(-1, logits.shape[-1]), top_k)
    if return_scores:
        rows = [list(zip(ids, row, strict=True)) for ids, row in zip(rows, values, strict=True)]
    return rows if hidden_state.ndim == 2 else rows[0]


def best_tokens(logits: mx.array, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """The ids of the `k` largest of each row of `logits [n, vocabulary]`, the largest first, and
    their logits; of equal ones the smaller id comes first."""
    chosen = top_k(logits, k)
    values = np.array(mx.take_along_axis(logits, chosen, axis=-1).astype(mx.float32))
    ids = np.array(chosen).astype(np.int64)
    order = np.lexsort((ids, -values), axis=-1)
    ids, values = (np.take_along_axis(x, order, axis=-1) for x in (ids, values))
    return ids.tolist(), values.tolist()


def _project(
    model: Readable,
    hidden: mx.array,
    embedding: nn.Module | None,
    head: nn.Module | None,
) -> mx.array:
    if head is None and embedding is None:
        head = model.architecture.head
    if head is not None:
        project: Any = head  # nn.Module itself declares no call
        return project(hidden)
    tied: Any = model.architecture.embedding if embedding is None else embedding
    if tied is None:
        raise ValueError(
            "this model has no head that could be found: give lm_head or embedding_layer"
        )
    return tied.as_linear(hidden)
