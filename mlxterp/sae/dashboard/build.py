"""Makes the bundle of a coder from what is known of its features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dashboard.bundle import Bundle, Comparison
from mlxterp.sae.dashboard.facts import facts_of, norm_sites
from mlxterp.sae.dashboard.layout import TABLE
from mlxterp.sae.dashboard.passages import TOP, Amounts, passages
from mlxterp.sae.dashboard.sides import Side, side_arrays, sides_of
from mlxterp.sae.dashboard.strings import Strings, finite
from mlxterp.sae.evals.fidelity import Fidelity
from mlxterp.sae.evals.loss import LossRecovered
from mlxterp.sae.features.codes import association
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sae.metadata import Statistics
from mlxterp.sae.similarity.map import CAPTION, Method, feature_map
from mlxterp.sae.similarity.matching import Matching
from mlxterp.sae.similarity.nearest import nearest_all

LISTED = 10  # tokens, similar features and features that fire together
PEAKS = 3  # tokens of a row of the table


def build_bundle(
    data: FeatureData,
    labels: FeatureLabels | None = None,
    *,
    title: str = "",
    statistics: Statistics | None = None,
    measured: tuple[Fidelity | None, LossRecovered | None] = (None, None),
    circuits: Mapping[str, Any] | Sequence[Any] = (),
    comparisons: Sequence[Comparison] = (),
    map_method: Method | None = "pca",
    amounts: Amounts | None = None,
    verbose: bool = False,
) -> Bundle:
    """Everything that a dashboard shows of a coder, from one pass over its features.

    Examples and co-activations are those of `data`, whose language model gives the texts and the
    tokens that features write and read. `statistics` are the reports of the training, `measured`
    what `evaluate` found, `circuits` are by name or have numbers, `map_method` is that of
    `feature_map`, or None for none. Values of contexts whose codes were not kept are computed again
    in one pass through the model. Raises `ValueError` where the data know no model.
    """
    coder, source = data.coder, data.source
    if source is None:
        raise ValueError(
            "A dashboard needs the language model for its texts: call sae.bind(model), or load the "
            "coder with model.load_sae(path)."
        )
    labels = FeatureLabels(coder.n_features) if labels is None else labels
    amounts, strings = amounts or Amounts(), Strings()
    strings.number("")
    sides = sides_of(coder, source)
    with tqdm(total=4 + len(sides), desc="dashboard", unit="part", disable=not verbose) as bar:
        arrays = {"examples.safetensors": passages(data, source, strings, amounts)}
        bar.update()
        for i, side in enumerate(sides):
            of_side = side_arrays(side, coder, source, strings, LISTED)
            arrays[f"side_{i}.safetensors"] = of_side
            bar.update()
        arrays["features.safetensors"] = _details(data)
        bar.update()
        arrays[TABLE] = _table(data, arrays, sides)
        bar.update()
        found = None if map_method is None else feature_map(coder, map_method)
        if found is not None:
            arrays[TABLE]["map"] = found.points.astype(np.float32)
        bar.update()
    of_map = None if found is None else {**vars(found), "caption": CAPTION}
    facts = facts_of(data, source, title, statistics or Statistics(), measured)
    facts |= {
        "map": of_map and {name: of_map[name] for name in ("method", "explained", "caption")},
        "sides": [side.to_dict() for side in sides],
        "sizes": _sizes(arrays),
    }
    named = circuits if isinstance(circuits, Mapping) else dict(enumerate(circuits, 1))
    pages = tuple(_circuit(str(name), circuit, coder) for name, circuit in named.items())
    return Bundle(finite(facts), tuple(strings.shown), arrays, labels, pages, tuple(comparisons))


def compared(name: str, matching: Matching, other: Bundle) -> Comparison:
    """Another coder for a dashboard: how it matches the first, and its own bundle."""
    found = matching.to_dict()
    facts = {k: found[k] for k in ("scores", "chance", "by", "absolute", "threshold", "method")}
    arrays = {
        "partners": matching.partners.astype(np.int32),
        "cosines": matching.cosines.astype(np.float32),
        "best": matching.best.astype(np.float32),
        "shared": matching.shared.astype(np.uint8),
    }
    return Comparison(name, other, finite(facts), arrays)


def _details(data: FeatureData) -> dict[str, np.ndarray]:
    n = data.n_features
    near = nearest_all(data.coder, top_k=LISTED) if n > 1 else None
    similar = np.full((n, LISTED), -1, np.int32)
    cosines = np.zeros((n, LISTED), np.float16)
    if near is not None:
        similar[:, : near.ids.shape[1]], cosines[:, : near.ids.shape[1]] = near
    together = np.full((n, LISTED), -1, np.int32)
    counts = np.zeros((n, LISTED), np.uint32)
    for i, others, common in _co_active(data):
        together[i, : len(others)], counts[i, : len(others)] = others, common
    return {
        "histogram": data.histogram.astype(np.uint32),
        "similar": similar, "cosines": cosines,
        "together": together, "together_counts": counts,
    }  # fmt: skip


def _co_active(data: FeatureData) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The features with the largest Jaccard index with each, and on how many tokens both fire."""
    codes, counts = data.codes, data.codes.firing_counts
    for i in np.flatnonzero(counts).tolist():
        common = codes.together(i)
        found = np.flatnonzero(common)
        at = int(np.searchsorted(found, i))
        scores = association(common[found], counts[found], at, codes.n_tokens, "jaccard")
        scores[at] = -np.inf
        best = np.argsort(-scores, kind="stable")[: min(LISTED, len(found) - 1)]
        yield i, found[best], common[found[best]]


def _table(
    data: FeatureData, arrays: Mapping[str, Any], sides: Sequence[Side]
) -> dict[str, np.ndarray]:
    details, n = arrays["features.safetensors"], data.n_features
    writes = [i for i, side in enumerate(sides) if side.direction == "writes"]
    promotes = np.full((n, PEAKS), -1, np.int32)
    if writes:
        promotes = arrays[f"side_{writes[0]}.safetensors"]["top"][:, :PEAKS]
    nearest = details["similar"][:, 0]
    table = {
        "firing_rates": data.firing_rates, "means": data.means, "maxima": data.maxima,
        "nearest": np.where(nearest >= 0, details["cosines"][:, 0], np.nan),
    }  # fmt: skip
    table = {name: column.astype(np.float32) for name, column in table.items()}
    table |= {
        "firing_counts": data.firing_counts.astype(np.uint32),
        "kept_counts": data.codes.firing_counts.astype(np.uint32),
        "nearest_ids": nearest.astype(np.int32),
        "peaks": _peaks(arrays["examples.safetensors"], n),
        "promotes": np.ascontiguousarray(promotes),
    }
    if norm_sites(data.coder) is not None:
        table["norms"] = np.array(data.coder.decoder_norms().astype(mx.float32))
    return table


def _peaks(examples: Mapping[str, np.ndarray], n_features: int) -> np.ndarray:
    """The texts at the peaks of each feature's strongest examples, the commonest first."""
    found = np.full((n_features, PEAKS), -1, np.int32)
    features = np.repeat(np.arange(n_features), np.diff(examples["starts"].astype(np.int64)))
    strongest = np.flatnonzero(examples["kinds"] == TOP)
    firsts = examples["firsts"][strongest].astype(np.int64)
    at = firsts + examples["peaks"][strongest]
    # Of several tokens that make up a character the first has it, and the others have text 0.
    while (again := (examples["tokens"][at] == 0) & (at > firsts)).any():
        at = at - again
    ends = np.searchsorted(features[strongest], np.arange(n_features + 1))
    texts = examples["tokens"][at]
    for i in np.flatnonzero(np.diff(ends)).tolist():
        common = Counter(texts[ends[i] : ends[i + 1]].tolist()).most_common(PEAKS)
        found[i, : len(common)] = [text for text, _ in common]
    return found


def _sizes(arrays: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, int]:
    held = arrays["examples.safetensors"]
    return {
        "n_examples": len(held["kinds"]), "n_values": len(held["values"]),
        "n_tokens": len(held["tokens"]), "n_intervals": held["shares"].shape[1],
        "n_similar": LISTED, "n_together": LISTED, "n_logits": LISTED, "n_peaks": PEAKS,
    }  # fmt: skip


def _circuit(name: str, circuit: Any, coder: SparseCoder) -> dict[str, Any]:
    """A circuit as a page draws it, with the features that are the coder's own."""
    content = finite(circuit.page_content())
    levels = {*coder.reads.names, *coder.writes.names}
    levels |= {", ".join(names) for names in (coder.reads.names, coder.writes.names)}
    for node in content["nodes"]:
        own = node["kind"] == "feature" and node["site"] in levels
        node["feature"] = node["index"] if own and node["index"] < coder.n_features else None
    return {"name": name, **content}
