"""Activations of many texts at one place of each, as rows for statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxterp.analysis.source import Readable
from mlxterp.sites import Site

Position = int | Literal["mean"]
BATCH = 16  # texts that are read at once


def vector_site(model: Readable, layer: int | str | Site, component: str | None = None) -> Site:
    """The site, if an activation there is one vector for each token, `[B, S, d]`.

    Raises `ValueError` for an unknown site and for one of another shape.
    """
    site = model.site(layer, component)
    table = model.architecture.table
    if site not in table or len(table[site].shape) != 3 or table[site].shape[:2] != ("B", "S"):
        shape = list(table[site].shape) if site in table else "one that is not known"
        raise ValueError(f"layer must be a site of shape [B, S, d], and {site} has {shape}.")
    return site


def as_texts(name: str, texts: Any) -> list[Any]:
    """Texts, or rows of token ids, as a list; raises `ValueError` where there are none, and for
    anything else."""
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found:
        raise ValueError(f"{name} must have at least one text: the list is empty.")
    other = next((text for text in found if not isinstance(text, (str, list, tuple))), None)
    if other is not None:
        raise ValueError(f"{name} must be texts or lists of token ids, not {other!r:.80}.")
    return found


def rows_at(
    model: Readable, texts: Sequence[Any], sites: Sequence[Site], position: Position
) -> dict[Site, np.ndarray]:
    """The activations `[n_texts, d]` of each text at one position, in float64.

    A negative position counts from the last real token of each text; "mean" is the mean over its
    tokens, special ones left out. Raises `ValueError` for a position that a text does not have.
    """
    _check_position(position)
    parts: dict[Site, list[np.ndarray]] = {site: [] for site in sites}
    for start, values, kept in _passes(model, texts, sites):
        weights = mx.array(_weights(kept, position, start).astype(np.float32))
        for site, array in values.items():
            # What is left out counts for nothing, even where it is not finite.
            array = mx.where(weights[..., None] > 0, array.astype(mx.float32), 0.0)
            rows = (weights[:, None] @ array)[:, 0]
            parts[site].append(np.array(rows, np.float64))
    return {site: np.concatenate(rows) for site, rows in parts.items()}


def rows_of_tokens(
    model: Readable, texts: Sequence[Any], sites: Sequence[Site]
) -> tuple[dict[Site, list[np.ndarray]], list[np.ndarray]]:
    """The activations `[n_tokens, d]` of every token of each text, and which of them `[n_tokens]`
    are of no special token."""
    rows: dict[Site, list[np.ndarray]] = {site: [] for site in sites}
    plain: list[np.ndarray] = []
    for _, values, (real, ordinary) in _passes(model, texts, sites):
        lengths = real.sum(axis=1)
        plain += [words[:n] for words, n in zip(ordinary, lengths, strict=True)]
        for site, array in values.items():
            found = np.array(array.astype(mx.float32), np.float64)
            rows[site] += [row[:n] for row, n in zip(found, lengths, strict=True)]
    return rows, plain


Kept = tuple[np.ndarray, np.ndarray]  # real tokens, and those of them that are not special


def _passes(
    model: Readable, texts: Sequence[Any], sites: Sequence[Site]
) -> Iterator[tuple[int, dict[Site, mx.array], Kept]]:
    special = np.array(sorted(model.special_token_ids), dtype=np.int64)
    for start in range(0, len(texts), BATCH):
        done = model.run(list(texts[start : start + BATCH]), capture=tuple(sites), stop=True)
        values = {site: done[site] for site in sites}
        mx.eval(values)
        real = np.array(done.mask)
        yield start, values, (real, real & ~np.isin(np.array(done.tokens), special))


def _check_position(position: Any) -> None:
    whole = isinstance(position, (int, np.integer)) and not isinstance(position, bool)
    if not whole and position != "mean":
        raise ValueError(f"position must be a whole number or 'mean', got {position!r}.")


def _weights(kept: Kept, position: Position, start: int) -> np.ndarray:
    """How much each token counts, `[B, S]`, rows of sum 1."""
    real, ordinary = kept
    lengths = real.sum(axis=1)
    if position == "mean":
        counts = ordinary.sum(axis=1)
        if (empty := np.flatnonzero(counts == 0)).size:
            raise ValueError(f"text {start + empty[0]} has special tokens only: it has no mean.")
        return ordinary / counts[:, None]
    if (short := np.flatnonzero((lengths <= position) | (lengths < -position))).size:
        i = short[0]
        raise ValueError(
            f"position must be {-lengths[i]} to {lengths[i] - 1} in text {start + i}, which has "
            f"{lengths[i]} tokens, got {position}."
        )
    return np.arange(real.shape[1]) == (position % lengths)[:, None]
