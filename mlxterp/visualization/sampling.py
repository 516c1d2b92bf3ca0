"""Random tokens that a model knows, without special ones."""

from __future__ import annotations

import numpy as np

from mlxterp.analysis.source import Readable


def plain_ids(model: Readable) -> np.ndarray:
    """The ids that stand for text. Raises `ValueError` for a model whose vocabulary is unknown."""
    sizes = (model.architecture.vocab_size, getattr(model.tokenizer, "vocab_size", None))
    known = [size for size in sizes if size]
    if not known:
        raise ValueError("the vocabulary of this model is not known: it has no embedding")
    return np.setdiff1d(np.arange(min(known)), [*model.special_token_ids])


def drawn(ids: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` different ones, or all where there are fewer, in random order."""
    return rng.choice(ids, min(n, len(ids)), replace=False)


def repeated_tokens(
    model: Readable, n_tokens: int, n_repeats: int, n_sequences: int, seed: int
) -> tuple[np.ndarray, int]:
    """Sequences of different random tokens, again and again, `[n_sequences, S]`, and the period."""
    asked = {"n_random_tokens": n_tokens, "n_repeats": n_repeats, "n_sequences": n_sequences}
    for name, least in (("n_random_tokens", 2), ("n_repeats", 2), ("n_sequences", 1)):
        if asked[name] < least:
            raise ValueError(f"{name} must be >= {least}, not {asked[name]}")
    ids, rng = plain_ids(model), np.random.default_rng(seed)
    if len(ids) < 2:
        raise ValueError(f"the vocabulary must have 2 tokens that are not special, not {len(ids)}")
    rows = np.tile(np.stack([drawn(ids, n_tokens, rng) for _ in range(n_sequences)]), n_repeats)
    period = rows.shape[1] // n_repeats
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if isinstance(bos, int):
        rows = np.pad(rows, [(0, 0), (1, 0)], constant_values=bos)
    longest = model.context_length
    if longest is not None and rows.shape[1] > longest:
        raise ValueError(
            f"n_random_tokens * n_repeats must fit into the context of {longest} tokens, "
            f"not {period} * {n_repeats}"
        )
    return rows.astype(np.int32), period
