"""Documents without duplicates and boilerplate."""

from __future__ import annotations

import hashlib
import importlib
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mlxterp.sae.corpus import encoded, without_special_ends
from mlxterp.sae.documents import Document
from mlxterp.sae.source import ActivationSource

REASONS: tuple[str, ...] = (
    "empty", "exact_duplicate", "near_duplicate", "boilerplate", "low_norm", "extreme_loss",
    "not_needed",
)  # fmt: skip

SHINGLE_WORDS = 5
NEAR_JACCARD = 0.8
PERMUTATIONS = 128
COMMON_LINE_WORDS = 6
COMMON_LINE_DOCUMENTS = 5
MOST_REPEATED = 0.3  # of a document's characters
LEAST_LETTERS = 0.4
LEAST_LEFT = 0.5

Read = list[tuple[Any, np.ndarray]]


class Ledger:
    """Counts what is seen and dropped."""

    def __init__(self) -> None:
        self.documents_seen = self.tokens_seen = 0
        self.documents = dict.fromkeys(REASONS, 0)
        self.tokens = dict.fromkeys(REASONS, 0)

    def drop(self, reason: str, n_tokens: int, n_documents: int = 1) -> None:
        self.documents[reason] += n_documents
        self.tokens[reason] += n_tokens


def read_documents(
    source: ActivationSource, documents: Iterable[Document], limit: float, ledger: Ledger
) -> tuple[Read, int | None]:
    """Documents with their token ids, until these are `limit`, and the id that starts each."""
    waiting: deque[Document] = deque()

    def noted() -> Iterator[Document]:
        for document in documents:
            if len(document):
                waiting.append(document)
                yield document
            else:
                ledger.documents_seen += 1
                ledger.drop("empty", 0)

    read, bos_id, special = [], None, source.special_token_ids
    for ids in encoded(source, noted()):
        document = waiting.popleft()
        if len(ids) and ids[0] in special:
            bos_id = int(ids[0])
        body = np.array(without_special_ends(ids, special), np.int32)
        ledger.documents_seen += 1
        ledger.tokens_seen += len(body)
        if len(body) and _words(document):
            read.append((document, body))
        else:
            ledger.drop("empty", len(body))
        if ledger.tokens_seen >= limit:
            break
    return read, bos_id


def _words(document: Any) -> list[str]:
    """The words of a text or a chat; token ids are words as they are."""
    if isinstance(document, str):
        return document.split()
    if isinstance(document[0], Mapping):
        return [word for message in document for word in str(message["content"]).split()]
    return list(map(str, np.asarray(document).tolist()))


def deduplicated(read: Read, ledger: Ledger) -> Read:
    """The first of all that are the same but for white space, or nearly the same.

    Near duplicates have sets of word 5-shingles whose Jaccard similarity is at least 0.8; MinHash
    (Broder, 1997) with locality-sensitive hashing proposes them and the sets decide.
    """
    try:
        datasketch = importlib.import_module("datasketch")
    except ImportError as error:
        raise ImportError(
            'datasketch is missing: pip install "mlxterp[data]", or deduplicate=False'
        ) from error
    # A lower threshold proposes a little too much, and hardly ever too little.
    index = datasketch.MinHashLSH(threshold=NEAR_JACCARD - 0.15, num_perm=PERMUTATIONS)
    seen: set[bytes] = set()
    kept: Read = []
    for document, ids in read:
        words = _words(document)
        digest = hashlib.sha256(" ".join(words).encode()).digest()
        if digest in seen:
            ledger.drop("exact_duplicate", len(ids))
            continue
        seen.add(digest)
        shingles = _shingles(words)
        sketch = datasketch.MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32)
        sketch.update_batch(sorted(shingles))
        near = (_shingles(_words(kept[i][0])) for i in index.query(sketch))
        if any(len(a & shingles) >= NEAR_JACCARD * len(a | shingles) for a in near):
            ledger.drop("near_duplicate", len(ids))
            continue
        index.insert(len(kept), sketch)
        kept.append((document, ids))
    return kept


def _shingles(words: list[str]) -> set[bytes]:
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(last)}


def without_boilerplate(source: ActivationSource, read: Read, ledger: Ledger) -> Read:
    """Texts without common lines, and without those texts that are hardly prose or code.

    A line of at least 6 words that is in 5 documents or more stays in the first of them only. A
    document goes where that leaves less than half of its characters, where more than 30 % of
    these are in lines that it repeats, or fewer than 40 % of those that are not white space are
    letters (like the rules of Gopher, arXiv 2112.11446). Chats and token ids are left as they are.
    """
    counts: Counter[int] = Counter()
    for document, _ in read:
        counts.update({hash(line) for line in _long_lines(document)})
    seen: set[int] = set()
    kept: Read = []
    changed: list[int] = []
    for document, ids in read:
        if isinstance(document, str):
            text = _without_common(document, counts, seen)
            if _is_boilerplate(document, text):
                ledger.drop("boilerplate", len(ids))
                continue
            if text != document:
                changed.append(len(kept))
                document = text
        kept.append((document, ids))
    again = encoded(source, (kept[i][0] for i in changed))
    for i, ids in zip(changed, again, strict=True):
        body = np.array(without_special_ends(ids, source.special_token_ids), np.int32)
        ledger.drop("boilerplate", len(kept[i][1]) - len(body), 0)
        kept[i] = kept[i][0], body
    return kept


def _long_lines(document: Any) -> list[str]:
    lines = document.splitlines() if isinstance(document, str) else []
    return [line.strip() for line in lines if len(line.split()) >= COMMON_LINE_WORDS]


def _without_common(text: str, counts: Counter[int], seen: set[int]) -> str:
    common = {
        key for line in _long_lines(text) if counts[key := hash(line)] >= COMMON_LINE_DOCUMENTS
    }
    gone = common & seen
    seen |= common
    if not gone:
        return text
    return "".join(line for line in text.splitlines(True) if hash(line.strip()) not in gone)


def _is_boilerplate(before: str, after: str) -> bool:
    lines = [line for line in map(str.strip, after.splitlines()) if line]
    size = sum(map(len, lines))
    repeated = size - sum(map(len, set(lines)))
    solid = "".join(after.split())
    return (
        len(after) < LEAST_LEFT * len(before)
        or repeated > MOST_REPEATED * size
        or sum(map(str.isalpha, solid)) < LEAST_LETTERS * len(solid)
    )
