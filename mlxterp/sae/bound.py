"""A coder that remembers its language model, its data, and what is known of its features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.features import collection
from mlxterp.sae.features.data import MARKER as COLLECTED
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sae.metadata import Metadata, Statistics
from mlxterp.sae.source import ActivationSource

FEATURES = "features"  # the directory of what was collected
TOKENS_AT_A_GLANCE = 200_000


class BoundCoder(SparseCoder):
    """A coder with its origin: how and on what it was trained, and what was found out since."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.metadata = Metadata()
        self.statistics = Statistics()
        self._source: ActivationSource | None = None
        self._training_data: ActivationDataset | None = None
        self._held_out: ActivationDataset | None = None
        self._features: FeatureData | None = None
        self._labels: FeatureLabels | None = None
        self.path: Path | None = None

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

    @property
    def features(self) -> FeatureData | None:
        """What `collect` found out, in this session or before the coder was saved."""
        if self._features is None and self.path is not None:
            place = self.path / FEATURES
            if (place / COLLECTED).is_file():
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

    @property
    def labels(self) -> FeatureLabels:
        """What features are said to respond to: one's own labels, `sae.labels.set(42, "...")`, and
        those that `auto_label_features` made. A saved coder has them in its `labels.json`."""
        if self._labels is None:
            self._labels = FeatureLabels.of_coder(self.path, self.n_features)
        return self._labels

    def detach(self) -> None:
        """Forget where the coder is saved: labels and what is collected stay with it from now on,
        and go to a disk with the next `save`."""
        known = self.features, self.labels
        self.path, (self._features, self._labels) = None, known
        self.labels.path = None

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
