"""What a user holds: a coder that knows its origin, with the library's functions as methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast, overload

import mlx.core as mx

from mlxterp.sae import evals
from mlxterp.sae.coder import MARKER, Columns, SparseCoder, check_feature
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.features import analysis, collection, connections, interpretation, peaks, view
from mlxterp.sae.features import data as feature_data
from mlxterp.sae.features import logit_effects as logits
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.search import Examples, FoundFeature, find_feature_by_examples
from mlxterp.sae.files import write_directory
from mlxterp.sae.labels import labeling
from mlxterp.sae.labels.labels import LABELS_FILE, FeatureLabels
from mlxterp.sae.metadata import Compatibility, Metadata, Statistics, compatibility
from mlxterp.sae.similarity import clusters as families
from mlxterp.sae.similarity import map as feature_maps
from mlxterp.sae.similarity import matching, nearest
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.steering import edits as steering

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
FEATURES = "features"
TOKENS_AT_A_GLANCE = 200_000


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
        self._features: FeatureData | None = None
        self._labels: FeatureLabels | None = None
        self.path: Path | None = None

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
        if self._features is not None:
            self._features = replace(self._features, source=model)

    def known_model(self, model: ActivationSource | None = None) -> ActivationSource:
        """The model given, or the one that the coder knows; `ValueError` where it knows none."""
        source = self._source if model is None else model
        if source is None:
            raise ValueError(
                "This coder does not know its language model: pass model=..., call "
                "sae.bind(model), or load the coder with model.load_sae(path)."
            )
        return source

    def encode_text(
        self,
        model: ActivationSource | str | Sequence[str] | None = None,
        text: str | Sequence[str] | None = None,
    ) -> Any:
        """The codes `[n_tokens, n_features]` of a text, or of each of several: `encode_text(model,
        text)`, or `encode_text(text)` of a coder that knows its model; see `analysis.encode_text`.
        """
        if text is None:
            model, text = None, cast("str | Sequence[str]", model)
        source = self.known_model(cast("ActivationSource | None", model))
        return analysis.encode_text(self, source, text)

    def interpret_features(
        self,
        features: mx.array | Sequence[mx.array],
        top_k: int = 5,
        *,
        model: ActivationSource | None = None,
        labels: Mapping[int, str] | None = None,
    ) -> interpretation.Interpretation:
        """The strongest features of a code, or of a sum of codes, with what they promote; see
        `interpretation.interpret_features`."""
        source = self._source if model is None else model
        return interpretation.interpret_features(self, source, features, top_k, labels)

    @overload
    def analyze_text(self, text: str, **options: Any) -> analysis.TextAnalysis: ...
    @overload
    def analyze_text(self, text: Sequence[str], **options: Any) -> analysis.TextAnalyses: ...
    def analyze_text(
        self, text: str | Sequence[str], *, model: ActivationSource | None = None, **options: Any
    ) -> analysis.TextAnalysis | analysis.TextAnalyses:
        """Which features are active on which token; see `analysis.analyze_text`."""
        return analysis.analyze_text(self, self.known_model(model), text, **options)

    def find_top_features(
        self, text: str | Sequence[str], **options: Any
    ) -> list[peaks.FeatureActivation]:
        """The features with the largest values anywhere in a text, or in several, largest first."""
        return list(self.analyze_text(text, **options).top)

    def find_feature_by_examples(
        self, examples: Examples, counter_examples: Examples = (), model: Any = None, **options: Any
    ) -> FoundFeature:
        """The feature that examples of a property share; see `search.find_feature_by_examples`."""
        if "data" not in options:
            options["data"] = self.features if counter_examples else self._collected(model)
        source = self.known_model(model)
        return find_feature_by_examples(self, source, examples, counter_examples, **options)

    @overload
    def logit_effects(self, feature_id: int, **options: Any) -> logits.LogitEffects: ...
    @overload
    def logit_effects(
        self, feature_id: Iterable[int], **options: Any
    ) -> dict[int, logits.LogitEffects]: ...
    def logit_effects(
        self,
        feature_id: int | Iterable[int],
        *,
        model: ActivationSource | None = None,
        **options: Any,
    ) -> logits.LogitEffects | dict[int, logits.LogitEffects]:
        """The tokens that features make more and less likely; see `logit_effects.logit_effects`."""
        return logits.logit_effects(self, self.known_model(model), feature_id, **options)

    @property
    def features(self) -> FeatureData | None:
        """What `collect` found out, in this session or before the coder was saved."""
        if self._features is None and self.path is not None:
            place = self.path / FEATURES
            if (place / feature_data.MARKER).is_file():
                self._features = FeatureData.load(place, self, self._source)
        return self._features

    def collect(
        self,
        dataset: Iterable[str] | ActivationDataset | None = None,
        *,
        model: ActivationSource | None = None,
        path: str | Path | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> FeatureData:
        """Statistics, examples and co-activations of all features, from one pass over a dataset.

        The result is remembered, as `features`, and used by everything that needs examples. It is
        saved beside a coder that has been saved, or at `path`; there an interrupted pass goes on
        where it was. Without a `dataset` the training data serves, in the session of the training.
        `options` are those of `collection.collect`.
        """
        data = self._as_dataset(model, dataset, self._training_data, verbose)
        place = path if path is not None or self.path is None else self.path / FEATURES
        self._features = collection.collect(
            self, data, path=place, known=self._features, verbose=verbose, **options
        )
        return self._features

    def _collected(
        self,
        model: ActivationSource | None,
        dataset: Iterable[str] | ActivationDataset | None = None,
    ) -> FeatureData:
        """What is collected already or, for a dataset or the training data, is now."""
        if dataset is None and self.features is not None:
            return self.features if model is None else replace(self.features, source=model)
        return self.collect(dataset, model=model, max_tokens=TOKENS_AT_A_GLANCE)

    def visualize_feature(
        self,
        feature_id: int,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
        top_k: int = 10,
    ) -> Any:
        """Everything about one feature: examples, statistics, the tokens that it promotes, and its
        neighbours; see `FeatureView`.

        Examples are from what `collect` found. Before that a pass over up to 200,000 tokens of the
        `dataset`, or of the training data in its session, is made now.
        """
        feature_id = check_feature(self, feature_id)
        data = self._collected(model, dataset)
        label = self.labels[feature_id].text if feature_id in self.labels else None
        return view.view_feature(self, self.known_model(model), data, feature_id, top_k, label)

    @property
    def labels(self) -> FeatureLabels:
        """What features are said to respond to: one's own labels, `sae.labels.set(42, "...")`, and
        those that `auto_label_features` made. A saved coder has them in its `labels.json`."""
        if self._labels is None:
            self._labels = FeatureLabels.of_coder(self.path, self.n_features)
        return self._labels

    def auto_label_features(
        self,
        labeler_model: Any = None,
        *,
        labeler: Any = None,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> FeatureLabels:
        """Labels of features with their scores, from a language model (`labeler_model`, or anything
        else that answers prompts as `labeler`) or, without one, from the tokens on which they fire.
        They are added to `labels`; see `labeling.auto_label_features`.
        """
        if None not in (labeler_model, labeler):
            raise ValueError("Pass labeler_model or labeler, not both.")
        labeler = labeler_model if labeler is None else labeler
        data = self._collected(model, dataset)
        return labeling.auto_label_features(
            self, data, labeler, labels=self.labels, verbose=verbose, **options
        )

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
        verbose: bool = False,
    ) -> ActivationDataset:
        if isinstance(dataset, ActivationDataset):
            return dataset
        if dataset is not None:
            return ActivationDataset.from_texts(
                self.known_model(model),
                dataset,
                list(self.reads.union(self.writes).names),
                context_length=self.metadata.data.get("context_length"),
                verbose=verbose,
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
        self, features: steering.Features, strength: float = 1.0, **options: Any
    ) -> dict[str, steering.Edit]:
        """Edits that add, clamp, scale or ablate features, in units of the largest values that
        `collect` found: `model.generate(..., edit=...)`; see `steering.steering_edit`."""
        maxima = None if self.features is None else self.features.maxima
        return steering.steering_edit(self, features, strength, **{"maxima": maxima, **options})

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

    def similar_features(
        self, feature_id: int, other: SparseCoder | None = None, top_k: int = 10, **options: Any
    ) -> nearest.Neighbours:
        """The nearest features, in the coder or in another one; see `nearest.nearest`."""
        return nearest.nearest(self, feature_id, other, top_k=top_k, **options)

    def match(self, other: SparseCoder, **options: Any) -> matching.Matching:
        """A partner in another coder for every feature, one to one; see `matching.match`."""
        return matching.match(self, other, **options)

    def clusters(self, data: FeatureData | None = None, **options: Any) -> families.Clusters:
        """Families of features that write alike; see `clusters.find_clusters`."""
        return families.find_clusters(self, data, **options)

    def feature_map(
        self, method: feature_maps.Method = "pca", **options: Any
    ) -> feature_maps.FeatureMap:
        """All features as points of a plane, to look at; see `map.feature_map`."""
        return feature_maps.feature_map(self, method, **options)

    def _other(
        self, other: SparseCoder | ActivationSource | None
    ) -> SparseCoder | ActivationSource:
        return self.known_model(None) if other is None else other

    def is_compatible(
        self, model: ActivationSource, layer: Any = None, component: str | None = None
    ) -> Compatibility:
        """Whether the coder fits the model, and the site if one is named; false says why."""
        return compatibility(self, self.metadata, model, layer, component)

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

    def save(self, path: str | Path) -> Path:
        """Write the coder as a directory (by custom named `*.mlx`) and return its path.

        An older coder there is replaced whole, labels included; raises `ValueError` where
        something else is there.
        """
        contents: dict[str, Any] = {
            CONFIG_FILE: self.to_config(),
            "statistics.json": self.statistics.to_dict(),
            "metadata.json": self.metadata.to_dict(),
        }
        contents |= self.array_files()
        if self.features is not None:
            contents |= {f"{FEATURES}/{name}": part for name, part in self.features.files.items()}
        if self.labels:
            contents[LABELS_FILE] = self.labels.to_dict()
        self.path = write_directory(path, contents, marker=MARKER)
        self.labels.path = self.path / LABELS_FILE
        return self.path
