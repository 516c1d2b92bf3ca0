"""Words of a vocabulary and what a model has at them, to ask for their first letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns
from mlxterp.sae.source import ActivationSource

SHORTEST = 2
SHOTS = 5
WORDS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Words:
    """Words of one token each, and the activations `[n, width]` at their tokens.

    `groups` `[n]` are equal for spellings of one word, such as with and without a capital.
    """

    words: tuple[str, ...]
    activations: mx.array
    groups: np.ndarray

    @property
    def letters(self) -> np.ndarray:
        """The first letter of each, `[n]`, in lower case."""
        return np.array([word[0] for word in self.words])


def vocabulary_words(source: ActivationSource) -> dict[str, int]:
    """The tokens that are a space and a word of two letters or more, with their ids.

    Raises `ValueError` for a model that has no `vocab_size`.
    """
    size = getattr(source, "vocab_size", None)
    if size is None:
        raise ValueError("Words are taken from the vocabulary: the model must have a vocab_size.")
    texts = source.to_str_tokens([*range(size)])
    found = {}
    for i, text in enumerate(texts):
        word = text[1:]
        if text[:1] == " " and len(word) >= SHORTEST and word.isascii() and word.isalpha():
            found.setdefault(word, i)
    return found


def read_words(
    source: ActivationSource,
    columns: Columns,
    words: Sequence[str] | None = None,
    *,
    max_words: int = 4000,
    seed: int = 0,
) -> Words:
    """What a model has at each word after examples of the task, `" cat: c\\n dog: d\\n bird"`.

    The examples are drawn from the same words, five for each batch of words; the activation is that
    at the word's own token. Words that are not one token are left out. Raises `ValueError` where
    none is left.
    """
    known = vocabulary_words(source)
    wanted = [word for word in (known if words is None else dict.fromkeys(words)) if word in known]
    if not wanted:
        raise ValueError("words must hold words that are one token after a space; none is.")
    rng = np.random.default_rng(seed)
    wanted = [wanted[i] for i in np.sort(rng.permutation(len(wanted))[:max_words])]
    parts = []
    for start in range(0, len(wanted), WORDS_AT_ONCE):
        some = wanted[start : start + WORDS_AT_ONCE]
        shown = [wanted[i] for i in rng.integers(len(wanted), size=SHOTS)]
        prompt = "".join(f" {word}: {word[0].lower()}\n" for word in shown)
        (before,) = source.encode_batch([prompt])
        rows = [[*_without_end(before, source), known[word]] for word in some]
        done = source.run(mx.array(rows), capture=columns.names, stop=True)
        joined = columns.join({name: done[name] for name in columns.names})
        parts.append(joined[:, -1].astype(mx.float32))
        mx.eval(parts[-1])
    lower = [word.lower() for word in wanted]
    _, groups = np.unique(lower, return_inverse=True)
    return Words(tuple(lower), mx.concatenate(parts), groups)


def _without_end(ids: Sequence[int], source: ActivationSource) -> list[int]:
    """The ids without a special token at the end, which some tokenizers add."""
    end = len(ids)
    while end > 1 and ids[end - 1] in source.special_token_ids:
        end -= 1
    return [*ids[:end]]
