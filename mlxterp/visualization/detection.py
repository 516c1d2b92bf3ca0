"""Find the heads of a model that attend in known ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.analysis.source import Readable
from mlxterp.visualization.copying import COPIES, detect_copying_heads
from mlxterp.visualization.heads import AttentionPatternDetector, HeadScores, HeadTypes
from mlxterp.visualization.patterns import Patterns, get_attention_patterns
from mlxterp.visualization.sampling import repeated_tokens
from mlxterp.visualization.scores import induction_score

Layers = int | Iterable[int] | None


def detect_induction_heads(
    model: Readable,
    n_random_tokens: int = 50,
    n_repeats: int = 2,
    threshold: float = 0.4,
    layers: Layers = None,
    seed: int = 42,
    *,
    n_sequences: int = 4,
) -> HeadScores:
    """The heads that, where random tokens repeat themselves, attend to what came after the present
    one: `induction_score` above `threshold`, as a mean over `n_sequences`.

    The tokens are different ones without special ones, as many as there are where the vocabulary
    is smaller; the token that begins a text, if the tokenizer has one, comes before them. Raises
    `ValueError` for sequences longer than the context, and for fewer than 2 tokens or repeats.

    Reference: Olsson et al. 2022, arXiv 2209.11895.
    """
    tokens, period = repeated_tokens(model, n_random_tokens, n_repeats, n_sequences, seed)
    start = tokens.shape[1] - period * n_repeats
    every = {}
    for layer, pattern in _patterns(model, mx.array(tokens), layers).items():
        scores = np.mean(induction_score(pattern[..., start:, start:], period), axis=0)
        every |= {(layer, head): score for head, score in enumerate(scores.tolist())}
    return HeadScores("induction", every, threshold)


def detect_head_types(
    model: Readable,
    text: Any,
    threshold: float = 0.4,
    layers: Layers = None,
    *,
    induction: bool = True,
    copying: bool = False,
    n_random_tokens: int = 50,
) -> HeadTypes:
    """The heads of each type, `{type: [(layer, head), ...]}`, and those of none as "unknown".

    On the `text`: "previous_token", "first_token" and "current_token", and "duplicate_token" where
    a token occurs twice (it is empty otherwise). On `n_random_tokens` that repeat themselves:
    "induction", by `detect_induction_heads`. Where asked for "copying", by `detect_copying_heads`
    with its own threshold. Raises `ValueError` for several texts at once.
    """
    ids = _one_text(model, text)
    row = np.array(ids[0]).tolist()
    tokens = row if len(set(row)) < len(row) else None
    detector = AttentionPatternDetector(*[threshold] * 5)
    names = ("previous_token", "first_token", "current_token", "duplicate_token")
    scores: dict[str, dict[tuple[int, int], float]] = {name: {} for name in names}
    for layer, pattern in _patterns(model, ids, layers).items():
        for name, values in detector.analyze_head(pattern[0], tokens=tokens).items():
            scores[name] |= {(layer, head): x for head, x in enumerate(values.tolist())}
    thresholds = dict.fromkeys((*names, "induction"), threshold) | {"copying": COPIES}
    if induction:
        found = detect_induction_heads(model, n_random_tokens, layers=layers)
        scores["induction"] = found.every
    if copying:
        scores["copying"] = detect_copying_heads(model, layers=layers).every
    return HeadTypes(scores, {name: thresholds[name] for name in scores})


def find_attention_pattern(
    model: Readable,
    text: Any,
    pattern_fn: Callable[[np.ndarray], float],
    threshold: float = 0.5,
    layers: Layers = None,
) -> HeadScores:
    """The heads for which `pattern_fn(pattern [S, S])` of a text is above `threshold`.

    Raises `ValueError` where it returns no finite number, and for several texts at once.
    """
    ids = _one_text(model, text)
    every = {}
    for layer, pattern in _patterns(model, ids, layers).items():
        for head, own in enumerate(pattern[0]):
            every[layer, head] = score = float(pattern_fn(own))
            if not np.isfinite(score):
                raise ValueError(f"pattern_fn must return a finite number, not {score}")
    return HeadScores("custom", every, threshold)


def _one_text(model: Readable, text: Any) -> mx.array:
    ids = model.tokens(text)[0]
    if ids.shape[0] != 1:
        raise ValueError(f"text must be one text, not {ids.shape[0]}")
    return ids


def _patterns(model: Readable, tokens: mx.array, layers: Layers) -> Patterns:
    return get_attention_patterns(model.attention(tokens, layers))
