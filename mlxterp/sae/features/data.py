"""What a pass over a corpus has learned about the features of a coder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.features.co_occurrence import (
    CoActive,
    CoOccurrence,
    co_occurrence,
    most_frequent,
)
from mlxterp.sae.features.codes import Measure, SparseCodes, association
from mlxterp.sae.features.examples import Example, ExampleReader, Interval
from mlxterp.sae.files import read_arrays, read_json, write_directory
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import fragment, plot_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
MARKER = "collection.json"
TYPES = ("F32", "F16", "I64", "I32", "U32", "U16")  # of the arrays that are saved
N_BINS = 64  # of a histogram, two to the octave
OCTAVES_ABOVE = 8  # the largest value of the first tokens

Kind = Literal["top", "random", "intervals"]


@dataclass(frozen=True)
class Settings:
    """What decides on the result of a pass: the numbers of top examples and of values that are
    kept, the seed of the choice of contexts, and the fingerprints of coder, corpus and model."""

    n_examples: int
    max_kept: int
    seed: int
    identity: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FeatureData:
    """Statistics, examples and co-activations of all features of a coder; see `collection.collect`.

    Of the `n_tokens` tokens that were looked at, special ones left out: `firing_counts`
    `[n_features]` is on how many of them each feature is not zero, `sums` the sum of its values,
    `maxima` its largest value (in size, where there are negative ones), `histogram` `[n_features,
    n_bins]` counts the sizes of its values between `bin_edges`. `top_values` and `top_positions`
    `[n_features, n]` are its largest values, at most one of each context, and where they are in the
    flattened tokens of `corpus`, -1 where there is none.

    `codes` are the whole codes of all contexts, or of a random part of them. `source` is the
    language model, which examples need for their text.
    """

    coder: SparseCoder
    source: ActivationSource | None
    corpus: Corpus
    settings: Settings
    n_contexts: int
    n_tokens: int
    rank_limit: int
    firing_counts: np.ndarray
    sums: np.ndarray
    maxima: np.ndarray
    histogram: np.ndarray
    top_values: np.ndarray
    top_positions: np.ndarray
    codes: SparseCodes

    @property
    def n_features(self) -> int:
        """The number of features."""
        return len(self.firing_counts)

    @property
    def is_complete(self) -> bool:
        """Whether the pass came to its end."""
        return self.n_contexts == len(self.corpus)

    @property
    def firing_rates(self) -> np.ndarray:
        """The share of the tokens on which each feature fires, `[n_features]`."""
        return self.firing_counts / max(1, self.n_tokens)

    @property
    def means(self) -> np.ndarray:
        """The mean value of each feature where it fires, 0 where it never does, `[n_features]`."""
        return self.sums / np.maximum(1, self.firing_counts)

    @property
    def bin_edges(self) -> np.ndarray:
        """The values between the bins of the histograms, `[n_bins + 1]`, two bins to the octave;
        the first and the last bin hold what is beyond as well."""
        return self.codes.scale * 2.0 ** (np.arange(N_BINS + 1) / 2 - N_BINS / 2 + OCTAVES_ABOVE)

    @property
    def dead(self) -> np.ndarray:
        """The features that never fired."""
        return np.flatnonzero(self.firing_counts == 0)

    def dense(self, threshold: float = 0.1) -> np.ndarray:
        """The features that fire on more than that share of the tokens."""
        return np.flatnonzero(self.firing_rates > threshold)

    def examples(
        self, feature_id: int, n: int = 10, kind: Kind = "top", before: int = 16, after: int = 8
    ) -> tuple[Example, ...]:
        """Up to `n` stretches of text where a feature fires, at most one of each context.

        `top` are those where it is strongest, `random` any; `intervals` one of each of `n` evenly
        spaced intervals between its maximum and 0, from strong to weak. Around the position up to
        so many tokens of the same document are shown. Raises `ValueError` for an unknown feature
        or kind, and where the language model is not known.
        """
        if kind == "intervals":
            found = self.intervals(feature_id, n, 1, before, after)
            return tuple(example for interval in found for example in interval.examples)
        return self._texts.read(feature_id, self.positions(feature_id, n, kind), before, after)

    def positions(self, feature_id: int, n: int = 10, kind: Kind = "top") -> np.ndarray:
        """Where the `top` or `random` ones of `examples` are in the flattened tokens."""
        feature_id = check_feature(self.coder, feature_id)
        if kind == "top":
            positions = self.top_positions[feature_id, :n]
            return positions[positions >= 0]
        if kind == "random":
            return self._drawn(feature_id, n)
        raise ValueError(f"kind must be 'top', 'random' or 'intervals', got {kind!r}.")

    def intervals(
        self,
        feature_id: int,
        n_intervals: int = 10,
        n: int = 3,
        before: int = 16,
        after: int = 8,
    ) -> tuple[Interval, ...]:
        """Random examples, `n` of each of evenly spaced intervals between a feature's maximum
        and 0, from strong to weak."""
        return tuple(
            Interval(low, high, share, self._texts.read(feature_id, drawn, before, after))
            for low, high, share, drawn in self.interval_positions(feature_id, n_intervals, n)
        )

    def interval_positions(
        self, feature_id: int, n_intervals: int = 10, n: int = 3
    ) -> list[tuple[float, float, float, np.ndarray]]:
        """Of each of `intervals` its bounds, its share, and where its examples are."""
        feature_id = check_feature(self.coder, feature_id)
        edges = np.linspace(0, self.maxima[feature_id], n_intervals + 1)
        rows, values = self.codes.of(feature_id)
        # The values kept are rounded, and may be above the maximum by that.
        within = np.clip(np.searchsorted(edges, np.abs(values), "left") - 1, 0, n_intervals - 1)
        found = []
        for i in reversed(range(n_intervals)):
            of_these = rows[within == i]
            share = len(of_these) / max(1, len(rows))
            drawn = self._drawn(feature_id, n, of_these)
            found.append((float(edges[i]), float(edges[i + 1]), share, drawn))
        return found

    def example(self, feature_id: int, position: int, before: int = 16, after: int = 8) -> Example:
        """The stretch of text around a position, with a feature's values on it."""
        return self._texts.read(feature_id, np.array([position]), before, after)[0]

    def silent(
        self, feature_id: int, n: int = 10, seed: int = 0, before: int = 16, after: int = 8
    ) -> np.ndarray:
        """Random positions, at most one of each context, with no value of a feature from `before`
        tokens before to `after` tokens after; fewer than `n` where there are not so many."""
        feature_id = check_feature(self.coder, feature_id)
        positions = self.codes.positions
        firing = positions[self.codes.of(feature_id)[0]]
        drawn = np.random.default_rng([seed, feature_id]).permutation(len(positions))
        found: list[int] = []
        contexts: set[int] = set()
        for start in range(0, len(drawn), 1024):
            candidates = positions[drawn[start : start + 1024]]
            ends = np.searchsorted(firing, [candidates - before, candidates + after + 1])
            for position in candidates[ends[0] == ends[1]].tolist():
                context = position // self.corpus.context
                if context not in contexts:
                    contexts.add(context)
                    found.append(position)
                if len(found) == n:
                    return np.array(found)
        return np.array(found, np.int64)

    def documents(self, positions: Iterable[int] | np.ndarray) -> np.ndarray:
        """The number of the document at each position."""
        return self.corpus.owners.reshape(-1)[np.asarray(positions)]

    def co_active(
        self, feature_id: int, n: int = 10, by: Measure = "jaccard"
    ) -> tuple[CoActive, ...]:
        """The features that fire most on the same tokens, among the tokens whose codes are kept.

        With `a` and `b` the numbers of tokens on which they fire and `ab` that on which both do, of
        `t` tokens: `jaccard` is `ab / (a + b - ab)`, `conditional` `ab / a` (how often the other
        fires where this one does), `phi` their correlation, `npmi` the normalised pointwise mutual
        information in [-1, 1], `count` `ab`.
        """
        feature_id = check_feature(self.coder, feature_id)
        together = self.codes.together(feature_id)
        scores = association(
            together, self.codes.firing_counts, feature_id, self.codes.n_tokens, by
        )
        scores[feature_id], scores[together == 0] = -np.inf, -np.inf
        best = np.argsort(-scores, kind="stable")[:n]
        return tuple(
            CoActive(int(i), int(together[i]), float(scores[i]))
            for i in best
            if scores[i] > -np.inf
        )

    def co_occurrence(
        self, features: Sequence[int] = (), n: int = 20, by: Measure = "jaccard"
    ) -> CoOccurrence:
        """How strongly each two of some features go together, by a measure of `co_active`; of the
        `n` that fire most often, where none are given."""
        given = [check_feature(self.coder, i) for i in dict.fromkeys(features)]
        return co_occurrence(self.codes, given or most_frequent(self.codes, n), by)

    def co_activation(self, features: Sequence[int]) -> np.ndarray:
        """On how many of the tokens whose codes are kept each two of some features fire, `[n, n]`;
        on the diagonal, on how many each of them does."""
        return self.codes.counts_together([check_feature(self.coder, i) for i in features])

    def clearest(self, n: int = 5, n_examples: int = 5) -> list[int]:
        """Features that are easy to name: their strongest examples peak on one and the same word.

        Ranked by the share of the commonest whole word among the peaks, then by the size of the
        peaks; no two of the features share their word.
        """
        values, positions = self.top_values[:, :n_examples], self.top_positions[:, :n_examples]
        ranked = []
        for feature_id in np.flatnonzero((positions >= 0).all(axis=1)).tolist():
            counted = Counter(self._texts.words(positions[feature_id])).most_common(1)
            for word, count in counted:
                ranked.append((count, float(values[feature_id].mean()), word, feature_id))
        chosen: dict[str, int] = {}
        for _, _, word, feature_id in sorted(ranked, reverse=True):
            chosen.setdefault(word, feature_id)
        return list(chosen.values())[:n]

    @property
    def _texts(self) -> ExampleReader:
        return ExampleReader(self.coder, self.source, self.corpus, self.codes)

    def _drawn(self, feature_id: int, n: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Random positions where a feature fires, at most one of each context."""
        rows = self.codes.of(feature_id)[0] if rows is None else rows
        rng = np.random.default_rng([self.settings.seed, feature_id])
        positions = self.codes.positions[rng.permutation(rows)]
        _, first = np.unique(positions // self.corpus.context, return_index=True)
        return positions[np.sort(first)[:n]]

    def to_dict(self) -> dict[str, Any]:
        """The statistics of all features as lists, without examples and codes."""
        return {
            "n_tokens": self.n_tokens,
            "firing_counts": self.firing_counts.tolist(),
            "means": self.means.tolist(),
            "maxima": self.maxima.tolist(),
            "bin_edges": self.bin_edges.tolist(),
            "histogram": self.histogram.tolist(),
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the firing rates: how many features fire on which share of the
        tokens. Raises `ImportError` where matplotlib is missing."""
        return plot_density(self.firing_rates, ax)

    def _repr_html_(self) -> str:
        dense = f"{len(self.dense()):,} on more than 10 % of the tokens"
        facts = [
            ("features", f"{self.n_features:,}: {len(self.dead):,} never fire, {dense}"),
            ("tokens", f"{self.n_tokens:,} in {self.n_contexts:,} contexts"),
            ("codes kept", f"of {self.codes.n_tokens:,} tokens"),
        ]
        return fragment("facts.html", title="Statistics of features", facts=facts)

    def __repr__(self) -> str:
        kept = self.codes.n_tokens / max(1, self.n_tokens)
        share = "all" if len(self.codes.contexts) == self.n_contexts else f"{100 * kept:.0f}% of"
        return (
            f"FeatureData({self.n_features:,} features on {self.n_tokens:,} tokens: "
            f"{len(self.dead):,} never fire, {len(self.dense()):,} on more than 10% of them; "
            f"codes of {share} the contexts)"
        )

    @property
    def files(self) -> dict[str, Any]:
        """What is saved, by the name of the file."""
        codes, corpus = self.codes, self.corpus
        facts = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "n_features": self.n_features,
            "n_contexts": self.n_contexts,
            "n_tokens": self.n_tokens,
            "rank_limit": self.rank_limit,
            "scale": codes.scale,
            "corpus": {
                "shape": list(corpus.tokens.shape),
                "bos_id": corpus.bos_id,
                "special": sorted(corpus.special),
                "separate": corpus.separate,
            },
            "kept": {
                "contexts": len(codes.contexts),
                "tokens": codes.n_tokens,
                "values": len(codes.values),
            },
        }
        # MLX has no float64 on every device: the sums are written as the integers of their bits.
        arrays = {**vars(self), **vars(corpus), **vars(codes), "sums": self.sums.view(np.int64)}
        return {MARKER: facts} | {
            name: {key: mx.array(arrays[key]) for key in shapes}
            for name, shapes in _shapes(facts).items()
        }

    def save(self, path: str | Path) -> Path:
        """Write everything as a directory, which replaces an older one, and return its path."""
        return write_directory(path, self.files, MARKER)

    @classmethod
    def load(
        cls, path: str | Path, coder: SparseCoder, source: ActivationSource | None = None
    ) -> FeatureData:
        """What `save` wrote; raises `ValueError`, naming the file, where it is missing, damaged, or
        of a coder with another number of features."""
        path = Path(path)
        facts = read_json(path / MARKER, ("format_version", "settings", "n_features", "kept"))
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path / MARKER} has format_version {facts['format_version']!r}; this release of "
                f"mlxterp reads {FORMAT_VERSION}."
            )
        if facts["n_features"] != coder.n_features:
            raise ValueError(
                f"{path} is of a coder with {facts['n_features']} features, not {coder.n_features}."
            )
        try:
            settings, shapes = Settings(**facts["settings"]), _shapes(facts)
            corpus = facts["corpus"]
            described = {name: facts[name] for name in ("n_contexts", "n_tokens", "rank_limit")}
            scale = float(facts["scale"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path / MARKER} does not describe a collection: {error!r}") from None
        arrays: dict[str, Any] = {}
        for name, of_file in shapes.items():
            read = read_arrays(path / name, of_file, TYPES)
            arrays |= {key: np.array(array) for key, array in read.items()}
        tokens, owners = arrays.pop("tokens"), arrays.pop("owners")
        names = ("contexts", "positions", "starts", "features", "values")
        kept = {name: arrays.pop(name) for name in names}
        codes = SparseCodes(**kept, scale=scale, n_features=coder.n_features)
        arrays["sums"] = arrays["sums"].view(np.float64)
        return cls(
            coder=coder, source=source, settings=settings, codes=codes,
            corpus=Corpus(
                tokens, owners, corpus["bos_id"], frozenset(corpus["special"]), corpus["separate"]
            ),
            **described, **arrays,
        )  # fmt: skip


def _shapes(facts: dict[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of all arrays, by file."""
    n, n_examples, kept = facts["n_features"], facts["settings"]["n_examples"], facts["kept"]
    corpus, entries = tuple(facts["corpus"]["shape"]), (kept["values"],)
    return {
        "statistics.safetensors": {
            "firing_counts": (n,), "sums": (n,), "maxima": (n,), "histogram": (n, N_BINS),
        },
        "examples.safetensors": {"top_values": (n, n_examples), "top_positions": (n, n_examples)},
        "corpus.safetensors": {"tokens": corpus, "owners": corpus},
        "codes.safetensors": {
            "contexts": (kept["contexts"],), "positions": (kept["tokens"],),
            "starts": (kept["tokens"] + 1,), "features": entries, "values": entries,
        },
    }  # fmt: skip
