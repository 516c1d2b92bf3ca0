"""The sparse autoencoder: a coder that reads and writes one site, and the trainer that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxterp.sae.base import MARKER, BaseSAE, Metadata, Statistics
from mlxterp.sae.callbacks import Callback, ProgressBar
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.files import check_replaceable
from mlxterp.sae.harvest import ActivationSource, find_site
from mlxterp.sae.trainer import Trainer
from mlxterp.version import __version__


class SAE(BaseSAE):
    """A sparse autoencoder: it writes the site that it reads.

    Reference: Gao et al. 2024, arXiv 2406.04093.
    """

    kind = "sae"

    def __init__(self, reads: Columns, writes: Columns, n_features: int, **options: Any):
        if reads != writes or len(reads.names) != 1:
            raise ValueError(f"An SAE writes the one site that it reads, got {reads} and {writes}.")
        super().__init__(reads, writes, n_features, **options)

    @property
    def site(self) -> str:
        """The name of the site."""
        return self.reads.names[0]


class _OnClassOrInstance:
    """A method that works on the class too, there on a default instance."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return self._function.__get__(owner() if instance is None else instance)


class SAETrainer:
    """Trains SAEs: `fit` on activations, `train` from a model and texts.

    `config=None` stands for the recommended recipe, chosen by the width of the site and the amount
    of data.
    """

    def __init__(
        self,
        config: SAEConfig | None = None,
        checkpoint_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.config = config
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = tuple(callbacks)

    def fit(self, dataset: ActivationDataset | Any, resume: bool = False) -> SAE:
        """An SAE of a dataset of one site, or of an array `[n_tokens, d_in]`.

        A share `config.validation_split` is held out. With `resume` a run that was cut off goes on
        from its last checkpoint in `checkpoint_dir`. Raises `ValueError` for unusable data, and
        `TrainingError` for a run that cannot go on.
        """
        if not isinstance(dataset, ActivationDataset):
            dataset = ActivationDataset.from_activations(dataset)
        columns = dataset.columns
        config = self.config or SAEConfig.recommended(columns.width, len(dataset))
        training, validation = dataset, None
        if config.validation_split:
            training, validation = dataset.split(config.validation_split, config.seed)
        sae = SAE(columns, columns, config.n_features(columns.width), k=config.k)
        trainer = Trainer(config, self.checkpoint_dir, self.callbacks)
        result = trainer.fit(sae, training, validation, resume)
        sae.statistics = Statistics(result.training, result.validation, result.firing_rates)
        sae.metadata = Metadata(
            model=_describe(dataset.source),
            data={
                "training_tokens": len(training),
                "validation_tokens": 0 if validation is None else len(validation),
                "documents": None if dataset.corpus is None else len(dataset.corpus.documents),
                "context_length": None if dataset.corpus is None else dataset.corpus.context,
                "skipped_tokens": training.n_skipped,
            },
            config=config.to_dict(),
            library_version=__version__,
        )
        sae.bind(dataset.source, training, validation)
        return sae

    @_OnClassOrInstance
    def train(
        self,
        model: ActivationSource,
        layer: Any,
        component: str | None = None,
        dataset: ActivationDataset | Iterable[str] = (),
        config: SAEConfig | None = None,
        validation_split: float | None = None,
        save_path: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> SAE:
        """An SAE of one site of a model, from texts or a dataset; saved if a path is given.

        `component` is `mlp` (where none is given), `attn`, `residual` or any other of
        `model.sites()`; `layer` may also be the whole name of a site. The result remembers the
        model and the data. Raises `ValueError` for a site that does not exist, for an empty
        dataset or one of another site, and for a `save_path` where something else is.
        """
        if save_path is not None:
            check_replaceable(Path(save_path), MARKER)
        if not isinstance(dataset, ActivationDataset):
            dataset = ActivationDataset.from_texts(
                model, dataset, layer, component, verbose=verbose
            )
        if dataset.source not in (None, model):
            raise ValueError("dataset was made with another model than the one given.")
        site = str(find_site(model, layer, component))
        _check_columns(dataset.columns, Columns((site,), (model.width(site),)))
        config = config or self.config or SAEConfig.recommended(dataset.columns.width, len(dataset))
        if validation_split is not None:
            config = config.replace(validation_split=validation_split)
        callbacks = (*self.callbacks, *([ProgressBar()] if verbose else []))
        sae = SAETrainer(config, self.checkpoint_dir, callbacks).fit(dataset, resume)
        if dataset.source is None:  # made from an array, which knows no model
            sae.metadata = replace(sae.metadata, model=_describe(model))
            sae.bind(model, sae._training_data, sae._held_out)
        if save_path is not None:
            sae.save(save_path)
        return sae


def _check_columns(found: Columns, wanted: Columns) -> None:
    if found != wanted:
        raise ValueError(
            f"dataset holds {found}, the SAE is to read {wanted}. Name the site of an array with "
            "ActivationDataset.from_activations(array, site=...)."
        )


def _describe(source: ActivationSource | None) -> dict[str, Any]:
    if source is None:
        return {}
    facts = {name: getattr(source, name, None) for name in ("name", "n_layers", "d_model")}
    return {**facts, "fingerprint": source.fingerprint}
