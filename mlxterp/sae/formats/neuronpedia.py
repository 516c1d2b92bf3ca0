"""Features as the files that Neuronpedia imports, and the explanations that it exports, as labels.

    {model}/{layer}-{set}/features/batch-{i}.jsonl.gz        a feature on each line
                          activations/batch-{i}.jsonl.gz     an example of one of these features
                          explanations/batch-{i}.jsonl.gz    a label of one
                          model.jsonl  release.jsonl  source.jsonl  sourceset.jsonl

Each line is an object whose names are those of the columns of Neuronpedia's database.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.sae.coder import check_feature
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.examples import Example
from mlxterp.sae.features.logit_effects import logit_directions, writes_stream
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sites import Site

PER_BATCH = 128  # features
N_TOP, N_INTERVALS, N_OF_EACH = 20, 5, 5  # examples, as the usual dashboards have them
BEFORE, AFTER = 64, 32  # tokens around the position of an example
N_TOKENS, N_BINS = 10, 40
# Lists that other tools fill: what is known of single neurons.
EMPTY = (
    "topkCosSimIndices", "topkCosSimValues", "neuron_alignment_indices", "neuron_alignment_values",
    "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson",
    "correlated_neurons_l1", "decoder_weights_dist", "vector", "neg_str", "neg_values", "pos_str",
    "pos_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
)  # fmt: skip
OF_TOP = -1.0  # stands for the bounds and the share of an interval in the strongest examples
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
SOURCE = "source.jsonl"


@dataclass(frozen=True)
class Listing:
    """What Neuronpedia is told of a coder besides its features.

    `model` is its name for the language model, such as `gemma-2-2b`, and `source_set` the name of
    the coders of all layers, without a layer. `creator_id` is the id of a user in the instance that
    imports the files, of whom everything there is. `release` names what `title` and `url` describe.
    `explanation_type` and `explanation_model` are names that the instance knows, if any.
    """

    model: str
    source_set: str
    release: str
    creator_id: str
    creator: str
    title: str = ""
    description: str = ""
    url: str = ""
    dataset: str = ""
    hf_repo: str | None = None
    hf_folder: str | None = None
    explanation_type: str | None = None
    explanation_model: str | None = None

    def __post_init__(self) -> None:
        for field in ("model", "source_set", "release"):
            if not NAME.fullmatch(getattr(self, field)):
                raise ValueError(
                    f"{field} must be letters, digits, dots, dashes and underscores, the first no "
                    f"dot or dash, got {getattr(self, field)!r}."
                )
        if not self.creator_id or not self.creator:
            raise ValueError("creator_id and creator must not be empty.")


def write_features(
    data: FeatureData,
    listing: Listing,
    directory: str | Path,
    *,
    features: Iterable[int] | None = None,
    labels: FeatureLabels | None = None,
) -> Path:
    """Write what was collected about features as files that an instance of Neuronpedia imports.

    Written are `features`, by default all that fired, with their strongest and other examples, the
    tokens that they make most and least likely, how often they fire, and their `labels` as
    explanations; the result is the folder, `directory/{model}/{layer}-{source_set}`, in the place
    of an older one. Raises `ValueError` for a coder of several layers, for data without a
    language model, and where something else is in the way.
    """
    if data.source is None:
        raise ValueError("The language model is needed: pass model=... to collect, or load_sae.")
    path = Path(directory) / listing.model / f"{_layer(data)}-{listing.source_set}"
    if path.exists() and not (path / SOURCE).is_file():
        raise ValueError(f"{path} exists and holds no {SOURCE}; it is not overwritten.")
    found = np.flatnonzero(data.firing_counts).tolist() if features is None else features
    ids = sorted({check_feature(data.coder, i) for i in found})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        made = scratch / "new"
        _write_all(data, listing, made, path.name, ids, labels or {})
        if path.exists():
            path.rename(scratch / "old")
        made.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _write_all(
    data: FeatureData,
    listing: Listing,
    path: Path,
    source: str,
    ids: list[int],
    labels: Mapping[int, Any],
) -> None:
    own = {"modelId": listing.model, "layer": source}
    for number, start in enumerate(range(0, len(ids), PER_BATCH)):
        some = ids[start : start + PER_BATCH]
        effects = _effects(data, some)
        rows: dict[str, list[dict[str, Any]]] = {
            "features": [
                own | {"index": str(i), "sourceSetName": listing.source_set}
                | {"creatorId": listing.creator_id} | _feature(data, i) | effects.get(i, {})
                for i in some
            ],
            "activations": [
                own | {"index": str(i), "creatorId": listing.creator_id, "id": _id(own, i, n)} | row
                for i in some for n, row in enumerate(_activations(data, i))
            ],
            "explanations": [
                own | {"index": str(i), "authorId": listing.creator_id, "id": _id(own, i, "label")}
                | _explanation(labels[i], listing)
                for i in some if i in labels
            ],
        }  # fmt: skip
        for name, objects in rows.items():
            if objects:
                _write_lines(path / name / f"batch-{number}.jsonl.gz", objects)
    for name, content in _about(data, listing, source).items():
        _write_lines(path / f"{name}.jsonl", [content])


def _write_lines(path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in objects).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def _layer(data: FeatureData) -> int:
    layers = {Site.from_string(name).layer for name in data.coder.reads.names}
    layer = layers.pop()
    if layers or layer is None:
        raise ValueError(
            f"Neuronpedia has the features of one layer in a source, got {data.coder.reads}."
        )
    return layer


def _feature(data: FeatureData, feature_id: int) -> dict[str, Any]:
    """What there is to say of a feature but its effect on the logits."""
    values = data.codes.of(feature_id)[1]
    heights, middles = [], []
    if len(values):
        heights, edges = np.histogram(values, N_BINS)
        heights, middles = heights.tolist(), ((edges[:-1] + edges[1:]) / 2).tolist()
    return {name: [] for name in EMPTY} | {
        "maxActApprox": _rounded(abs(data.maxima[feature_id])),
        "frac_nonzero": float(data.firing_rates[feature_id]),
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": [_rounded(x) for x in middles],
        "hasVector": False,
    }


def _effects(data: FeatureData, ids: list[int]) -> dict[int, dict[str, Any]]:
    """By feature: the tokens that it makes most and least likely, and how the effects on all of
    them are distributed; nothing of a coder that does not write to the stream."""
    assert data.source is not None
    if not ids or not writes_stream(data.coder, data.source):
        return {}
    found = {}
    for i, row in zip(ids, logit_directions(data.coder, data.source, ids), strict=True):
        order = np.argsort(row)
        lowest, highest = order[:N_TOKENS], order[::-1][:N_TOKENS]
        heights, edges = np.histogram(row, N_BINS)
        found[i] = {
            "neg_str": data.source.to_str_tokens(lowest.tolist()),
            "neg_values": [_rounded(x) for x in row[lowest]],
            "pos_str": data.source.to_str_tokens(highest.tolist()),
            "pos_values": [_rounded(x) for x in row[highest]],
            "logits_hist_data_bar_heights": heights.tolist(),
            "logits_hist_data_bar_values": [_rounded(x) for x in (edges[:-1] + edges[1:]) / 2],
        }
    return found


def _activations(data: FeatureData, feature_id: int) -> Iterator[dict[str, Any]]:
    """The strongest examples, and random ones of each interval of the values."""
    largest = abs(float(data.maxima[feature_id]))
    for example in data.examples(feature_id, N_TOP, "top", BEFORE, AFTER):
        yield _activation(example, OF_TOP, largest, OF_TOP)
    if largest == 0:
        return
    for found in data.intervals(feature_id, N_INTERVALS, N_OF_EACH, BEFORE, AFTER):
        for example in found.examples:
            yield _activation(example, found.low, found.high, found.share)


def _activation(example: Example, low: float, high: float, share: float) -> dict[str, Any]:
    values = [_rounded(x) for x in example.values]
    best = max(range(len(values)), key=values.__getitem__)
    return {
        "tokens": list(example.tokens),
        "values": values,
        "maxValue": values[best],
        "maxValueTokenIndex": best,
        "minValue": min(values),
        "qualifyingTokenIndex": example.peak,
        "binMin": _rounded(low),
        "binMax": _rounded(high),
        "binContains": _rounded(share),
        "dfaValues": [],
        "lossValues": [],
    }


def _explanation(label: Any, listing: Listing) -> dict[str, Any]:
    return {
        "description": label.text,
        "typeName": listing.explanation_type,
        "explanationModelName": listing.explanation_model,
        "notes": f"by {label.source}",
    }


def _about(data: FeatureData, listing: Listing, source: str) -> dict[str, dict[str, Any]]:
    """The files of one line: of the model, the release, the set of coders and this coder."""
    now = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")
    creator = {"creatorId": listing.creator_id, "createdAt": now}
    urls = [listing.url] if listing.url else []
    return {
        "model": creator | {
            "id": listing.model, "instruct": listing.model.endswith("-it"),
            "displayNameShort": listing.model, "displayName": listing.model,
            "visibility": "PUBLIC", "layers": 0, "neuronsPerLayer": 0, "owner": "",
            "updatedAt": now,
        },
        "release": creator | {
            "name": listing.release, "description": listing.title or listing.release,
            "descriptionShort": listing.title or listing.release, "urls": urls,
            "creatorName": listing.creator, "creatorNameShort": listing.creator,
            "visibility": "PUBLIC",
        },
        "sourceset": creator | {
            "modelId": listing.model, "name": listing.source_set, "hasDashboards": True,
            "visibility": "PUBLIC", "description": listing.description, "type": "",
            "creatorName": listing.creator, "urls": urls, "releaseName": listing.release,
        },
        "source": creator | {
            "id": source, "modelId": listing.model, "setName": listing.source_set,
            "hasDashboards": True, "inferenceEnabled": False, "visibility": "PUBLIC",
            "num_prompts": data.n_contexts, "num_tokens_in_prompt": data.corpus.context,
            "dataset": listing.dataset, "hfRepoId": listing.hf_repo,
            "hfFolderId": listing.hf_folder,
        },
    }  # fmt: skip


def _id(own: Mapping[str, str], feature_id: int, which: Any) -> str:
    """An id that is the same whenever the same is written: importing twice adds nothing."""
    text = f"{own['modelId']}/{own['layer']}/{feature_id}/{which}"
    return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")
