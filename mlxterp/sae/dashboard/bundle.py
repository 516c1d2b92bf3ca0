"""What a dashboard shows of a coder, compact enough to be read as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import save as to_safetensors

from mlxterp.sae.dashboard.layout import MARKER, STRINGS_FILE, TABLE
from mlxterp.sae.dashboard.passages import FIRST_INTERVAL, RANDOM, TOP
from mlxterp.sae.dashboard.strings import label_entry, short, shorts
from mlxterp.sae.files import write_directory
from mlxterp.sae.labels.labels import LABELS_FILE, FeatureLabels

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Bundle:
    """The data behind a dashboard: about a kilobyte of every feature of a coder, and texts once.

    `facts` are plain values about the whole, `strings` the texts that arrays give the numbers of,
    `arrays` those of `layout.shapes` by file. `circuits` are pages of circuits, and `comparisons`
    other coders, whose own bundles have neither.
    """

    facts: Mapping[str, Any]
    strings: tuple[str, ...]
    arrays: Mapping[str, Arrays]
    labels: FeatureLabels
    circuits: tuple[Mapping[str, Any], ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    @property
    def n_features(self) -> int:
        """The number of features."""
        return self.facts["coder"]["n_features"]

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays and strings of this coder."""
        arrays = sum(a.nbytes for held in self.arrays.values() for a in held.values())
        return arrays + sum(len(text.encode("utf-8", "replace")) for text in self.strings)

    @property
    def table(self) -> Arrays:
        """The columns of the table of all features."""
        return self.arrays[TABLE]

    @cached_property
    def _value_starts(self) -> np.ndarray:
        counts = self.arrays["examples.safetensors"]["n_values"]
        return np.append(0, np.cumsum(counts, dtype=np.int64))

    def table_bytes(self, included: Sequence[int] | None = None) -> bytes:
        """The table as safetensors; `included` are the features that have more than their row."""
        n = self.n_features
        has_more = np.zeros(n, np.uint8)
        has_more[slice(None) if included is None else list(included)] = 1
        return to_safetensors({**self.table, "included": has_more})

    def meta(self, included: int | None = None) -> dict[str, Any]:
        """What is known of the whole, as plain values."""
        circuits = [
            {"name": c["name"], "n_nodes": len(c["nodes"]), "n_edges": len(c["edges"])}
            for c in self.circuits
        ]
        n = self.n_features
        return {
            **{key: value for key, value in self.facts.items() if key != "sizes"},
            "circuits": circuits,
            "compare": [{"name": comparison.name} for comparison in self.comparisons],
            "features": {"n": n, "included": n if included is None else included},
        }

    def label_entries(self) -> dict[str, Any]:
        """The labels of all features that have one, by id."""
        return {str(i): label_entry(self.labels, i) for i in self.labels}

    def feature(self, feature_id: int) -> dict[str, Any]:
        """Everything about one feature, as plain values; raises `IndexError` where it is none."""
        if not 0 <= feature_id < self.n_features:
            raise IndexError(f"feature_id must be in [0, {self.n_features - 1}], got {feature_id}.")
        table, details = self.table, self.arrays["features.safetensors"]
        examples = [*self._examples(feature_id)]
        norms = table.get("norms")
        return {
            "id": feature_id,
            "firing_rate": short(table["firing_rates"][feature_id]),
            "firing_count": int(table["firing_counts"][feature_id]),
            "mean": short(table["means"][feature_id]),
            "maximum": short(table["maxima"][feature_id]),
            "histogram": details["histogram"][feature_id].tolist(),
            "examples": [example for kind, example in examples if kind == TOP],
            "intervals": self._intervals(feature_id, examples),
            "random": [example for kind, example in examples if kind == RANDOM],
            "sides": [self._side(i, feature_id) for i in range(len(self.facts["sides"]))],
            "similar": [
                {"id": int(i), "cosine": short(cosine)}
                for i, cosine in _listed(details, "similar", "cosines", feature_id)
            ],
            "co_active": self._co_active(feature_id),
            "norms": None if norms is None else shorts(norms[feature_id]),
        }

    def _examples(self, feature_id: int) -> Iterator[tuple[int, dict[str, Any]]]:
        held, strings = self.arrays["examples.safetensors"], self.strings
        start, stop = held["starts"][feature_id : feature_id + 2].tolist()
        for i in range(start, stop):
            first, length = int(held["firsts"][i]), int(held["lengths"][i])
            values = np.zeros(length, np.float32)
            part = slice(self._value_starts[i], self._value_starts[i + 1])
            values[held["value_tokens"][part]] = held["values"][part] * np.float32(self._scale)
            yield (
                int(held["kinds"][i]),
                {
                    "tokens": [strings[j] for j in held["tokens"][first : first + length].tolist()],
                    "values": shorts(values),
                    "peak": int(held["peaks"][i]),
                    "document": int(held["documents"][i]),
                },
            )

    @property
    def _scale(self) -> float:
        return self.facts["scale"]

    def _intervals(
        self, feature_id: int, examples: Sequence[tuple[int, dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        shares = self.arrays["examples.safetensors"]["shares"][feature_id]
        if not self.table["firing_counts"][feature_id]:
            return []
        edges = np.linspace(self.table["maxima"][feature_id], 0, len(shares) + 1)
        return [
            {
                "low": short(edges[i + 1]),
                "high": short(edges[i]),
                "share": short(share),
                "examples": [example for kind, example in examples if kind == FIRST_INTERVAL + i],
            }
            for i, share in enumerate(shares)
        ]

    def _side(self, side: int, feature_id: int) -> dict[str, Any]:
        held = self.arrays[f"side_{side}.safetensors"]
        return {
            end: [
                [self.strings[i], short(value)]
                for i, value in _listed(held, end, f"{end}_values", feature_id)
            ]
            for end in ("top", "bottom")
        }

    def _co_active(self, feature_id: int) -> list[dict[str, Any]]:
        details = self.arrays["features.safetensors"]
        counts = self.table["kept_counts"]
        return [
            {
                "id": int(i),
                "score": short(n / (counts[feature_id] + float(counts[i]) - n)),
                "count": int(n),
            }
            for i, n in _listed(details, "together", "together_counts", feature_id)
        ]

    def together(self, features: Sequence[int]) -> dict[str, Any]:
        """On how many tokens each two of some features fire; None for pairs that are not among
        those listed."""
        details, own = self.arrays["features.safetensors"], self.table["kept_counts"]
        pairs = {}
        for a in features:
            for b, n in _listed(details, "together", "together_counts", a):
                pairs[a, int(b)] = pairs[int(b), a] = int(n)
        counts = [
            [int(own[a]) if a == b else pairs.get((a, b)) for b in features] for a in features
        ]
        n_tokens = self.facts["data"]["n_kept_tokens"]
        return {"features": [*features], "counts": counts, "n_tokens": n_tokens, "exact": False}

    def _files(self) -> dict[str, Any]:
        arrays = {
            name: {key: mx.array(array) for key, array in held.items()}
            for name, held in self.arrays.items()
        }
        counts = {"n_circuits": len(self.circuits), "n_comparisons": len(self.comparisons)}
        files = {MARKER: {**self.facts, **counts}, STRINGS_FILE: {"strings": [*self.strings]}}
        return {**files, **arrays, LABELS_FILE: self.labels.to_dict()}

    def save(self, path: str | Path) -> Path:
        """Write everything as a directory, which replaces an older one, and return its path."""
        files = self._files()
        files |= {f"circuit_{i}.json": circuit for i, circuit in enumerate(self.circuits)}
        for i, comparison in enumerate(self.comparisons):
            other = comparison.bundle._files()
            files |= {f"other_{i}/{name}": content for name, content in other.items()}
            files[f"other_{i}/matching.json"] = {"name": comparison.name, **comparison.facts}
            arrays = {key: mx.array(array) for key, array in comparison.arrays.items()}
            files[f"other_{i}/matching.safetensors"] = arrays
        return write_directory(path, files, MARKER)

    def __repr__(self) -> str:
        size = f"{self.nbytes / self.n_features:,.0f} bytes each"
        return f"Bundle({self.facts['title']}, {self.n_features:,} features, {size})"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Another coder beside one, and which of its features are the same.

    `arrays` are `partners`, `cosines`, `best` and `shared` `[n_features]` of a `Matching`, `facts`
    its scores.
    """

    name: str
    bundle: Bundle
    facts: Mapping[str, Any]
    arrays: Arrays

    def to_dict(self) -> dict[str, Any]:
        """The scores, as plain values."""
        of_other = {"title": self.bundle.facts["title"], "n_features": self.bundle.n_features}
        return {"name": self.name, **of_other, **self.facts}

    def table_bytes(self) -> bytes:
        """The arrays as safetensors."""
        return to_safetensors(dict(self.arrays))


def _listed(held: Arrays, ids: str, values: str, feature_id: int) -> Iterator[tuple[int, Any]]:
    """The pairs of a feature's row of two arrays, without places that are empty."""
    for i, value in zip(held[ids][feature_id].tolist(), held[values][feature_id], strict=True):
        if i >= 0:
            yield i, value
