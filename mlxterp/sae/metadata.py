"""Where a coder comes from, and what training measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from mlxterp.sae import visualization


@dataclass(frozen=True)
class Metadata:
    """Where a coder comes from: plain values, saved with it as `metadata.json`."""

    model: dict[str, Any] = field(default_factory=dict)
    """`name`, `fingerprint`, `n_layers` and `d_model` of the language model, the type of its
    weights, `dtype`, and how they are quantised, `quantization`."""
    data: dict[str, Any] = field(default_factory=dict)
    """Number of tokens and documents, and the context length, of training and validation."""
    config: dict[str, Any] = field(default_factory=dict)
    """The training configuration."""
    library_version: str = ""
    source: dict[str, Any] = field(default_factory=dict)
    """`format`, and what a file of another library says beside; empty for a coder of ours."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Metadata:
        """The inverse of `to_dict`; names that are not fields are left out."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(frozen=True)
class Statistics:
    """What training measured, saved as `statistics.json`.

    `training` and `validation` are the reports in order; `firing_rates` `[n_features]` is the share
    of tokens on which each feature fired at the end of training, empty where it is not known.
    """

    training: tuple[dict[str, Any], ...] = ()
    validation: tuple[dict[str, Any], ...] = ()
    firing_rates: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def to_dict(self) -> dict[str, Any]:
        """Reports, rates to six digits, and the ids of the features with rate zero."""
        return {
            "training": list(self.training),
            "validation": list(self.validation),
            "firing_rates": [float(f"{rate:.6g}") for rate in self.firing_rates],
            "dead_features": np.flatnonzero(self.firing_rates == 0).tolist(),
        }

    def plot(self, axes: Any = None) -> Any:
        """A matplotlib figure of loss, FVU, L0 and dead features; see
        `visualization.plot_training`."""
        return visualization.plot_training(self.training, self.validation, axes)

    def _repr_html_(self) -> str:
        facts = training_facts(self.training, self.validation)
        return visualization.fragment("facts.html", title="Training", facts=facts)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Statistics:
        """The inverse of `to_dict`."""
        rates = np.array(values.get("firing_rates", []), dtype=np.float64)
        return cls(tuple(values.get("training", ())), tuple(values.get("validation", ())), rates)


def training_facts(
    training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """What the last reports of a run say, in words; nothing where there is none."""
    if not training:
        return []
    last, held = training[-1], (validation or [{}])[-1]
    facts = [("trained on", f"{last['tokens']:,} tokens in {last['step']:,} steps")]
    for key, name, form in (("fvu", "FVU", ".4f"), ("l0", "L0", ".1f"), ("dead", "dead", ".1%")):
        shown = f"{last[key]:{form}}" if last.get(key) is not None else "unknown"
        own = held.get(key) if key != "dead" else None
        facts.append((name, shown if own is None else f"{shown}, held out {own:{form}}"))
    return facts
