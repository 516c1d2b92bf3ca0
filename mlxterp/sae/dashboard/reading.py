"""Bundles as they are read from a disk, checked before they are believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.sae.dashboard.bundle import Bundle, Comparison
from mlxterp.sae.dashboard.layout import MARKER, STRINGS_FILE, check_arrays, check_meta, shapes
from mlxterp.sae.files import read_arrays, read_json
from mlxterp.sae.labels.labels import LABELS_FILE, FeatureLabels

TYPES = ("F32", "F16", "U32", "I32", "U8")


def open_bundle(path: str | Path) -> Bundle:
    """What `Bundle.save` wrote; raises `ValueError`, naming the file, where it is missing or
    damaged."""
    path = Path(path)
    bundle, facts = _opened(path)
    circuits = [
        read_json(path / f"circuit_{i}.json", ("name", "nodes", "edges"))
        for i in range(facts["n_circuits"])
    ]
    comparisons = [
        _comparison(path / f"other_{i}", bundle.n_features) for i in range(facts["n_comparisons"])
    ]
    return Bundle(
        bundle.facts, bundle.strings, bundle.arrays, bundle.labels, tuple(circuits),
        tuple(comparisons),
    )  # fmt: skip


def _opened(path: Path) -> tuple[Bundle, dict[str, Any]]:
    facts = check_meta(path / MARKER)
    strings = read_json(path / STRINGS_FILE, ("strings",))["strings"]
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"{path / STRINGS_FILE} must hold a list of texts.")
    arrays = {name: _arrays(path / name, held) for name, held in shapes(facts).items()}
    check_arrays(path, facts, arrays, len(strings))
    labels = FeatureLabels.load(path / LABELS_FILE, facts["coder"]["n_features"])
    of_whole = {k: v for k, v in facts.items() if k not in ("n_circuits", "n_comparisons")}
    return Bundle(of_whole, tuple(strings), arrays, labels), facts


def _comparison(path: Path, n_features: int) -> Comparison:
    facts = read_json(path / "matching.json", ("name", "scores", "chance"))
    names = ("partners", "cosines", "best", "shared")
    arrays = _arrays(path / "matching.safetensors", dict.fromkeys(names, (n_features,)))
    bundle = _opened(path)[0]
    if arrays["partners"].size and arrays["partners"].max() >= bundle.n_features:
        raise ValueError(f"{path / 'matching.safetensors'} names features that there are none of.")
    return Comparison(str(facts.pop("name")), bundle, facts, arrays)


def _arrays(path: Path, held: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {key: np.array(array) for key, array in read_arrays(path, held, TYPES).items()}
