"""Labelled texts, and the activations and codes of what is labelled in them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.features.display import INCOMPLETE, pieces
from mlxterp.sae.source import ActivationSource

CONTEXT = 128
TEXTS_AT_ONCE = 16
TOKENS_AT_ONCE = 1024
NO = -1


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Texts with a class for each, or for stretches of each.

    `labels` holds for every text a class or, for a set of tokens, spans `(start, end, class)` in
    characters: the class of a token is that of the span in which its first visible character is,
    and tokens outside all spans are left out. `groups` says which texts are of one document: no
    document is both trained and tested on. Make one with `LabelledSet.of`.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[Any, ...]
    groups: tuple[Hashable, ...]

    @classmethod
    def of(
        cls,
        name: str,
        texts: Sequence[str],
        labels: Sequence[Any],
        groups: Sequence[Hashable] | None = None,
    ) -> LabelledSet:
        """A set; without `groups` every text is a document of its own.

        Classes are `bool`, `int` or `str`. Raises `ValueError` for unequal lengths, for a text that
        is empty, and for fewer than two classes.
        """
        groups = range(len(texts)) if groups is None else groups
        if not len(texts) == len(labels) == len(groups):
            raise ValueError(
                f"{name!r} must have a label and a group for each text, got {len(texts)} texts, "
                f"{len(labels)} labels and {len(groups)} groups."
            )
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{name!r} must have texts that are not empty.")
        made = cls(name, tuple(texts), tuple(labels), tuple(groups))
        if len({isinstance(label, (tuple, list)) for label in labels}) > 1:
            raise ValueError(f"{name!r} must have a class for each text, or spans for each.")
        if len(made.classes) < 2:
            raise ValueError(f"{name!r} must have two classes or more, got {list(made.classes)}.")
        return made

    @property
    def of_tokens(self) -> bool:
        """Whether tokens are labelled, and not whole texts."""
        return isinstance(self.labels[0], (tuple, list)) if self.labels else False

    @property
    def classes(self) -> tuple[Any, ...]:
        """The classes, sorted; of `False` and `True` the latter is what is looked for."""
        spans = itertools.chain.from_iterable(self.labels) if self.of_tokens else ()
        found = {c for _, _, c in spans} if self.of_tokens else set(self.labels)
        return tuple(sorted(found, key=lambda c: (str(type(c)), c)))

    def __repr__(self) -> str:
        what = "tokens" if self.of_tokens else "texts"
        return f"LabelledSet({self.name}: {what} of {len(self.texts):,} texts, {self.classes})"


@dataclass(frozen=True, eq=False)
class Examples:
    """What is labelled in a set, as the sites of a coder see it.

    `activations` `[n_tokens, width]` are those of all tokens that are needed, `owners` `[n_tokens]`
    (ascending) says which example each is of: one token, or all of a text, over which activations
    and codes are averaged. `labels` `[n]` are numbers among `classes`, `groups` `[n]` those of
    documents.
    """

    name: str
    classes: tuple[Any, ...]
    activations: mx.array
    owners: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> tuple[int, ...]:
        """The classes that are looked for, each among all others: of two the last."""
        return (1,) if len(self.classes) == 2 else tuple(range(len(self.classes)))

    def raw(self) -> np.ndarray:
        """The mean activation of each example, `[n, width]`."""
        return self._means(lambda x: x, self.activations.shape[1])

    def codes(self, coder: SparseCoder) -> np.ndarray:
        """The mean code of each example, `[n, n_features]`."""
        return self._means(coder.encode, coder.n_features)

    def _means(self, function: Any, width: int) -> np.ndarray:
        found = np.zeros((len(self), width), np.float32)
        for start in range(0, len(self.owners), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            values = np.array(function(self.activations[part]).astype(mx.float32))
            owners, first = np.unique(self.owners[part], return_index=True)
            found[owners] += np.add.reduceat(values, first, axis=0)
        return found / np.bincount(self.owners, minlength=len(self))[:, None]


def read_examples(
    labelled: LabelledSet,
    source: ActivationSource,
    columns: Columns,
    *,
    max_examples: int = 2000,
    seed: int = 0,
) -> Examples:
    """The activations of a set at the sites of some columns, as many of each class where there are
    enough.

    Texts are read up to 128 tokens, or what the model takes. Raises `ValueError` where tokens do
    not add up to the texts, so that characters cannot be found again.
    """
    drawn = _Drawn(labelled, source, max_examples, np.random.default_rng(seed))
    activations, owners = [], []
    for start in range(0, len(drawn.rows), TEXTS_AT_ONCE):
        rows = drawn.rows[start : start + TEXTS_AT_ONCE]
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        captured = source.run(mx.array(tokens), capture=columns.names, stop=True)
        joined = columns.join({name: captured[name] for name in columns.names})
        own = np.full(tokens.shape, NO)
        for i, of_row in enumerate(drawn.owners[start : start + TEXTS_AT_ONCE]):
            own[i, : len(of_row)] = of_row
        kept = np.flatnonzero(own.reshape(-1) != NO)
        taken = joined.reshape(-1, columns.width)[mx.array(kept)].astype(mx.float32)
        mx.eval(taken)
        activations.append(taken)
        owners.append(own.reshape(-1)[kept])
    return Examples(
        labelled.name, labelled.classes, mx.concatenate(activations), np.concatenate(owners),
        drawn.labels, drawn.groups,
    )  # fmt: skip


class _Drawn:
    """Which examples are taken: token ids `rows` of the texts that have any, and for each of them
    the example of each token, `NO` where it is of none."""

    def __init__(
        self, labelled: LabelledSet, source: ActivationSource, limit: int, rng: np.random.Generator
    ):
        numbers = {c: i for i, c in enumerate(labelled.classes)}
        context = min(CONTEXT, source.context_length or CONTEXT)
        of_groups = {g: i for i, g in enumerate(dict.fromkeys(labelled.groups))}
        rows = [[*ids][:context] for ids in source.encode_batch(labelled.texts)]
        classes = [
            _classes(source, row, text, label, numbers, labelled.of_tokens)
            for row, text, label in zip(rows, labelled.texts, labelled.labels, strict=True)
        ]
        # One entry for each candidate: its text, its first token, and its class.
        if labelled.of_tokens:
            candidates = np.array(
                [(i, t, c) for i, of in enumerate(classes) for t, c in enumerate(of) if c != NO]
            ).reshape(-1, 3)
        else:
            candidates = np.array([(i, 0, of.max()) for i, of in enumerate(classes)])
            candidates = candidates[candidates[:, 2] != NO]
        candidates = candidates[_balanced(candidates[:, 2], limit, rng)]
        self.labels = candidates[:, 2]
        self.groups = np.array([of_groups[labelled.groups[i]] for i in candidates[:, 0].tolist()])
        self.rows, self.owners = [], []
        for i in np.unique(candidates[:, 0]).tolist():
            own = np.flatnonzero(candidates[:, 0] == i)
            of_row = np.full(len(rows[i]), NO)
            if labelled.of_tokens:
                of_row[candidates[own, 1]] = own
            else:
                of_row[classes[i] != NO] = own[0]
            self.rows.append(rows[i])
            self.owners.append(of_row)


def _classes(
    source: ActivationSource,
    row: list[int],
    text: str,
    label: Any,
    numbers: dict[Any, int],
    of_tokens: bool,
) -> np.ndarray:
    """The class of each token, `NO` where it has none."""
    special = np.isin(row, [*source.special_token_ids])
    if not of_tokens:
        return np.where(special, NO, numbers[label])
    by_character = np.full(len(text), NO)
    for start, end, name in label:
        by_character[start:end] = numbers[name]
    parts = ["" if s else part for s, part in zip(special, pieces(source, row), strict=True)]
    joined = "".join(parts)
    # Some tokenizers put a space before every text.
    offset = 1 if joined[:1] == " " and text[:1] != " " else 0
    if not text.startswith(joined[offset:].rstrip(INCOMPLETE)):
        raise ValueError(
            "Tokens must add up to the text for labels of characters, got "
            f"{joined[offset:][:60]!r} for {text[:60]!r}."
        )
    found, end = np.full(len(row), NO), -offset
    for t, part in enumerate(parts):
        at = end + len(part) - len(part.lstrip())
        end += len(part)
        if part.strip():
            found[t] = by_character[at]
    return found


def _balanced(labels: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Which candidates are taken, ascending: at most the limit, as many of each class where there
    are enough."""
    classes, counts = np.unique(labels, return_counts=True)
    quota, left = {}, limit
    for n, c in sorted(zip(counts.tolist(), classes.tolist(), strict=True)):
        quota[c] = min(n, left // (len(classes) - len(quota)))
        left -= quota[c]
    chosen = [rng.choice(np.flatnonzero(labels == c), n, replace=False) for c, n in quota.items()]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
