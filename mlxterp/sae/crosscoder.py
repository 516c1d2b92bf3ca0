"""The crosscoder: one code for several sites, and the trainer that makes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.sae import diffing, interactions, sharing
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import CrosscoderConfig, SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.fitting import CoderTrainer, OnClassOrInstance, as_dataset, columns_of
from mlxterp.sae.model_pair import ModelPair
from mlxterp.sae.source import ActivationSource, find_site


class Crosscoder(BaseSAE):
    """One sparse code for the activations of several sites: components, layers, or two models.

    A feature has one value and a decoder row at every site; the norms of these rows say where it is
    at home. Features are selected, and penalised, by their value times the sum of these norms.

    Reference: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing";
    selection in a batch: Minder et al. 2025, arXiv 2504.02922.
    """

    kind = "crosscoder"

    def __init__(
        self, reads: Columns, writes: Columns, n_features: int, *args: Any, **options: Any
    ):
        if reads != writes or len(reads.names) < 2:
            raise ValueError(
                f"A crosscoder writes the several sites that it reads, got {reads} and {writes}."
            )
        super().__init__(reads, writes, n_features, *args, **options)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return self.reads.names

    def relative_norms(self) -> np.ndarray:
        """How much of each feature's decoder is at each site; see `sharing.relative_norms`."""
        return sharing.relative_norms(self)

    def decoder_cosines(self) -> np.ndarray:
        """The cosines between a feature's decoder rows; see `sharing.decoder_cosines`."""
        return sharing.decoder_cosines(self)

    def sharing(self, **options: Any) -> sharing.Sharing:
        """Which features are shared and which are of one site alone; see `sharing.sharing`."""
        return sharing.sharing(self, **options)

    def shared_features(
        self,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
        top: int = 20,
        **options: Any,
    ) -> interactions.SharedFeatures:
        """The features that explain most of every site; see `interactions.shared_features`.

        Without a `dataset` the data held out in training serve.
        """
        data = self._as_dataset(model, dataset, self._held_out)
        return interactions.shared_features(self, data, top, **options)

    def component_interactions(
        self,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
        **options: Any,
    ) -> interactions.ComponentInteractions:
        """How much the sites have in common; see `interactions.component_interactions`.

        Features count by their decoder norms or, with a `dataset`, by how often they fire too.
        """
        data = None if dataset is None else self._as_dataset(model, dataset, None)
        return interactions.component_interactions(self, data, **options)

    def diff(
        self,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[str] | ActivationDataset | None = None,
        **options: Any,
    ) -> diffing.ModelDiff:
        """What each feature says of two models, by norms and by data; see `diffing.diff`.

        Without a `dataset` the training data serve, in the session of the training.
        """
        return diffing.diff(self, self._as_dataset(model, dataset, self._training_data), **options)


class CrosscoderTrainer(CoderTrainer):
    """Trains crosscoders: `fit` on activations, `train` from models and texts.

    Its arguments are those of `SAETrainer`; `config=None` stands for the recommended recipe.
    """

    kind = Crosscoder
    config_type = CrosscoderConfig

    def fit(
        self,
        dataset: ActivationDataset | Any,
        resume: bool = False,
        *,
        model: ActivationSource | None = None,
    ) -> Crosscoder:
        """A crosscoder of all sites of a dataset, or of `{site: array [n_tokens, d]}`.

        A share `config.validation_split` is held out. Raises as `SAETrainer.fit` does.
        """
        dataset = as_dataset(dataset)
        return self.fit_between(dataset.columns, dataset.columns, dataset, resume, model)

    @OnClassOrInstance
    def train(
        self,
        model: ActivationSource | None = None,
        layer: Any = None,
        components: Sequence[str] = (),
        dataset: ActivationDataset | Iterable[str] = (),
        layers: Sequence[Any] = (),
        component: str | None = None,
        sites: Sequence[Any] = (),
        models: Sequence[ActivationSource] | Mapping[str, ActivationSource] | ModelPair = (),
        config: SAEConfig | None = None,
        validation_split: float | None = None,
        save_path: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> Crosscoder:
        """A crosscoder of several sites of a model, or of one site in several models.

        The sites are the `components` of a `layer`, one `component` (`mlp` where none is given)
        of several `layers`, or any list of `sites` by their whole names. `models` with one
        tokenizer, in a list or by name, take the place of `model` and are compared at the
        `component` of a `layer`, or at `sites` such as `base:layers.3.mlp`: model diffing. The
        result remembers models and data. Raises `ValueError` as `SAETrainer.train`
        does, and for fewer than two sites.
        """
        if models:
            source: Any = models if isinstance(models, ModelPair) else ModelPair(models)
            if layers or components:
                raise ValueError(
                    "models=... are compared at one component of one layer, or at sites=[...]; "
                    "layers and components are those of one model."
                )
            wanted = [source.site(s) for s in sites] or source.sites_of(layer, component)
        elif model is None:
            raise ValueError("train needs a model, or models=[base, tuned].")
        else:
            source = model
            wanted = _sites(model, layer, components, layers, component, sites)
        columns = columns_of(source, wanted)
        return self.train_between(
            source, columns, columns, dataset, config=config, validation_split=validation_split,
            save_path=save_path, resume=resume, verbose=verbose,
        )  # fmt: skip


def _sites(
    model: ActivationSource,
    layer: Any,
    components: Sequence[str],
    layers: Sequence[Any],
    component: str | None,
    sites: Sequence[Any],
) -> list[Any]:
    ways = {
        "layer and components": [(layer, name) for name in components],
        "layers": [(one, component) for one in layers],
        "sites": [(site, None) for site in sites],
    }
    given = {name: found for name, found in ways.items() if found}
    if len(given) != 1:
        raise ValueError(
            "A crosscoder's sites are given in one of three ways: a layer and components, layers "
            f"and a component, or sites; got {list(given) or 'none'}."
        )
    (found,) = given.values()
    if len(found) < 2:
        raise ValueError(f"A crosscoder needs two or more sites, got {found}.")
    return [find_site(model, *one) for one in found]
