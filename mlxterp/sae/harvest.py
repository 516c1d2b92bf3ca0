"""From text to activations: packed contexts through a language model, stopped at the last site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns
from mlxterp.tokenization import pack

TOKENS_PER_FORWARD = 4096
TEXTS_PER_CALL = 256


class ActivationSource(Protocol):
    """All that `mlxterp.sae` needs to know of a language model."""

    name: str

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def to_str_tokens(self, input: Any) -> list[str]: ...

    def site(self, layer: Any, component: str | None = None) -> Any: ...

    def width(self, site: Any) -> int: ...

    def run(
        self, tokens: Any, *, capture: Any = (), edit: Any = None, stop: bool = False
    ) -> Any: ...

    def unembed(self, hidden: mx.array) -> mx.array: ...


def find_site(source: ActivationSource, layer: Any, component: str | None = None) -> Any:
    """The site of a layer and component, `mlp` where none is given, or of a whole name."""
    if component is None and isinstance(layer, (int, np.integer)):
        component = "mlp"
    return source.site(layer, component)


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, packed into contexts of equal length.

    `documents` are token ids `[n]` each, without the special tokens at their ends; those within are
    read by the model but reach no dataset and no statistic.
    """

    documents: tuple[np.ndarray, ...]
    context: int
    bos_id: int | None
    special: frozenset[int]

    @classmethod
    def from_texts(
        cls, source: ActivationSource, texts: Iterable[str], context: int, max_tokens: int | None
    ) -> Corpus:
        """Tokenise texts, reading no more of them than `max_tokens` need.

        Raises `ValueError` where there is no text, or none with a token.
        """
        documents, bos, total = [], None, 0
        for chunk in _chunks(texts):
            for ids in source.encode_batch([text for text in chunk if text]):
                if ids and ids[0] in source.special_token_ids:
                    bos = ids[0]
                body = _without_special_ends(ids, source.special_token_ids)
                room = len(body) if max_tokens is None else max_tokens - total
                if len(body[:room]):
                    documents.append(np.array(body[:room], dtype=np.int32))
                    total += len(body[:room])
            if max_tokens is not None and total >= max_tokens:
                break
        if not documents:
            raise ValueError("The dataset is empty: it must hold at least one text with a token.")
        return cls(tuple(documents), context, bos, source.special_token_ids)

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[n_rows, context]` and each position's document, -1 where none counts."""
        packed = list(pack(self.documents, self.context, bos_id=self.bos_id))
        tokens = np.stack([tokens for tokens, _ in packed])
        owners = np.stack([owners for _, owners in packed])
        special = np.isin(tokens, list(self.special))
        return tokens, np.where(special, -1, owners)

    @property
    def n_tokens(self) -> int:
        """Positions that count."""
        return int((self.rows[1] >= 0).sum())

    def blocks(self) -> Iterator[tuple[int, mx.array, mx.array]]:
        """All contexts in order, as many at a time as go through the model together.

        Yields the first one's number, token ids `[n, context]`, and which positions count.
        """
        tokens, documents = self.rows
        step = rows_per_forward(self.context)
        for start in range(0, len(tokens), step):
            counts: Any = documents[start : start + step] >= 0
            yield start, mx.array(tokens[start : start + step]), mx.array(counts)

    def split(self, share: float, seed: int) -> tuple[Corpus, Corpus]:
        """Two corpora of which the second holds about `share` of the tokens, in whole documents.

        A single document is cut in two.
        """
        if len(self.documents) == 1:
            (document,) = self.documents
            cut = min(max(1, round(len(document) * (1 - share))), len(document) - 1)
            return self._of([document[:cut]]), self._of([document[cut:]])
        held_out = self._draw(share, np.random.default_rng(seed))
        return (
            self._of(d for i, d in enumerate(self.documents) if i not in held_out),
            self._of(d for i, d in enumerate(self.documents) if i in held_out),
        )

    def _draw(self, share: float, rng: np.random.Generator) -> set[int]:
        """Random documents with about the share of tokens; those too large for it are left.

        They exceed the share by a tenth of the smaller part at most.
        """
        lengths = [len(document) for document in self.documents]
        most, size = (share + 0.1 * min(share, 1 - share)) * sum(lengths), 0
        drawn: set[int] = set()
        for i in rng.permutation(len(lengths)).tolist():
            if size + lengths[i] <= most and len(drawn) < len(lengths) - 1:
                drawn.add(i)
                size += lengths[i]
        return drawn or {int(np.argmin(lengths))}

    def _of(self, documents: Iterable[np.ndarray]) -> Corpus:
        return Corpus(tuple(documents), self.context, self.bos_id, self.special)


def _without_special_ends(ids: list[int], special: frozenset[int]) -> list[int]:
    start, end = 0, len(ids)
    while start < end and ids[start] in special:
        start += 1
    while end > start and ids[end - 1] in special:
        end -= 1
    return ids[start:end]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    if isinstance(texts, str):
        raise ValueError("dataset must be a list of texts, got one string; put it in a list.")
    if isinstance(texts, Mapping):
        raise ValueError(f"dataset must be a list of texts, got a mapping; pass one of {[*texts]}.")
    chunk = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"dataset must hold strings; item {i} is {type(text).__name__}.")
        chunk.append(text)
        if len(chunk) == TEXTS_PER_CALL:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def rows_per_forward(context: int) -> int:
    """How many contexts go through the model at once."""
    return max(1, TOKENS_PER_FORWARD // context)


def harvest(
    source: ActivationSource, corpus: Corpus, columns: Columns, order: np.ndarray
) -> Iterator[tuple[mx.array, np.ndarray]]:
    """Activations `[n, width]` of the positions that count, and their documents `[n]`.

    `order` says which contexts, one after another. Positions whose activation is not finite are
    left out. Raises `ValueError` for a site that is not one vector per token.
    """
    # One forward ahead, so that the device computes while the one before it is looked at.
    waiting = None
    for following in _forwards(source, corpus, columns, order):
        if waiting is not None:
            yield from _finite(*waiting)
        waiting = following
    if waiting is not None:
        yield from _finite(*waiting)


def _forwards(
    source: ActivationSource, corpus: Corpus, columns: Columns, order: np.ndarray
) -> Iterator[tuple[mx.array, np.ndarray]]:
    """Activations and documents as in `harvest`, of all positions that count, being computed."""
    tokens, documents = corpus.rows
    step = rows_per_forward(corpus.context)
    for start in range(0, len(order), step):
        picked = order[start : start + step]
        captured = source.run(mx.array(tokens[picked]), capture=columns.names, stop=True)
        joined = columns.join({name: captured[name] for name in columns.names})
        if joined.shape[:-1] != tokens[picked].shape:
            raise ValueError(
                f"{', '.join(columns.names)} must be one vector per token, [batch, tokens, width]; "
                f"it is {list(joined.shape)}."
            )
        owners = documents[picked].reshape(-1)
        positions = np.flatnonzero(owners >= 0)
        activations = joined.reshape(-1, columns.width)[mx.array(positions)]
        mx.async_eval(activations)
        yield activations, owners[positions]


def _finite(activations: mx.array, owners: np.ndarray) -> Iterator[tuple[mx.array, np.ndarray]]:
    finite = np.array(mx.isfinite(activations).all(axis=-1))
    if not finite.all():
        activations, owners = activations[mx.array(np.flatnonzero(finite))], owners[finite]
    if len(owners):
        yield activations, owners
