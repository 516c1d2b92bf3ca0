"""The feature for a property of text, found from examples of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.features.analysis import encode_text
from mlxterp.sae.features.codes import SparseCodes
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.display import pieces
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import Table

TEXTS_AT_ONCE = 32
WINDOWS, TOKENS = 4096, 1 << 16  # most windows of the background, and most tokens in them

Examples = Sequence[str | tuple[str, str]]


@dataclass(frozen=True)
class Candidate:
    """How well a feature fits examples.

    Of `n_examples` it fires in `firing`, and `mean` is the mean of its largest value in each;
    `maximum` is its largest value anywhere. `background` is the share of stretches of other text,
    as long as the examples, in which it fires, and `counter` the share of the counter-examples.
    """

    feature_id: int
    score: float
    firing: int
    n_examples: int
    mean: float
    maximum: float
    background: float | None = None
    counter: float | None = None


class FoundFeature(int):
    """The number of the feature that fits examples best, with the `candidates`, best first.

    It can be used wherever the number of a feature can; shown as `repr` it is a table.
    """

    candidates: tuple[Candidate, ...]

    def __new__(cls, candidates: Sequence[Candidate]) -> FoundFeature:
        found = super().__new__(cls, candidates[0].feature_id)
        found.candidates = tuple(candidates)
        return found

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.candidates,)

    @property
    def score(self) -> float:
        """The score of the best."""
        return self.candidates[0].score

    @property
    def table(self) -> Table:
        """The candidates."""
        columns = {"background": "in other text", "counter": "in counter-examples"}
        first = self.candidates[0]
        known = [name for name in columns if getattr(first, name) is not None]
        rows = (
            (
                str(c.feature_id), f"{c.score:+.3f}", f"{c.firing}", f"{c.mean:.2f}",
                f"{c.maximum:.2f}", *(f"{100 * getattr(c, name):.1f}%" for name in known),
            )
            for c in self.candidates
        )  # fmt: skip
        return Table(
            f"Feature {int(self)} fits {first.n_examples} examples best",
            ("feature", "score", "fires in", "mean", "maximum", *map(columns.__getitem__, known)),
            tuple(rows),
        )

    def __repr__(self) -> str:
        return repr(self.table)

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"feature_id": int(self), "candidates": [asdict(c) for c in self.candidates]}


def find_feature_by_examples(
    coder: SparseCoder,
    source: ActivationSource,
    examples: Examples,
    counter_examples: Examples = (),
    *,
    data: FeatureData | None = None,
    top_k: int = 10,
) -> FoundFeature:
    """The features that fire strongly in examples and not elsewhere, as a ranking that is also the
    number of the best of them.

    An example is a text, or `(before, part)`: a text `before + part` of which the part alone shows
    what is meant. With `m[e, i]` the largest value of feature `i` in example `e`, the score is

        score[i] = mean_e(m[e, i] - b[e, i]) / maximum[i]

    where `b[e, i]` is what is to be expected without the property: the mean of the feature's
    largest value in stretches, as long as the example, of the text of `data`, or in the
    `counter_examples`; with both, the larger of the two. Values count by size, special tokens not
    at all. `maximum` is the largest value known.

    Raises `ValueError` without examples, for one without tokens, where no feature fires in any, and
    with neither data nor counter-examples.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}.")
    if data is None and not counter_examples:
        raise ValueError(
            "There is nothing to compare the examples with: pass counter_examples, or data, what "
            "sae.collect(texts) returns."
        )
    if data is not None and data.n_features != coder.n_features:
        raise ValueError(
            f"data must be of a coder with {coder.n_features} features, got {data.n_features}."
        )
    values, lengths = _largest(coder, source, examples, "examples")
    maximum, expected = values.max(axis=0), np.zeros(values.shape)
    background = counter = None
    if data is not None:
        sizes, at, counts = np.unique(lengths, return_inverse=True, return_counts=True)
        means, rates = map(np.stack, zip(*(_windows(data.codes, n) for n in sizes), strict=True))
        maximum, expected = np.maximum(maximum, data.maxima), means[at]
        background = counts @ rates / counts.sum()
    if counter_examples:
        others, _ = _largest(coder, source, counter_examples, "counter_examples")
        maximum = np.maximum(maximum, others.max(axis=0))
        expected, counter = np.maximum(expected, others.mean(axis=0)), (others > 0).mean(axis=0)
    firing = (values > 0).sum(axis=0)
    if not firing.any():
        raise ValueError("No feature is active in any of the examples.")
    scores = (values - expected).mean(axis=0) / np.where(maximum > 0, maximum, 1)
    order = np.argsort(-np.where(firing > 0, scores, -np.inf), kind="stable")
    return FoundFeature(
        [
            Candidate(
                feature_id=i,
                score=float(scores[i]),
                firing=int(firing[i]),
                n_examples=len(values),
                mean=float(values[:, i].mean()),
                maximum=float(maximum[i]),
                background=None if background is None else float(background[i]),
                counter=None if counter is None else float(counter[i]),
            )
            for i in order[: min(top_k, np.count_nonzero(firing))].tolist()
        ]
    )


def _largest(
    coder: SparseCoder, source: ActivationSource, examples: Examples, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The size of each feature's largest value in each example, `[n, n_features]`, and of how many
    tokens."""
    pairs = [*_pairs([examples] if isinstance(examples, str) else examples, name)]
    if not pairs:
        raise ValueError(f"{name} must hold at least one text.")
    values, lengths = [], []
    for start in range(0, len(pairs), TEXTS_AT_ONCE):
        some = pairs[start : start + TEXTS_AT_ONCE]
        texts = [before + part for before, part in some]
        rows, codes = source.encode_batch(texts), encode_text(coder, source, texts)
        for (_, part), ids, z in zip(some, rows, codes, strict=True):
            counts = _within(source, [*ids], len(part))
            if not counts.any():
                raise ValueError(f"{name} must be texts with tokens, got {part!r}.")
            sizes = np.abs(np.array(z.astype(mx.float32))[counts])
            values.append(sizes.max(axis=0))
            lengths.append(len(sizes))
    return np.stack(values), np.array(lengths)


def _pairs(examples: Examples, name: str) -> Iterator[tuple[str, str]]:
    for example in examples:
        pair = ("", example) if isinstance(example, str) else example
        match pair:
            case (str(before), str(part)) if part:
                yield before, part
            case _:
                raise ValueError(
                    f"{name} must be texts, or pairs (before, part), none of them empty, got "
                    f"{example!r}."
                )


def _within(source: ActivationSource, ids: list[int], n_characters: int) -> np.ndarray:
    """Which tokens have any of the last characters; special ones have none."""
    special = np.isin(ids, list(source.special_token_ids))
    sizes = [len(text) for text in pieces(source, ids)]
    ends = np.cumsum(np.where(special, 0, sizes))
    return (ends > ends[-1] - n_characters) & ~special


def _windows(codes: SparseCodes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Of evenly spread stretches of so many tokens: the mean of each feature's largest value
    `[n_features]`, and the share in which it fires."""
    length = min(length, codes.n_tokens)
    n = max(1, min(WINDOWS, TOKENS // length, codes.n_tokens // length))
    starts = np.linspace(0, codes.n_tokens - length, n).astype(np.int64)
    ends = zip(codes.starts[starts], codes.starts[starts + length], strict=True)
    entries = [np.arange(start, end) for start, end in ends]
    window = np.repeat(np.arange(n), [*map(len, entries)])
    entries = np.concatenate(entries)
    features = codes.features[entries].astype(np.int64)
    values = np.float32(codes.scale) * np.abs(codes.values[entries])
    # One after another the largest of a feature in a window is written last.
    order = np.lexsort((values, window, features))
    features, window, values = features[order], window[order], values[order]
    last = np.append((features[1:] != features[:-1]) | (window[1:] != window[:-1]), True)
    features, values = features[last], values[last]
    sums = np.bincount(features, values, minlength=codes.n_features)
    return sums / n, np.bincount(features, minlength=codes.n_features) / n
