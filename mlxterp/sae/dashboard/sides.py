"""What features write and read, as tokens, of all features of a coder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dashboard.strings import Strings
from mlxterp.sae.features.connections import token_embeddings
from mlxterp.sae.features.logit_effects import logit_directions, writes_stream, written
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource

Ends = list[tuple[np.ndarray, np.ndarray]]  # token ids and numbers, of the largest and smallest

FEATURES_PER_BLOCK, LOGITS_PER_BLOCK = 512, 128
MOST_SITES = 8


@dataclass(frozen=True)
class Side:
    """One way in which tokens go with features: what these write, at one site or at all of them
    together, or what they read."""

    direction: Literal["writes", "reads"]
    site: str | None
    title: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def sides_of(coder: SparseCoder, source: ActivationSource) -> tuple[Side, ...]:
    """What can be said of a coder's features: what they write, wherever that has the width of the
    residual stream, and what they read where that is something else."""
    found = []
    if writes_stream(coder, source):
        found.append(Side("writes", None, "Tokens made more and less likely"))
    else:
        names = [name for name in coder.writes.names if writes_stream(coder, source, name)]
        found += [
            Side("writes", name, f"Tokens made more and less likely, by {name}")
            for name in names[:MOST_SITES]
        ]
    if coder.reads != coder.writes and _reads_stream(coder, source):
        found.append(Side("reads", None, "Tokens that it reads, by its encoder alone"))
    return tuple(found)


def side_arrays(
    side: Side, coder: SparseCoder, source: ActivationSource, strings: Strings, n: int
) -> dict[str, np.ndarray]:
    """The `n` largest and the `n` smallest numbers of each feature, `top_values` and
    `bottom_values` `[n_features, n]`, with the numbers of their tokens' texts, `top` and `bottom`;
    -1 where there are not so many tokens."""
    parts = (_written if side.direction == "writes" else _read)(side, coder, source, n)
    ends = [[np.concatenate(arrays) for arrays in zip(*held, strict=True)]
            for held in zip(*parts, strict=True)]  # fmt: skip
    known = np.unique(np.concatenate([ids.reshape(-1) for ids, _ in ends]))
    texts = strings.numbers(_model(side, coder, source).to_str_tokens(known.tolist()))
    arrays: dict[str, np.ndarray] = {}
    for end, (ids, values) in zip(("top", "bottom"), ends, strict=True):
        missing = [(0, 0), (0, n - ids.shape[1])]
        numbers = texts[np.searchsorted(known, ids)]
        arrays[end] = np.pad(numbers, missing, constant_values=-1).astype(np.int32)
        arrays[f"{end}_values"] = np.pad(values, missing).astype(np.float32)
    return arrays


def _model(side: Side, coder: SparseCoder, source: ActivationSource) -> ActivationSource:
    """The one whose tokens they are."""
    if side.direction == "writes":
        return written(coder, source, side.site)[0]
    return owner(source, coder.reads.names[0])[0]


def _written(side: Side, coder: SparseCoder, source: ActivationSource, n: int) -> list[Ends]:
    found = []
    for start in range(0, coder.n_features, LOGITS_PER_BLOCK):
        ids = range(start, min(start + LOGITS_PER_BLOCK, coder.n_features))
        scores = logit_directions(coder, source, ids, side.site)
        empty = np.zeros((len(ids), 0), np.int64), np.zeros((len(ids), 0), np.float32)
        found.append([_larger(empty, scores, 0, sign, n) for sign in (1, -1)])
    return found


def _read(side: Side, coder: SparseCoder, source: ActivationSource, n: int) -> list[Ends]:
    """The ends of `W_enc . embedding` over all tokens, of which only so many are held at once."""
    rows = [*_encoder_rows(coder)]
    best = [[(np.zeros((len(part), 0), np.int64), np.zeros((len(part), 0)))] * 2 for part in rows]
    for first, embedded in token_embeddings(_model(side, coder, source), rows[0].shape[1]):
        for i, part in enumerate(rows):
            scores = np.array(part @ embedded.T)
            best[i] = [
                _larger(held, scores, first, sign, n)
                for held, sign in zip(best[i], (1, -1), strict=True)
            ]
    return best


def _larger(
    held: tuple[np.ndarray, np.ndarray], scores: np.ndarray, first: int, sign: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `n` best of those held and of the scores `[n_features, tokens]` of further tokens."""
    k = min(n, scores.shape[1])
    chosen = np.argpartition(-sign * scores, k - 1, axis=1)[:, :k]
    ids = np.concatenate([held[0], first + chosen], axis=1)
    values = np.concatenate([held[1], np.take_along_axis(scores, chosen, axis=1)], axis=1)
    order = np.argsort(-sign * values, axis=1, kind="stable")[:, :n]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)


def _encoder_rows(coder: SparseCoder) -> Iterator[mx.array]:
    """The encoder rows `[n, width]` of some features at a time, summed over the sites they read."""
    for block, W_enc in zip(coder.blocks, coder.of_blocks(coder.W_enc), strict=True):
        parts = [
            slice(part.start - block.reads.start, part.stop - block.reads.start)
            for part in coder.reads.slices.values()
            if block.reads.start <= part.start and part.stop <= block.reads.stop
        ]
        whole = sum((W_enc[:, part] for part in parts[1:]), W_enc[:, parts[0]]).astype(mx.float32)
        for start in range(0, len(whole), FEATURES_PER_BLOCK):
            yield whole[start : start + FEATURES_PER_BLOCK]


def _reads_stream(coder: SparseCoder, source: ActivationSource) -> bool:
    """Whether all that is read is of one model and has the width of its embeddings."""
    models = [owner(source, name)[0] for name in coder.reads.names]
    if any(model is not models[0] for model in models) or len(set(coder.reads.widths)) > 1:
        return False
    try:
        next(token_embeddings(models[0], coder.reads.widths[0]))
    except ValueError:
        return False
    return True
