"""Documents as token ids, packed into contexts of equal length."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.source import ActivationSource
from mlxterp.tokenization import pack

TOKENS_PER_FORWARD = 4096
TEXTS_PER_CALL = 256
CONTEXTS_PER_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents, packed into contexts.

    `tokens` and `owners` are `[n_contexts, context]`: token ids, and the number of each position's
    document, -1 at `bos_id` and in padding. The ids in `special` are read by the model but reach no
    dataset and no statistic. With `separate` no context holds more than one document.
    """

    tokens: np.ndarray
    owners: np.ndarray
    bos_id: int | None = None
    special: frozenset[int] = frozenset()
    separate: bool = False

    @classmethod
    def from_documents(
        cls,
        source: ActivationSource,
        documents: Iterable[Any],
        context: int,
        max_tokens: int | None = None,
        separate: bool = False,
        seed: int | None = None,
    ) -> Corpus:
        """Tokenise texts, chats and token ids, reading no more than `max_tokens` that count need.

        With a `seed` the documents are then put in random order. Raises `ValueError` where there is
        no document, or none with a token.
        """
        special, left, bos = source.special_token_ids, max_tokens, None
        joined, ends = array("i"), [0]
        for ids in encoded(source, documents):
            if len(ids) and ids[0] in special:
                bos = int(ids[0])
            body = np.array(without_special_ends(ids, special), np.int32)
            if not len(body):
                continue
            if left is not None:
                counted = np.cumsum(~np.isin(body, list(special)))
                body = body[: 1 + np.searchsorted(counted, left)]
                left -= min(left, int(counted[-1]))
            joined.frombytes(body.tobytes())
            ends.append(len(joined))
            if left == 0:
                break
        if not joined:
            raise ValueError("The dataset is empty: it must hold at least one text with a token.")
        flat, n = np.frombuffer(joined, np.int32), len(ends) - 1
        order = range(n) if seed is None else np.random.default_rng(seed).permutation(n)
        bodies = (flat[ends[i] : ends[i + 1]] for i in order)
        return cls.pack(bodies, context, bos, special, separate)

    @classmethod
    def pack(
        cls,
        documents: Iterable[np.ndarray],
        context: int,
        bos_id: int | None,
        special: frozenset[int],
        separate: bool = False,
    ) -> Corpus:
        """Documents of token ids, without the special ones at their ends, one after another."""
        # Python's arrays grow where they are; of lists of blocks a copy would have to be made.
        tokens, owners = array("i"), array("i")
        for row, numbers in pack(documents, context, bos_id=bos_id, separate=separate):
            tokens.frombytes(row.tobytes())
            owners.frombytes(numbers.tobytes())
        packed = [np.frombuffer(part, np.int32).reshape(-1, context) for part in (tokens, owners)]
        return cls(packed[0], packed[1], bos_id, special, separate)

    def __len__(self) -> int:
        """The number of contexts."""
        return len(self.tokens)

    @property
    def context(self) -> int:
        """Positions of a context."""
        return self.tokens.shape[1]

    def documents(self, contexts: Any = slice(None)) -> np.ndarray:
        """The document of each position `[n, context]` of some contexts, -1 where none counts."""
        owners = self.owners[contexts]
        if not self.special:
            return owners
        return np.where(np.isin(self.tokens[contexts], list(self.special)), -1, owners)

    @cached_property
    def document_sizes(self) -> np.ndarray:
        """The number of positions of each document that count, `[n_documents]`."""
        sizes = np.zeros(int(self.owners.max()) + 1, np.int64)
        for start in range(0, len(self), CONTEXTS_PER_BLOCK):
            found = self.documents(slice(start, start + CONTEXTS_PER_BLOCK))
            sizes += np.bincount(found[found >= 0], minlength=len(sizes))
        return sizes

    @property
    def n_documents(self) -> int:
        """The number of documents."""
        return int((self.document_sizes > 0).sum())

    @property
    def n_tokens(self) -> int:
        """Positions that count."""
        return int(self.document_sizes.sum())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides on the activations."""
        digest = hashlib.sha256(
            repr((self.tokens.shape, self.bos_id, sorted(self.special))).encode()
        )
        for part in (self.tokens, self.owners):
            bits: Any = np.ascontiguousarray(part)
            digest.update(bits)
        return digest.hexdigest()

    @property
    def rows_per_forward(self) -> int:
        """How many contexts go through the model at once."""
        return max(1, TOKENS_PER_FORWARD // self.context)

    def blocks(self) -> Iterator[tuple[int, mx.array, mx.array]]:
        """All contexts in order, as many at a time as go through the model together.

        Yields the first one's number, token ids `[n, context]`, and which positions count.
        """
        for start in range(0, len(self), self.rows_per_forward):
            block = slice(start, start + self.rows_per_forward)
            counts: Any = self.documents(block) >= 0
            yield start, mx.array(self.tokens[block]), mx.array(counts)

    def split(self, share: float, seed: int) -> tuple[Corpus, Corpus]:
        """Two corpora of which the second holds about `share` of the tokens, in whole documents.

        A single document is cut in two.
        """
        if len(self._starts) == 1:
            (document,) = self.bodies()
            cut = min(max(1, round(len(document) * (1 - share))), len(document) - 1)
            return self._of([document[:cut]]), self._of([document[cut:]])
        sizes = np.add.reduceat(self.owners.reshape(-1) >= 0, self._starts, dtype=np.int64)
        held_out = _draw(sizes.tolist(), share, np.random.default_rng(seed))
        rest = [i for i in range(len(sizes)) if i not in held_out]
        return self._of(self.bodies(rest)), self._of(self.bodies(sorted(held_out)))

    def between(self, start: int, end: int) -> Corpus:
        """The contexts of some positions, of which no others count."""
        first, last = start // self.context, -(-end // self.context)
        owners = np.array(self.owners[first:last])
        flat = owners.reshape(-1)
        flat[: start - first * self.context] = -1
        flat[end - first * self.context :] = -1
        return replace(self, tokens=self.tokens[first:last], owners=owners)

    def shuffled(self, seed: int) -> Corpus:
        """The same documents in another order."""
        order = np.random.default_rng(seed).permutation(len(self._starts))
        return self._of(self.bodies(order))

    def bodies(self, order: Iterable[int] | None = None) -> Iterator[np.ndarray]:
        """The token ids of each document, or of those named, in this order."""
        tokens, owners = self.tokens.reshape(-1), self.owners.reshape(-1)
        ends = [*self._starts[1:], owners.size]
        for i in range(len(ends)) if order is None else order:
            span = slice(self._starts[i], ends[i])
            yield tokens[span][owners[span] >= 0]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each document begins in the flattened tokens, `[n_documents]`."""
        owners = self.owners.reshape(-1)
        changes = np.append(0, 1 + np.flatnonzero(owners[1:] != owners[:-1]))
        inside = changes[owners[changes] >= 0]
        return inside[np.unique(owners[inside], return_index=True)[1]]

    def _of(self, documents: Iterable[np.ndarray]) -> Corpus:
        return self.pack(documents, self.context, self.bos_id, self.special, self.separate)


def encoded(source: ActivationSource, documents: Iterable[Any]) -> Iterator[Any]:
    """The token ids of each document that is not empty; texts are tokenised many at a time."""
    texts: list[str] = []
    for document in documents:
        if isinstance(document, str):
            texts += [document] if document else []
            if len(texts) < TEXTS_PER_CALL:
                continue
        yield from source.encode_batch(texts) if texts else ()
        texts = []
        if isinstance(document, str) or not len(document):
            continue
        chat = isinstance(document[0], Mapping)
        yield source.encode_chat(document) if chat else document
    yield from source.encode_batch(texts) if texts else ()


def without_special_ends(ids: Any, special: frozenset[int]) -> Any:
    start, end = 0, len(ids)
    while start < end and ids[start] in special:
        start += 1
    while end > start and ids[end - 1] in special:
        end -= 1
    return ids[start:end]


def _draw(lengths: list[int], share: float, rng: np.random.Generator) -> set[int]:
    """Random documents with about the share of tokens; those too large for it are left.

    They exceed the share by a tenth of the smaller part at most.
    """
    most, size = (share + 0.1 * min(share, 1 - share)) * sum(lengths), 0
    drawn: set[int] = set()
    for i in rng.permutation(len(lengths)).tolist():
        if size + lengths[i] <= most and len(drawn) < len(lengths) - 1:
            drawn.add(i)
            size += lengths[i]
    return drawn or {int(np.argmin(lengths))}
