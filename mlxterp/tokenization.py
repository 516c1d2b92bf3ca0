"""Text to rows of token ids: encode, decode, pack, pad and mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

NO_TOKENIZER = (
    "this model has no tokenizer: give one, InterpretableModel(model, tokenizer=...), "
    "or pass token ids in place of text"
)


def pad(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[mx.array, mx.array]:
    """Rows of unequal length as `tokens [B, S]`, padded on the right, and `mask [B, S]`, True at
    real tokens; raises `ValueError` where a row is empty."""
    lengths = [len(row) for row in rows]
    if not rows or not all(lengths):
        which = (
            f"row {lengths.index(0)} of {len(rows)} has no tokens" if rows else "there are no rows"
        )
        raise ValueError(f"inputs must have at least one token in each row: {which}")
    tokens = np.full((len(rows), max(lengths)), pad_id, dtype=np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = np.asarray(row)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return mx.array(tokens), mx.array(mask.tolist())


def pack(
    documents: Iterable[Sequence[int] | np.ndarray],
    context_length: int,
    bos_id: int | None = None,
    pad_id: int = 0,
    separate: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Join documents back to back and cut them into rows of `context_length` tokens.

    Yields `tokens` and `document`, both int32 `[context_length]`. Every row and every document
    starts with `bos_id` where it is given; `document` is the index of each token's document, and
    -1 at `bos_id` and in the padding that fills the last row. With `separate` every document
    starts in a row of its own. Raises `ValueError` where a row has no room for a token.
    """
    first = 0 if bos_id is None else 1
    if context_length <= first:
        raise ValueError(
            f"context_length must be at least {first + 1} tokens, not {context_length}"
        )
    row = _Row(context_length, bos_id, pad_id)
    for index, document in enumerate(documents):
        ids = np.asarray(document, dtype=np.int32)
        if len(ids) and bos_id is not None and ids[0] == bos_id:
            ids = ids[1:]
        while len(ids):
            ids = row.add(ids, index)
            if row.is_full():
                yield row.take()
        row.end_document()
        if separate and row.has_tokens():
            yield row.take()
    if row.has_tokens():
        yield row.take()


class _Row:
    """The row being filled."""

    def __init__(self, length: int, bos_id: int | None, pad_id: int) -> None:
        self._length, self._bos_id, self._pad_id = length, bos_id, pad_id
        self._start()

    def _start(self) -> None:
        self._tokens = np.full(self._length, self._pad_id, dtype=np.int32)
        self._document = np.full(self._length, -1, dtype=np.int32)
        self._used = 0
        self._needs_bos = self._bos_id is not None

    def add(self, ids: np.ndarray, index: int) -> np.ndarray:
        """Append as much of `ids` as fits and return the rest."""
        if self._needs_bos and self._bos_id is not None:
            self._tokens[self._used] = self._bos_id
            self._used += 1
            self._needs_bos = False
        n = min(len(ids), self._length - self._used)
        self._tokens[self._used : self._used + n] = ids[:n]
        self._document[self._used : self._used + n] = index
        self._used += n
        return ids[n:]

    def end_document(self) -> None:
        self._needs_bos = self._bos_id is not None

    def is_full(self) -> bool:
        return self._used == self._length

    def has_tokens(self) -> bool:
        return bool((self._document >= 0).any())

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        done = self._tokens, self._document
        self._start()
        return done


def to_tokens(
    inputs: Any, tokenizer: Any, vocab_size: int | None, pad_id: int = 0
) -> tuple[mx.array, mx.array | None]:
    """Text, token ids or an array as the model's input `[B, S]` and its mask (None for floats).

    Raises `ValueError` for empty input, for text without a tokenizer, and for ids that the
    embedding has no row for, which MLX would not notice; `TypeError` for other kinds of input.
    """
    if isinstance(inputs, mx.array):
        return _array_to_tokens(inputs, vocab_size)
    tokens, mask = pad(_rows(inputs, tokenizer), pad_id)
    _check_ids(tokens, vocab_size)
    return tokens, mask


def _rows(inputs: Any, tokenizer: Any) -> list[list[int]]:
    if isinstance(inputs, str):
        inputs = [inputs]
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"inputs must be text, token ids or an array, not {type(inputs).__name__}")
    if not inputs:
        raise ValueError("inputs must have at least one token: the list is empty")
    if all(isinstance(item, str) for item in inputs):
        return [encode(tokenizer, text) for text in inputs]
    rows = [inputs] if not isinstance(inputs[0], (list, tuple)) else inputs
    for row in rows:
        bad = next(
            (i for i in row if isinstance(i, bool) or not isinstance(i, (int, np.integer))), None
        )
        if bad is not None:
            raise TypeError(f"token ids must be integers, not {type(bad).__name__}: {bad!r}")
    return [list(row) for row in rows]


def _array_to_tokens(inputs: mx.array, vocab_size: int | None) -> tuple[mx.array, mx.array | None]:
    if inputs.size == 0:
        raise ValueError(f"inputs must have at least one token: the shape is {list(inputs.shape)}")
    if inputs.dtype == mx.bool_:
        raise TypeError("token ids must be integers, not bool")
    tokens = inputs[None] if inputs.ndim == 1 else inputs
    if not mx.issubdtype(tokens.dtype, mx.integer):
        return tokens, None
    if tokens.ndim != 2:
        raise ValueError(f"token ids must have the shape [S] or [B, S], not {list(inputs.shape)}")
    _check_ids(tokens, vocab_size)
    return tokens, mx.ones(tokens.shape, dtype=mx.bool_)


def _check_ids(tokens: mx.array, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    try:
        ids = np.array(tokens)
    except ValueError:
        return  # inside mx.compile or mx.vmap, where no array has a value yet
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must be 0 to {vocab_size - 1}, the rows of the embedding: "
            f"the input has {low if low < 0 else high}"
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of `text`, with the special tokens that the tokenizer adds."""
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {type(text).__name__}")
    ids = [int(i) for i in tokenizer.encode(text)]
    if not ids:
        raise ValueError(f"the text has no tokens: {text!r}")
    return ids


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, with special tokens; none at all where a text has none."""
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, not one string")
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # what mlx-lm wraps
    if texts and hasattr(inner, "all_special_ids") and callable(inner):
        # Many texts at once, and no warning about lengths: long ones are cut into contexts.
        batch: Any = inner(list(texts), verbose=False)
        return batch["input_ids"]
    return [[int(i) for i in tokenizer.encode(text)] for text in texts]


def encode_chat(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """The token ids of a chat, a list of `{"role": ..., "content": ...}`, by its chat template.

    Raises `ValueError` where the tokenizer has none.
    """
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this model's tokenizer has no chat template: give texts in place of messages"
        )
    ids = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)
    return [int(i) for i in ids]


def decode(tokenizer: Any, tokens: Any) -> str:
    """The text of a sequence of token ids."""
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    return tokenizer.decode([int(i) for i in _flat(tokens)])


def pieces(tokenizer: Any, tokens: Any) -> list[str]:
    """Each token as text; a token that is only part of a character becomes U+FFFD."""
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    return [_piece(tokenizer, int(i)) for i in _flat(tokens)]


def _flat(tokens: Any) -> list[int]:
    """The ids of a list or of an array, of which a batch stands for its first row."""
    ids = np.array(tokens)
    return (ids[0] if ids.ndim == 2 else ids.reshape(-1)).tolist()


def _piece(tokenizer: Any, token_id: int) -> str:
    text = tokenizer.decode([token_id])
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return text
    raw = tokenizer.convert_ids_to_tokens([token_id])[0]
    # A sentence piece loses the space before it when it is decoded alone.
    is_word = isinstance(raw, str) and raw.startswith("\u2581")
    return f" {text}" if is_word and not text.startswith(" ") else text


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that stand for no text, such as those that begin, end and pad a document."""
    return frozenset(int(i) for i in getattr(tokenizer, "all_special_ids", None) or ())


class TextMethods:
    """What a model with a `tokenizer` does with text."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, with the special tokens that the tokenizer adds."""
        return encode(self.tokenizer, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, not padded."""
        return encode_batch(self.tokenizer, texts)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a chat, by the tokenizer's chat template."""
        return encode_chat(self.tokenizer, messages)

    def decode(self, tokens: Sequence[int] | mx.array) -> str:
        """The text of token ids."""
        return decode(self.tokenizer, tokens)

    def token_to_str(self, token_id: int) -> str:
        """The text of one token."""
        return decode(self.tokenizer, [token_id])

    def to_str_tokens(
        self, input: str | Sequence[int] | mx.array, prepend_bos: bool = False
    ) -> list[str]:
        """Each token of a text or of token ids as text; of a batch, the first row.

        `prepend_bos` puts the first token of a document before a text that lacks it.
        """
        if isinstance(input, str):
            input = self.encode(input)
            bos = getattr(self.tokenizer, "bos_token_id", None)
            if prepend_bos and bos is not None and input[0] != bos:
                input = [bos, *input]
        return pieces(self.tokenizer, input)
