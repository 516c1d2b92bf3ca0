"""Where a coder comes from, what training measured, and whether it fits a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from mlxterp.sae import visualization
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.source import ActivationSource, find_site


@dataclass(frozen=True)
class Metadata:
    """Where a coder comes from: plain values, saved with it as `metadata.json`."""

    model: dict[str, Any] = field(default_factory=dict)
    """`name`, `fingerprint`, `n_layers` and `d_model` of the language model."""
    data: dict[str, Any] = field(default_factory=dict)
    """Number of tokens and documents, and the context length, of training and validation."""
    config: dict[str, Any] = field(default_factory=dict)
    """The training configuration."""
    library_version: str = ""

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


@dataclass(frozen=True)
class Compatibility:
    """Whether a coder fits a model and a site: true or false, and why not."""

    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons

    def __repr__(self) -> str:
        return "compatible" if self else "not compatible: " + "; ".join(self.reasons)


def compatibility(
    coder: SparseCoder,
    metadata: Metadata,
    model: ActivationSource,
    layer: Any = None,
    component: str | None = None,
) -> Compatibility:
    """Whether a coder fits a model, and the site if one is named."""
    if layer is None and component is not None:
        raise ValueError(f"component={component!r} says nothing without layer=...")
    reasons = []
    columns = coder.reads.union(coder.writes)
    for name, width in zip(columns.names, columns.widths, strict=True):
        try:
            found = model.width(name)
        except ValueError as error:
            reasons.append(str(error))
        else:
            if found != width:
                reasons.append(f"{name} has width {found} in the model, {width} in the coder")
    trained_on = metadata.model.get("fingerprint")
    if trained_on is not None and trained_on != model.fingerprint:
        reasons.append(f"it was trained on other weights ({metadata.model.get('name')})")
    if layer is not None:
        try:
            site = str(find_site(model, layer, component))
        except ValueError as error:
            reasons.append(str(error))
        else:
            if site not in columns.names:
                reasons.append(f"it is of {', '.join(columns.names)}, not of {site}")
    return Compatibility(tuple(reasons))
