"""The patterns of attention as NumPy arrays, wherever they are held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.attention import Attention
from mlxterp.trace import Trace

Patterns = Mapping[int, np.ndarray]
Head = tuple[int, int]  # layer and head


def get_attention_patterns(
    trace: Trace | Attention | Patterns, layers: int | Iterable[int] | None = None
) -> dict[int, np.ndarray]:
    """The patterns `{layer: [B, H, S, T]}` in float32, from query to key, of some `layers`.

    `trace` is what `model.trace(...)` or `model.attention(...)` returned, or patterns as they are
    returned here; None are all layers that have softmax attention. Raises `ValueError` for a layer
    without, or that attended several times, for a trace that was told what to capture, and for a
    model that has no softmax attention.
    """
    held = trace.attention if isinstance(trace, Trace) else trace
    if not isinstance(held, Mapping):
        raise TypeError(f"trace must be a Trace or an Attention, not {type(trace).__name__}")
    count = len(trace.model.architecture.blocks) if isinstance(trace, Trace) else None
    return {layer: _pattern(held, layer) for layer in _layers(held, layers, count)}


def _layers(held: Mapping[int, Any], layers: Any, count: int | None) -> list[int]:
    if layers is None:
        return [*held]
    numbers = [index(n) for n in (layers if isinstance(layers, Iterable) else (layers,))]
    numbers = [n + count if count is not None and n < 0 else n for n in numbers]
    missing = [n for n in numbers if n not in held]
    if missing or not numbers:
        raise ValueError(f"layers must be of {[*held]}, which have softmax attention, not {layers}")
    return numbers


def _pattern(held: Mapping[int, Any], layer: int) -> np.ndarray:
    found = held[layer]
    return as_array(found.pattern if isinstance(held, Attention) else found, 4)


def as_array(pattern: Any, n_axes: int | None = None) -> np.ndarray:
    """A pattern `[..., S, T]` of NumPy, MLX or lists as float32; T is at least S.

    Raises `ValueError` for another shape, and for what is no finite number.
    """
    if isinstance(pattern, mx.array):
        pattern = pattern.astype(mx.float32)  # NumPy has no bfloat16
    values = np.asarray(pattern, np.float32)
    if values.ndim < 2 or (n_axes and values.ndim != n_axes):
        axes = "[..., S, T]" if n_axes is None else "[B, H, S, T]"
        raise ValueError(f"a pattern must have the shape {axes}, not {list(values.shape)}")
    queries, keys = values.shape[-2:]
    if not 1 <= queries <= keys:
        raise ValueError(f"a pattern must have as many keys as queries, or more: {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a pattern must have finite numbers only")
    return values


def some_heads(patterns: Patterns, heads: Iterable[Head] | None) -> list[Head]:
    """The heads that are named, or all; raises `ValueError` for one that there is not."""
    every = [(layer, head) for layer, x in patterns.items() for head in range(x.shape[1])]
    if heads is None:
        return every
    chosen = [(index(layer), index(head)) for layer, head in heads]
    wrong = [head for head in chosen if head not in every]
    if wrong or not chosen:
        counts = {layer: x.shape[1] for layer, x in patterns.items()}
        raise ValueError(f"heads must be (layer, head) of {{layer: heads}} {counts}, not {wrong}")
    return chosen


def check_tokens(tokens: Iterable[str], n_keys: int) -> list[str]:
    """The tokens of the keys; raises `ValueError` where there are more or fewer."""
    if isinstance(tokens, str):
        raise ValueError(f"tokens must be a list of texts, such as model.to_str_tokens({tokens!r})")
    tokens = [str(token) for token in tokens]
    if len(tokens) != n_keys:
        raise ValueError(f"tokens must be {n_keys}, one for each key, not {len(tokens)}")
    return tokens
