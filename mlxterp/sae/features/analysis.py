"""Which features are active in a text."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.source import ActivationSource


@dataclass(frozen=True)
class FeatureActivation:
    """A feature, its largest value in a text, and the token where it has it."""

    feature_id: int
    value: float
    position: int
    token: str

    def __repr__(self) -> str:
        return f"feature {self.feature_id}: {self.value:.3f} at {self.position} {self.token!r}"


@dataclass(frozen=True)
class TextAnalysis:
    """The features that are active in a text.

    `tokens` are its pieces; `by_token` holds, for each of them, up to `top_k` pairs `(feature_id,
    value)`, largest first, and nothing for special tokens; `top` the features with the largest
    values anywhere in the text.
    """

    tokens: tuple[str, ...]
    by_token: tuple[tuple[tuple[int, float], ...], ...]
    top: tuple[FeatureActivation, ...]

    def __repr__(self) -> str:
        lines = ["token                features (value)"]
        for token, features in zip(self.tokens, self.by_token, strict=True):
            listed = "  ".join(f"{i} ({value:.2f})" for i, value in features[:5])
            lines.append(f"{token!r:<20} {listed}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Everything, as plain values."""
        return {
            "tokens": list(self.tokens),
            "by_token": [[list(pair) for pair in features] for features in self.by_token],
            "top": [vars(feature) for feature in self.top],
        }


def encode_text(
    coder: SparseCoder, source: ActivationSource, text: str
) -> tuple[list[str], mx.array]:
    """The pieces of a text and their codes `[n_tokens, n_features]`, zero at special tokens.

    Raises `ValueError` for an empty text, or what is none.
    """
    if not isinstance(text, str):
        raise ValueError(f"text must be one string, got {type(text).__name__}.")
    if not text:
        raise ValueError("text must not be empty.")
    (ids,) = source.encode_batch([text])
    captured = source.run(mx.array([ids]), capture=coder.reads.names, stop=True)
    codes = coder.encode({name: captured[name][0] for name in coder.reads.names})
    counts = mx.array([i not in source.special_token_ids for i in ids])
    return source.to_str_tokens(ids), codes * counts[:, None]


def analyze_text(
    coder: SparseCoder, source: ActivationSource, text: str, top_k: int = 10
) -> TextAnalysis:
    """Which features are active where in a text, the `top_k` largest of each token and of all."""
    tokens, codes = encode_text(coder, source, text)
    values = np.array(codes.astype(mx.float32))
    order = np.argsort(-values, axis=1)[:, :top_k]
    by_token = tuple(
        tuple((int(i), float(row[i])) for i in ids if row[i] != 0)
        for row, ids in zip(values, order, strict=True)
    )
    peaks = values.max(axis=0)
    ranked = [int(i) for i in np.argsort(-peaks)[:top_k] if peaks[i] > 0]
    positions = values.argmax(axis=0)
    top = tuple(
        FeatureActivation(i, float(peaks[i]), int(positions[i]), tokens[positions[i]])
        for i in ranked
    )
    return TextAnalysis(tuple(tokens), by_token, top)
