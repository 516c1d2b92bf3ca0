"""What features respond to and what they do: top features, top examples, logit effects."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource


@dataclass(frozen=True)
class FeatureActivation:
    """A feature, its largest value in a text, and the token where it has it."""

    feature_id: int
    value: float
    position: int
    token: str

    def __repr__(self) -> str:
        return f"feature {self.feature_id}: {self.value:.3f} at {self.position} {self.token!r}"


@dataclass(frozen=True)
class TextAnalysis:
    """The features that are active in a text.

    `tokens` are its pieces; `by_token` holds, for each of them, up to `top_k` pairs `(feature_id,
    value)`, largest first, and nothing for special tokens; `top` the features with the largest
    values anywhere in the text.
    """

    tokens: tuple[str, ...]
    by_token: tuple[tuple[tuple[int, float], ...], ...]
    top: tuple[FeatureActivation, ...]

    def __repr__(self) -> str:
        lines = ["token                features (value)"]
        for token, features in zip(self.tokens, self.by_token, strict=True):
            listed = "  ".join(f"{i} ({value:.2f})" for i, value in features[:5])
            lines.append(f"{token!r:<20} {listed}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Everything, as plain values."""
        return {
            "tokens": list(self.tokens),
            "by_token": [[list(pair) for pair in features] for features in self.by_token],
            "top": [vars(feature) for feature in self.top],
        }


@dataclass(frozen=True)
class Example:
    """A stretch of text around a position where a feature is active.

    `values` holds the feature's value on each of `tokens`; `peak` is the index among them of the
    position that the example is about.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int

    @property
    def value(self) -> float:
        """The feature's value at the peak."""
        return self.values[self.peak]

    @property
    def token(self) -> str:
        """The token at the peak."""
        return self.tokens[self.peak]

    def __repr__(self) -> str:
        marked = (f"«{t}»" if i == self.peak else t for i, t in enumerate(self.tokens))
        return f"{self.value:6.2f}  {''.join(marked)!r}"


@dataclass(frozen=True)
class LogitEffects:
    """The tokens that a feature's decoder row makes most and least likely, with their logits."""

    top: tuple[tuple[str, float], ...]
    bottom: tuple[tuple[str, float], ...]


def check_feature(coder: SparseCoder, feature_id: int) -> int:
    """The id itself; raises `ValueError` where the coder has no such feature."""
    whole = isinstance(feature_id, (int, np.integer)) and not isinstance(feature_id, bool)
    if not whole or not 0 <= feature_id < coder.n_features:
        raise ValueError(f"feature_id must be in [0, {coder.n_features - 1}], got {feature_id!r}.")
    return int(feature_id)


def encode_text(
    coder: SparseCoder, source: ActivationSource, text: str
) -> tuple[list[str], mx.array]:
    """The pieces of a text and their codes `[n_tokens, n_features]`, zero at special tokens.

    Raises `ValueError` for an empty text, or what is none.
    """
    if not isinstance(text, str):
        raise ValueError(f"text must be one string, got {type(text).__name__}.")
    if not text:
        raise ValueError("text must not be empty.")
    (ids,) = source.encode_batch([text])
    captured = source.run(mx.array([ids]), capture=coder.reads.names, stop=True)
    codes = coder.encode({name: captured[name][0] for name in coder.reads.names})
    counts = mx.array([i not in source.special_token_ids for i in ids])
    return source.to_str_tokens(ids), codes * counts[:, None]


def analyze_text(
    coder: SparseCoder, source: ActivationSource, text: str, top_k: int = 10
) -> TextAnalysis:
    """Which features are active where in a text, the `top_k` largest of each token and of all."""
    tokens, codes = encode_text(coder, source, text)
    values = np.array(codes.astype(mx.float32))
    order = np.argsort(-values, axis=1)[:, :top_k]
    by_token = tuple(
        tuple((int(i), float(row[i])) for i in ids if row[i] != 0)
        for row, ids in zip(values, order, strict=True)
    )
    peaks = values.max(axis=0)
    ranked = [int(i) for i in np.argsort(-peaks)[:top_k] if peaks[i] > 0]
    positions = values.argmax(axis=0)
    top = tuple(
        FeatureActivation(i, float(peaks[i]), int(positions[i]), tokens[positions[i]])
        for i in ranked
    )
    return TextAnalysis(tuple(tokens), by_token, top)


class FeatureExamples:
    """The positions of a dataset where each feature of a coder is most active.

    `values` and `positions` are `[n_features, n]`, largest first and at most one of each context;
    `positions` index the flattened token rows, and count only where the value is above zero.
    """

    def __init__(
        self,
        coder: SparseCoder,
        dataset: ActivationDataset,
        values: np.ndarray,
        positions: np.ndarray,
    ):
        self._coder, self._dataset = coder, dataset
        self.values, self.positions = values, positions

    def strongest(self, n: int) -> FeatureExamples:
        """The first `n` examples of every feature."""
        return FeatureExamples(
            self._coder, self._dataset, self.values[:, :n], self.positions[:, :n]
        )

    def of(self, feature_id: int, window: int = 12) -> tuple[Example, ...]:
        """The examples of one feature, with up to `window` tokens before and half of it after."""
        feature_id = check_feature(self._coder, feature_id)
        found = self.values[feature_id] > 0
        return tuple(
            self._example(feature_id, int(position), window)
            for position in self.positions[feature_id][found]
        )

    def clearest(self, n: int = 5) -> list[int]:
        """Features that are easy to name: their strongest examples peak on one and the same word.

        Ranked by the share of the commonest whole word among the peaks, then by the size of the
        peaks; no two of the features share their word.
        """
        ranked = []
        for feature_id in np.flatnonzero((self.values > 0).all(axis=1)).tolist():
            counted = Counter(self._peak_words(feature_id)).most_common(1)
            for word, count in counted:
                ranked.append((count, float(self.values[feature_id].mean()), word, feature_id))
        chosen: dict[str, int] = {}
        for _, _, word, feature_id in sorted(ranked, reverse=True):
            chosen.setdefault(word, feature_id)
        return list(chosen.values())[:n]

    def _peak_words(self, feature_id: int) -> list[str]:
        """The peaks' tokens, in lower case, that are words by themselves."""
        source = self._dataset.source
        assert source is not None
        tokens = _corpus(self._dataset).tokens.reshape(-1)
        positions = self.positions[feature_id]
        peaks = source.to_str_tokens(tokens[positions].tolist())
        after = source.to_str_tokens(tokens[np.minimum(positions + 1, len(tokens) - 1)].tolist())
        words = (
            peak.strip().lower()
            for peak, following in zip(peaks, after, strict=True)
            if peak[:1].isspace() and not following[:1].isalpha()
        )
        return [word for word in words if word.isalpha() and len(word) > 1]

    def _example(self, feature_id: int, position: int, window: int) -> Example:
        source, columns = self._dataset.source, self._coder.reads
        assert source is not None
        corpus = _corpus(self._dataset)
        row, column = divmod(position, corpus.context)
        tokens, documents = corpus.tokens, corpus.documents(row)
        owner = documents[column]
        start, end = max(0, column - window), min(tokens.shape[1], column + window // 2 + 1)
        shown = [i for i in range(start, end) if documents[i] == owner]
        captured = source.run(
            mx.array(tokens[row : row + 1, :end]), capture=columns.names, stop=True
        )
        codes = self._coder.encode({name: captured[name][0] for name in columns.names})
        values: Any = codes[:, feature_id].tolist()
        pieces = source.to_str_tokens(tokens[row, shown].tolist())
        return Example(tuple(pieces), tuple(values[i] for i in shown), shown.index(column))


def _corpus(dataset: ActivationDataset):
    if dataset.corpus is None or dataset.source is None:
        raise ValueError("Examples need a dataset made from texts with a language model.")
    return dataset.corpus


def collect_examples(
    coder: SparseCoder, dataset: ActivationDataset, n: int = 10, max_tokens: int = 200_000
) -> FeatureExamples:
    """The `n` strongest examples of every feature, found in one pass over up to `max_tokens`.

    Raises `ValueError` for a dataset without texts.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}.")
    corpus, source = _corpus(dataset), dataset.source
    assert source is not None
    values = mx.zeros((n, coder.n_features))
    positions = mx.zeros((n, coder.n_features), mx.int32)
    n_contexts = min(len(corpus), -(-max_tokens // corpus.context))
    with tqdm(total=n_contexts, desc="examples", disable=not dataset.verbose) as bar:
        for start, tokens, counts in corpus.blocks():
            if start >= n_contexts:
                break
            captured = source.run(tokens, capture=coder.reads.names, stop=True)
            codes = coder.encode({name: captured[name] for name in coder.reads.names})
            codes = mx.where(counts[..., None], codes, 0)
            # Only the peak of each context competes: examples come from different contexts.
            peaks, columns = codes.max(axis=1), codes.argmax(axis=1).astype(mx.int32)
            firsts = (mx.arange(start, start + len(peaks)) * corpus.context)[:, None]
            values = mx.concatenate([values, peaks])
            positions = mx.concatenate([positions, firsts + columns])
            best = mx.argpartition(-values, n - 1, axis=0)[:n]
            values = mx.take_along_axis(values, best, axis=0)
            positions = mx.take_along_axis(positions, best, axis=0)
            mx.eval(values, positions)
            bar.update(len(peaks))
    order = mx.argsort(-values, axis=0)
    ranked = (np.array(mx.take_along_axis(array, order, axis=0)).T for array in (values, positions))
    return FeatureExamples(coder, dataset, *ranked)


def logit_effects(
    coder: SparseCoder,
    source: ActivationSource,
    feature_id: int,
    top_k: int = 10,
    site: str | None = None,
) -> LogitEffects:
    """The tokens that a feature's decoder row promotes and suppresses most.

    The row is read by the model's own final norm and head as if it were the residual stream; of a
    coder that writes several sites of one model the sum of the rows is, or that of one `site`.
    Raises `ValueError` where it does not have the width of the stream, and for a coder that writes
    several models where no site is named.
    """
    row = coder.direction(check_feature(coder, feature_id))
    writes = coder.writes if site is None else coder.writes.only(site)
    owners = [owner(source, name)[0] for name in writes.names]
    if len(set(writes.widths)) > 1 or any(model is not owners[0] for model in owners):
        raise ValueError(f"This coder writes {writes}: name one of its sites with site=...")
    row = mx.stack([coder.writes.take(row, (name,)) for name in writes.names]).sum(axis=0)
    logits = np.array(owners[0].unembed(row[None])[0].astype(mx.float32))
    order = np.argsort(logits)
    named = [
        tuple((source.to_str_tokens([int(i)])[0], float(logits[i])) for i in ids)
        for ids in (order[::-1][:top_k], order[:top_k])
    ]
    return LogitEffects(*named)
