"""The stretches of text that a dashboard shows, of which every token is held once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxterp.sae.corpus import Corpus
from mlxterp.sae.dashboard.strings import Strings
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.display import INCOMPLETE, LONGEST_CHARACTER, pieces
from mlxterp.sae.source import ActivationSource

TOP, RANDOM, FIRST_INTERVAL = 0, 1, 2  # the kinds of examples; intervals are numbered from there
WINDOWS_PER_BLOCK = 1 << 16
ENTRIES_PER_BLOCK = 1 << 24  # of a dense code
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Amounts:
    """How many examples of each sort a feature has, and the tokens before and after their peaks."""

    n_top: int = 16
    n_intervals: int = 5
    n_each: int = 3
    n_random: int = 6
    before: int = 16
    after: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = 100 if name in ("before", "after") else 200
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be in [1, {most}], got {value}.")


@dataclass(frozen=True, eq=False)
class _Windows:
    """Examples: their features, kinds, peaks and the positions `first` to `end` around them."""

    features: np.ndarray
    kinds: np.ndarray
    peaks: np.ndarray
    first: np.ndarray
    end: np.ndarray


def passages(
    data: FeatureData, source: ActivationSource, strings: Strings, amounts: Amounts
) -> dict[str, np.ndarray]:
    """The arrays of all examples of all features.

    Feature `i` has the examples `starts[i]` to `starts[i + 1]`: `kinds` says of which sort each is,
    `firsts` and `lengths` which of `tokens`, numbers of texts, it shows, `peaks` which of these it
    is about. Of its values those that are not zero are listed, `n_values` of them, at
    `value_tokens` of the example, in units of `scale`. `shares` `[n_features, n_intervals]` are
    those of the intervals.
    """
    features, kinds, positions, shares = _chosen(data, amounts)
    alone = _Alone(source, data.corpus, strings)
    first, end = alone.windows(positions, amounts)
    wide = alone.widened(first, end)
    shown = np.zeros(data.corpus.tokens.size + 1, bool)
    for start, stop in zip(*(ends.tolist() for ends in wide), strict=True):
        shown[start:stop] = True
    numbers, tokens = np.cumsum(shown) - 1, alone.texts(np.flatnonzero(shown))
    # Of a character at either end all tokens are shown: its first has it, the others have none.
    rest = np.append(tokens == strings.number(""), False)
    for _ in range(LONGEST_CHARACTER):
        first -= rest[numbers[first]] & (first > wide[0])
        end += rest[np.minimum(numbers[end - 1] + 1, len(tokens))] & (end < wide[1])
    windows = _Windows(features, kinds, positions, first, end)
    examples, at, values = _values(data, source, windows)
    return {
        "starts": np.searchsorted(features, np.arange(data.n_features + 1)).astype(np.uint32),
        "kinds": kinds.astype(np.uint8),
        "firsts": numbers[first].astype(np.uint32),
        "lengths": (end - first).astype(np.uint8),
        "peaks": (positions - first).astype(np.uint8),
        "documents": data.corpus.owners.reshape(-1)[positions].astype(np.int32),
        "n_values": np.bincount(examples, minlength=len(first)).astype(np.uint8),
        "value_tokens": at.astype(np.uint8),
        "values": values.astype(np.float16),
        "tokens": tokens,
        "shares": shares,
    }


def _chosen(data: FeatureData, amounts: Amounts) -> tuple[np.ndarray, ...]:
    """The feature, the kind and the position of each example, and the shares of intervals."""
    counts, kinds, positions = np.zeros(data.n_features, np.int64), [], []
    shares = np.zeros((data.n_features, amounts.n_intervals), np.float32)
    for i in np.flatnonzero(data.firing_counts).tolist():
        found = [
            (TOP, data.positions(i, amounts.n_top)),
            (RANDOM, data.positions(i, amounts.n_random, "random")),
        ]
        intervals = data.interval_positions(i, amounts.n_intervals, amounts.n_each)
        for j, (_, _, share, drawn) in enumerate(intervals):
            shares[i, j] = share
            found.append((FIRST_INTERVAL + j, drawn))
        for kind, there in found:
            kinds.append(np.full(len(there), kind))
            positions.append(there)
            counts[i] += len(there)
    features = np.repeat(np.arange(data.n_features), counts)
    joined = [np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (kinds, positions)]
    return features, *joined, shares


class _Alone:
    """The texts of the tokens of a corpus, each by itself or as a part of a character."""

    def __init__(self, source: ActivationSource, corpus: Corpus, strings: Strings):
        self._source, self._corpus, self._strings = source, corpus, strings
        self._tokens, self._owners = corpus.tokens.reshape(-1), corpus.owners.reshape(-1)
        ids = np.unique(self._tokens)
        found = source.to_str_tokens(ids.tolist())
        self._numbers = np.zeros(int(ids.max()) + 1, np.int32)
        self._broken = np.zeros(len(self._numbers), bool)
        self._numbers[ids] = strings.numbers(found)
        self._broken[ids] = [INCOMPLETE in text for text in found]

    def windows(self, positions: np.ndarray, amounts: Amounts) -> tuple[np.ndarray, np.ndarray]:
        """The first position around each, and that after the last: up to so many before and after,
        in the same document and context."""
        first, end = np.zeros((2, len(positions)), np.int64)
        around, length = np.arange(-amounts.before, amounts.after + 1), self._corpus.context
        for start in range(0, len(positions), WINDOWS_PER_BLOCK):
            block = slice(start, start + WINDOWS_PER_BLOCK)
            peaks = positions[block]
            columns = peaks[:, None] % length + around
            at = np.clip(peaks[:, None] + around, 0, len(self._owners) - 1)
            same = self._owners[at] == self._owners[peaks][:, None]
            same &= (columns >= 0) & (columns < length)
            first[block] = peaks - amounts.before + same.argmax(axis=1)
            end[block] = first[block] + same.sum(axis=1)
        return first, end

    def widened(self, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same with further tokens at both ends that may be parts of characters there."""
        for _ in range(LONGEST_CHARACTER):
            first = first - self._within_character(first)
            end = end + self._within_character(end)
        return first, end

    def _within_character(self, at: np.ndarray) -> np.ndarray:
        """Whether a character may go on from the token before each position to the one at it."""
        here, before = np.minimum(at, len(self._tokens) - 1), np.maximum(at - 1, 0)
        broken = self._broken[self._tokens[here]] & self._broken[self._tokens[before]]
        return broken & (at % self._corpus.context > 0) & self._joined(before, here)

    def _joined(self, before: np.ndarray, here: np.ndarray) -> np.ndarray:
        return self._owners[before] == self._owners[here]

    def texts(self, positions: np.ndarray) -> np.ndarray:
        """The number of the text of each of some ascending positions."""
        ids = self._tokens[positions]
        numbers, broken = self._numbers[ids], np.flatnonzero(self._broken[ids])
        known: dict[tuple[int, ...], np.ndarray] = {}
        contexts = positions // self._corpus.context
        steps = np.diff(positions[broken]) != 1
        steps |= np.diff(contexts[broken]) != 0
        steps |= ~self._joined(positions[broken[:-1]], positions[broken[1:]])
        for run in np.split(broken, np.flatnonzero(steps) + 1):
            key = tuple(ids[run].tolist())
            if key and key not in known:
                known[key] = self._strings.numbers(pieces(self._source, key))
            if key:
                numbers[run] = known[key]
        return numbers.astype(np.uint32)


def _values(
    data: FeatureData, source: ActivationSource, windows: _Windows
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values that are not zero: the example of each, the token in it, and the value in units of
    `scale`; by example and token."""
    kept = np.isin(windows.peaks // data.corpus.context, data.codes.contexts)
    parts = [*_kept_values(data, windows, kept), *_computed_values(data, source, windows, ~kept)]
    empty = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    examples, at, values = (np.concatenate(columns) for columns in zip(empty, *parts, strict=True))
    order = np.lexsort((at, examples))
    sizes = np.clip(values[order] / np.float32(data.codes.scale), -LARGEST, LARGEST)
    return examples[order], at[order], sizes


def _kept_values(
    data: FeatureData, windows: _Windows, kept: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """Of the contexts whose codes are held, a feature at a time."""
    chosen = np.flatnonzero(kept)
    ends = np.searchsorted(windows.features[chosen], np.arange(data.n_features + 1))
    for i in np.flatnonzero(np.diff(ends)).tolist():
        own = chosen[ends[i] : ends[i + 1]]
        rows, values = data.codes.of(i)
        positions = data.codes.positions[rows]
        low, high = np.searchsorted(positions, [windows.first[own], windows.end[own]])
        sizes = high - low
        entries = np.arange(sizes.sum()) + np.repeat(low - np.cumsum(sizes) + sizes, sizes)
        examples = np.repeat(own, sizes)
        yield examples, positions[entries] - windows.first[examples], values[entries]


def _computed_values(
    data: FeatureData, source: ActivationSource, windows: _Windows, missing: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """Of all other contexts, in one pass through the model, some contexts at a time."""
    corpus = data.corpus
    owners = windows.peaks // corpus.context
    chosen = np.flatnonzero(missing)
    chosen = chosen[np.argsort(owners[chosen], kind="stable")]
    wanted, firsts = np.unique(owners[chosen], return_index=True)
    examples = np.split(chosen, firsts[1:])
    for start in range(0, len(wanted), corpus.rows_per_forward):
        contexts = wanted[start : start + corpus.rows_per_forward]
        names = data.coder.reads.names
        found = source.run(mx.array(corpus.tokens[contexts]), capture=names, stop=True)
        for i, context in enumerate(contexts.tolist()):
            x = {name: found[name][i] for name in names}
            yield from _in_context(data, x, context, windows, examples[start + i])


def _in_context(
    data: FeatureData, x: dict[str, mx.array], context: int, windows: _Windows, own: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """The values of some examples that are all in one context, from its activations."""
    coder, length = data.coder, data.corpus.context
    counts = data.corpus.documents(context) >= 0
    features = mx.array(windows.features[own])
    size = max(1, ENTRIES_PER_BLOCK // coder.n_features)
    for row in range(0, length, size):
        part = slice(row, row + size)
        z = coder.encode({name: array[part] for name, array in x.items()})[:, features]
        values = np.array(z.astype(mx.float32)).T
        positions = context * length + row + np.arange(values.shape[1])
        inside = counts[part] & np.isfinite(values) & (values != 0)
        inside &= positions >= windows.first[own, None]
        inside &= positions < windows.end[own, None]
        which, column = np.nonzero(inside)
        yield own[which], positions[column] - windows.first[own[which]], values[which, column]
