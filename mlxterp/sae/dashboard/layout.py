"""The files of a bundle: which arrays they hold, of which shape, and what these may contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.sae.features.data import N_BINS
from mlxterp.sae.files import read_json

FORMAT_VERSION = 1
MARKER = "dashboard.json"
STRINGS_FILE = "strings.json"
TABLE = "table.safetensors"
SIZES = (
    "n_examples", "n_values", "n_tokens", "n_intervals", "n_similar", "n_together", "n_logits",
    "n_peaks",
)  # fmt: skip
REQUIRED = (
    "format_version", "title", "coder", "data", "sides", "scale", "sizes", "norm_sites", "map",
    "n_circuits", "n_comparisons",
)  # fmt: skip
MOST = 1 << 33  # of any one size: what is larger is damage
Shapes = dict[str, dict[str, tuple[int, ...]]]


def shapes(facts: Mapping[str, Any]) -> Shapes:
    """The shapes of all arrays, by file."""
    n, size = facts["coder"]["n_features"], facts["sizes"]
    columns = (
        "firing_rates", "firing_counts", "kept_counts", "means", "maxima", "nearest", "nearest_ids",
    )  # fmt: skip
    table: dict[str, tuple[int, ...]] = dict.fromkeys(columns, (n,))
    table |= {"peaks": (n, size["n_peaks"]), "promotes": (n, size["n_peaks"])}
    if facts["map"] is not None:
        table["map"] = (n, 2)
    if facts["norm_sites"] is not None:
        table["norms"] = (n, len(facts["norm_sites"]))
    similar, together = (n, size["n_similar"]), (n, size["n_together"])
    of_examples = ("kinds", "firsts", "lengths", "peaks", "documents", "n_values")
    ends = ("top", "top_values", "bottom", "bottom_values")
    of_side: dict[str, tuple[int, ...]] = dict.fromkeys(ends, (n, size["n_logits"]))
    sides = {f"side_{i}.safetensors": of_side for i in range(len(facts["sides"]))}
    return {
        TABLE: table,
        "features.safetensors": {
            "histogram": (n, N_BINS), "similar": similar, "cosines": similar,
            "together": together, "together_counts": together,
        },
        "examples.safetensors": {
            "starts": (n + 1,), **dict.fromkeys(of_examples, (size["n_examples"],)),
            "value_tokens": (size["n_values"],), "values": (size["n_values"],),
            "tokens": (size["n_tokens"],), "shares": (n, size["n_intervals"]),
        },
        **sides,
    }  # fmt: skip


def check_meta(path: Path) -> dict[str, Any]:
    """The facts of a bundle; raises `ValueError`, naming the file, where they are none."""
    facts = read_json(path, REQUIRED)
    if facts["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {facts['format_version']!r}; this release of mlxterp "
            f"reads {FORMAT_VERSION}."
        )
    try:
        sizes = {name: facts["sizes"][name] for name in SIZES}
        sizes["n_features"] = facts["coder"]["n_features"]
        sizes |= {name: facts[name] for name in ("n_circuits", "n_comparisons")}
        scale, lists = float(facts["scale"]), (facts["sides"], facts["norm_sites"] or [])
        n_tokens = int(facts["data"]["n_kept_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a bundle: {error!r}") from None
    whole = all(type(value) is int and 0 <= value < MOST for value in sizes.values())
    if not whole or not all(isinstance(held, list) for held in lists) or n_tokens < 0:
        raise ValueError(f"{path} does not describe a bundle: its sizes are {sizes}.")
    if not np.isfinite(scale) or sizes["n_features"] < 1:
        raise ValueError(f"{path} does not describe a bundle: its scale is {scale}.")
    return facts


def check_arrays(
    path: Path, facts: Mapping[str, Any], arrays: Mapping[str, Mapping[str, np.ndarray]], n: int
) -> None:
    """Raises `ValueError` where arrays point beyond each other or the `n` strings."""
    n_features, examples = facts["coder"]["n_features"], arrays["examples.safetensors"]
    details, table = arrays["features.safetensors"], arrays[TABLE]
    limits = [(details["similar"], n_features), (details["together"], n_features)]
    limits += [(table[name], n) for name in ("peaks", "promotes")]
    limits += [(table["nearest_ids"], n_features), (examples["tokens"], n)]
    for i in range(len(facts["sides"])):
        limits += [(arrays[f"side_{i}.safetensors"][end], n) for end in ("top", "bottom")]
    ends = examples["firsts"].astype(np.int64) + examples["lengths"]
    limits += [(ends, len(examples["tokens"]) + 1)]
    lengths = np.repeat(examples["lengths"], examples["n_values"])
    starts = examples["starts"].astype(np.int64)
    sound = (
        all(not array.size or int(array.max()) < limit for array, limit in limits)
        and len(lengths) == len(examples["values"])
        and bool((examples["value_tokens"] < lengths).all())
        and bool((examples["peaks"] < examples["lengths"]).all())
        and bool((np.diff(starts) >= 0).all())
        and int(starts[-1]) == len(examples["kinds"])
    )
    if not sound:
        raise ValueError(f"{path} is damaged: its arrays point beyond what there is.")
