"""The library's functions on a coder, as methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast, overload

import mlx.core as mx
import numpy as np

from mlxterp.sae.bound import BoundCoder
from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.features import analysis, connections, interpretation, peaks, view
from mlxterp.sae.features import logit_effects as logits
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.search import Examples, FoundFeature, find_feature_by_examples
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sae.similarity import clusters as families
from mlxterp.sae.similarity import map as feature_maps
from mlxterp.sae.similarity import matching, nearest
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.steering import edits as steering
from mlxterp.sae.steering.report import Comparison, SteeringReport, compare
from mlxterp.sae.steering.sweep import strength_sweep

if TYPE_CHECKING:
    from mlxterp.sae.dashboard.dashboard import Dashboard


class CoderMethods(BoundCoder):
    """The library's functions on a coder, as methods that know its model and its data."""

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
        labels = self.labels.texts if labels is None else labels
        return interpretation.interpret_features(self, source, features, top_k, labels)

    @overload
    def analyze_text(self, text: str, **options: Any) -> analysis.TextAnalysis: ...
    @overload
    def analyze_text(self, text: Sequence[str], **options: Any) -> analysis.TextAnalyses: ...
    def analyze_text(
        self, text: str | Sequence[str], *, model: ActivationSource | None = None, **options: Any
    ) -> analysis.TextAnalysis | analysis.TextAnalyses:
        """Which features are active on which token; see `analysis.analyze_text`."""
        options = {"labels": self.labels.texts, **options}
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
        label = self.labels.texts.get(feature_id)
        return view.view_feature(self, self.known_model(model), data, feature_id, top_k, label)

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
        from mlxterp.sae.labels import labeling

        return labeling.auto_label_features(
            self, data, labeler, labels=self.labels, verbose=verbose, **options
        )

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
        options = {"maxima": self._known_maxima(), **options}
        return steering.steering_edit(self, features, strength, **options)

    def _known_maxima(self) -> Callable[[], np.ndarray] | None:
        """The way to the largest values, so that nothing is collected where none is needed."""
        data = self._training_data
        if self.features is None and (data is None or None in (data.corpus, data.source)):
            return None
        return lambda: self._collected(None).maxima

    def splice(
        self,
        *,
        features: Mapping[int, steering.Change] | None = None,
        keep_error: bool = False,
    ) -> dict[str, steering.Edit]:
        """Edits that put the coder in the place of what it describes; see `steering.splice`."""
        return steering.splice(self, features=features, keep_error=keep_error)

    def spliced(
        self,
        model: ActivationSource | None = None,
        *,
        features: Mapping[int, steering.Change] | None = None,
        keep_error: bool = False,
    ) -> AbstractContextManager[None]:
        """`with sae.spliced(): ...` puts the coder in the place of what it describes in every use
        of the model, see `splice` and `model.editing`."""
        edits = self.splice(features=features, keep_error=keep_error)
        return self.known_model(model).editing(edits)

    def compare_generations(
        self,
        features: steering.Features | Mapping[str, Mapping[str, steering.Edit]],
        prompts: str | Sequence[str],
        strengths: Sequence[float] = (0.5, 1.0, 2.0),
        *,
        model: ActivationSource | None = None,
        **options: Any,
    ) -> Comparison:
        """What the model writes plain and steered, side by side; see `report.compare`."""
        options = {"maxima": self._known_maxima(), **options}
        return compare(self, self.known_model(model), features, prompts, strengths, **options)

    def strength_sweep(
        self,
        features: steering.Features,
        texts: Sequence[Any],
        strengths: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0),
        *,
        model: ActivationSource | None = None,
        **options: Any,
    ) -> SteeringReport:
        """What steering does to the predictions on texts at several strengths, beside directions
        that mean nothing; see `sweep.strength_sweep`."""
        options = {"maxima": self._known_maxima(), **options}
        return strength_sweep(self, self.known_model(model), features, texts, strengths, **options)

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

    def dashboard(
        self,
        *,
        model: ActivationSource | None = None,
        validation_dataset: Iterable[str] | ActivationDataset | None = None,
        port: int | None = 8080,
        **options: Any,
    ) -> Dashboard:
        """All features in a browser, at a local address until `stop()`, and `save("page.html")`
        for one offline file; see `dashboard.make_dashboard`.

        Examples are from the `validation_dataset`, up to 200,000 tokens of it, and the coder is
        measured on it; else from what `collect` found or, in its session, the training data.
        """
        from mlxterp.sae.dashboard.dashboard import make_dashboard

        given = validation_dataset
        dataset = None if given is None else self._as_dataset(model, given, None)
        data = self._collected(model, dataset)
        data = replace(data, source=self.known_model(model))
        held = self._held_out if dataset is None else dataset
        return make_dashboard(data, self.labels, self.statistics, held, port=port, **options)

    def _other(
        self, other: SparseCoder | ActivationSource | None
    ) -> SparseCoder | ActivationSource:
        return self.known_model(None) if other is None else other
