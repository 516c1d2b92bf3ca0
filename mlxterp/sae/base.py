"""What a user holds: a coder that knows its origin, with the library's functions as methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import mlx.core as mx
import numpy as np

from mlxterp.sae import analysis, connections, evals, steering, visualization
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.files import write_directory
from mlxterp.sae.source import ActivationSource, find_site

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
# By this file a saved coder is known; a `config.json` is in many directories, such as a model's.
MARKER = "encoder_bias.safetensors"


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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Statistics:
        """The inverse of `to_dict`."""
        rates = np.array(values.get("firing_rates", []), dtype=np.float64)
        return cls(tuple(values.get("training", ())), tuple(values.get("validation", ())), rates)


@dataclass(frozen=True)
class Compatibility:
    """Whether a coder fits a model and a site: true or false, and why not."""

    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons

    def __repr__(self) -> str:
        return "compatible" if self else "not compatible: " + "; ".join(self.reasons)


class BaseSAE(SparseCoder):
    """A trained coder with its origin, and the library's functions on it as methods."""

    kind: ClassVar[str]
    may_skip: ClassVar[bool] = False

    def __init__(
        self, reads: Columns, writes: Columns, n_features: int, *args: Any, **options: Any
    ):
        super().__init__(reads, writes, n_features, *args, **options)
        if self.has_skip and not self.may_skip:
            raise ValueError(f"skip is for transcoders only, got skip=True for {self.kind!r}.")
        self.metadata = Metadata()
        self.statistics = Statistics()
        self._source: ActivationSource | None = None
        self._training_data: ActivationDataset | None = None
        self._held_out: ActivationDataset | None = None
        self._examples: analysis.FeatureExamples | None = None

    @classmethod
    def untrained(cls, reads: Columns, writes: Columns, config: SAEConfig) -> Self:
        """A coder of the config's size, counted from the mean width of the sites that it reads."""
        n_features = config.n_features(round(reads.width / max(1, len(reads.names))))
        name = config.activation_function
        return cls(reads, writes, n_features, name, config.k, skip=config.skip)

    def bind(
        self,
        model: ActivationSource | None,
        training: ActivationDataset | None = None,
        held_out: ActivationDataset | None = None,
    ) -> None:
        """Remember a model, and the data of this session, for calls that name none."""
        self._source, self._training_data, self._held_out = model, training, held_out
        self._examples = None

    def _model(self, model: ActivationSource | None) -> ActivationSource:
        source = self._source if model is None else model
        if source is None:
            raise ValueError(
                "This coder does not know its language model: pass model=..., call "
                "sae.bind(model), or load the coder with model.load_sae(path)."
            )
        return source

    def analyze_text(
        self, text: str, *, model: ActivationSource | None = None, top_k: int = 10
    ) -> analysis.TextAnalysis:
        """Which features are active on which token; see `analysis.analyze_text`."""
        return analysis.analyze_text(self, self._model(model), text, top_k)

    def find_top_features(
        self, text: str, *, model: ActivationSource | None = None, top_k: int = 10
    ) -> list[analysis.FeatureActivation]:
        """The features with the largest values anywhere in a text, largest first."""
        return list(self.analyze_text(text, model=model, top_k=top_k).top)

    def visualize_feature(
        self,
        feature_id: int,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
        top_k: int = 10,
    ) -> visualization.FeatureView:
        """The feature's strongest examples in a dataset and the tokens that it promotes.

        Without a `dataset` the training data serves, where the coder was trained in this session;
        otherwise a `ValueError` asks for one.
        """
        source = self._model(model)
        feature_id = analysis.check_feature(self, feature_id)
        examples = self.top_examples(model=source, dataset=dataset, n=top_k)
        rates = self.statistics.firing_rates
        rate = float(rates[feature_id]) if len(rates) else None
        return visualization.view_feature(self, source, examples, feature_id, rate)

    def top_examples(
        self,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
        n: int = 10,
    ) -> analysis.FeatureExamples:
        """The `n` strongest examples of every feature; see `analysis.collect_examples`."""
        remembered = self._examples
        if dataset is None and remembered is not None and remembered.values.shape[1] >= n:
            return remembered.strongest(n)
        data = self._as_dataset(model, dataset, self._training_data)
        examples = analysis.collect_examples(self, data, n)
        if dataset is None:
            self._examples = examples
        return examples

    def evaluate(
        self,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
    ) -> tuple[evals.Fidelity, evals.LossRecovered | None]:
        """FVU, L0 and firing rates, and the language model's loss with the coder spliced in.

        Without a `dataset` the data held out in training serve, in the session of the training.
        For data that are arrays and not texts the second result is `None`.
        """
        data = self._as_dataset(model, dataset, self._held_out)
        if data.corpus is None or data.source is None:
            return evals.fidelity(self, data), None
        return evals.fidelity(self, data), evals.loss_recovered(self, data)

    def _as_dataset(
        self,
        model: ActivationSource | None,
        dataset: Iterable[str] | ActivationDataset | None,
        remembered: ActivationDataset | None,
    ) -> ActivationDataset:
        if isinstance(dataset, ActivationDataset):
            return dataset
        if dataset is not None:
            return ActivationDataset.from_texts(
                self._model(model),
                dataset,
                list(self.reads.union(self.writes).names),
                context_length=self.metadata.data.get("context_length"),
            )
        if remembered is None:
            raise ValueError("This coder remembers no data: pass dataset=, a list of texts.")
        return remembered

    def steer(
        self,
        activation: mx.array,
        feature_id: int,
        strength: float = 1.0,
        site: str | None = None,
    ) -> mx.array:
        """The activation with a feature added; see `steering.steer`."""
        return steering.steer(self, activation, feature_id, strength, site)

    def steering_edit(
        self, feature_id: int, strength: float = 1.0, site: str | None = None
    ) -> dict[str, steering.Edit]:
        """Edits that add a feature at every token: `model.generate(..., edit=...)`."""
        return steering.steering_edit(self, feature_id, strength, site)

    def splice(
        self,
        *,
        features: Mapping[int, steering.Change] | None = None,
        keep_error: bool = False,
    ) -> dict[str, steering.Edit]:
        """Edits that put the coder in the place of what it describes; see `steering.splice`."""
        return steering.splice(self, features=features, keep_error=keep_error)

    def input_side(
        self,
        feature_id: int,
        other: SparseCoder | ActivationSource | None = None,
        **options: Any,
    ) -> connections.Connected:
        """The tokens of the model, or the features of an earlier coder, that drive a feature by
        weights alone; see `connections.reads`."""
        return connections.reads(self, feature_id, self._other(other), **options)

    def output_side(
        self,
        feature_id: int,
        other: SparseCoder | ActivationSource | None = None,
        **options: Any,
    ) -> connections.Connected:
        """The tokens of the model, or the features of a later coder, that a feature drives; see
        `connections.writes`."""
        return connections.writes(self, feature_id, self._other(other), **options)

    def weights_to(self, later: SparseCoder, **options: Any) -> connections.InputInvariantWeights:
        """The weights between all features and those of a later coder; see
        `connections.input_invariant_weights`."""
        return connections.input_invariant_weights(self, later, **options)

    def _other(
        self, other: SparseCoder | ActivationSource | None
    ) -> SparseCoder | ActivationSource:
        return self._model(None) if other is None else other

    def is_compatible(
        self, model: ActivationSource, layer: Any = None, component: str | None = None
    ) -> Compatibility:
        """Whether the coder fits the model, and the site if one is named; false says why."""
        if layer is None and component is not None:
            raise ValueError(f"component={component!r} says nothing without layer=...")
        reasons = []
        columns = self.reads.union(self.writes)
        for name, width in zip(columns.names, columns.widths, strict=True):
            try:
                found = model.width(name)
            except ValueError as error:
                reasons.append(str(error))
            else:
                if found != width:
                    reasons.append(f"{name} has width {found} in the model, {width} in the coder")
        trained_on = self.metadata.model.get("fingerprint")
        if trained_on is not None and trained_on != model.fingerprint:
            reasons.append(f"it was trained on other weights ({self.metadata.model.get('name')})")
        if layer is not None:
            try:
                site = str(find_site(model, layer, component))
            except ValueError as error:
                reasons.append(str(error))
            else:
                if site not in columns.names:
                    reasons.append(f"it is of {', '.join(columns.names)}, not of {site}")
        return Compatibility(tuple(reasons))

    def to_config(self) -> dict[str, Any]:
        """Everything that rebuilds the coder but its arrays, as saved in `config.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "reads": self.reads.to_list(),
            "writes": self.writes.to_list(),
            "n_features": self.n_features,
            "skip": self.has_skip,
            "activation_function": {
                "activation_function": self.activation_name,
                **self.activation_function.options,
            },
        }

    def array_files(self) -> dict[str, dict[str, mx.array]]:
        """The arrays of the coder and of its activation function by the file that holds them."""
        written = ("W_dec", "b_dec", "W_skip", "site_scale")
        return {
            "encoder.safetensors": {"W_enc": self.W_enc, **self.activation_function.arrays},
            "decoder.safetensors": {name: self[name] for name in written if name in self},
            MARKER: {"b_enc": self.b_enc},
        }

    def set_array(self, name: str, array: mx.array) -> None:
        """Replace one of the arrays of `array_files`."""
        owner = self.activation_function if name in self.activation_function.arrays else self
        owner[name] = array

    def save(self, path: str | Path) -> Path:
        """Write the coder as a directory (by custom named `*.mlx`) and return its path.

        An older coder there is replaced whole; raises `ValueError` where something else is there.
        """
        contents: dict[str, Any] = {
            CONFIG_FILE: self.to_config(),
            "statistics.json": self.statistics.to_dict(),
            "metadata.json": self.metadata.to_dict(),
        }
        contents |= self.array_files()
        return write_directory(path, contents, marker=MARKER)

    def __repr__(self) -> str:
        sites = _listed(self.reads.names)
        if self.writes != self.reads:
            sites += f" -> {_listed(self.writes.names)}"
        width = f"d_in={self.d_in}" + (f", d_out={self.d_out}" if self.d_out != self.d_in else "")
        k = "" if self.k is None else f", k={self.k}"
        return (
            f"{type(self).__name__}({sites}, {width}, n_features={self.n_features}, "
            f"{self.activation_name}{k}{', skip' if self.has_skip else ''})"
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, ..., {names[-1]}"
