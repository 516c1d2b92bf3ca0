"""What is known of features, as the JSON files that front-ends of attribution graphs read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.circuit import Circuit, Node
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.examples import Example
from mlxterp.sae.features.logit_effects import LogitEffects, logit_effects, writes_stream

N_TOP, N_INTERVALS, N_OF_EACH = 10, 5, 4
N_BINS = 50
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def feature_files(
    circuit: Circuit, coders: Iterable[BaseSAE]
) -> Iterator[tuple[Node, dict[str, Any]]]:
    """A node of each feature of a circuit whose coder has collected examples, and the content of
    the feature's file."""
    for coder in coders:
        own = {n.index: n for n in circuit.nodes if _is_of(coder, n) and n.kind == "feature"}
        data = coder.features
        if data is None or data.source is None or not own:
            continue
        ids = sorted(own)
        effects: dict[int, LogitEffects] = {}
        if writes_stream(coder, data.source):
            effects = logit_effects(coder, data.source, ids)
        for i in ids:
            yield own[i], feature_json(data, i, own[i].site, effects.get(i))


def feature_json(
    data: FeatureData, feature_id: int, name: str, effects: LogitEffects | None = None
) -> dict[str, Any]:
    """The content of the file of a feature: its strongest examples, random ones of evenly spaced
    intervals of its values, and how these are distributed where it fires."""
    largest = abs(float(data.maxima[feature_id]))
    # The values kept are rounded, and may be above the largest by that.
    values = np.clip(data.codes.of(feature_id)[1], -largest, largest)
    smallest = min(0.0, float(values.min(initial=0.0)))
    groups = [("Top activations", data.examples(feature_id, N_TOP))]
    if largest > 0:
        groups += [
            (f"Interval {found.low:.3g} to {found.high:.3g}", found.examples)
            for found in data.intervals(feature_id, N_INTERVALS, N_OF_EACH)
        ]
    return {
        "transcoder_id": name,
        "index": feature_id,
        "examples_quantiles": [
            {"quantile_name": title, "examples": _examples(examples)}
            for title, examples in groups
            if examples
        ],
        "top_logits": [token for token, _ in effects.top] if effects else [],
        "bottom_logits": [token for token, _ in effects.bottom] if effects else [],
        "act_min": smallest,
        "act_max": largest,
        "quantile_values": np.quantile(values, QUANTILES).tolist() if len(values) else [],
        "histogram": np.histogram(values, N_BINS, (smallest, largest or 1.0))[0].tolist(),
        "activation_frequency": float(data.firing_rates[feature_id]),
    }


def _examples(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {
            "tokens": list(example.tokens),
            "tokens_acts_list": list(example.values),
            "train_token_ind": example.peak,
            "is_repeated_datapoint": False,
        }
        for example in examples
    ]


def _is_of(coder: BaseSAE, node: Node) -> bool:
    return node.site in coder.writes.names or node.site == ", ".join(coder.writes.names)
