"""The sparse autoencoder: a coder that reads and writes one site, and the trainer that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxterp.sae.base import MARKER, BaseSAE, Metadata, Statistics
from mlxterp.sae.callbacks import Callback, ProgressBar
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.files import check_replaceable
from mlxterp.sae.parallel import Parallel, is_first
from mlxterp.sae.source import ActivationSource, find_site
from mlxterp.sae.trainer import Trainer, TrainingResult, train_together
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
    of data. `parallel` divides the work among the processes that `mlx.launch` started, by tokens,
    `"data"`, or by features, `"features"`: see `Trainer`.
    """

    def __init__(
        self,
        config: SAEConfig | None = None,
        checkpoint_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        parallel: Parallel | None = None,
    ):
        self.config = config
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = tuple(callbacks)
        self.parallel: Parallel | None = parallel

    def fit(
        self,
        dataset: ActivationDataset | Any,
        resume: bool = False,
        *,
        model: ActivationSource | None = None,
    ) -> SAE:
        """An SAE of a dataset of one site, or of an array `[n_tokens, d_in]`.

        A share `config.validation_split` is held out. With `resume` a run that was cut off goes on
        from its last checkpoint in `checkpoint_dir`. `model` is the language model that the result
        remembers, where the dataset knows none. Raises `ValueError` for unusable data, and
        `TrainingError` for a run that cannot go on.
        """
        dataset = _as_dataset(dataset)
        config = self.config or SAEConfig.recommended(dataset.columns.width, len(dataset))
        training, held_out = _divide(dataset, config)
        sae = _untrained(dataset.columns, config)
        trainer = Trainer(config, self.checkpoint_dir, self.callbacks, self.parallel)
        result = trainer.fit(sae, training, held_out, resume)
        _describe(sae, config, result, training, held_out, dataset.source or model)
        return sae

    def fit_many(
        self,
        dataset: ActivationDataset | Any,
        configs: Mapping[str, SAEConfig],
        resume: bool = False,
        *,
        sites: Mapping[str, str] | None = None,
        callbacks: Mapping[str, Sequence[Callback]] | None = None,
        model: ActivationSource | None = None,
    ) -> dict[str, SAE]:
        """Several SAEs from one pass over the activations: `{name: config}` gives `{name: SAE}`.

        Configs may differ in everything but `batch_size`, `num_epochs`, `seed` and
        `validation_split`. For a dataset of several sites `sites` names that of each SAE;
        `callbacks` are those of each. Each writes its checkpoints to a directory of its name in
        `checkpoint_dir`. Raises `ValueError` as `fit` does, and where the configs do not go
        together.
        """
        dataset = _as_dataset(dataset)
        _check_names(configs, sites)
        if self.callbacks and len(configs) > 1:
            raise ValueError(
                "A callback keeps what one run reports: give callbacks={name: [...]} to fit_many, "
                "one list for each SAE, instead of to SAETrainer."
            )
        shares = {name: config.validation_split for name, config in configs.items()}
        if len(set(shares.values())) != 1:
            raise ValueError(f"validation_split must be the same for all configs, got {shares}.")
        training, held_out = _divide(dataset, next(iter(configs.values())))
        saes = {}
        for name, config in configs.items():
            columns = dataset.columns
            if sites is not None:
                known = dataset.source
                site = sites[name] if known is None else str(find_site(known, sites[name]))
                columns = columns.only(site)
            saes[name] = _untrained(columns, config)
        results = train_together(
            {name: (sae, configs[name]) for name, sae in saes.items()},
            training,
            held_out,
            self.checkpoint_dir,
            callbacks or dict.fromkeys(configs, self.callbacks),
            resume,
            self.parallel,
        )
        for name, sae in saes.items():
            source = dataset.source or model
            _describe(sae, configs[name], results[name], training, held_out, source)
        return saes

    @_OnClassOrInstance
    def train_many(
        self,
        model: ActivationSource,
        layers: Sequence[Any],
        component: str | None = None,
        dataset: Iterable[str] = (),
        configs: Mapping[str, SAEConfig] | SAEConfig | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> dict[str, SAE]:
        """SAEs of several sites of a model, each with one config or with several, from one pass of
        the texts through it.

        `layers` are as in `train`. The keys of the result are the sites' names, followed by a space
        and the config's name where there are several. Raises `ValueError` as `fit_many` does.
        """
        sites = [str(find_site(model, layer, component)) for layer in layers]
        data = ActivationDataset.of(model, dataset, sites, verbose=verbose)
        width = max(data.columns.widths, default=0)
        if not isinstance(configs, Mapping):
            configs = {"": configs or self.config or SAEConfig.recommended(width, len(data))}
        wanted = {f"{site} {name}".strip(): site for site in sites for name in configs}
        chosen = [config for _ in sites for config in configs.values()]
        return self.fit_many(data, dict(zip(wanted, chosen, strict=True)), resume, sites=wanted)

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
        first = is_first(self.parallel)
        if save_path is not None:
            check_replaceable(Path(save_path), MARKER)
        dataset = ActivationDataset.of(model, dataset, layer, component, verbose and first)
        if dataset.source not in (None, model):
            raise ValueError("dataset was made with another model than the one given.")
        site = str(find_site(model, layer, component))
        _check_columns(dataset.columns, Columns((site,), (model.width(site),)))
        config = config or self.config or SAEConfig.recommended(dataset.columns.width, len(dataset))
        if validation_split is not None:
            config = config.replace(validation_split=validation_split)
        callbacks = (*self.callbacks, *([ProgressBar()] if verbose else []))
        trainer = SAETrainer(config, self.checkpoint_dir, callbacks, self.parallel)
        sae = trainer.fit(dataset, resume, model=model)
        if save_path is not None and first:
            sae.save(save_path)
        return sae


def _check_columns(found: Columns, wanted: Columns) -> None:
    if found != wanted:
        raise ValueError(
            f"dataset holds {found}, the SAE is to read {wanted}. Name the site of an array with "
            "ActivationDataset.from_activations(array, site=...)."
        )


def _as_dataset(dataset: ActivationDataset | Any) -> ActivationDataset:
    if isinstance(dataset, ActivationDataset):
        return dataset
    return ActivationDataset.from_activations(dataset)


def _check_names(configs: Mapping[str, SAEConfig], sites: Mapping[str, str] | None) -> None:
    if not configs:
        raise ValueError("configs must hold at least one {name: config}.")
    for name in configs:
        if not name or name != Path(name).name:
            raise ValueError(f"A name of an SAE must be one of a directory, got {name!r}.")
    missing = [] if sites is None else [name for name in configs if name not in sites]
    if missing:
        raise ValueError(f"sites must name the site of every SAE; missing: {missing}.")


def _divide(
    dataset: ActivationDataset, config: SAEConfig
) -> tuple[ActivationDataset, ActivationDataset | None]:
    if not config.validation_split:
        return dataset, None
    return dataset.split(config.validation_split, config.seed)


def _untrained(columns: Columns, config: SAEConfig) -> SAE:
    n_features = config.n_features(columns.width)
    name = config.activation_function
    return SAE(columns, columns, n_features, activation_function=name, k=config.k)


def _describe(
    sae: SAE,
    config: SAEConfig,
    result: TrainingResult,
    training: ActivationDataset,
    held_out: ActivationDataset | None,
    source: ActivationSource | None,
) -> None:
    """Tell the SAE how it came about, and bind it to model and data."""
    corpora = [data.corpus for data in (training, held_out) if data is not None]
    documents = [corpus.n_documents for corpus in corpora if corpus is not None]
    sae.statistics = Statistics(result.training, result.validation, result.firing_rates)
    sae.metadata = Metadata(
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
    sae.bind(source, training, held_out)


def _facts(source: ActivationSource | None) -> dict[str, Any]:
    if source is None:
        return {}
    facts = {name: getattr(source, name, None) for name in ("name", "n_layers", "d_model")}
    return {**facts, "fingerprint": source.fingerprint}
