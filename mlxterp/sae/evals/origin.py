"""What was measured, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder

COSINES = 1 << 25  # at once


@dataclass(frozen=True)
class EvaluationData:
    """What was measured, and on how many tokens, special ones not counted, of how many documents.

    `contexts` of `context_length` tokens were chosen by the `seed`; they are `None` where they are
    not known, like the documents. Spreads are over `clusters`, documents or tokens, which are
    drawn again in `n_clusters` groups. Equal `fingerprint`s are of equal tokens.
    """

    coder: Mapping[str, Any]
    model: str
    n_tokens: int
    n_documents: int | None
    n_contexts: int | None
    context_length: int | None
    clusters: str
    n_clusters: int
    seed: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def described(coder: SparseCoder) -> dict[str, Any]:
    """What a coder is, as plain values."""
    known = getattr(coder, "metadata", None)
    path = getattr(coder, "path", None)
    return {
        "name": repr(coder),
        "kind": getattr(coder, "kind", "coder"),
        "reads": coder.reads.to_list(),
        "writes": coder.writes.to_list(),
        "n_features": coder.n_features,
        "activation_function": coder.activation_name,
        "k": coder.k,
        "file": None if path is None else path.name,
        "source": dict(getattr(known, "source", {})),
    }


def weights_of(coder: SparseCoder) -> dict[str, np.ndarray]:
    """Facts of each feature's arrays, `[n_features]`: the norm of its encoder row, its bias, where
    it writes what it reads the cosine between its rows, and the largest cosine of each of its rows
    with that of another feature."""
    encoder = np.array(coder.W_enc.astype(mx.float32), np.float64)
    norms = np.linalg.norm(encoder, axis=1)
    facts = {
        "encoder_norm": norms,
        "encoder_bias": np.array(coder.b_enc.astype(mx.float32), np.float64),
    }
    if len(coder.blocks) > 1:
        return facts
    if coder.reads == coder.writes:
        decoder = np.array(coder.W_dec.astype(mx.float32), np.float64)
        lengths = norms * np.linalg.norm(decoder, axis=1)
        products = (encoder * decoder).sum(axis=1)
        facts["encoder_decoder_cosine_sim"] = products / np.where(lengths > 0, lengths, np.nan)
    return facts | {
        "max_encoder_cosine_sim": nearest_cosines(coder.W_enc),
        "max_decoder_cosine_sim": nearest_cosines(coder.W_dec),
    }


def nearest_cosines(rows: mx.array) -> np.ndarray:
    """The largest cosine of each row with another one, `[n]`; of a row of zeros 0."""
    rows = rows.astype(mx.float32)
    norms = mx.linalg.norm(rows, axis=-1, keepdims=True)
    units, found = rows / mx.where(norms > 0, norms, 1), []
    size = max(1, COSINES // len(units))
    for start in range(0, len(units), size):
        cosines = units[start : start + size] @ units.T
        own = mx.arange(start, start + len(cosines))[:, None] == mx.arange(len(units))
        found.append(np.array(mx.where(own, -mx.inf, cosines).max(axis=-1)))
    return np.concatenate(found)
