"""What the trainers of all kinds share: from a dataset to a coder that knows how it came about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mlxterp.sae.base import MARKER, BaseSAE
from mlxterp.sae.callbacks import Callback, ProgressBar
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.files import check_replaceable
from mlxterp.sae.metadata import Metadata, Statistics
from mlxterp.sae.parallel import Parallel, is_first
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.trainer import Trainer, TrainingResult
from mlxterp.version import __version__


class OnClassOrInstance:
    """A method that works on the class too, there on a default instance."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return self._function.__get__(owner() if instance is None else instance)


class CoderTrainer:
    """Trains coders of one kind.

    `config=None` stands for the recommended recipe, chosen by the width of the sites and the amount
    of data. `parallel` divides the work among the processes that `mlx.launch` started, by tokens,
    `"data"`, or by features, `"features"`: see `Trainer`.
    """

    kind: ClassVar[type[BaseSAE]]
    config_type: ClassVar[type[SAEConfig]]

    def __init__(
        self,
        config: SAEConfig | None = None,
        checkpoint_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        parallel: Parallel | None = None,
    ):
        self.config = self._checked(config)
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = tuple(callbacks)
        self.parallel: Parallel | None = parallel

    def _checked(self, config: Any) -> SAEConfig | None:
        if config is not None and not isinstance(config, SAEConfig):
            name = self.config_type.__name__
            raise ValueError(f"config must be a {name}, such as {name}(k=32), got {config!r}.")
        return config

    def recommended(self, reads: Columns, n_tokens: int, **settings: Any) -> SAEConfig:
        """The recommended recipe for what is read and an amount of data; `settings` take the place
        of its own."""
        width = round(reads.width / max(1, len(reads.names)))
        return self.config_type.recommended(width, n_tokens, **settings)

    def fit_between(
        self,
        reads: Columns,
        writes: Columns,
        dataset: ActivationDataset,
        resume: bool = False,
        model: ActivationSource | None = None,
    ) -> Any:
        """A coder that reads and writes these sites of a dataset, part of which is held out."""
        config = self.config or self.recommended(reads, len(dataset))
        training, held_out = divide(dataset, config)
        coder = self.kind.untrained(reads, writes, config)
        trainer = Trainer(config, self.checkpoint_dir, self.callbacks, self.parallel)
        result = trainer.fit(coder, training, held_out, resume)
        describe(coder, config, result, training, held_out, dataset.source or model)
        return coder

    def train_between(
        self,
        model: ActivationSource,
        reads: Columns,
        writes: Columns,
        dataset: Any,
        *,
        config: SAEConfig | None = None,
        validation_split: float | None = None,
        save_path: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
        **settings: Any,
    ) -> Any:
        """A coder between sites of a model, from texts or a dataset; saved if a path is given.

        `settings` take the place of the config's. Raises `ValueError` for a dataset of another
        model or of other sites, and for a `save_path` where something else is.
        """
        config = self._checked(config) or self.config
        first = is_first(self.parallel)
        if save_path is not None:
            check_replaceable(Path(save_path), MARKER)
        wanted = reads.union(writes)
        dataset = ActivationDataset.of(model, dataset, list(wanted.names), None, verbose and first)
        if dataset.source not in (None, model):
            raise ValueError("dataset was made with another model than the one given.")
        if not dataset.columns.has(wanted):
            raise ValueError(
                f"dataset holds {dataset.columns}, the {self.kind.__name__} needs {wanted}. Name "
                "the sites of arrays: ActivationDataset.from_activations({site: array})."
            )
        if validation_split is not None:
            settings["validation_split"] = validation_split
        if config is None:
            config = self.recommended(reads, len(dataset), **settings)
        elif settings:
            config = config.replace(**settings)
        callbacks = (*self.callbacks, *([ProgressBar()] if verbose else []))
        trainer = type(self)(config, self.checkpoint_dir, callbacks, self.parallel)
        coder = trainer.fit_between(reads, writes, dataset, resume, model)
        if save_path is not None and first:
            coder.save(save_path)
        return coder


def columns_of(model: ActivationSource, sites: Sequence[Any]) -> Columns:
    """The columns of sites of a model; raises `ValueError` for one that is there twice."""
    return Columns(tuple(map(str, sites)), tuple(model.width(site) for site in sites))


def as_dataset(dataset: ActivationDataset | Any) -> ActivationDataset:
    """A dataset, or one of arrays."""
    if isinstance(dataset, ActivationDataset):
        return dataset
    return ActivationDataset.from_activations(dataset)


def divide(
    dataset: ActivationDataset, config: SAEConfig
) -> tuple[ActivationDataset, ActivationDataset | None]:
    """What is trained on and what is held out."""
    if not config.validation_split:
        return dataset, None
    return dataset.split(config.validation_split, config.seed)


def describe(
    coder: BaseSAE,
    config: SAEConfig,
    result: TrainingResult,
    training: ActivationDataset,
    held_out: ActivationDataset | None,
    source: ActivationSource | None,
) -> None:
    """Tell the coder how it came about, and bind it to model and data."""
    corpora = [data.corpus for data in (training, held_out) if data is not None]
    documents = [corpus.n_documents for corpus in corpora if corpus is not None]
    coder.statistics = Statistics(result.training, result.validation, result.firing_rates)
    coder.metadata = Metadata(
        model=_facts(source),
        data={
            "training_tokens": len(training),
            "validation_tokens": 0 if held_out is None else len(held_out),
            "documents": sum(documents) if documents else None,
            "context_length": None if training.corpus is None else training.corpus.context,
            "skipped_tokens": training.n_skipped,
        },
        config=config.to_dict(),
        library_version=__version__,
    )
    coder.bind(source, training, held_out)


def _facts(source: ActivationSource | None) -> dict[str, Any]:
    if source is None:
        return {}
    facts = {name: getattr(source, name, None) for name in ("name", "n_layers", "d_model")}
    return {**facts, **getattr(source, "precision", {}), "fingerprint": source.fingerprint}
