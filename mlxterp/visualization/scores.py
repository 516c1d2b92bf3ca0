"""What a head attends to, as numbers of its pattern, and what it copies, of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxterp.visualization.patterns import as_array

ROWS = 1024  # of a product over the vocabulary that are made at once
Score = float | np.ndarray


def induction_score(attention_pattern: Any, seq_len: int) -> Score:
    """How much a head attends to what came after the present token one period before.

        score = mean over t >= seq_len of pattern[t, t - seq_len + 1]

    `attention_pattern [..., S, T]` is of a text that repeats itself every `seq_len` tokens; a
    number where it is `[S, T]`, else an array of the leading axes, and 0 where there is no second
    period. Raises `ValueError` for a `seq_len` below 1.

    Reference: Olsson et al. 2022, arXiv 2209.11895.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be >= 1, not {seq_len}")
    return _diagonal(as_array(attention_pattern), seq_len - 1, seq_len)


def previous_token_score(attention_pattern: Any) -> Score:
    """The mean attention of `attention_pattern [..., S, T]` to the token before, of all queries
    but the first; 0 where there is one token only."""
    return _diagonal(as_array(attention_pattern), 1, 1)


def current_token_score(attention_pattern: Any) -> Score:
    """The mean attention of `attention_pattern [..., S, T]` to the query's own token, which is all
    that the first query has."""
    return _diagonal(as_array(attention_pattern), 0, 0)


def first_token_score(attention_pattern: Any) -> Score:
    """The mean attention of `attention_pattern [..., S, T]` to the first token, where many heads
    rest; the first query has no other."""
    return _number(as_array(attention_pattern)[..., 0].mean(axis=-1))


def duplicate_token_score(attention_pattern: Any, tokens: Sequence[Any]) -> Score:
    """How much a head attends to earlier occurrences of the present token.

        score = mean over queries t whose token occurred before
                of sum over s < t with tokens[s] = tokens[t] of pattern[t, s]

    `tokens` are those of the keys, as ids or texts. Raises `ValueError` where they are not as many
    as the keys, or none occurs twice.

    Reference: Wang et al. 2022, arXiv 2211.00593.
    """
    pattern = as_array(attention_pattern)
    queries, keys = pattern.shape[-2:]
    same = np.tril(np.equal.outer(_numbered(tokens), _numbered(tokens)), -1)
    if len(same) != keys:
        raise ValueError(f"tokens must be {keys}, one for each key, not {len(same)}")
    same = same[keys - queries :]
    if not (counts := same.any(axis=1)).any():
        raise ValueError("tokens must have one that occurs twice")
    return _number((pattern * same).sum(axis=-1)[..., counts].mean(axis=-1))


def copying_score(ov_circuit: Any, unembedding: Any = None) -> float:
    """How much larger the diagonal of a head's OV circuit is than all of it, by absolute values.

        score = mean(diag(M)) / mean(|M|)
        M = ov_circuit, or unembedding.T @ ov_circuit @ unembedding

    `ov_circuit [d_model, d_model]`, `unembedding [d_model, vocab]`. This is of plain matrices,
    without norms: `detect_copying_heads` asks the model itself. Raises `ValueError` for other
    shapes.
    """
    ov = np.asarray(ov_circuit, np.float64)
    if ov.ndim != 2 or ov.shape[0] != ov.shape[1]:
        raise ValueError(f"ov_circuit must have the shape [d_model, d_model], not {ov.shape}")
    if unembedding is None:
        return float(np.diag(ov).mean() / (np.abs(ov).mean() + 1e-8))
    out = np.asarray(unembedding, np.float64)
    if out.ndim != 2 or out.shape[0] != len(ov):
        raise ValueError(f"unembedding must have the shape [{len(ov)}, vocab], not {out.shape}")
    rows = out.T @ ov
    diagonal = np.einsum("vd,dv->v", rows, out).mean()
    blocks = (rows[i : i + ROWS] @ out for i in range(0, len(rows), ROWS))  # vocab^2 is too large
    return float(diagonal / (sum(np.abs(block).sum() for block in blocks) / len(rows) ** 2 + 1e-8))


def _diagonal(pattern: np.ndarray, back: int, first: int) -> Score:
    """The mean attention to `back` tokens before, of queries at positions from `first` on."""
    queries, keys = pattern.shape[-2:]
    along = np.diagonal(pattern, keys - queries - back, axis1=-2, axis2=-1)
    begin = max(0, back - (keys - queries)) + keys - queries  # the position of its first query
    along = along[..., max(0, first - begin) :]
    if not along.shape[-1]:
        return _number(np.zeros(pattern.shape[:-2]))
    return _number(along.mean(axis=-1))


def _number(values: np.ndarray) -> Score:
    return float(values) if values.ndim == 0 else values


def _numbered(tokens: Sequence[Any]) -> np.ndarray:
    """A number for each different token."""
    numbers: dict[Any, int] = {}
    plain = tokens.tolist() if hasattr(tokens, "tolist") else tokens  # type: ignore[attr-defined]
    return np.array([numbers.setdefault(token, len(numbers)) for token in plain], np.int64)
